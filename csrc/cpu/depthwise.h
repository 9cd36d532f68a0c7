// Depthwise convolution over channels-last images, with bias and activation.
#pragma once

#include <cstdint>

#include "common/activation.h"
#include "common/parallel.h"
#include "common/types.h"

namespace cvfast {

// Channels per weight panel: the widest vector, so that one packing serves every level.
inline constexpr int kDepthwisePanel = 16;

// Strides count elements. Channels of x are adjacent; so are those of out, seen through the depth
// multiplier m: output channel c * m + j reads input channel c. Pixels, rows and images may lie
// apart, so x and out may be channel slices of wider buffers.
//
// Weights are panels [m][ceil(channels / 16)][kernel_h * kernel_w + 1][16] of float, zero beyond
// the last channel; the last row of a panel is the bias.
struct DepthwiseShape {
    int64_t batch, channels, height, width;
    int64_t x_image, x_row, x_pixel;
    int64_t out_height, out_width;
    int64_t out_image, out_row, out_pixel;
    int64_t multiplier;
    int64_t kernel_h, kernel_w;
    int64_t stride_h, stride_w;
    int64_t pad_top, pad_left;  // bottom and right follow from the output's size
    int64_t dilation_h, dilation_w;
    Activation activation;
};

// T: float, BFloat16 or Half; sums are float. Results do not depend on the number of threads.
template <class T>
void depthwise(const DepthwiseShape& shape, const T* x, const float* packed, T* out,
               const Parallel& parallel);

}  // namespace cvfast
