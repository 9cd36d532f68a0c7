// The depthwise kernel, compiled once per instruction-set level by foreach_isa.h.
//
// A tile is a few neighbouring outputs of one row, over one or two vectors of channels. Each input
// vector is loaded once per tile and kernel row, and feeds every output that it touches: at 3x3,
// stride 1, 14 outputs take 16 inputs and 3 weights for 42 multiply-adds, so arithmetic is the
// limit.

namespace cvfast {

#ifndef CVFAST_DEPTHWISE_RANGE
#define CVFAST_DEPTHWISE_RANGE
// What one call computes: rows of one channel block of one image, at one step of the multiplier.
struct DepthwiseRange {
    int64_t image, step;
    int64_t channel_begin, channel_end;
    int64_t row_begin, row_end;
    int64_t ring_rows;  // row i of x lies at i % ring_rows
};
#endif

namespace CVFAST_ISA_NAMESPACE {

// Outputs per tile. Both divide the row lengths of common networks (7, 14, 28, 56, 112); the long
// one needs 32 registers. Measured on Zen 5 at 3x3: 14 outputs of one vector run up to 1.25 times
// as fast as 7 outputs of two, and those 1.0 to 1.1 times as fast as 7 of one.
inline constexpr int kShortTile = 7;
inline constexpr int kLongTile = kVectors >= 32 ? 14 : kShortTile;

// Everything about a tile but its channels.
template <class T>
struct Tile {
    const DepthwiseShape& shape;
    const T* x;      // channel 0 of the first kernel row that lies in the image, column 0
    T* out;          // channel 0 of the first output
    int64_t column;  // input column of the first output's first tap; may be negative
    int64_t tap_begin, tap_end;  // kernel rows that lie in the image
    int outputs;                 // of the tile's, how many are stored
    int64_t wrap_tap, wrap;      // after this tap the rows go on `wrap` elements further back
};

// Weights of the vector at channel c.
inline const float* weights_at(const DepthwiseShape& s, const float* packed, int64_t c) {
    const int64_t panel = (s.kernel_h * s.kernel_w + 1) * kDepthwisePanel;
    const int64_t lane = c & (kDepthwisePanel - 1);
    return packed + (c - lane) / kDepthwisePanel * panel + lane;
}

template <class T, bool kPartial>
CVFAST_INLINE Vec load_channels(const T* p, int n) {
    if constexpr (kPartial) return load_n(p, n);
    return load(p);
}

// Stores `outputs` pixels of `n` channels each, which lie `multiplier` elements apart. Out of line:
// inside the tile it would crowd the instruction cache for a case that is rare.
template <class T>
__attribute__((noinline)) void scatter(const DepthwiseShape& s, const T* lanes, int outputs, int n,
                                       T* out) {
    for (int o = 0; o < outputs; ++o, lanes += kLanes, out += s.out_pixel) {
        for (int i = 0; i < n; ++i) out[i * s.multiplier] = lanes[i];
    }
}

// Channels [c, c + V * kLanes) of one tile, or its first `n` where kPartial. kWidth and kStride are
// the kernel's; kWidth 0 takes any kernel, stride and dilation. kEdge: some columns lie outside the
// image, or some outputs outside the row.
template <class T, int kWidth, int kStride, int kTile, int V, bool kEdge, bool kPartial>
void depthwise_tile(const Tile<T>& tile, const float* packed, int64_t c, int n) {
    const DepthwiseShape& s = tile.shape;
    const int64_t taps_w = kWidth ? kWidth : s.kernel_w;
    const float* w[V];
    Vec acc[V][kTile];
    CVFAST_UNROLL for (int v = 0; v < V; ++v) {
        w[v] = weights_at(s, packed, c + v * kLanes);
        CVFAST_UNROLL for (int o = 0; o < kTile; ++o) acc[v][o] = set1(0.f);
        w[v] += tile.tap_begin * taps_w * kDepthwisePanel;
    }
    const T* row = tile.x + c;
    for (int64_t tap = tile.tap_begin; tap < tile.tap_end; ++tap) {
        if constexpr (kWidth != 0) {
            Vec weight[V][kWidth];
            CVFAST_UNROLL for (int v = 0; v < V; ++v) {
                CVFAST_UNROLL for (int k = 0; k < kWidth; ++k) {
                    weight[v][k] = load(w[v] + k * kDepthwisePanel);
                }
                w[v] += kWidth * kDepthwisePanel;
            }
            const T* pixel = row + tile.column * s.x_pixel;
            constexpr int kColumns = (kTile - 1) * kStride + kWidth;
            CVFAST_UNROLL for (int j = 0; j < kColumns; ++j, pixel += s.x_pixel) {
                opaque(pixel);
                if constexpr (kEdge) {
                    if (static_cast<uint64_t>(tile.column + j) >= static_cast<uint64_t>(s.width)) {
                        continue;
                    }
                }
                CVFAST_UNROLL for (int v = 0; v < V; ++v) {
                    Vec x = load_channels<T, kPartial>(pixel + v * kLanes, n);
                    opaque(x);
                    CVFAST_UNROLL for (int k = 0; k < kWidth; ++k) {
                        const int o = (j - k) / kStride;
                        if (j >= k && (j - k) % kStride == 0 && o < kTile) {
                            acc[v][o] = fma(x, weight[v][k], acc[v][o]);
                        }
                    }
                }
            }
        } else {
            for (int64_t k = 0; k < taps_w; ++k) {
                int64_t column = tile.column + k * s.dilation_w;
                CVFAST_UNROLL for (int o = 0; o < kTile; ++o, column += s.stride_w) {
                    if (static_cast<uint64_t>(column) >= static_cast<uint64_t>(s.width)) continue;
                    CVFAST_UNROLL for (int v = 0; v < V; ++v) {
                        const Vec x =
                            load_channels<T, kPartial>(row + column * s.x_pixel + v * kLanes, n);
                        acc[v][o] = fma(x, load(w[v]), acc[v][o]);
                    }
                }
                CVFAST_UNROLL for (int v = 0; v < V; ++v) w[v] += kDepthwisePanel;
            }
        }
        row += s.dilation_h * s.x_row;
        if (tap == tile.wrap_tap) row -= tile.wrap;
    }
    // The bias comes last: sums that started at a large one would round each product at its size.
    CVFAST_UNROLL for (int v = 0; v < V; ++v) {
        const Vec bias = load(w[v] + (s.kernel_h - tile.tap_end) * taps_w * kDepthwisePanel);
        CVFAST_UNROLL for (int o = 0; o < kTile; ++o) acc[v][o] = add(acc[v][o], bias);
    }
    activate_all(acc, s.activation);
    T* out = tile.out + c * s.multiplier;
    if (s.multiplier != 1) {
        CVFAST_UNROLL for (int v = 0; v < V; ++v) {
            T lanes[kTile * kLanes];
            CVFAST_UNROLL for (int o = 0; o < kTile; ++o) store(lanes + o * kLanes, acc[v][o]);
            scatter(s, lanes, tile.outputs, n, out + v * kLanes * s.multiplier);
        }
        return;
    }
    CVFAST_UNROLL for (int o = 0; o < kTile; ++o, out += s.out_pixel) {
        if constexpr (kEdge) {
            if (o >= tile.outputs) break;
        }
        CVFAST_UNROLL for (int v = 0; v < V; ++v) {
            if constexpr (kPartial) {
                store_n(out + v * kLanes, acc[v][o], n);
            } else {
                store(out + v * kLanes, acc[v][o]);
            }
        }
    }
}

template <class T, int kWidth, int kStride, int kTile, bool kEdge>
CVFAST_INLINE void depthwise_tile_channels(const Tile<T>& tile, const float* packed,
                                           const DepthwiseRange& range) {
    int64_t c = range.channel_begin;
    const int64_t end = range.channel_end;
    if constexpr (kTile < kLongTile) {  // registers for two vectors
        for (; c + 2 * kLanes <= end; c += 2 * kLanes) {
            depthwise_tile<T, kWidth, kStride, kTile, 2, kEdge, false>(tile, packed, c, kLanes);
        }
    }
    for (; c + kLanes <= end; c += kLanes) {
        depthwise_tile<T, kWidth, kStride, kTile, 1, kEdge, false>(tile, packed, c, kLanes);
    }
    if (c < end) {
        const int n = static_cast<int>(end - c);
        depthwise_tile<T, kWidth, kStride, kTile, 1, true, true>(tile, packed, c, n);
    }
}

// One tile from output column o on, over all channels of the range.
template <class T, int kWidth, int kStride, int kTile>
CVFAST_INLINE void depthwise_tile_at(Tile<T> tile, const float* packed, const DepthwiseRange& range,
                                     int64_t o) {
    const DepthwiseShape& s = tile.shape;
    tile.column = o * s.stride_w - s.pad_left;
    tile.outputs = static_cast<int>(std::min<int64_t>(kTile, s.out_width - o));
    tile.out += o * s.out_pixel;
    const int64_t last = tile.column + (kTile - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w;
    if (tile.outputs == kTile && tile.column >= 0 && last < s.width) {
        depthwise_tile_channels<T, kWidth, kStride, kTile, false>(tile, packed, range);
    } else {
        depthwise_tile_channels<T, kWidth, kStride, kTile, true>(tile, packed, range);
    }
}

// The rows of a strip share their input through L1: three rows of this many bytes fit beside the
// weights.
inline constexpr int64_t kStripBytes = 8 * 1024;

template <class T, int kWidth, int kStride>
void depthwise_rows_of(const DepthwiseShape& s, const T* x, const float* packed, T* out,
                       const DepthwiseRange& range) {
    const int64_t panels = (s.channels + kDepthwisePanel - 1) / kDepthwisePanel;
    packed += range.step * panels * kDepthwisePanel * (s.kernel_h * s.kernel_w + 1);
    x += range.image * s.x_image;
    out += range.image * s.out_image + range.step;

    constexpr int kTile = kWidth ? kLongTile : kShortTile;
    const int64_t pixel_bytes = (range.channel_end - range.channel_begin) * int64_t{sizeof(T)};
    const int64_t strip_tiles =
        std::max<int64_t>(1, kStripBytes / (pixel_bytes * s.stride_w * kTile));
    const int64_t strip = strip_tiles * kTile;
    for (int64_t strip_begin = 0; strip_begin < s.out_width; strip_begin += strip) {
        const int64_t strip_end = std::min(s.out_width, strip_begin + strip);
        for (int64_t r = range.row_begin; r < range.row_end; ++r) {
            // Of the kernel's rows, those that lie in the image.
            const int64_t top = r * s.stride_h - s.pad_top;
            const int64_t above = (std::max<int64_t>(-top, 0) + s.dilation_h - 1) / s.dilation_h;
            const int64_t within =
                (std::max<int64_t>(s.height - top, 0) + s.dilation_h - 1) / s.dilation_h;
            const int64_t tap_begin = std::min(s.kernel_h, above);
            const int64_t tap_end = std::max(tap_begin, std::min(s.kernel_h, within));
            const int64_t first = (top + tap_begin * s.dilation_h) % range.ring_rows;
            const Tile<T> tile{s,
                               x + first * s.x_row,
                               out + r * s.out_row,
                               0,
                               tap_begin,
                               tap_end,
                               0,
                               tap_begin + range.ring_rows - 1 - first,
                               range.ring_rows * s.x_row};
            int64_t o = strip_begin;
            for (; strip_end - o > kShortTile; o += kTile) {
                depthwise_tile_at<T, kWidth, kStride, kTile>(tile, packed, range, o);
            }
            if (o < strip_end) {
                depthwise_tile_at<T, kWidth, kStride, kShortTile>(tile, packed, range, o);
            }
        }
    }
}

}  // namespace CVFAST_ISA_NAMESPACE
}  // namespace cvfast

#if defined(CVFAST_BF16_DOT)
#include "cpu/depthwise_bf16.h"
#endif

namespace cvfast::CVFAST_ISA_NAMESPACE {

template <class T>
void depthwise_rows(const DepthwiseShape& s, const T* x, const float* packed, T* out,
                    const DepthwiseRange& range) {
#if defined(CVFAST_BF16_DOT)
    if constexpr (std::is_same_v<T, BFloat16>) {
        if (takes_bf16(s)) return depthwise_bf16(s, x, packed, out, range);
    }
#endif
    if (s.dilation_w == 1 && (s.stride_w == 1 || s.stride_w == 2)) {
        const bool two = s.stride_w == 2;
        switch (s.kernel_w) {
            case 3:
                return two ? depthwise_rows_of<T, 3, 2>(s, x, packed, out, range)
                           : depthwise_rows_of<T, 3, 1>(s, x, packed, out, range);
            case 5:
                return two ? depthwise_rows_of<T, 5, 2>(s, x, packed, out, range)
                           : depthwise_rows_of<T, 5, 1>(s, x, packed, out, range);
            case 7:
                return two ? depthwise_rows_of<T, 7, 2>(s, x, packed, out, range)
                           : depthwise_rows_of<T, 7, 1>(s, x, packed, out, range);
        }
    }
    depthwise_rows_of<T, 0, 0>(s, x, packed, out, range);
}

}  // namespace cvfast::CVFAST_ISA_NAMESPACE
