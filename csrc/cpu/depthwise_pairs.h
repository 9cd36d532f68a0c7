// Depthwise tiles of bfloat16 where VDPBF16PS takes as long as four multiply-adds: of 32 channels
// the even ones and the odd ones apart, since widening every other channel takes one instruction,
// and widening neighbours two. Included by depthwise_bf16.h.

namespace cvfast::CVFAST_ISA_NAMESPACE {

// Two rows of outputs share most of their inputs, and widen each once for both.
inline constexpr int kBf16Rows = 2;

// Which of 32 channels a vector holds.
enum class Bf16Lanes { even, odd, first };

template <Bf16Lanes kLanesOf, bool kPartial>
CVFAST_INLINE Vec bf16_channels(const BFloat16* p, __mmask32 mask) {
    if constexpr (kLanesOf == Bf16Lanes::first) {
        return widen(p, _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p));
    } else {
        const __m512i both = kPartial ? _mm512_maskz_loadu_epi16(mask, p) : _mm512_loadu_si512(p);
        const Vec pairs = _mm512_castsi512_ps(both);
        return kLanesOf == Bf16Lanes::even ? even(pairs) : odd(pairs);
    }
}

// The weights of n <= 32 channels: for each tap, and then for the bias, the even channels and the
// odd ones. Up to 16 channels lie as they are, before a vector that is not used.
inline void pack_bf16(const DepthwiseShape& s, const float* packed, int64_t n, float* out) {
    const int64_t rows = s.taps() + 1;
    const __m512i evens =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
    for (int64_t i = 0; i < rows; ++i, packed += kDepthwisePanel, out += kBf16Channels) {
        const Vec low = load(packed);
        if (n <= kLanes) {
            store(out, low);
            continue;
        }
        const Vec high = load(packed + rows * kDepthwisePanel);
        store(out, _mm512_permutex2var_ps(low, evens, high));
        store(out + kLanes, _mm512_permutex2var_ps(low, odds, high));
    }
}

// The activated sums of a tile.
template <Bf16Lanes kLanesOf, int kRows, int kWidth, int kStride, bool kEdge, bool kPartial>
CVFAST_INLINE void bf16_sums(const Bf16Tile& tile, const float* weights, int64_t c, __mmask32 mask,
                             Vec (&acc)[kRows][kBf16Outputs]) {
    const DepthwiseShape& s = tile.shape;
    if (kLanesOf == Bf16Lanes::odd) weights += kLanes;
    // Sums that start at a large bias round each product at its size; results have only 8 bits.
    const Vec bias = load(weights + kWidth * kWidth * kBf16Channels);
    CVFAST_UNROLL for (int r = 0; r < kRows; ++r) {
        CVFAST_UNROLL for (int o = 0; o < kBf16Outputs; ++o) acc[r][o] = bias;
    }
    CVFAST_UNROLL for (int i = 0; i < (kRows - 1) * kStride + kWidth; ++i) {
        if (!tile.rows[i]) continue;
        // Of each row of outputs the kernel row that reads this row of inputs, if any.
        Vec weight[kRows][kWidth];
        CVFAST_UNROLL for (int r = 0; r < kRows; ++r) {
            const int row = i - r * kStride;
            CVFAST_UNROLL for (int k = 0; k < kWidth; ++k) {
                if (row < 0 || row >= kWidth) continue;
                weight[r][k] = load(weights + (row * kWidth + k) * kBf16Channels);
            }
        }
        const BFloat16* pixel = tile.rows[i] + c + tile.column * s.x_pixel;
        constexpr int kColumns = (kBf16Outputs - 1) * kStride + kWidth;
        CVFAST_UNROLL for (int j = 0; j < kColumns; ++j, pixel += s.x_pixel) {
            opaque(pixel);
            if constexpr (kEdge) {
                if (static_cast<uint64_t>(tile.column + j) >= static_cast<uint64_t>(s.width)) {
                    continue;
                }
            }
            Vec x = bf16_channels<kLanesOf, kPartial>(pixel, mask);
            opaque(x);
            CVFAST_UNROLL for (int r = 0; r < kRows; ++r) {
                const int row = i - r * kStride;
                CVFAST_UNROLL for (int k = 0; k < kWidth; ++k) {
                    const int o = (j - k) / kStride;
                    if (row < 0 || row >= kWidth || j < k || (j - k) % kStride) continue;
                    if (o < kBf16Outputs) acc[r][o] = fma(x, weight[r][k], acc[r][o]);
                }
            }
        }
    }
    activate_all(acc, s.activation);
}

template <int kRows, int kWidth, int kStride, bool kEdge, bool kPartial>
void bf16_tile(const Bf16Tile& tile, const float* weights, int64_t c, int n) {
    const DepthwiseShape& s = tile.shape;
    const auto mask = static_cast<__mmask32>(~0u >> (kBf16Channels - n));
    Vec acc[kRows][kBf16Outputs];
    alignas(64) float evens[kRows][kBf16Outputs][kLanes];
    const bool few = kPartial && n <= kLanes;
    if (few) {
        bf16_sums<Bf16Lanes::first, kRows, kWidth, kStride, kEdge, kPartial>(tile, weights, c, mask,
                                                                             acc);
    } else {
        bf16_sums<Bf16Lanes::even, kRows, kWidth, kStride, kEdge, kPartial>(tile, weights, c, mask,
                                                                            acc);
        CVFAST_UNROLL for (int r = 0; r < kRows; ++r) {
            CVFAST_UNROLL for (int o = 0; o < kBf16Outputs; ++o) store(evens[r][o], acc[r][o]);
        }
        bf16_sums<Bf16Lanes::odd, kRows, kWidth, kStride, kEdge, kPartial>(tile, weights, c, mask,
                                                                           acc);
    }
    BFloat16* row = tile.out + c;
    CVFAST_UNROLL for (int r = 0; r < kRows; ++r, row += s.out_row) {
        BFloat16* out = row;
        CVFAST_UNROLL for (int o = 0; o < kBf16Outputs; ++o, out += s.out_pixel) {
            if constexpr (kEdge) {
                if (o >= tile.outputs) break;
            }
            if constexpr (!kPartial) {
                _mm512_storeu_si512(out, narrow_pairs(load(evens[r][o]), acc[r][o]));
            } else if (few) {
                store_n(out, acc[r][o], n);
            } else {
                const __m512i y = narrow_pairs(load(evens[r][o]), acc[r][o]);
                _mm512_mask_storeu_epi16(out, mask, y);
            }
        }
    }
}

}  // namespace cvfast::CVFAST_ISA_NAMESPACE
