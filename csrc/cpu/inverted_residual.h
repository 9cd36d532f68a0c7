// The inverted residual of the MobileNets over channels-last images, in one pass: a pointwise
// expansion, a depthwise convolution, a pointwise projection. The hidden tensor between them, up to
// six times as wide as the input, exists a few rows at a time, in scratch memory.
#pragma once

#include "cpu/call.h"
#include "cpu/depthwise.h"
#include "cpu/pointwise.h"

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

// hidden = expand_activation(expand * x)                        or x, where expand is null
// d      = depthwise_activation(depthwise (*) hidden)           bias of each included
// out    = activation(project * d + residual)                   or d, where project is null
// means  = of d over the pixels of each of its rows
//
// T: float, BFloat16 or Half; sums are float. Weights are packed as those of pointwise and
// depthwise. What does not apply is null; residual needs project, means its absence.
template <class T>
struct InvertedResidualOperands {
    const T* x;
    const float* expand;
    const float* depthwise;
    const float* project;
    const T* residual;
    T* out;
    T* means;
};

// A task is a band of output rows of one image. It walks down the band in strips of a few rows, and
// within a strip over chunks of hidden channels: expands the rows that the chunk lacks, applies the
// depthwise convolution, and adds its part to the strip's projection. Neighbouring bands both
// expand the rows that both need.
//
// The sums of a projection depend on the chunks, which depend on the shape alone; never on bands.
struct InvertedResidualPlan : Cut {
    int64_t bands;   // of an image
    int64_t strip;   // output rows
    int64_t chunk;   // hidden channels, a multiple of 16
    bool one_strip;  // per band: no expanded row outlives its chunk

    // Of the expanded rows of one chunk, which follow each other in a ring. Zeros stand left and
    // right of them where the depthwise convolution pads.
    int64_t ring_rows, ring_width, ring_pixel;
    int64_t d_pixel;
    // Bytes from the begin of the scratch memory: expanded rows, the depthwise convolution's output
    // and the projection's sums, of a strip each, and pixels packed for either product.
    int64_t d_offset, sums_offset, pack_offset;
    bool pack_x, pack_d;
};

template <class T>
InvertedResidualPlan make_plan(const InvertedResidualShape& shape,
                               const InvertedResidualOperands<T>& operands, int threads);

template <class T>
void run_tasks(const InvertedResidualShape& shape, const InvertedResidualOperands<T>& operands,
               const InvertedResidualPlan& plan, int64_t begin, int64_t end, void* scratch);

}  // namespace cvfast
