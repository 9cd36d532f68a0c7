#include "cpu/pool.h"

#define CVFAST_KERNEL_SOURCE "cpu/pool_kernel.h"
#include "cpu/foreach_isa.h"

namespace cvfast {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads pay when each has at least this many bytes to read: waking one costs about 3 us.
constexpr int64_t kBytesPerThread = 160 * 1024;

int useful_threads(int64_t bytes, int threads) {
    return static_cast<int>(std::clamp<int64_t>(bytes / kBytesPerThread, 1, threads));
}

// A strip of columns, as float at most, stays in L1 between the two passes, beside the rows it is
// made of.
constexpr int64_t kStripBytes = 8 * 1024;

// Channels are cut into blocks where a strip would hold too few columns, or where there are too few
// rows to share out.
constexpr int64_t kMostChannels = 512;
constexpr int64_t kFewRows = 16;
constexpr int64_t kPanel = 64;  // a block is a multiple of so many channels

constexpr int64_t kLineBytes = 64;

}  // namespace

template <class T>
PoolPlan make_plan(const PoolShape& s, const PoolOperands<T>&, int threads) {
    PoolPlan plan{};
    const int64_t rows = s.batch * s.out_height;
    if (rows * s.channels == 0) return plan;
    const int64_t panels = ceil_div(s.channels, kPanel);
    plan.blocks =
        std::min(panels, std::max(ceil_div(s.channels, kMostChannels), ceil_div(kFewRows, rows)));
    plan.tasks = rows * plan.blocks;
    const int64_t pixel_bytes = ceil_div(panels, plan.blocks) * kPanel * int64_t{sizeof(float)};
    const int64_t beyond =
        (s.kernel_w - 1) * s.dilation_w;  // of the columns of a strip's last output
    plan.strip = std::max<int64_t>(0, kStripBytes / pixel_bytes - beyond - 1) / s.stride_w + 1;
    plan.strip = std::min(plan.strip, s.out_width);
    plan.scratch_bytes =
        std::min(s.width, (plan.strip - 1) * s.stride_w + beyond + 1) * pixel_bytes;
    plan.threads =
        useful_threads(s.batch * s.channels * s.height * s.width * int64_t{sizeof(T)}, threads);
    return plan;
}

template <class T>
void run_tasks(const PoolShape& s, const PoolOperands<T>& o, const PoolPlan& plan, int64_t begin,
               int64_t end, void* scratch) {
    using Kernel = void (*)(const PoolShape&, const PoolOperands<T>&, const PoolRange&, void*);
    static constexpr Kernel kernels[kIsaCount] = CVFAST_ISA_TABLE(pool_rows<T>);
    const Kernel kernel = kernels[static_cast<int>(current_isa())];

    const int64_t panels = ceil_div(s.channels, kPanel);
    while (begin < end) {
        const int64_t row = begin % s.out_height;
        const int64_t rows = std::min(end - begin, s.out_height - row);
        const int64_t block = begin / s.out_height % plan.blocks;
        const int64_t image = begin / s.out_height / plan.blocks;
        const auto channel = [&](int64_t b) {
            return std::min(s.channels, b * panels / plan.blocks * kPanel);
        };
        const PoolRange range{image, channel(block), channel(block + 1),
                              row,   row + rows,     plan.strip};
        kernel(s, o, range, scratch);
        begin += rows;
    }
}

template <class T>
GlobalPoolPlan make_plan(const GlobalPoolShape& s, const GlobalPoolOperands<T>&, int threads) {
    constexpr int64_t size = sizeof(T);
    GlobalPoolPlan plan{};
    plan.panels = ceil_div(s.channels * size, kLineBytes);
    plan.tasks = s.batch * plan.panels;
    plan.threads = useful_threads(s.batch * s.channels * s.height * s.width * size, threads);
    return plan;
}

template <class T>
void run_tasks(const GlobalPoolShape& s, const GlobalPoolOperands<T>& o, const GlobalPoolPlan& plan,
               int64_t begin, int64_t end, void*) {
    using Kernel = void (*)(const GlobalPoolShape&, const GlobalPoolOperands<T>&, int64_t, int64_t);
    static constexpr Kernel kernels[kIsaCount] = CVFAST_ISA_TABLE(global_pool_channels<T>);
    const Kernel kernel = kernels[static_cast<int>(current_isa())];

    constexpr int64_t kLine = kLineBytes / sizeof(T);
    while (begin < end) {
        const int64_t image = begin / plan.panels, panel = begin % plan.panels;
        const int64_t panels = std::min(end - begin, plan.panels - panel);
        GlobalPoolOperands<T> operands = o;
        operands.x += image * s.x_image;
        operands.out += image * s.out_image;
        kernel(s, operands, panel * kLine, std::min(s.channels, (panel + panels) * kLine));
        begin += panels;
    }
}

#define CVFAST_INSTANTIATE(T)                                                                     \
    template PoolPlan make_plan(const PoolShape&, const PoolOperands<T>&, int);                   \
    template void run_tasks(const PoolShape&, const PoolOperands<T>&, const PoolPlan&, int64_t,   \
                            int64_t, void*);                                                      \
    template GlobalPoolPlan make_plan(const GlobalPoolShape&, const GlobalPoolOperands<T>&, int); \
    template void run_tasks(const GlobalPoolShape&, const GlobalPoolOperands<T>&,                 \
                            const GlobalPoolPlan&, int64_t, int64_t, void*);
CVFAST_INSTANTIATE(float)
CVFAST_INSTANTIATE(BFloat16)
CVFAST_INSTANTIATE(Half)

}  // namespace cvfast
