#include "cpu/winograd.h"

#include <limits>

#define CVFAST_KERNEL_SOURCE "cpu/winograd_kernel.h"
#define CVFAST_KERNEL_BF16_DOT
#include "cpu/foreach_isa.h"

namespace cvfast {
namespace {

// Tiles of the widest register tile.
constexpr int64_t kStep = 14;

// Tiles of a block at most: scratch memory grows with them. Measured on Zen 5 (1 MB of L2), 32 to
// 512 channels: 28 are as fast as 112, within 2 %; at 512, 14 take up to 1.4 times as long, for all
// weights pass over each block. Beyond, where weights come from memory, blocks are large.
int64_t most_tiles(int64_t channels) { return channels <= 512 ? 2 * kStep : 8 * kStep; }

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t tile_count(const ConvShape& s) {
    const WinogradTile tile = winograd_tile(s.algorithm);
    return s.batch * ceil_div(s.out_height, tile.height) * ceil_div(s.out_width, tile.width);
}

int64_t scratch_bytes(const ConvShape& s, int64_t tiles) {
    const int64_t words = ceil_div(s.in_channels, winograd_word(s.algorithm));
    return winograd_scratch(words, winograd_tile(s.algorithm).taps(), tiles).bytes();
}

}  // namespace

ConvPlan winograd_plan(const ConvShape& s, int threads, int64_t most_scratch) {
    const int64_t tiles = tile_count(s);
    const int64_t panels = (s.out_channels + kConvPanel - 1) / kConvPanel;

    ConvPlan plan{};
    plan.threads = threads;
    plan.channel_blocks = 1;
    plan.tiles = most_tiles(s.in_channels);
    while (plan.tiles > kStep && scratch_bytes(s, plan.tiles) > most_scratch) plan.tiles -= kStep;
    int64_t least_blocks = 1;
    // Threads share out the larger operand, and each reads all of the smaller.
    if (s.out_channels > tiles && panels >= 2 * threads) {
        plan.channel_blocks = threads;
    } else {
        least_blocks = threads;
        // Of the sizes with which the busiest thread has fewest tiles, the largest.
        int64_t least = std::numeric_limits<int64_t>::max();
        for (int64_t size = plan.tiles; size >= kStep; size -= kStep) {
            const int64_t blocks = ceil_div(tiles, size);
            const int64_t busiest = ceil_div(blocks, threads) * size;
            if (busiest < least) {
                least = busiest;
                plan.tiles = size;
            }
        }
    }
    // As even as whole register tiles allow; few tiles, as even as can be.
    const int64_t even = ceil_div(tiles, std::max(least_blocks, ceil_div(tiles, plan.tiles)));
    plan.tiles = even < kStep ? even : std::min(tiles, ceil_div(even, kStep) * kStep);
    plan.pixel_blocks = ceil_div(tiles, plan.tiles);
    plan.scratch_bytes = scratch_bytes(s, plan.tiles);
    plan.tasks = plan.pixel_blocks * plan.channel_blocks;
    return plan;
}

template <class T>
void winograd_task(const ConvShape& s, const ConvPlan& plan, const ConvOperands<T>& operands,
                   int64_t task, void* scratch) {
    using Kernel = void (*)(const ConvShape&, const ConvOperands<T>&, const WinogradBlock&, void*);
    // In the order of ConvAlgorithm, behind direct.
    static constexpr Kernel kernels[][kIsaCount] = {CVFAST_ISA_TABLE(winograd_f2_block<T>),
                                                    CVFAST_ISA_TABLE(winograd_f2x4_block<T>),
                                                    CVFAST_ISA_TABLE(winograd_f4_block<T>)};
    const int isa = static_cast<int>(current_isa());
    Kernel kernel = nullptr;
    if (s.algorithm != ConvAlgorithm::winograd_f2_bf16) {
        kernel = kernels[static_cast<int>(s.algorithm) - 1][isa];
    } else if constexpr (std::is_same_v<T, BFloat16>) {
        static constexpr Kernel pairs[kIsaCount] = CVFAST_ISA_TABLE(winograd_f2_bf16_block);
        kernel = pairs[isa];
    }

    const int64_t panels = (s.out_channels + kConvPanel - 1) / kConvPanel;
    const int64_t tiles = tile_count(s);
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
