// The part of conv() that runs Winograd's algorithms; see conv.h.
#pragma once

#include "cpu/conv.h"

namespace cvfast {

// Outputs of a tile.
struct WinogradTile {
    int64_t height, width;
    int64_t taps() const { return (height + 2) * (width + 2); }
};

inline WinogradTile winograd_tile(ConvAlgorithm algorithm) {
    const int64_t height = algorithm == ConvAlgorithm::winograd_f4 ? 4 : 2;
    const int64_t width = algorithm == ConvAlgorithm::winograd_f2 ? 2 : 4;
    return {height, width};
}

ConvPlan winograd_plan(const ConvShape& shape, int threads);

// Task `task` of plan.pixel_blocks * plan.channel_blocks.
template <class T>
void winograd_task(const ConvShape& shape, const ConvPlan& plan, const ConvOperands<T>& operands,
                   int64_t task, void* scratch);

}  // namespace cvfast
