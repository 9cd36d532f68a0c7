// The geometry of a depthwise convolution and the layout of its weights, the same on every backend.
#pragma once

#include <cstdint>

#include "common/activation.h"

#ifdef __CUDACC__
#define CVFAST_HOST_DEVICE __host__ __device__
#else
#define CVFAST_HOST_DEVICE
#endif

namespace cvfast {

// Channels per weight panel: the widest CPU vector, so that one packing serves every backend.
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

    CVFAST_HOST_DEVICE int64_t panels() const {
        return (channels + kDepthwisePanel - 1) / kDepthwisePanel;
    }
    CVFAST_HOST_DEVICE int64_t taps() const { return kernel_h * kernel_w; }
    // Floats of the packed weights, bias included.
    CVFAST_HOST_DEVICE int64_t packed_size() const {
        return multiplier * panels() * (taps() + 1) * kDepthwisePanel;
    }
};

}  // namespace cvfast
