// Pooling over channels-last images: the largest or the mean of each window, the mean of an image.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cpu/call.h"

namespace cvfast {

enum class PoolKind : int { max, average };

// Strides count elements; channels are adjacent.
struct PoolShape {
    PoolKind kind;
    int64_t batch, channels, height, width;
    int64_t x_image, x_row, x_pixel;
    int64_t out_height, out_width;
    int64_t out_image, out_row, out_pixel;
    int64_t kernel_h, kernel_w;
    int64_t stride_h, stride_w;
    int64_t pad_h, pad_w;
    int64_t dilation_h, dilation_w;  // 1 for the mean
    bool count_padding;              // in the divisor of the mean
    int64_t divisor;                 // of the mean; 0 for the window's size
};

// Pools x, or relu(scale[c] * x + shift[c]) where scale and shift are not null (both, or neither;
// for the mean alone). T: float, BFloat16 or Half; sums are float.
template <class T>
struct PoolOperands {
    const T* x;
    const float* scale;
    const float* shift;
    T* out;
};

// A task is an output row of a block of channels of one image.
struct PoolPlan : Cut {
    int64_t blocks;
    int64_t strip;  // outputs whose columns are held at once
};

template <class T>
PoolPlan make_plan(const PoolShape& shape, const PoolOperands<T>& operands, int threads);

template <class T>
void run_tasks(const PoolShape& shape, const PoolOperands<T>& operands, const PoolPlan& plan,
               int64_t begin, int64_t end, void* scratch);

struct GlobalPoolShape {
    int64_t batch, channels, height, width;
    int64_t x_image, x_row, x_pixel;
    int64_t out_image;
};

// out[n, c] = mean of relu(scale[c] * x[n, c] + shift[c]) over the image, or of x[n, c] where scale
// and shift are null.
template <class T>
struct GlobalPoolOperands {
    const T* x;
    const float* scale;
    const float* shift;
    T* out;
};

// A task is a cache line of channels of one image.
struct GlobalPoolPlan : Cut {
    int64_t panels;  // of an image
};

template <class T>
GlobalPoolPlan make_plan(const GlobalPoolShape& shape, const GlobalPoolOperands<T>& operands,
                         int threads);

template <class T>
void run_tasks(const GlobalPoolShape& shape, const GlobalPoolOperands<T>& operands,
               const GlobalPoolPlan& plan, int64_t begin, int64_t end, void* scratch);

}  // namespace cvfast
