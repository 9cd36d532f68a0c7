#include "cpu/conv.h"

#include <limits>
#include <utility>

#include "cpu/machine.h"
#include "cpu/winograd.h"
#include "cpu/winograd_1d.h"

#define CVFAST_KERNEL_SOURCE "cpu/conv_kernel.h"
#define CVFAST_KERNEL_BF16_DOT
#define CVFAST_KERNEL_AMX
#include "cpu/foreach_isa.h"

namespace cvfast {
namespace {

// Input rows of a block: they stay in L2 beside the weights of a register tile. Weights that are
// more than this many bytes come from further away for every block, which had better be large then.
// AMX multiplies faster than L3 hands on weights: 1024 to 512 channels at 32x32 take 0.85 of the
// time with blocks of this size.
const int64_t kPackedBytes = l2_bytes() / 4, kAmxPackedBytes = l2_bytes() * 2 / 5;
const int64_t kManyWeights = l2_bytes() * 8;
// Where a block must do with less scratch memory.
const int64_t kLeastPackedBytes = l2_bytes() / 16;
// Columns of a block at least, where rows are longer than that.
constexpr int64_t kMinColumns = 56;

// Threads pay when each has at least this many nanoseconds of work: waking one costs about 3 us.
constexpr double kNanosecondsPerThread = 4000;
constexpr double kMultiplyAddsPerNanosecond = 100;
// By AMX; of bfloat16 in pairs.
constexpr double kAmxPerNanosecond = 500, kAmxFloatPerNanosecond = 200;
// Results that it leaves, at least as many as that with few input channels.
constexpr double kAmxResultsPerNanosecond = 6;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether AMX multiplies where the algorithm is direct. Floats are split in pieces first; those of
// two panels of weights must leave room in L2, and enough pixels must share them: 128 to 256
// channels take 0.76 of the time at 14x14, but 256 to 512 at 7x7 1.3 times as long on one thread
// and 1.4 on two. Results depend on it, and an image may come in bands: the number of rows must not
// matter.
template <class T>
bool takes_amx(const ConvShape& s) {
    if (s.algorithm != ConvAlgorithm::direct || !has_amx() || std::is_same_v<T, Half>) return false;
    if (std::is_same_v<T, BFloat16>) return true;
    constexpr int64_t kMostProducts = 2304, kLeastColumns = 10;
    return !has_few_channels(s) && s.out_width >= kLeastColumns &&
           s.kernel_h * s.kernel_w * s.in_channels <= kMostProducts;
}

template <class T>
double multiply_adds_per_nanosecond(bool amx) {
    if (!amx) return kMultiplyAddsPerNanosecond;
    return std::is_same_v<T, BFloat16> ? kAmxPerNanosecond : kAmxFloatPerNanosecond;
}

template <class T>
int useful_threads(const ConvShape& s, int threads) {
    const double outputs =
        double(s.batch) * double(s.out_height * s.out_width) * double(s.out_channels);
    const double products =
        outputs * double(s.kernel_h * s.kernel_w * conv_words<T>(s.in_channels));
    const double rate = multiply_adds_per_nanosecond<T>(takes_amx<T>(s));
    const double results = takes_amx<T>(s) ? outputs / kAmxResultsPerNanosecond : 0;
    const double worth = (products / rate + results) / kNanosecondsPerThread;
    return worth >= threads ? threads : std::max(1, static_cast<int>(worth));
}

// The input rows of a block in scratch memory; with AMX of all pieces.
template <class T>
int64_t packed_bytes(const ConvShape& s, int64_t images, int64_t rows, int64_t columns, bool amx) {
    if constexpr (!std::is_same_v<T, Half>) {
        if (amx) return amx_rows<T>(s, images, rows, columns).bytes();
    }
    return images * packed_rows<T>(s, rows, columns).words() * int64_t{sizeof(float)};
}

// What else lies there, whatever the block.
template <class T>
int64_t rest_bytes(const ConvShape& s, bool amx) {
    if constexpr (!std::is_same_v<T, Half>) {
        if (amx) {
            const AmxRows p = amx_rows<T>(s, 1, 1, 1);
            if (std::is_same_v<T, BFloat16>) return p.run_bytes();
            return p.run_bytes() + amx_weights_bytes<T>(p.run_count, p.run_values, s.out_channels);
        }
    }
    return run_list_bytes<T>(s);
}

// A kernel of one row as one of one column, and the images with it: taps beyond the image are left
// out by the row of outputs.
ConvShape upright(ConvShape s) {
    if (s.kernel_h > 1 || s.kernel_w == 1) return s;
    if (s.algorithm == ConvAlgorithm::direct && has_few_channels(s)) return s;
    std::swap(s.height, s.width);
    std::swap(s.out_height, s.out_width);
    std::swap(s.kernel_h, s.kernel_w);
    std::swap(s.stride_h, s.stride_w);
    std::swap(s.pad_top, s.pad_left);
    std::swap(s.dilation_h, s.dilation_w);
    for (ImageStrides* strides : {&s.x, &s.x2, &s.residual, &s.out}) {
        std::swap(strides->row, strides->pixel);
    }
    return s;
}

template <class T>
ConvPlan direct_plan(const ConvShape& s, int threads, bool amx, int64_t most_scratch) {
    ConvPlan plan{};
    plan.threads = threads;
    plan.amx = amx;
    const double rate = multiply_adds_per_nanosecond<T>(amx);
    const double taps = double(s.kernel_h * s.kernel_w * conv_words<T>(s.in_channels));
    const double weights = taps * double(s.out_channels) * sizeof(float);
    const int64_t usual = amx ? kAmxPackedBytes : kPackedBytes;
    const int64_t rest = rest_bytes<T>(s, amx);
    const int64_t most_packed = std::min(weights > double(kManyWeights) ? 2 * kPackedBytes : usual,
                                         std::max(kLeastPackedBytes, most_scratch - rest));
    plan.images = 1;
    plan.columns = s.out_width;
    while (plan.columns > kMinColumns &&
           packed_bytes<T>(s, 1, 1, plan.columns, amx) > most_packed) {
        plan.columns = ceil_div(plan.columns, 2);
    }
    const int64_t column_blocks = ceil_div(s.out_width, plan.columns);
    const int64_t one = packed_bytes<T>(s, 1, 1, plan.columns, amx);
    const int64_t all = packed_bytes<T>(s, 1, s.out_height, plan.columns, amx);
    int64_t least_blocks = 1, most_images = 1;
    if (all > most_packed) {
        const int64_t more = s.out_height == 1 ? 1 : (all - one) / (s.out_height - 1);
        const int64_t rows = std::max<int64_t>(1, 1 + (most_packed - one) / more);
        least_blocks = ceil_div(s.out_height, rows);
    } else if (column_blocks == 1) {
        most_images = std::clamp(most_packed / all, int64_t{1}, s.batch);
    }

    // Of the ways to share out pixels and channels, the one whose slowest thread has least to do.
    const int64_t panels = ceil_div(s.out_channels, kConvPanel);
    double least = std::numeric_limits<double>::infinity();
    for (int64_t channel_blocks = 1; channel_blocks <= std::min<int64_t>(threads, panels);
         ++channel_blocks) {
        const int64_t parts = std::max<int64_t>(1, threads / channel_blocks);
        const double channels = double(ceil_div(panels, channel_blocks) * kConvPanel);
        for (int64_t images = std::min(most_images, ceil_div(s.batch, parts)); images > 0;
             --images) {
            const int64_t others = ceil_div(s.batch, images) * column_blocks;
            int64_t row_blocks = least_blocks;
            while (others * row_blocks % parts && row_blocks < s.out_height) ++row_blocks;
            const int64_t rows = ceil_div(s.out_height, row_blocks);
            const double blocks = double(ceil_div(others * row_blocks, parts));
            const double pixels = double(images * rows * plan.columns);
            const double packed = double(packed_bytes<T>(s, images, rows, plan.columns, amx));
            // Threads that share out the channels read each other's pixels, now and in the next
            // layer.
            const double time =
                blocks *
                (pixels * channels * taps / rate + channels * taps * sizeof(float) / kWeightBytes +
                 reading_time(packed, channel_blocks) +
                 reading_time(pixels * channels * sizeof(T), channel_blocks));
            if (time < least) {
                least = time;
                plan.images = images;
                plan.row_blocks = row_blocks;
                plan.channel_blocks = channel_blocks;
            }
        }
    }
    const int64_t rows = ceil_div(s.out_height, plan.row_blocks);
    plan.pixel_blocks = ceil_div(s.batch, plan.images) * plan.row_blocks * column_blocks;
    plan.scratch_bytes = rest + packed_bytes<T>(s, plan.images, rows, plan.columns, amx);
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
    const int64_t channels = task / plan.pixel_blocks, pixels = task % plan.pixel_blocks;
    const int64_t column = pixels % column_blocks * plan.columns;
    const int64_t row_block = pixels / column_blocks % plan.row_blocks;
    const int64_t image = pixels / column_blocks / plan.row_blocks * plan.images;
    const ConvBlock block{image,
                          std::min(s.batch, image + plan.images),
                          row_block * s.out_height / plan.row_blocks,
                          (row_block + 1) * s.out_height / plan.row_blocks,
                          column,
                          std::min(s.out_width, column + plan.columns),
                          channels * panels / plan.channel_blocks,
                          (channels + 1) * panels / plan.channel_blocks};
#if defined(__x86_64__)
    if constexpr (!std::is_same_v<T, Half>) {
        if (plan.amx) return avx512_amx::conv_amx_block(s, operands, block, scratch);
    }
#endif
    kernels[static_cast<int>(current_isa())](s, operands, block, scratch);
}

}  // namespace

template <class T>
ConvPlan make_plan(const ConvShape& s, const ConvOperands<T>&, int threads, int64_t most_scratch) {
    threads = useful_threads<T>(s, threads);
    switch (s.algorithm) {
        case ConvAlgorithm::direct:
            if (takes_amx<T>(s)) return direct_plan<T>(s, threads, true, most_scratch);
            return direct_plan<T>(upright(s), threads, false, most_scratch);
        case ConvAlgorithm::winograd_1d:
            return winograd_1d_plan(upright(s), threads, most_scratch);
        default:
            return winograd_plan(s, threads, most_scratch);
    }
}

template <class T>
void run_tasks(const ConvShape& s, const ConvOperands<T>& operands, const ConvPlan& plan,
               int64_t begin, int64_t end, void* scratch) {
    const ConvShape shape = upright(s);
    for (; begin < end; ++begin) {
        switch (s.algorithm) {
            case ConvAlgorithm::direct:
                direct_task(plan.amx ? s : shape, plan, operands, begin, scratch);
                break;
            case ConvAlgorithm::winograd_1d:
                winograd_1d_task(shape, plan, operands, begin, scratch);
                break;
            default:
                winograd_task(s, plan, operands, begin, scratch);
        }
    }
}

#define CVFAST_INSTANTIATE(T)                                                                   \
    template ConvPlan make_plan(const ConvShape&, const ConvOperands<T>&, int, int64_t);        \
    template void run_tasks(const ConvShape&, const ConvOperands<T>&, const ConvPlan&, int64_t, \
                            int64_t, void*);
CVFAST_INSTANTIATE(float)
CVFAST_INSTANTIATE(BFloat16)
CVFAST_INSTANTIATE(Half)

}  // namespace cvfast
