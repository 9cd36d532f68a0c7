// Depthwise convolution over channels-last images, with bias and activation.
#pragma once

#include "common/depthwise.h"
#include "common/parallel.h"
#include "common/types.h"

namespace cvfast {

// T: float, BFloat16 or Half; sums are float. Results do not depend on the number of threads.
template <class T>
void depthwise(const DepthwiseShape& shape, const T* x, const float* packed, T* out,
               const Parallel& parallel);

}  // namespace cvfast
