// Depthwise convolution of bfloat16 images by VDPBF16PS, which adds two products to each lane:
// those of two kernel rows. Included by depthwise_kernel.h at the level that has the instruction.
//
// At 3x3 that is 6 dot products for 9 multiply-adds, and nothing is widened: unpacking 32 channels
// of two rows yields the pairs. It does so within 128 bits: one accumulator holds the channels 0-3,
// 8-11, 16-19, 24-27, another those between. Weights and bias are laid out in that order for each
// call, and stores restore it. The products are of the weights' nearest bfloat16 numbers.

namespace cvfast::CVFAST_ISA_NAMESPACE {

inline constexpr int kDotLanes = 2 * kLanes;
inline constexpr int kDotChannels = 128;  // of these the weights lie in L1
inline constexpr int kDotTaps = 5;        // along a row or a column, at most
inline constexpr int kDotTile = 7;        // outputs: 14 accumulators beside at most 10 weights
inline constexpr int kDotVectors = (kDotTaps + 1) / 2 * kDotTaps * 2 + 2;  // of 32 channels

// What a kernel row that lies outside the image, or that an odd row is paired with, reads.
inline constexpr BFloat16 kDotZeros[kDotChannels]{};

inline bool takes_dot(const DepthwiseShape& s) {
    return s.multiplier == 1 && s.dilation_h == 1 && s.dilation_w == 1 && s.kernel_h <= kDotTaps &&
           (s.kernel_w == 3 || s.kernel_w == 5) && (s.stride_w == 1 || s.stride_w == 2);
}

// The channel, of 32, in each lane of accumulator v.
CVFAST_INLINE __m512i dot_order(int v) {
    const __m512i low = _mm512_set_epi32(27, 26, 25, 24, 19, 18, 17, 16, 11, 10, 9, 8, 3, 2, 1, 0);
    return _mm512_add_epi32(low, _mm512_set1_epi32(4 * v));
}

// The weights of n <= 32 channels: for each pair of kernel rows and each column two vectors, then
// the bias.
inline void pack_dot(const DepthwiseShape& s, const float* packed, int64_t n, float* out) {
    const int64_t taps = s.kernel_h * s.kernel_w;
    const auto channels = [&](int64_t tap, int v) {
        const bool present = tap <= taps && v * kLanes < n;
        return present ? load(packed + (v * (taps + 1) + tap) * kDepthwisePanel) : set1(0.f);
    };
    const auto rows_of = [&](int64_t first, int64_t second, int v) {
        return __builtin_bit_cast(__m512i,
                                  _mm512_cvtne2ps_pbh(channels(second, v), channels(first, v)));
    };
    for (int64_t row = 0; row < s.kernel_h; row += 2) {
        for (int64_t k = 0; k < s.kernel_w; ++k) {
            const int64_t first = row * s.kernel_w + k;
            const int64_t second = row + 1 < s.kernel_h ? first + s.kernel_w : taps + 1;
            const __m512i a = rows_of(first, second, 0);
            const __m512i b = rows_of(first, second, 1);
            for (int v = 0; v < 2; ++v, out += kLanes) {
                // A row's channels are 16 elements before the other's; from 16 on they are b's.
                const __m512i c = dot_order(v);
                const __m512i at = _mm512_add_epi32(c, _mm512_and_si512(c, _mm512_set1_epi32(16)));
                const __m512i other = _mm512_or_si512(at, _mm512_set1_epi32(16));
                const __m512i both = _mm512_or_si512(at, _mm512_slli_epi32(other, 16));
                _mm512_storeu_si512(out, _mm512_permutex2var_epi16(a, both, b));
            }
        }
    }
    for (int v = 0; v < 2; ++v, out += kLanes) {
        store(out, _mm512_permutex2var_ps(channels(taps, 0), dot_order(v), channels(taps, 1)));
    }
}

// Everything about a tile but its channels.
struct DotTile {
    const DepthwiseShape& shape;
    const BFloat16* rows[kDotTaps + 1];  // per kernel row: the block's first channel, column 0
    int64_t pixel[kDotTaps + 1];         // elements from column to column: none among zeros
    BFloat16* out;                       // of the first output, the block's first channel
    int64_t column;                      // of the first output's first tap; may be negative
    int outputs;                         // of the tile's, how many are stored
};

// Channels [c, c + 32) of the block, or its first n where kPartial. kEdge: some columns lie outside
// the image, or some outputs outside the row.
template <int kWidth, int kStride, bool kEdge, bool kPartial>
void dot_tile(const DotTile& tile, const float* weights, int64_t c, int n) {
    const DepthwiseShape& s = tile.shape;
    const auto mask = static_cast<__mmask32>(~0u >> (kDotLanes - n));
    const auto load_row = [&](const BFloat16* p) {
        return kPartial ? _mm512_maskz_loadu_epi16(mask, p) : _mm512_loadu_si512(p);
    };
    Vec acc[2][kDotTile];
    CVFAST_UNROLL for (int o = 0; o < kDotTile; ++o) acc[0][o] = acc[1][o] = set1(0.f);
    for (int64_t row = 0; row < s.kernel_h; row += 2) {
        Vec weight[kWidth][2];
        CVFAST_UNROLL for (int k = 0; k < kWidth; ++k) {
            CVFAST_UNROLL for (int v = 0; v < 2; ++v, weights += kLanes) {
                weight[k][v] = load(weights);
            }
        }
        const BFloat16* a = tile.rows[row] + c + tile.column * tile.pixel[row];
        const BFloat16* b = tile.rows[row + 1] + c + tile.column * tile.pixel[row + 1];
        constexpr int kColumns = (kDotTile - 1) * kStride + kWidth;
        CVFAST_UNROLL for (int j = 0; j < kColumns;
                           ++j, a += tile.pixel[row], b += tile.pixel[row + 1]) {
            opaque(a);
            opaque(b);
            if constexpr (kEdge) {
                if (static_cast<uint64_t>(tile.column + j) >= static_cast<uint64_t>(s.width)) {
                    continue;
                }
            }
            const __m512i first = load_row(a), second = load_row(b);
            const Vec pairs[2] = {_mm512_castsi512_ps(_mm512_unpacklo_epi16(first, second)),
                                  _mm512_castsi512_ps(_mm512_unpackhi_epi16(first, second))};
            CVFAST_UNROLL for (int k = 0; k < kWidth; ++k) {
                const int o = (j - k) / kStride;
                if (j >= k && (j - k) % kStride == 0 && o < kDotTile) {
                    acc[0][o] = dot_pairs(pairs[0], weight[k][0], acc[0][o]);
                    acc[1][o] = dot_pairs(pairs[1], weight[k][1], acc[1][o]);
                }
            }
        }
    }
    // The bias comes last: sums that started at a large one would round each product at its size.
    CVFAST_UNROLL for (int v = 0; v < 2; ++v) {
        const Vec bias = load(weights + v * kLanes);
        CVFAST_UNROLL for (int o = 0; o < kDotTile; ++o) acc[v][o] = add(acc[v][o], bias);
    }
    activate_all(acc, s.activation);
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    BFloat16* out = tile.out + c;
    CVFAST_UNROLL for (int o = 0; o < kDotTile; ++o, out += s.out_pixel) {
        if constexpr (kEdge) {
            if (o >= tile.outputs) break;
        }
        const auto narrowed =
            __builtin_bit_cast(__m512i, _mm512_cvtne2ps_pbh(acc[1][o], acc[0][o]));
        const __m512i y = _mm512_permutexvar_epi64(order, narrowed);
        if constexpr (kPartial) {
            _mm512_mask_storeu_epi16(out, mask, y);
        } else {
            _mm512_storeu_si512(out, y);
        }
    }
}

template <int kWidth, int kStride, bool kEdge>
CVFAST_INLINE void dot_tile_channels(const DotTile& tile, const float* weights, int64_t stride,
                                     int64_t channels) {
    int64_t c = 0;
    for (; c + kDotLanes <= channels; c += kDotLanes, weights += stride) {
        dot_tile<kWidth, kStride, kEdge, false>(tile, weights, c, kDotLanes);
    }
    if (c < channels) {
        dot_tile<kWidth, kStride, true, true>(tile, weights, c, static_cast<int>(channels - c));
    }
}

template <int kWidth, int kStride>
void depthwise_dot_of(const DepthwiseShape& s, const BFloat16* x, const float* packed,
                      BFloat16* out, const DepthwiseRange& range) {
    const int64_t channels = range.channel_end - range.channel_begin;
    alignas(64) float weights[kDotChannels / kDotLanes * kDotVectors * kLanes];
    const int64_t stride = ((s.kernel_h + 1) / 2 * kWidth * 2 + 2) * kLanes;
    for (int64_t c = 0; c < channels; c += kDotLanes) {
        pack_dot(s, weights_at(s, packed, range.channel_begin + c),
                 std::min<int64_t>(kDotLanes, channels - c), weights + c / kDotLanes * stride);
    }
    x += range.image * s.x_image + range.channel_begin;
    out += range.image * s.out_image + range.channel_begin;

    const int64_t strip_tiles = std::max<int64_t>(
        1, kStripBytes / (channels * int64_t{sizeof(BFloat16)} * s.stride_w * kDotTile));
    const int64_t strip = strip_tiles * kDotTile;
    for (int64_t strip_begin = 0; strip_begin < s.out_width; strip_begin += strip) {
        const int64_t strip_end = std::min(s.out_width, strip_begin + strip);
        for (int64_t r = range.row_begin; r < range.row_end; ++r) {
            DotTile tile{s, {}, {}, out + r * s.out_row + strip_begin * s.out_pixel, 0, 0};
            const int64_t top = r * s.stride_h - s.pad_top;
            for (int64_t tap = 0; tap <= kDotTaps; ++tap) {
                const int64_t row = top + tap;
                const bool inside = tap < s.kernel_h && row >= 0 && row < s.height;
                tile.rows[tap] = inside ? x + row % range.ring_rows * s.x_row : kDotZeros;
                tile.pixel[tap] = inside ? s.x_pixel : 0;
            }
            for (int64_t o = strip_begin; o < strip_end; o += kDotTile) {
                tile.column = o * kStride - s.pad_left;
                tile.outputs = static_cast<int>(std::min<int64_t>(kDotTile, s.out_width - o));
                const int64_t last = tile.column + (kDotTile - 1) * kStride + kWidth - 1;
                if (tile.outputs == kDotTile && tile.column >= 0 && last < s.width) {
                    dot_tile_channels<kWidth, kStride, false>(tile, weights, stride, channels);
                } else {
                    dot_tile_channels<kWidth, kStride, true>(tile, weights, stride, channels);
                }
                tile.out += kDotTile * s.out_pixel;
            }
        }
    }
}

inline void depthwise_dot(const DepthwiseShape& s, const BFloat16* x, const float* packed,
                          BFloat16* out, DepthwiseRange range) {
    const auto kernel = s.kernel_w == 3
                            ? (s.stride_w == 2 ? depthwise_dot_of<3, 2> : depthwise_dot_of<3, 1>)
                            : (s.stride_w == 2 ? depthwise_dot_of<5, 2> : depthwise_dot_of<5, 1>);
    const int64_t end = range.channel_end;
    for (; range.channel_begin < end; range.channel_begin += kDotChannels) {
        range.channel_end = std::min(end, range.channel_begin + kDotChannels);
        kernel(s, x, packed, out, range);
    }
}

}  // namespace cvfast::CVFAST_ISA_NAMESPACE
