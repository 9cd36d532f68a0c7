#include "cpu/conv.h"

#include "cpu/winograd.h"

#define CVFAST_KERNEL_SOURCE "cpu/conv_kernel.h"
#include "cpu/foreach_isa.h"

namespace cvfast {
namespace {

// Input rows of a block: they stay in L2 beside the weights of a register tile.
constexpr int64_t kPackedBytes = 256 * 1024;
// Columns of a block at least, where rows are longer than that.
constexpr int64_t kMinColumns = 56;

// Threads pay when each has at least this many nanoseconds of work: waking one costs about 3 us.
constexpr double kNanosecondsPerThread = 4000;
constexpr double kFlopsPerNanosecond = 100;

int useful_threads(const ConvShape& s, int threads) {
    const double outputs =
        double(s.batch) * double(s.out_height * s.out_width) * double(s.out_channels);
    const double flops = 2 * outputs * double(s.kernel_h * s.kernel_w) * double(s.in_channels);
    const double worth = flops / kFlopsPerNanosecond / kNanosecondsPerThread;
    return worth >= threads ? threads : std::max(1, static_cast<int>(worth));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t packed_bytes(const ConvShape& s, int64_t rows, int64_t columns) {
    return packed_rows(s, rows, columns).floats() * int64_t{sizeof(float)};
}

ConvPlan direct_plan(const ConvShape& s, int threads) {
    const int64_t panels = ceil_div(s.out_channels, kConvPanel);
    ConvPlan plan{};
    plan.threads = threads;
    plan.images = 1;
    plan.rows = s.out_height;
    plan.columns = s.out_width;
    while (plan.columns > kMinColumns && packed_bytes(s, 1, plan.columns) > kPackedBytes) {
        plan.columns = ceil_div(plan.columns, 2);
    }
    const int64_t one = packed_bytes(s, 1, plan.columns);
    if (const int64_t all = packed_bytes(s, plan.rows, plan.columns); all > kPackedBytes) {
        const int64_t more = plan.rows == 1 ? 1 : (all - one) / (plan.rows - 1);
        plan.rows = std::max<int64_t>(1, 1 + (kPackedBytes - one) / more);
    } else if (plan.columns == s.out_width) {
        plan.images = std::clamp(kPackedBytes / all, int64_t{1}, s.batch);
    }

    // Threads share out the larger operand, and each reads all of the smaller.
    const int64_t weights = s.kernel_h * s.kernel_w * s.out_channels;
    const int64_t inputs = s.batch * s.height * s.width;
    plan.channel_blocks = weights > inputs && panels >= 2 * threads ? threads : 1;
    const auto row_blocks = [&] { return ceil_div(s.out_height, plan.rows); };
    if (plan.channel_blocks == 1 && threads > 1) {
        const int64_t share = ceil_div(s.batch, threads);
        plan.images = std::min(plan.images, std::max<int64_t>(1, share));
        if (plan.images == 1) {
            const int64_t others = s.batch * ceil_div(s.out_width, plan.columns);
            int64_t blocks = row_blocks();
            while (others * blocks % threads && blocks < s.out_height) ++blocks;
            plan.rows = ceil_div(s.out_height, blocks);
        }
    }
    plan.pixel_blocks =
        ceil_div(s.batch, plan.images) * row_blocks() * ceil_div(s.out_width, plan.columns);
    constexpr int64_t kSums = 14 * 2 * kConvPanel;  // of the widest register tile
    const int64_t offsets = ceil_div(s.kernel_h * s.kernel_w, 8) * 8 * int64_t{sizeof(int64_t)};
    plan.scratch_bytes = kSums * int64_t{sizeof(float)} + offsets +
                         plan.images * packed_bytes(s, plan.rows, plan.columns);
    plan.tasks = plan.pixel_blocks * plan.channel_blocks;
    return plan;
}

template <class T>
void direct_task(const ConvShape& s, const ConvPlan& plan, const ConvOperands<T>& operands,
                 int64_t task, void* scratch) {
    using Kernel = void (*)(const ConvShape&, const ConvOperands<T>&, const ConvBlock&, void*);
    static constexpr Kernel kernels[kIsaCount] = CVFAST_ISA_TABLE(conv_block<T>);

    const int64_t panels = ceil_div(s.out_channels, kConvPanel);
    const int64_t column_blocks = ceil_div(s.out_width, plan.columns);
    const int64_t row_blocks = ceil_div(s.out_height, plan.rows);
    const int64_t channels = task / plan.pixel_blocks, pixels = task % plan.pixel_blocks;
    const int64_t column = pixels % column_blocks * plan.columns;
    const int64_t row = pixels / column_blocks % row_blocks * plan.rows;
    const int64_t image = pixels / column_blocks / row_blocks * plan.images;
    const ConvBlock block{image,
                          std::min(s.batch, image + plan.images),
                          row,
                          std::min(s.out_height, row + plan.rows),
                          column,
                          std::min(s.out_width, column + plan.columns),
                          channels * panels / plan.channel_blocks,
                          (channels + 1) * panels / plan.channel_blocks};
    kernels[static_cast<int>(current_isa())](s, operands, block, scratch);
}

}  // namespace

template <class T>
ConvPlan make_plan(const ConvShape& s, const ConvOperands<T>&, int threads) {
    threads = useful_threads(s, threads);
    return s.algorithm == ConvAlgorithm::direct ? direct_plan(s, threads)
                                                : winograd_plan(s, threads);
}

template <class T>
void run_tasks(const ConvShape& s, const ConvOperands<T>& operands, const ConvPlan& plan,
               int64_t begin, int64_t end, void* scratch) {
    for (int64_t task = begin; task < end; ++task) {
        if (s.algorithm == ConvAlgorithm::direct) {
            direct_task(s, plan, operands, task, scratch);
        } else {
            winograd_task(s, plan, operands, task, scratch);
        }
    }
}

#define CVFAST_INSTANTIATE(T)                                                                   \
    template ConvPlan make_plan(const ConvShape&, const ConvOperands<T>&, int);                 \
    template void run_tasks(const ConvShape&, const ConvOperands<T>&, const ConvPlan&, int64_t, \
                            int64_t, void*);
CVFAST_INSTANTIATE(float)
CVFAST_INSTANTIATE(BFloat16)
CVFAST_INSTANTIATE(Half)

}  // namespace cvfast
