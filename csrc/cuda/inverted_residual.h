// The inverted residual block of the MobileNets in one kernel, over channels-last images on NVIDIA
// GPUs: a pointwise expansion, a depthwise convolution and a pointwise projection, of which the
// hidden tensor between them exists in shared memory only, some channels of one tile at a time. T
// is
// __half or __nv_bfloat16; sums are float. The functions only enqueue work on `stream`, so that it
// may be captured in a graph, and return what is wrong with the call: nothing if it was launched.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/inverted_residual.h"

namespace cvfast::cuda {

// How the work is cut. cvfast/launch/inverted_residual/cuda.py chooses it and says more.
struct InvertedResidualLaunch {
    int rows, columns;  // of outputs in a tile
    int images;         // that a tile spans
    int down, across;   // warps of a block along the projection's pixels and channels
    int width;          // 16-channel columns of the projection that a warp sums; 0 without one
    int splits;         // blocks that share the hidden channels of a tile
};

// hidden = expand_activation(x expand + expand_bias)            or x, where expand is null
// d      = depthwise_activation(depthwise (*) hidden)           bias of each channel included
// out    = activation(d project + project_bias + residual)      or d, where project is null
// means  = of d over the pixels of each of its rows
//
// expand is [C][hidden16] and project [hidden][O16], their last dimensions padded with zeros to a
// multiple of 16, like the biases; depthwise is packed (common/depthwise.h). What does not apply is
// null; residual needs project, means its absence. partials holds inverted_residual_partials
// floats.
template <class T>
struct InvertedResidualTensors {
    const T* x;
    const T* expand;
    const float* expand_bias;
    const float* depthwise;
    const T* project;
    const float* project_bias;
    const T* residual;
    T* out;
    T* means;
    float* partials;
};

// Fills `launch` from the integers that Launch.as_ints() gives there.
std::string parse_launch(const std::vector<int64_t>& numbers, InvertedResidualLaunch& launch);

// What is wrong with a launch for this shape, if anything. `expands`, `projects`: whether the block
// has an expansion and a projection.
std::string check_launch(const InvertedResidualShape& shape, bool expands, bool projects,
                         const InvertedResidualLaunch& launch);

// Dynamic shared memory of a block, in bytes, for a launch that check_launch finds nothing wrong
// with.
int64_t inverted_residual_shared_bytes(const InvertedResidualShape& shape, bool expands,
                                       bool projects, const InvertedResidualLaunch& launch);

// Floats that the parts of a split projection take; 0 if it is not split.
int64_t inverted_residual_partials(const InvertedResidualShape& shape, bool projects,
                                   const InvertedResidualLaunch& launch);

// The order of summation depends on the shape and the launch only.
template <class T>
std::string inverted_residual(const InvertedResidualShape& shape,
                              const InvertedResidualTensors<T>& tensors,
                              const InvertedResidualLaunch& launch, cudaStream_t stream);

}  // namespace cvfast::cuda
