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

// A row of a channel block, as float, stays in L1 between the two passes.
constexpr int64_t kRowBytes = 16 * 1024;
constexpr int64_t kBlockChannels = 16;  // a block is a multiple of so many

constexpr int64_t kLineBytes = 64;

}  // namespace

template <class T>
PoolPlan make_plan(const PoolShape& s, const PoolOperands<T>&, int threads) {
    PoolPlan plan{};
    const int64_t channel_bytes = s.width * int64_t{sizeof(float)};
    plan.blocks = std::min(ceil_div(s.channels * channel_bytes, kRowBytes),
                           ceil_div(s.channels, kBlockChannels));
    plan.tasks = s.batch * plan.blocks * s.out_height;
    plan.scratch_bytes =
        ceil_div(ceil_div(s.channels, kBlockChannels), std::max<int64_t>(1, plan.blocks)) *
        kBlockChannels * channel_bytes;
    plan.threads = useful_threads(s.batch * s.channels * s.height * channel_bytes, threads);
    return plan;
}

template <class T>
void run_tasks(const PoolShape& s, const PoolOperands<T>& o, const PoolPlan& plan, int64_t begin,
               int64_t end, void* scratch) {
    using Kernel = void (*)(const PoolShape&, const PoolOperands<T>&, const PoolRange&, float*);
    static constexpr Kernel kernels[kIsaCount] = CVFAST_ISA_TABLE(pool_rows<T>);
    const Kernel kernel = kernels[static_cast<int>(current_isa())];

    const int64_t panels = ceil_div(s.channels, kBlockChannels);
    while (begin < end) {
        const int64_t row = begin % s.out_height;
        const int64_t rows = std::min(end - begin, s.out_height - row);
        const int64_t block = begin / s.out_height % plan.blocks;
        const int64_t image = begin / s.out_height / plan.blocks;
        const auto channel = [&](int64_t b) {
            return std::min(s.channels, b * panels / plan.blocks * kBlockChannels);
        };
        const PoolRange range{image, channel(block), channel(block + 1), row, row + rows};
        kernel(s, o, range, static_cast<float*>(scratch));
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

    constexpr int64_t kPanel = kLineBytes / sizeof(T);
    while (begin < end) {
        const int64_t image = begin / plan.panels, panel = begin % plan.panels;
        const int64_t panels = std::min(end - begin, plan.panels - panel);
        GlobalPoolOperands<T> operands = o;
        operands.x += image * s.x_image;
        operands.out += image * s.out_image;
        kernel(s, operands, panel * kPanel, std::min(s.channels, (panel + panels) * kPanel));
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
