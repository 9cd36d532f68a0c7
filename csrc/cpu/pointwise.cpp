#include "cpu/pointwise.h"

#include <limits>
#include <memory>
#include <new>

#include "cpu/machine.h"

#define CVFAST_KERNEL_SOURCE "cpu/pointwise_kernel.h"
#define CVFAST_KERNEL_BF16_DOT
#define CVFAST_KERNEL_AMX
#include "cpu/foreach_isa.h"

namespace cvfast {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads pay when each has at least this many nanoseconds of work: waking one costs about 3 us.
constexpr double kNanosecondsPerThread = 4000;
constexpr double kMultiplyAddsPerNanosecond = 100;
// By AMX, in bfloat16 and in float, which takes six products.
constexpr double kAmxPerNanosecond = 1000, kAmxFloatPerNanosecond = 200;
constexpr double kSplitNanoseconds = 0.08;  // to split a float
constexpr double kBytesPerNanosecond = 60, kAmxBytesPerNanosecond = 20;

// The pixels of a block stay in the L2 cache while every panel of weights passes over them.
const int64_t kBlockBytes = l2_bytes() / 4;
// Rows of a block at least, where it must do with less scratch memory.
constexpr int64_t kLeastPackedRows = 64;
constexpr int64_t kTileRows = 14;

// Whether AMX multiplies. Float pixels and weights are first split in pieces, each as often as
// there are blocks of the other: that must pay. From the shape alone, for results depend on it.
template <class T>
bool takes_amx(const PointwiseShape& s) {
    if (!has_amx() || std::is_same_v<T, Half>) return false;
    if (std::is_same_v<T, BFloat16>) return true;
    return amx_takes_floats(s.batch * s.height * s.width, s.in_channels, s.out_channels);
}

template <class T>
double multiply_adds_per_nanosecond(bool amx) {
    if (!amx) return kMultiplyAddsPerNanosecond;
    return std::is_same_v<T, BFloat16> ? kAmxPerNanosecond : kAmxFloatPerNanosecond;
}

// Bytes of a pixel in scratch memory.
template <class T>
int64_t scratch_pixel(const PointwiseShape& s, bool amx) {
    if (amx && std::is_same_v<T, float>) {
        return kPieces * pointwise_packed_pixel(s.in_channels, sizeof(BFloat16));
    }
    return pointwise_packed_pixel(s.in_channels, kPointwiseSize<T>);
}

struct Blocks {
    int64_t row_blocks, panel_blocks;
};

// The cut for `threads` threads whose slowest thread has least to do: multiply-adds, and bytes of
// pixels and weights that it reads.
template <class T>
Blocks blocks_for(const PointwiseShape& s, int64_t runs, int64_t run_rows, int threads, bool amx,
                  int64_t most_packed) {
    const int64_t panels = ceil_div(s.out_channels, kPointwisePanel);
    const int64_t pixel = scratch_pixel<T>(s, amx);
    // Many weights that are split take larger blocks, since each splits them anew.
    const int64_t pieces = s.in_channels * s.out_channels * kPieces * int64_t{sizeof(BFloat16)};
    const bool many = amx && std::is_same_v<T, float> && pieces > kBlockBytes / 2;
    const int64_t block_bytes = many ? 2 * kBlockBytes : kBlockBytes;
    const int64_t packed_rows = std::max(kLeastPackedRows, most_packed / pixel);
    const int64_t most_rows =
        std::max(kTileRows, std::min(block_bytes / pixel, packed_rows) / kTileRows * kTileRows);
    Blocks best{};
    double least = std::numeric_limits<double>::infinity();
    for (int64_t panel_blocks = 1; panel_blocks <= std::min<int64_t>(threads, panels);
         ++panel_blocks) {
        const int64_t parts = std::max<int64_t>(1, threads / panel_blocks);
        const int64_t parts_per_run = std::min(ceil_div(parts, runs), run_rows);
        const int64_t row_blocks =
            ceil_div(ceil_div(run_rows, most_rows), parts_per_run) * parts_per_run;
        const int64_t block_rows = ceil_div(run_rows, row_blocks);
        // AMX takes two tiles of rows at a time; a last one alone takes longer than half of that.
        const bool alone = amx && ceil_div(block_rows, int64_t{kAmxRows}) % 2;
        const double rows = double(ceil_div(runs * row_blocks, parts)) *
                            double(alone ? block_rows + kAmxRows / 2 : block_rows);
        const double channels = double(ceil_div(panels, panel_blocks) * kPointwisePanel);
        const double in = double(s.in_channels), size = sizeof(T);
        const double products = in * rows * channels / multiply_adds_per_nanosecond<T>(amx);
        const double weights = in * channels * size / kWeightBytes;
        const double split =
            amx && std::is_same_v<T, float> ? in * (rows + channels) * kSplitNanoseconds : 0;
        // Threads that share out the channels read each other's pixels, now and in the next layer.
        const double pixels = reading_time(in * rows * size, panel_blocks) +
                              reading_time(channels * rows * size, panel_blocks);
        const double time = products + weights + split + pixels;
        if (time < least) {
            least = time;
            best = {row_blocks, panel_blocks};
        }
    }
    return best;
}

}  // namespace

template <class T>
PointwisePlan make_plan(const PointwiseShape& s, const PointwiseOperands<T>& o, int threads,
                        int64_t most_scratch) {
    PointwisePlan p{};
    if (s.batch * s.height * s.width == 0) return p;
    // Whether the results' step of one axis is `inner` of their pixels.
    const auto even = [&](int64_t inner, int64_t residual, int64_t out) {
        return out == inner * s.out_pixel && (!o.residual || residual == inner * s.residual_pixel);
    };
    const bool one_line = s.height == 1;
    const bool even_source = one_line || s.x_row == s.width * s.x_pixel;
    const bool even_results = one_line || even(s.width, s.residual_row, s.out_row);
    p.lines = s.height;
    p.run_rows = s.width;
    // Lines that lie apart in the source only are brought together by packing.
    if (even_results && (even_source || s.out_channels >= kPackedChannels)) {
        p.lines = 1;
        p.run_rows = s.height * s.width;
    }
    p.runs = s.batch * p.lines;
    const int64_t x_image = even_source ? p.run_rows * s.x_pixel : s.height * s.x_row;
    const bool images_alike =
        s.batch == 1 || (s.x_image == x_image && even(p.run_rows, s.residual_image, s.out_image));
    if (p.lines == 1 && images_alike && !o.gate) {
        p.runs = 1;
        p.run_rows *= s.batch;
    }
    p.line = even_source ? p.run_rows : s.width;

    const double pixels = double(s.batch) * double(s.height * s.width);
    const double in = double(s.in_channels), out = double(s.out_channels);
    const double bytes = (pixels * (in + out) + in * out) * double(sizeof(T));
    p.amx = takes_amx<T>(s);
    const double time = pixels * in * out / multiply_adds_per_nanosecond<T>(p.amx) +
                        bytes / (p.amx ? kAmxBytesPerNanosecond : kBytesPerNanosecond);
    const double worth = time / kNanosecondsPerThread;
    p.threads = worth >= threads ? threads : std::max(1, static_cast<int>(worth));

    p.pack = o.scale || o.gate || p.line < p.run_rows ||
             pointwise_must_pack<T>(s.in_channels, s.x_pixel, s.out_channels, p.amx);
    const bool pieces = p.amx && std::is_same_v<T, float>;
    const bool half_panel = pointwise_whole_channels(s.out_channels) < s.out_channels;
    if (pieces || (p.amx && half_panel)) {
        p.scratch_bytes = amx_weights_bytes<T>(1, s.in_channels, s.out_channels);
    }
    const bool packs = p.pack || pieces;
    const int64_t most_packed =
        packs ? std::max<int64_t>(0, most_scratch - p.scratch_bytes) : kAnyScratch;
    const Blocks blocks = blocks_for<T>(s, p.runs, p.run_rows, p.threads, p.amx, most_packed);
    p.row_blocks = blocks.row_blocks;
    p.panel_blocks = blocks.panel_blocks;
    p.tasks = p.runs * p.row_blocks * p.panel_blocks;
    if (packs) p.scratch_bytes += ceil_div(p.run_rows, p.row_blocks) * scratch_pixel<T>(s, p.amx);
    return p;
}

template <class T>
void run_tasks(const PointwiseShape& s, const PointwiseOperands<T>& o, const PointwisePlan& p,
               int64_t begin, int64_t end, void* scratch) {
    using Kernel = void (*)(const PointwiseBlock<T>&);
    static constexpr Kernel kernels[kIsaCount] = CVFAST_ISA_TABLE(pointwise_task<T>);
    const Kernel kernel = kernels[static_cast<int>(current_isa())];

    const int64_t panels = ceil_div(s.out_channels, kPointwisePanel);
    const int64_t words = pointwise_words<T>(s.in_channels);
    PointwiseBlock<T> block{};
    block.in_channels = block.chunk = s.in_channels;
    block.x_pixel = s.x_pixel;
    block.residual_pixel = s.residual_pixel;
    block.out_pixel = s.out_pixel;
    block.activation = s.activation;
    block.segment = pointwise_segment(p.run_rows);
    block.pack = p.pack;
    block.amx = p.amx;
    block.scratch = scratch;
    block.line = p.line;
    block.x_line = s.x_row;
    for (int64_t task = begin; task < end; ++task) {
        const int64_t row_block = task % p.row_blocks;
        const int64_t run = task / p.row_blocks % p.runs;
        const int64_t panel_block = task / p.row_blocks / p.runs;
        const int64_t image = run / p.lines, line = run % p.lines;
        const int64_t row = row_block * p.run_rows / p.row_blocks;
        const int64_t panel = panel_block * panels / p.panel_blocks;
        const int64_t panel_end = (panel_block + 1) * panels / p.panel_blocks;
        const int64_t channel = panel * kPointwisePanel;
        block.rows = (row_block + 1) * p.run_rows / p.row_blocks - row;
        block.out_channels = std::min(s.out_channels, panel_end * kPointwisePanel) - channel;
        block.operands = o;
        block.column = row % p.line;
        block.operands.x += image * s.x_image + (line + row / p.line) * s.x_row;
        block.operands.x += block.column * s.x_pixel;
        block.operands.packed += panel * (words + 1) * kPointwisePanel;
        if (o.gate) block.operands.gate += image * s.gate_image;
        if (o.residual) {
            block.operands.residual +=
                image * s.residual_image + line * s.residual_row + row * s.residual_pixel + channel;
        }
        block.operands.out += image * s.out_image + line * s.out_row + row * s.out_pixel + channel;
        kernel(block);
    }
}

#define CVFAST_INSTANTIATE(T)                                                                 \
    template PointwisePlan make_plan(const PointwiseShape&, const PointwiseOperands<T>&, int, \
                                     int64_t);                                                \
    template void run_tasks(const PointwiseShape&, const PointwiseOperands<T>&,               \
                            const PointwisePlan&, int64_t, int64_t, void*);
CVFAST_INSTANTIATE(float)
CVFAST_INSTANTIATE(BFloat16)
CVFAST_INSTANTIATE(Half)

}  // namespace cvfast
