#include "cpu/elementwise.h"

#define CVFAST_KERNEL_SOURCE "cpu/elementwise_kernel.h"
#include "cpu/foreach_isa.h"

namespace cvfast {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads pay when each has at least this many bytes to move: waking one costs about 3 us.
constexpr int64_t kBytesPerThread = 160 * 1024;

// Of one operand, in a task: small, so that threads stay level.
constexpr int64_t kBlockBytes = 16 * 1024;

// Dense runs are cut at multiples of this many elements: cache lines are written by one thread.
constexpr int64_t kGrain = 64;

// Part `index` of `count` almost equal parts of [0, size) starts here.
int64_t part_begin(int64_t size, int64_t index, int64_t count, int64_t grain) {
    return std::min(size, ceil_div(size, grain) * index / count * grain);
}

}  // namespace

template <class T>
ElementwisePlan make_plan(const ElementwiseShape& s, const ElementwiseOperands<T>& o, int threads) {
    ElementwisePlan p{};
    const int64_t elements = s.batch * s.channels * s.height * s.width;
    if (elements == 0) return p;
    // Whether every operand's step of one axis is `inner` of its pixels.
    const auto even = [&](int64_t inner, int64_t x, int64_t y, int64_t out) {
        return x == inner * s.x_pixel && out == inner * s.out_pixel &&
               (!o.y || y == inner * s.y_pixel);
    };
    p.lines = s.height;
    p.run_pixels = s.width;
    if (s.height == 1 || even(s.width, s.x_row, s.y_row, s.out_row)) {
        p.lines = 1;
        p.run_pixels = s.height * s.width;
    }
    p.runs = s.batch * p.lines;
    if (p.lines == 1 && (s.batch == 1 || even(p.run_pixels, s.x_image, s.y_image, s.out_image))) {
        p.runs = 1;
        p.run_pixels *= s.batch;
    }
    p.channels = s.channels;
    const bool dense = s.x_pixel == s.channels && s.out_pixel == s.channels &&
                       (!o.y || s.y_pixel == s.channels) && !o.scale;
    if (dense) {
        p.channels *= p.run_pixels;
        p.run_pixels = 1;
    }
    const int64_t bytes = p.run_pixels * p.channels * int64_t{sizeof(T)};
    const int64_t most = p.run_pixels > 1 ? p.run_pixels : ceil_div(p.channels, kGrain);
    p.blocks = std::min(ceil_div(bytes, kBlockBytes), most);
    p.tasks = p.runs * p.blocks;
    const int64_t moved = elements * int64_t{sizeof(T)} * (o.y ? 3 : 2);
    p.threads = static_cast<int>(std::clamp<int64_t>(moved / kBytesPerThread, 1, threads));
    return p;
}

template <class T>
void run_tasks(const ElementwiseShape& s, const ElementwiseOperands<T>& o, const ElementwisePlan& p,
               int64_t begin, int64_t end, void*) {
    using Kernel = void (*)(const ElementwiseBlock<T>&);
    static constexpr Kernel kernels[kIsaCount] = CVFAST_ISA_TABLE(elementwise_block<T>);
    const Kernel kernel = kernels[static_cast<int>(current_isa())];

    ElementwiseBlock<T> block{};
    block.x_pixel = s.x_pixel, block.y_pixel = s.y_pixel, block.out_pixel = s.out_pixel;
    block.op = s.op, block.activation = s.activation;
    while (begin < end) {
        const int64_t run = begin / p.blocks, first = begin % p.blocks;
        const int64_t last = std::min(p.blocks, first + end - begin);
        const int64_t image = run / p.lines, line = run % p.lines;
        int64_t pixel = 0, channel = 0;
        if (p.run_pixels > 1) {
            pixel = part_begin(p.run_pixels, first, p.blocks, 1);
            block.pixels = part_begin(p.run_pixels, last, p.blocks, 1) - pixel;
            block.channels = p.channels;
        } else {
            channel = part_begin(p.channels, first, p.blocks, kGrain);
            block.pixels = 1;
            block.channels = part_begin(p.channels, last, p.blocks, kGrain) - channel;
        }
        block.operands = o;
        block.operands.x += image * s.x_image + line * s.x_row + pixel * s.x_pixel + channel;
        if (o.y) {
            block.operands.y += image * s.y_image + line * s.y_row + pixel * s.y_pixel + channel;
        }
        if (o.scale) {
            block.operands.scale += channel;
            block.operands.shift += channel;
        }
        block.operands.out +=
            image * s.out_image + line * s.out_row + pixel * s.out_pixel + channel;
        kernel(block);
        begin += last - first;
    }
}

#define CVFAST_INSTANTIATE(T)                                                                  \
    template ElementwisePlan make_plan(const ElementwiseShape&, const ElementwiseOperands<T>&, \
                                       int);                                                   \
    template void run_tasks(const ElementwiseShape&, const ElementwiseOperands<T>&,            \
                            const ElementwisePlan&, int64_t, int64_t, void*);
CVFAST_INSTANTIATE(float)
CVFAST_INSTANTIATE(BFloat16)
CVFAST_INSTANTIATE(Half)

}  // namespace cvfast
