#include "cpu/inverted_residual.h"

#define CVFAST_KERNEL_SOURCE "cpu/inverted_residual_kernel.h"
#define CVFAST_KERNEL_BF16_DOT
#define CVFAST_KERNEL_AMX
#include "cpu/foreach_isa.h"

namespace cvfast {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t whole_lines(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

// Threads pay when each has at least this many nanoseconds of work: waking one costs about 3 us.
constexpr double kNanosecondsPerThread = 4000;
constexpr double kMultiplyAddsPerNanosecond = 90;

// The expanded rows of a chunk and the weights that pass over them share the caches; those of all
// chunks stay in L2 from strip to strip. Measured on Zen 5, 33 blocks: half or twice these sizes
// cost up to 5 %.
constexpr int64_t kRingBytes = 96 * 1024;
constexpr int64_t kLeastChunk = 32, kMostChunk = 192;
// Source pixels per strip: enough that the weights, which each strip reads anew, cost little.
constexpr int64_t kStripPixels = 168;
// Without an expansion only the depthwise convolution's output stands in scratch memory.
constexpr int64_t kOutputBytes = 112 * 1024;
constexpr int64_t kMostChunkAlone = 256;

double multiply_adds(const InvertedResidualShape& s, bool expand, bool project) {
    const double pixels = double(s.height * s.width),
                 out_pixels = double(s.out_height * s.out_width);
    const double per_output = double(s.kernel_h * s.kernel_w + (project ? s.out_channels : 0));
    return double(s.batch) * double(s.hidden) *
           (out_pixels * per_output + (expand ? pixels * double(s.in_channels) : 0));
}

// The bands per image whose slowest thread has least to do; of almost equal ones, the most.
int64_t bands_for(const InvertedResidualShape& s, bool expand, bool project, int threads) {
    if (threads == 1) return 1;
    // Rows that two neighbours both expand, counted in output rows.
    const double all = multiply_adds(s, expand, project);
    const double expansion = all - multiply_adds(s, false, project);
    const double shared = double(std::max<int64_t>(0, s.kernel_h - s.stride_h)) /
                          double(s.stride_h) * expansion / all;
    const auto time = [&](int64_t bands) {
        const double rows = double(ceil_div(s.out_height, bands)) + (bands > 1 ? shared : 0);
        return double(ceil_div(s.batch * bands, threads)) * rows;
    };
    constexpr double kAlmost = 1.02;
    const int64_t most = std::min(s.out_height, ceil_div(4 * threads, s.batch));
    double least = time(1);
    for (int64_t bands = 2; bands <= most; ++bands) least = std::min(least, time(bands));
    int64_t bands = most;
    while (time(bands) > kAlmost * least) --bands;
    return bands;
}

// From the shape alone: the chunks decide the order of sums, which threads must not change.
template <class T>
void choose_strip_and_chunk(const InvertedResidualShape& s, bool expand, InvertedResidualPlan& p) {
    constexpr int64_t kSize = sizeof(T);
    const int64_t panels = ceil_div(s.hidden, kDepthwisePanel);
    int64_t most_panels = kMostChunkAlone / kDepthwisePanel;
    if (expand) {
        p.strip = ceil_div(kStripPixels, s.out_width * s.stride_h);
    } else {
        const int64_t pixel = std::min(panels, most_panels) * kDepthwisePanel * kSize;
        p.strip = ceil_div(kOutputBytes / pixel, s.out_width);
    }
    if (2 * p.strip > s.out_height) p.strip = s.out_height;
    if (expand) {
        const int64_t ring = ((p.strip - 1) * s.stride_h + s.kernel_h) * s.width * kSize;
        most_panels = std::clamp(kRingBytes / ring, kLeastChunk, kMostChunk) / kDepthwisePanel;
    }
    // Chunks of almost equal width.
    p.chunk = ceil_div(panels, ceil_div(panels, most_panels)) * kDepthwisePanel;
}

// Where everything lies in scratch memory, given bands, strip and chunk.
template <class T>
void lay_out(const InvertedResidualShape& s, const InvertedResidualOperands<T>& o,
             InvertedResidualPlan& p) {
    constexpr int64_t kSize = sizeof(T);
    const int64_t chunks = ceil_div(s.hidden, p.chunk);
    const int64_t band = ceil_div(s.out_height, p.bands);
    if (2 * p.strip > band) p.strip = band;
    p.one_strip = p.strip == band;
    p.d_pixel = pointwise_packed_pixel(p.chunk, kSize) / kSize;
    int64_t bytes = 0;
    if (o.expand) {
        p.ring_rows = std::min(s.height, (p.strip - 1) * s.stride_h + s.kernel_h);
        p.ring_width = std::max(s.pad_left + s.width, (s.out_width - 1) * s.stride_w + s.kernel_w);
        p.ring_pixel = p.d_pixel;
        bytes += (p.one_strip ? 1 : chunks) * p.ring_rows * p.ring_width * p.ring_pixel * kSize;
    }
    p.d_offset = bytes;
    const int64_t pixels = p.strip * s.out_width;
    if (o.project) {
        bytes += pixels * p.d_pixel * kSize;
        p.sums_offset = bytes;
        if (chunks > 1) {
            bytes += pixels * pointwise_panels(s.out_channels) * kPointwisePanel *
                     int64_t{sizeof(float)};
        }
    }
    p.pack_offset = bytes;
    p.pack_x = o.expand && pointwise_must_pack<T>(s.in_channels, s.x_pixel, p.chunk, p.amx);
    p.pack_d = o.project && pointwise_must_pack<T>(s.hidden, p.d_pixel, s.out_channels, p.amx);
    const int64_t packed_x =
        p.pack_x ? s.width * pointwise_packed_pixel(s.in_channels, kPointwiseSize<T>) : 0;
    const int64_t packed_d =
        p.pack_d ? pixels * pointwise_packed_pixel(p.chunk, kPointwiseSize<T>) : 0;
    const int64_t weights =
        p.amx ? amx_weights_bytes<BFloat16>(1, std::max(s.in_channels, p.chunk), 0) : 0;
    p.scratch_bytes = bytes + std::max(packed_x, packed_d) + weights;
}

}  // namespace

template <class T>
InvertedResidualPlan make_plan(const InvertedResidualShape& s, const InvertedResidualOperands<T>& o,
                               int threads) {
    InvertedResidualPlan p{};
    if (s.batch == 0) return p;
    const double worth =
        multiply_adds(s, o.expand, o.project) / kMultiplyAddsPerNanosecond / kNanosecondsPerThread;
    p.threads = worth >= threads ? threads : std::max(1, static_cast<int>(worth));
    p.bands = bands_for(s, o.expand, o.project, p.threads);
    choose_strip_and_chunk<T>(s, o.expand, p);
    p.amx = std::is_same_v<T, BFloat16> && has_amx();
    p.tasks = s.batch * p.bands;
    lay_out(s, o, p);
    return p;
}

template <class T>
void run_tasks(const InvertedResidualShape& s, const InvertedResidualOperands<T>& o,
               const InvertedResidualPlan& p, int64_t begin, int64_t end, void* scratch) {
    using Kernel = void (*)(const InvertedResidualBand<T>&);
    static constexpr Kernel kernels[kIsaCount] = CVFAST_ISA_TABLE(inverted_residual_band<T>);
    const Kernel kernel = kernels[static_cast<int>(current_isa())];
    for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / p.bands, band = task % p.bands;
        InvertedResidualOperands<T> from = o;
        from.x += image * s.x_image;
        if (o.residual) from.residual += image * s.residual_image;
        from.out += image * s.out_image;
        if (o.means) from.means += image * s.means_image;
        kernel({s, p, from, band * s.out_height / p.bands, (band + 1) * s.out_height / p.bands,
                static_cast<char*>(scratch)});
    }
}

#define CVFAST_INSTANTIATE(T)                                                                 \
    template InvertedResidualPlan make_plan(const InvertedResidualShape&,                     \
                                            const InvertedResidualOperands<T>&, int);         \
    template void run_tasks(const InvertedResidualShape&, const InvertedResidualOperands<T>&, \
                            const InvertedResidualPlan&, int64_t, int64_t, void*);
CVFAST_INSTANTIATE(float)
CVFAST_INSTANTIATE(BFloat16)
CVFAST_INSTANTIATE(Half)

}  // namespace cvfast
