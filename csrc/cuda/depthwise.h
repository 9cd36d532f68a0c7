// Depthwise convolution over channels-last images on NVIDIA GPUs, and its gradients. T is float,
// __half or __nv_bfloat16; sums are float. The functions only enqueue work on `stream`, so that it
// may be captured in a graph, and return what is wrong with the call: nothing if it was launched.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/depthwise.h"

namespace cvfast::cuda {

enum class DepthwisePass { forward, backward_input, backward_weight };

// How the work is cut. cvfast/launch/depthwise/cuda.py chooses it and says more.
struct DepthwiseLaunch {
    bool tiled;                       // else the general kernels, which use `workers` only
    int thread_rows, thread_columns;  // outputs of one thread
    int down, across;                 // threads of a block along rows and columns
    int words;                        // of 4 bytes: the channels of a block
    int stages;                       // rectangles in shared memory: with 2, one is being copied
    int workers;                      // blocks that share the rectangles of a block of channels
};

// Fills `launch` from the integers that Launch.as_ints() gives there.
std::string parse_launch(const std::vector<int64_t>& numbers, DepthwiseLaunch& launch);

// Dynamic shared memory of a block of the tile kernels, in bytes.
int64_t depthwise_shared_bytes(DepthwisePass pass, int64_t kernel, int64_t stride,
                               int64_t element_size, const DepthwiseLaunch& launch);

// The output of the forward pass, which tells where its activation was flat; null without one.
template <class T>
struct DepthwiseMask {
    const T* output;
    int64_t image, row, pixel;
};

template <class T>
std::string depthwise(const DepthwiseShape& shape, const T* x, const float* packed, T* out,
                      const DepthwiseLaunch& launch, cudaStream_t stream);

// In the shape, the strides x_* are those of grad_x, out_* those of grad.
template <class T>
std::string depthwise_backward_input(const DepthwiseShape& shape, const T* grad,
                                     const DepthwiseMask<T>& mask, const float* packed, T* grad_x,
                                     const DepthwiseLaunch& launch, cudaStream_t stream);

// How many partial sums the gradient of the weights is added up from.
int64_t depthwise_backward_weight_parts(const DepthwiseShape& shape, const DepthwiseLaunch& launch);

// packed_grad has the layout of packed weights: the gradient of the bias in the last row of a
// panel, zeros beyond the last channel. `parts` holds as many times its size as there are parts.
// The order of summation depends on the shape and the launch only.
template <class T>
std::string depthwise_backward_weight(const DepthwiseShape& shape, const T* grad,
                                      const DepthwiseMask<T>& mask, const T* x, float* parts,
                                      float* packed_grad, const DepthwiseLaunch& launch,
                                      cudaStream_t stream);

}  // namespace cvfast::cuda
