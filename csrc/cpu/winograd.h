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
    using enum ConvAlgorithm;
    const bool narrow = algorithm == winograd_f2 || algorithm == winograd_f2_bf16;
    return {algorithm == winograd_f4 ? 4 : 2, narrow ? 2 : 4};
}

// Input channels that the products take at once, as one word; see kConvWord.
inline int64_t winograd_word(ConvAlgorithm algorithm) {
    return algorithm == ConvAlgorithm::winograd_f2_bf16 ? 2 : 1;
}

// Taps of the kernel itself, which lie behind the transformed ones where these are rounded to pairs
// of W: they do not give it back.
template <class W>
inline constexpr int64_t kWinogradKept = kConvWord<W> == 2 ? 9 : 0;

ConvPlan winograd_plan(const ConvShape& shape, int threads, int64_t most_scratch);

// Task `task` of plan.pixel_blocks * plan.channel_blocks.
template <class T>
void winograd_task(const ConvShape& shape, const ConvPlan& plan, const ConvOperands<T>& operands,
                   int64_t task, void* scratch);

}  // namespace cvfast
