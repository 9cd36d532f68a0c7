// The part of conv() that runs Winograd's algorithm along kernels of one row or column; see conv.h.
#pragma once

#include "cpu/conv.h"

namespace cvfast {

// Entries of a transformed group of taps.
inline constexpr int64_t kWinograd1dPoints = 6;

inline bool winograd_1d_serves(const ConvShape& s) {
    const int64_t taps = s.kernel_h * s.kernel_w;
    return (s.kernel_h == 1 || s.kernel_w == 1) && (taps == 3 || taps == 5 || taps == 7) &&
           s.stride_h == 1 && s.stride_w == 1 && s.dilation_h == 1 && s.dilation_w == 1;
}

// Outputs of a tile; a group has seven taps less that number.
inline int64_t winograd_1d_outputs(int64_t taps) { return taps == 3 ? 4 : taps == 5 ? 2 : 3; }

// Groups of taps, as many taps apart as a tile has outputs.
inline int64_t winograd_1d_groups(int64_t taps) { return taps == 7 ? 2 : 1; }

// Of the transformed kernel.
inline int64_t winograd_1d_entries(int64_t taps) {
    return kWinograd1dPoints * winograd_1d_groups(taps);
}

// For kernels of one column.
ConvPlan winograd_1d_plan(const ConvShape& shape, int threads, int64_t most_scratch);

// Task `task` of plan.pixel_blocks.
template <class T>
void winograd_1d_task(const ConvShape& shape, const ConvPlan& plan, const ConvOperands<T>& operands,
                      int64_t task, void* scratch);

}  // namespace cvfast
