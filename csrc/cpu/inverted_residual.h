// The inverted residual of the MobileNets over channels-last images, in one pass: a pointwise
// expansion, a depthwise convolution, a pointwise projection. The hidden tensor between them, up to
// six times as wide as the input, exists a few rows at a time, in scratch memory.
#pragma once

#include "common/inverted_residual.h"
#include "cpu/call.h"
#include "cpu/depthwise.h"
#include "cpu/pointwise.h"

namespace cvfast {

// hidden = expand_activation(expand * x)                        or x, where expand is null
// d      = depthwise_activation(depthwise (*) hidden)           bias of each included
// out    = activation(project * d + residual)                   or d, where project is null
// means  = of d over the pixels of each of its rows
//
// T: float, BFloat16 or Half; sums are float. Weights are packed as those of pointwise and
// depthwise. What does not apply is null; residual needs project, means its absence;
// out may be residual itself where x is not.
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
    bool amx;  // products are AMX's
};

template <class T>
InvertedResidualPlan make_plan(const InvertedResidualShape& shape,
                               const InvertedResidualOperands<T>& operands, int threads);

template <class T>
void run_tasks(const InvertedResidualShape& shape, const InvertedResidualOperands<T>& operands,
               const InvertedResidualPlan& plan, int64_t begin, int64_t end, void* scratch);

}  // namespace cvfast
