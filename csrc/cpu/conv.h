// Dense convolution over channels-last images, with bias, residual and activation: direct, or by
// Winograd's minimal filtering (Lavin and Gray, 2016).
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/activation.h"
#include "common/types.h"
#include "cpu/amx.h"
#include "cpu/call.h"

namespace cvfast {

// Output channels per weight panel: the widest vector, so that one packing serves every level.
inline constexpr int kConvPanel = 16;

// Those of Winograd take stride and dilation 1: f2, f2x4 (two rows of four) and f4 compute tiles of
// 2x2, 2x4 and 4x4 outputs of 3x3 kernels at once, 1d two to four outputs along a kernel of 3, 5 or
// 7 taps in one row or column. They multiply in float32, but f2_bf16 in bfloat16; its images are
// too.
enum class ConvAlgorithm : int {
    direct,
    winograd_f2,
    winograd_f2x4,
    winograd_f4,
    winograd_1d,
    winograd_f2_bf16,
};

// Elements from image to image, row to row, pixel to pixel. Channels are adjacent, but see
// has_few_channels().
struct ImageStrides {
    int64_t image, row, pixel;
};

struct ConvShape {
    int64_t batch, in_channels, height, width;
    int64_t x_channels;  // of in_channels, those of x; x2 has the others. All, or a multiple of 16
    int64_t x_channel = 1;  // elements from channel to channel of x; see has_few_channels()
    int64_t out_channels, out_height, out_width;
    int64_t kernel_h, kernel_w;
    int64_t stride_h, stride_w;
    int64_t pad_top, pad_left;  // bottom and right follow from the output's size
    int64_t dilation_h, dilation_w;
    ImageStrides x, x2, residual, out;  // each may be a channel slice of a wider buffer
    Activation activation;
    ConvAlgorithm algorithm;  // that the weights are packed for
};

// Whether the direct algorithm packs no blocks of 16 channels, for most would be empty: the stem of
// a network. It then also takes an x whose pixels are adjacent and whose channels lie apart.
inline bool has_few_channels(const ConvShape& s) { return s.in_channels < 16; }

// Input channels that the direct algorithm multiplies at once, as one 32-bit word: bfloat16 come in
// pairs, the even one in the low half.
template <class T>
inline constexpr int64_t kConvWord = std::is_same_v<T, BFloat16> ? 2 : 1;

template <class T>
constexpr int64_t conv_words(int64_t channels) {
    return (channels + kConvWord<T> - 1) / kConvWord<T>;
}

// out = activation(bias + weight (*) [x, x2] + residual); T: float, BFloat16 or Half, sums are
// float. x2 and residual may be null; out may be residual itself.
//
// Weights are panels [ceil(out_channels / 16)][taps * words + 1][16] of 32-bit words, zero beyond
// the last channel; the last row of a panel is the bias, as float. Direct: taps are the kernel's,
// row by row, and words conv_words(in_channels), floats or pairs of BFloat16. Winograd: taps are
// the 16 (F2), 24 (F2x4) or 36 (F4) entries of the transformed kernel, or the 6 of each group of
// its taps, group within entry (1d; see winograd_1d_kernel.h), and words floats, one per channel;
// of f2_bf16 pairs, and the nine taps of the kernel itself lie behind the transformed ones.
template <class T>
struct ConvOperands {
    const T* x;
    const T* x2;
    const float* packed;
    const T* residual;
    T* out;
};

// How the work is cut: blocks of pixels times runs of output channels. The cut depends on the
// number of threads, the results do not.
struct ConvPlan : Cut {
    int64_t pixel_blocks, channel_blocks;
    int64_t images, row_blocks, columns;  // direct: a pixel block's images and columns at most
    int64_t tiles;                        // Winograd: of one pixel block at most
    int64_t lines;                        // Winograd along an axis: the same
    bool amx;                             // direct: products are those of AMX
};

template <class T>
ConvPlan make_plan(const ConvShape& shape, const ConvOperands<T>& operands, int threads,
                   int64_t most_scratch = kAnyScratch);

template <class T>
void run_tasks(const ConvShape& shape, const ConvOperands<T>& operands, const ConvPlan& plan,
               int64_t begin, int64_t end, void* scratch);

}  // namespace cvfast
