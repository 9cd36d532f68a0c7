// What networks do to images element by element: scale, shift, addition, gates, activations.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/types.h"
#include "cpu/call.h"

namespace cvfast {

enum class ElementwiseOp : int { none, add, mul };

// Those of common/activation.h, in their order, and two that take an exponential.
enum class ElementwiseActivation : int { none, relu, relu6, hardswish, hardsigmoid, sigmoid, silu };

// Strides count elements and channels are adjacent. A step of 0 in y repeats it: a gate per image
// and channel has no row and no pixel step.
struct ElementwiseShape {
    int64_t batch, channels, height, width;
    int64_t x_image, x_row, x_pixel;
    int64_t y_image, y_row, y_pixel;
    int64_t out_image, out_row, out_pixel;
    ElementwiseOp op;
    ElementwiseActivation activation;
};

// out = activation((scale * x + shift) op y); T: float, BFloat16 or Half, computed in float. scale
// and shift, of one number a channel, come together or are both null; y is null for `none`. out may
// be x or y itself.
template <class T>
struct ElementwiseOperands {
    const T* x;
    const T* y;
    const float* scale;
    const float* shift;
    T* out;
};

// Pixels that lie evenly apart in every operand form a run: the whole batch, an image or a row.
// Where they are dense, a run is one pixel with all their channels.
struct ElementwisePlan : Cut {
    int64_t lines, runs;           // runs per image; in all
    int64_t run_pixels, channels;  // of a run; of each of its pixels
    int64_t blocks;                // of a run
};

template <class T>
ElementwisePlan make_plan(const ElementwiseShape& shape, const ElementwiseOperands<T>& operands,
                          int threads);

template <class T>
void run_tasks(const ElementwiseShape& shape, const ElementwiseOperands<T>& operands,
               const ElementwisePlan& plan, int64_t begin, int64_t end, void* scratch);

}  // namespace cvfast
