#include "cpu/winograd_1d.h"

#include <algorithm>

#include "cpu/winograd.h"

#define CVFAST_KERNEL_SOURCE "cpu/winograd_1d_kernel.h"
#include "cpu/foreach_isa.h"

namespace cvfast {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Tiles of a block at most, in all its columns: their transformed inputs stay in L2.
constexpr int64_t kMostTiles = 112, kLeastTiles = 28;

int64_t tiles_of(const ConvShape& s) {
    return ceil_div(s.out_height, winograd_1d_outputs(s.kernel_h));
}

// Of a block of at most `most` tiles, of lines that have `tiles`.
int64_t scratch_bytes(const ConvShape& s, int64_t tiles, int64_t most) {
    const int64_t of_line = std::min(tiles, most);
    return winograd_1d_scratch(s, most / of_line, of_line).bytes();
}

}  // namespace

ConvPlan winograd_1d_plan(const ConvShape& s, int threads, int64_t most_scratch) {
    const int64_t lines = s.batch * s.out_width, tiles = tiles_of(s);
    const int64_t panels = ceil_div(s.out_channels, kConvPanel);
    ConvPlan plan{};
    plan.threads = threads;
    plan.channel_blocks = 1;
    int64_t most = kMostTiles;
    while (most > kLeastTiles && scratch_bytes(s, tiles, most) > most_scratch) most /= 2;
    plan.tiles = std::min(tiles, most);
    int64_t line_blocks = ceil_div(lines, most / plan.tiles);
    // Threads share out the outputs, or the weights where these are far more: at 8x8 that is 1.3
    // times as fast, at 17x17 as fast as the other.
    if (s.out_channels > 2 * tiles * lines && panels >= 2 * threads) {
        plan.channel_blocks = threads;
    } else {
        line_blocks = std::min(lines, ceil_div(line_blocks, threads) * threads);
    }
    plan.lines = ceil_div(lines, line_blocks);
    plan.pixel_blocks = ceil_div(lines, plan.lines) * ceil_div(tiles, plan.tiles);
    plan.scratch_bytes = winograd_1d_scratch(s, plan.lines, plan.tiles).bytes();
    plan.tasks = plan.pixel_blocks * plan.channel_blocks;
    return plan;
}

template <class T>
void winograd_1d_task(const ConvShape& s, const ConvPlan& plan, const ConvOperands<T>& operands,
                      int64_t task, void* scratch) {
    using Kernel =
        void (*)(const ConvShape&, const ConvOperands<T>&, const Winograd1dBlock&, void*);
    static constexpr Kernel kernels[kIsaCount] = CVFAST_ISA_TABLE(winograd_1d_block<T>);

    const int64_t panels = ceil_div(s.out_channels, kConvPanel);
    const int64_t lines = s.batch * s.out_width;
    const int64_t pixels = task % plan.pixel_blocks, channels = task / plan.pixel_blocks;
    const int64_t line_blocks = ceil_div(lines, plan.lines);
    const int64_t line = pixels % line_blocks, tile = pixels / line_blocks * plan.tiles;
    const Winograd1dBlock block{line * lines / line_blocks,
                                (line + 1) * lines / line_blocks,
                                tile,
                                std::min(tiles_of(s), tile + plan.tiles),
                                channels * panels / plan.channel_blocks,
                                (channels + 1) * panels / plan.channel_blocks};
    kernels[static_cast<int>(current_isa())](s, operands, block, scratch);
}

template void winograd_1d_task(const ConvShape&, const ConvPlan&, const ConvOperands<float>&,
                               int64_t, void*);
template void winograd_1d_task(const ConvShape&, const ConvPlan&, const ConvOperands<BFloat16>&,
                               int64_t, void*);
template void winograd_1d_task(const ConvShape&, const ConvPlan&, const ConvOperands<Half>&,
                               int64_t, void*);

}  // namespace cvfast
