#include "cpu/depthwise.h"

#define CVFAST_KERNEL_SOURCE "cpu/depthwise_kernel.h"
#define CVFAST_KERNEL_BF16_DOT
#define CVFAST_KERNEL_AMX
#include "cpu/foreach_isa.h"

namespace cvfast {
namespace {

// Threads pay when each has at least this many nanoseconds of work: waking one costs about 3 us.
constexpr double kNanosecondsPerThread = 4000;
constexpr double kFlopsPerNanosecond = 60;
constexpr double kBytesPerNanosecond = 40;

int useful_threads(const DepthwiseShape& s, int64_t element_size, int threads) {
    const double outputs =
        double(s.batch) * double(s.out_height * s.out_width) * double(s.channels * s.multiplier);
    const double inputs = double(s.batch) * double(s.height * s.width) * double(s.channels);
    const double compute = 2 * outputs * double(s.kernel_h * s.kernel_w) / kFlopsPerNanosecond;
    const double traffic = (outputs + inputs) * double(element_size) / kBytesPerNanosecond;
    const double worth = (compute + traffic) / kNanosecondsPerThread;
    return worth >= threads ? threads : std::max(1, static_cast<int>(worth));
}

// A block of channels of one image stays in L1 while a strip of columns is walked down its rows.
constexpr int64_t kBlockChannels = 128;

}  // namespace

template <class T>
DepthwisePlan make_plan(const DepthwiseShape& s, const DepthwiseOperands<T>&, int threads) {
    DepthwisePlan plan{};
    plan.blocks = (s.channels + kBlockChannels - 1) / kBlockChannels;
    plan.tasks = s.batch * s.multiplier * plan.blocks * s.out_height;
    plan.threads = useful_threads(s, sizeof(T), threads);
    const int64_t bands = s.batch % plan.threads == 0 ? 1 : plan.threads;
    plan.band_rows = (s.out_height + bands - 1) / bands;
    return plan;
}

template <class T>
void run_tasks(const DepthwiseShape& s, const DepthwiseOperands<T>& o, const DepthwisePlan& plan,
               int64_t begin, int64_t end, void*) {
    using Kernel =
        void (*)(const DepthwiseShape&, const T*, const float*, T*, const DepthwiseRange&);
    static constexpr Kernel kernels[kIsaCount] = CVFAST_ISA_TABLE(depthwise_rows<T>);
    const Kernel kernel = kernels[static_cast<int>(current_isa())];

    // Blocks are cut at panel boundaries, as equal as those allow.
    const int64_t panels = (s.channels + kDepthwisePanel - 1) / kDepthwisePanel;
    const int64_t blocks = plan.blocks;
    const int64_t planes = blocks * s.multiplier;
    while (begin < end) {
        const int64_t image = begin / (planes * s.out_height);
        const int64_t first = begin % (planes * s.out_height);
        const int64_t band = first / (planes * plan.band_rows) * plan.band_rows;
        const int64_t band_rows = std::min(plan.band_rows, s.out_height - band);
        const int64_t in_band = first - planes * band;
        const int64_t plane = in_band / band_rows, row = in_band % band_rows;
        const int64_t rows = std::min(end - begin, band_rows - row);
        const int64_t block = plane % blocks;
        const int64_t j = plane / blocks;
        const DepthwiseRange range{
            image,
            j,
            block * panels / blocks * kDepthwisePanel,
            std::min(s.channels, (block + 1) * panels / blocks * kDepthwisePanel),
            band + row,
            band + row + rows,
            std::max<int64_t>(1, s.height)};
        kernel(s, o.x, o.packed, o.out, range);
        begin += rows;
    }
}

#define CVFAST_INSTANTIATE(T)                                                                  \
    template DepthwisePlan make_plan(const DepthwiseShape&, const DepthwiseOperands<T>&, int); \
    template void run_tasks(const DepthwiseShape&, const DepthwiseOperands<T>&,                \
                            const DepthwisePlan&, int64_t, int64_t, void*);
CVFAST_INSTANTIATE(float)
CVFAST_INSTANTIATE(BFloat16)
CVFAST_INSTANTIATE(Half)

}  // namespace cvfast
