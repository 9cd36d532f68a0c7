// Depthwise convolution of bfloat16 images, 32 channels at a time, for the shapes of takes_bf16().
// Included by depthwise_kernel.h at the levels that have AVX512-BF16; depthwise_dot.h and
// depthwise_pairs.h are two ways to compute a tile.

namespace cvfast::CVFAST_ISA_NAMESPACE {

inline constexpr int kBf16Channels = 2 * kLanes;
inline constexpr int kBf16Outputs = 7;           // of a row of a tile
inline constexpr int kBf16Taps = 5;              // along a row or a column, at most
inline constexpr int kBf16WeightChannels = 128;  // of these the weights lie in L1
inline constexpr int kBf16Weights = 2 * (kBf16Taps * kBf16Taps + 1) * kLanes;  // at most

// Everything about a tile but its channels.
struct Bf16Tile {
    const DepthwiseShape& shape;
    const BFloat16* rows[kBf16Taps + 2];  // first channel, column 0; null: outside the image
    BFloat16* out;                        // of the first output, first channel
    int64_t column;                       // of the first output's first tap; may be negative
    int outputs;                          // of a row of the tile, how many are stored
};

}  // namespace cvfast::CVFAST_ISA_NAMESPACE

// Each defines kBf16Rows, the rows of outputs of a tile; pack_bf16(), which lays out the weights
// of n <= 32 channels; and bf16_tile(), channels [c, c + n) of a tile. There kPartial: n < 32;
// kEdge: some columns lie outside the image, or some outputs outside the row.
#if defined(CVFAST_HAS_AMX)
#include "cpu/depthwise_pairs.h"
#else
#include "cpu/depthwise_dot.h"
#endif

namespace cvfast::CVFAST_ISA_NAMESPACE {

template <int kRows, int kWidth, int kStride, bool kEdge>
CVFAST_INLINE void bf16_tile_channels(const Bf16Tile& tile, const float* weights,
                                      int64_t channels) {
    int64_t c = 0;
    for (; c + kBf16Channels <= channels; c += kBf16Channels, weights += kBf16Weights) {
        bf16_tile<kRows, kWidth, kStride, kEdge, false>(tile, weights, c, kBf16Channels);
    }
    if (c < channels) {
        bf16_tile<kRows, kWidth, kStride, true, true>(tile, weights, c,
                                                      static_cast<int>(channels - c));
    }
}

// kRows rows of outputs from row r on: those of a strip of columns, over all channels of the range.
template <int kRows, int kWidth, int kStride>
CVFAST_INLINE void bf16_rows(const DepthwiseShape& s, const BFloat16* x, const float* weights,
                             BFloat16* out, const DepthwiseRange& range, int64_t r,
                             int64_t strip_begin, int64_t strip_end) {
    Bf16Tile tile{s, {}, out + r * s.out_row + strip_begin * s.out_pixel, 0, 0};
    const int64_t top = r * s.stride_h - s.pad_top;
    for (int64_t i = 0; i < (kRows - 1) * s.stride_h + s.kernel_h; ++i) {
        const int64_t row = top + i;
        if (row >= 0 && row < s.height) tile.rows[i] = x + row % range.ring_rows * s.x_row;
    }
    for (int64_t o = strip_begin; o < strip_end; o += kBf16Outputs) {
        tile.column = o * kStride - s.pad_left;
        tile.outputs = static_cast<int>(std::min<int64_t>(kBf16Outputs, s.out_width - o));
        const int64_t last = tile.column + (kBf16Outputs - 1) * kStride + kWidth - 1;
        const int64_t channels = range.channel_end - range.channel_begin;
        if (tile.outputs == kBf16Outputs && tile.column >= 0 && last < s.width) {
            bf16_tile_channels<kRows, kWidth, kStride, false>(tile, weights, channels);
        } else {
            bf16_tile_channels<kRows, kWidth, kStride, true>(tile, weights, channels);
        }
        tile.out += kBf16Outputs * s.out_pixel;
    }
}

template <int kWidth, int kStride>
void depthwise_bf16_of(const DepthwiseShape& s, const BFloat16* x, const float* packed,
                       BFloat16* out, const DepthwiseRange& range) {
    const int64_t channels = range.channel_end - range.channel_begin;
    alignas(64) float weights[kBf16WeightChannels / kBf16Channels * kBf16Weights];
    for (int64_t c = 0; c < channels; c += kBf16Channels) {
        pack_bf16(s, weights_at(s, packed, range.channel_begin + c),
                  std::min<int64_t>(kBf16Channels, channels - c),
                  weights + c / kBf16Channels * kBf16Weights);
    }
    x += range.image * s.x_image + range.channel_begin;
    out += range.image * s.out_image + range.channel_begin;

    const int64_t tile_bytes = channels * int64_t{sizeof(BFloat16)} * s.stride_w * kBf16Outputs;
    const int64_t strip = std::max<int64_t>(1, kStripBytes / tile_bytes) * kBf16Outputs;
    for (int64_t begin = 0; begin < s.out_width; begin += strip) {
        const int64_t end = std::min(s.out_width, begin + strip);
        int64_t r = range.row_begin;
        for (; r + kBf16Rows <= range.row_end; r += kBf16Rows) {
            bf16_rows<kBf16Rows, kWidth, kStride>(s, x, weights, out, range, r, begin, end);
        }
        for (; r < range.row_end; ++r) {
            bf16_rows<1, kWidth, kStride>(s, x, weights, out, range, r, begin, end);
        }
    }
}

inline bool takes_bf16(const DepthwiseShape& s) {
    return s.multiplier == 1 && s.dilation_h == 1 && s.dilation_w == 1 && s.kernel_h <= kBf16Taps &&
           (s.kernel_w == 3 || s.kernel_w == 5) && (s.stride_w == 1 || s.stride_w == 2) &&
           (kBf16Rows == 1 || (s.kernel_h == s.kernel_w && s.stride_h == s.stride_w));
}

inline void depthwise_bf16(const DepthwiseShape& s, const BFloat16* x, const float* packed,
                           BFloat16* out, DepthwiseRange range) {
    const bool two = s.stride_w == 2;
    const auto kernel = s.kernel_w == 3 ? (two ? depthwise_bf16_of<3, 2> : depthwise_bf16_of<3, 1>)
                                        : (two ? depthwise_bf16_of<5, 2> : depthwise_bf16_of<5, 1>);
    const int64_t end = range.channel_end;
    for (; range.channel_begin < end; range.channel_begin += kBf16WeightChannels) {
        range.channel_end = std::min(end, range.channel_begin + kBf16WeightChannels);
        kernel(s, x, packed, out, range);
    }
}

}  // namespace cvfast::CVFAST_ISA_NAMESPACE
