// Depthwise convolution over channels-last images, with bias and activation.
#pragma once

#include "common/depthwise.h"
#include "common/types.h"
#include "cpu/call.h"

namespace cvfast {

// T: float, BFloat16 or Half; sums are float.
template <class T>
struct DepthwiseOperands {
    const T* x;
    const float* packed;
    T* out;
};

// A task is an output row of a block of channels of one image, at one step of the multiplier. All
// of a band of rows come before those of the next.
struct DepthwisePlan : Cut {
    int64_t blocks;
    int64_t band_rows;  // at most
};

template <class T>
DepthwisePlan make_plan(const DepthwiseShape& shape, const DepthwiseOperands<T>& operands,
                        int threads);

template <class T>
void run_tasks(const DepthwiseShape& shape, const DepthwiseOperands<T>& operands,
               const DepthwisePlan& plan, int64_t begin, int64_t end, void* scratch);

}  // namespace cvfast
