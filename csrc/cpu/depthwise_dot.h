// Depthwise tiles of bfloat16 by VDPBF16PS, which adds two products to each lane: those of two
// kernel rows. Included by depthwise_bf16.h.
//
// At 3x3 that is 6 dot products for 9 multiply-adds, and nothing is widened: unpacking 32 channels
// of two rows yields the pairs. It does so within 128 bits: one accumulator holds the channels 0-3,
// 8-11, 16-19, 24-27, another those between. Weights and bias are laid out in that order for each
// call, and stores restore it. The products are of the weights' nearest bfloat16 numbers.

namespace cvfast::CVFAST_ISA_NAMESPACE {

inline constexpr int kBf16Rows = 1;

// What a kernel row that lies outside the image, or that an odd row is paired with, reads.
inline constexpr BFloat16 kDotZeros[kBf16WeightChannels]{};

// The channel, of 32, in each lane of accumulator v.
CVFAST_INLINE __m512i dot_order(int v) {
    const __m512i low = _mm512_set_epi32(27, 26, 25, 24, 19, 18, 17, 16, 11, 10, 9, 8, 3, 2, 1, 0);
    return _mm512_add_epi32(low, _mm512_set1_epi32(4 * v));
}

// The weights of n <= 32 channels: for each pair of kernel rows and each column two vectors, then
// the bias.
inline void pack_bf16(const DepthwiseShape& s, const float* packed, int64_t n, float* out) {
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

template <int kRows, int kWidth, int kStride, bool kEdge, bool kPartial>
void bf16_tile(const Bf16Tile& tile, const float* weights, int64_t c, int n) {
    static_assert(kRows == 1);
    const DepthwiseShape& s = tile.shape;
    const auto mask = static_cast<__mmask32>(~0u >> (kBf16Channels - n));
    const auto load_row = [&](const BFloat16* p) {
        return kPartial ? _mm512_maskz_loadu_epi16(mask, p) : _mm512_loadu_si512(p);
    };
    Vec acc[2][kBf16Outputs];
    CVFAST_UNROLL for (int o = 0; o < kBf16Outputs; ++o) acc[0][o] = acc[1][o] = set1(0.f);
    for (int64_t row = 0; row < s.kernel_h; row += 2) {
        Vec weight[kWidth][2];
        CVFAST_UNROLL for (int k = 0; k < kWidth; ++k) {
            CVFAST_UNROLL for (int v = 0; v < 2; ++v, weights += kLanes) {
                weight[k][v] = load(weights);
            }
        }
        const BFloat16 *row_a = tile.rows[row], *row_b = tile.rows[row + 1];
        const int64_t pixel_a = row_a ? s.x_pixel : 0, pixel_b = row_b ? s.x_pixel : 0;
        const BFloat16* a = (row_a ? row_a : kDotZeros) + c + tile.column * pixel_a;
        const BFloat16* b = (row_b ? row_b : kDotZeros) + c + tile.column * pixel_b;
        constexpr int kColumns = (kBf16Outputs - 1) * kStride + kWidth;
        CVFAST_UNROLL for (int j = 0; j < kColumns; ++j, a += pixel_a, b += pixel_b) {
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
                if (j >= k && (j - k) % kStride == 0 && o < kBf16Outputs) {
                    acc[0][o] = dot_pairs(pairs[0], weight[k][0], acc[0][o]);
                    acc[1][o] = dot_pairs(pairs[1], weight[k][1], acc[1][o]);
                }
            }
        }
    }
    // The bias comes last: sums that started at a large one would round each product at its size.
    CVFAST_UNROLL for (int v = 0; v < 2; ++v) {
        const Vec bias = load(weights + v * kLanes);
        CVFAST_UNROLL for (int o = 0; o < kBf16Outputs; ++o) acc[v][o] = add(acc[v][o], bias);
    }
    activate_all(acc, s.activation);
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    BFloat16* out = tile.out + c;
    CVFAST_UNROLL for (int o = 0; o < kBf16Outputs; ++o, out += s.out_pixel) {
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

}  // namespace cvfast::CVFAST_ISA_NAMESPACE
