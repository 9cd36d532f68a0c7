#include "cpu/winograd.h"

#define CVFAST_KERNEL_SOURCE "cpu/winograd_kernel.h"
#include "cpu/foreach_isa.h"

namespace cvfast {
namespace {

// Tiles of a block. Measured on Zen 5 (1 MB of L2): up to 256 channels any number from 14 to 224
// runs within 5 %; at 512 and more, 112 run 1.3 times as fast as 14, though their inputs then lie
// in L3, for the weights cross from L3 once per block.
constexpr int64_t kTiles = 112;

int64_t outputs_across(ConvAlgorithm algorithm) {
    return algorithm == ConvAlgorithm::winograd_f4 ? 4 : 2;
}

int64_t taps_of(ConvAlgorithm algorithm) {
    const int64_t side = outputs_across(algorithm) + 2;
    return side * side;
}

int64_t tile_count(const ConvShape& s, ConvAlgorithm algorithm) {
    const int64_t out = outputs_across(algorithm);
    return s.batch * ((s.out_height + out - 1) / out) * ((s.out_width + out - 1) / out);
}

}  // namespace

ConvPlan winograd_plan(const ConvShape& s, int threads) {
    constexpr int64_t kStep = 14;  // tiles of the widest register tile
    const int64_t taps = taps_of(s.algorithm);
    const int64_t tiles = tile_count(s, s.algorithm);
    const int64_t panels = (s.out_channels + kConvPanel - 1) / kConvPanel;

    ConvPlan plan{};
    plan.threads = threads;
    plan.channel_blocks = 1;
    plan.pixel_blocks = (tiles + kTiles - 1) / kTiles;
    // Threads share out the larger operand, and each reads all of the smaller.
    if (s.out_channels > tiles && panels >= 2 * threads) {
        plan.channel_blocks = threads;
    } else {
        plan.pixel_blocks = (plan.pixel_blocks + threads - 1) / threads * threads;
    }
    const int64_t even = (tiles + plan.pixel_blocks - 1) / plan.pixel_blocks;
    plan.tiles = even < kStep ? even : (even + kStep - 1) / kStep * kStep;
    plan.pixel_blocks = (tiles + plan.tiles - 1) / plan.tiles;
    plan.scratch_bytes = winograd_scratch(s.in_channels, taps, plan.tiles).bytes();
    plan.tasks = plan.pixel_blocks * plan.channel_blocks;
    return plan;
}

template <class T>
void winograd_task(const ConvShape& s, const ConvPlan& plan, const ConvOperands<T>& operands,
                   int64_t task, void* scratch) {
    using Kernel = void (*)(const ConvShape&, const ConvOperands<T>&, const WinogradBlock&, void*);
    static constexpr Kernel f2[kIsaCount] = CVFAST_ISA_TABLE(winograd_f2_block<T>);
    static constexpr Kernel f4[kIsaCount] = CVFAST_ISA_TABLE(winograd_f4_block<T>);
    const Kernel kernel =
        (s.algorithm == ConvAlgorithm::winograd_f4 ? f4 : f2)[static_cast<int>(current_isa())];

    const int64_t panels = (s.out_channels + kConvPanel - 1) / kConvPanel;
    const int64_t tiles = tile_count(s, s.algorithm);
    const int64_t pixels = task % plan.pixel_blocks, channels = task / plan.pixel_blocks;
    const WinogradBlock block{pixels * plan.tiles, std::min(tiles, (pixels + 1) * plan.tiles),
                              channels * panels / plan.channel_blocks,
                              (channels + 1) * panels / plan.channel_blocks};
    kernel(s, operands, block, scratch);
}

template void winograd_task(const ConvShape&, const ConvPlan&, const ConvOperands<float>&, int64_t,
                            void*);
template void winograd_task(const ConvShape&, const ConvPlan&, const ConvOperands<BFloat16>&,
                            int64_t, void*);
template void winograd_task(const ConvShape&, const ConvPlan&, const ConvOperands<Half>&, int64_t,
                            void*);

}  // namespace cvfast
