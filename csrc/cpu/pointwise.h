// Pointwise (1x1) convolution over channels-last images: a matrix product of pixels and packed
// weights, with what comes before and after it fused.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/activation.h"
#include "common/types.h"
#include "cpu/amx.h"
#include "cpu/call.h"

namespace cvfast {

// Output channels per weight panel: the widest vector, so that one packing serves every level.
inline constexpr int kPointwisePanel = 16;

// Strides count elements. Channels of x, residual and out are adjacent; pixels, rows and images may
// lie apart, so that each may be a channel slice of a wider buffer. A strided convolution is one
// over the pixels that it reads: x_row and x_pixel are the image's, times the convolution's stride.
struct PointwiseShape {
    int64_t batch, height, width;  // of the output
    int64_t in_channels, out_channels;
    int64_t x_image, x_row, x_pixel;
    int64_t residual_image, residual_row, residual_pixel;
    int64_t out_image, out_row, out_pixel;
    int64_t gate_image;
    Activation activation;
};

// out = activation(bias + residual + weight * (gate * relu(scale * x + shift)))
//
// out may be residual itself.
//
// T: float, BFloat16 or Half; sums are float. Weights are rows of 16 32-bit words, in panels of 16
// output channels. A panel's first row is the bias, as float; the others are, for float and Half,
// one float per input channel; for BFloat16 one word per two input channels, the even one in the
// low half, zero beyond the last. Lanes beyond the last channel are zero.
//
// Where 1 to 8 channels remain after the last multiple of 16, they share a half panel: its rows
// interleave two of these, (c0 w0) (c0 w1) (c1 w0) (c1 w1) ..., so that no lane is idle; the bias
// stands in the even lanes. At 24 channels that saves a quarter of the time.
//
// Rows of packed weights; `pairs` for BFloat16.
constexpr int64_t pointwise_packed_rows(int64_t in_channels, int64_t out_channels, bool pairs) {
    const int64_t words = pairs ? (in_channels + 1) / 2 : in_channels;
    const int64_t rest = out_channels % kPointwisePanel;
    const bool half_panel = rest != 0 && rest <= kPointwisePanel / 2;
    const int64_t panels = (out_channels + kPointwisePanel - 1) / kPointwisePanel - half_panel;
    return panels * (1 + words) + (half_panel ? 1 + (words + 1) / 2 : 0);
}

// Bytes of an input channel as it is multiplied: Half is widened first.
template <class T>
inline constexpr int64_t kPointwiseSize = std::is_same_v<T, BFloat16> ? 2 : 4;

// Rows of a panel after its bias.
template <class T>
constexpr int64_t pointwise_words(int64_t in_channels) {
    return (in_channels * kPointwiseSize<T> + 3) / 4;
}

constexpr int64_t pointwise_panels(int64_t out_channels) {
    return (out_channels + kPointwisePanel - 1) / kPointwisePanel;
}

// Words that are summed one after another; the sums of such segments are added to each other. One
// long sum of 1024 float products had over twice the error of PyTorch's. A product of eight pixels
// or fewer, which is bound by memory and which PyTorch sums in many lanes, takes shorter ones.
constexpr int64_t pointwise_segment(int64_t pixels) { return pixels <= 8 ? 32 : 128; }

// To bring pixels into scratch memory pays where this many output channels read them from there.
inline constexpr int64_t kPackedChannels = 64;

// Whether pixels must be brought into scratch memory before they are multiplied, or had better be.
template <class T>
constexpr bool pointwise_must_pack(int64_t in_channels, int64_t x_pixel, int64_t out_channels,
                                   bool amx) {
    if (std::is_same_v<T, Half>) return true;
    if (in_channels * int64_t{sizeof(T)} % 4 != 0) return true;  // half a word would be left over
    if (amx) return false;
    // Pixels a multiple of 4096 bytes apart share one set of the L1 cache, which has fewer ways
    // than a tile has pixels. The copy pays where enough weights pass over it.
    return x_pixel * int64_t{sizeof(T)} % 4096 == 0 && out_channels >= kPackedChannels;
}

// Whether AMX, where there is one, multiplies floats, in pieces. In small layers what it wins is
// lost by the rest of a network: two cores that both use it run everything at a lower clock. With
// 64 channels at 14x14 too, MobileNet v2 takes 1.05 times as long; without them at 56x56, v1 does.
constexpr bool amx_takes_floats(int64_t pixels, int64_t in_channels, int64_t out_channels) {
    const int64_t channels = pixels >= 28 * 28 ? 64 : 128;
    return pixels >= 64 && in_channels >= channels && out_channels >= channels;
}

// What does not apply is null; scale and shift come together.
template <class T>
struct PointwiseOperands {
    const T* x;
    const float* packed;
    const float* scale;  // [in_channels]
    const float* shift;  // [in_channels]
    const T* gate;       // [batch][in_channels]
    const T* residual;
    T* out;
};

// How the work is cut into tasks: rows of pixels that lie evenly apart, in blocks, times blocks of
// weight panels. Tasks write disjoint parts of the output and may run in any order, on any thread;
// results do not depend on the cut.
struct PointwisePlan : Cut {
    int64_t runs, run_rows;            // matrices of pixels, and the pixels of each
    int64_t lines;                     // runs per image; 1 too where one run holds every image
    int64_t line;                      // pixels that lie evenly apart in the source: of a run,
                                       // or of one of its lines, which packing brings together
    int64_t row_blocks, panel_blocks;  // of each run
    bool pack;                         // pixels are brought into scratch memory
    bool amx;                          // products are AMX's
};

template <class T>
PointwisePlan make_plan(const PointwiseShape& shape, const PointwiseOperands<T>& operands,
                        int threads, int64_t most_scratch = kAnyScratch);

template <class T>
void run_tasks(const PointwiseShape& shape, const PointwiseOperands<T>& operands,
               const PointwisePlan& plan, int64_t begin, int64_t end, void* scratch);

}  // namespace cvfast
