// The geometry of an inverted residual block, the same on every backend.
#pragma once

#include <cstdint>

#include "common/activation.h"

namespace cvfast {

// Strides count elements. Channels of x, residual, out and means are adjacent; pixels, rows and
// images may lie apart, so that each may be a channel slice of a wider buffer.
struct InvertedResidualShape {
    int64_t batch, height, width;  // of x
    int64_t in_channels;           // of x
    int64_t hidden;                // of the depthwise convolution
    int64_t out_channels;
    int64_t kernel_h, kernel_w;
    int64_t stride_h, stride_w;
    int64_t pad_top, pad_left;  // bottom and right follow from the output's size
    int64_t out_height, out_width;
    int64_t x_image, x_row, x_pixel;
    int64_t residual_image, residual_row, residual_pixel;
    int64_t out_image, out_row, out_pixel;
    int64_t means_image, means_row;
    Activation expand_activation, depthwise_activation, activation;
};

}  // namespace cvfast
