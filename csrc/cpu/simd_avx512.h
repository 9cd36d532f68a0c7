// Sixteen float lanes: AVX-512 F, BW, VL, DQ. Included once, by foreach_isa.h.

namespace cvfast::CVFAST_ISA_NAMESPACE {

inline constexpr int kLanes = 16;
inline constexpr int kVectors = 32;
using Vec = __m512;

CVFAST_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
CVFAST_INLINE Vec set1_pair(double two) { return _mm512_castpd_ps(_mm512_set1_pd(two)); }

CVFAST_INLINE Vec widen(const Half*, __m256i h) { return _mm512_cvtph_ps(h); }
CVFAST_INLINE Vec widen(const BFloat16*, __m256i h) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

CVFAST_INLINE __m256i narrow(const Half*, Vec v) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#if defined(CVFAST_BF16_DOT)
// Subnormals become zero, as they are to VDPBF16PS.
CVFAST_INLINE __m256i narrow(const BFloat16*, Vec v) {
    return __builtin_bit_cast(__m256i, _mm512_cvtneps_pbh(v));
}
#else
CVFAST_INLINE __m256i narrow(const BFloat16*, Vec v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_srli_epi32(rounded, 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(rounded, nan, 0x7fc0));
}
#endif

CVFAST_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

CVFAST_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
CVFAST_INLINE Vec load_n(const float* p, int n) { return _mm512_maskz_loadu_ps(first(n), p); }

template <class T>
CVFAST_INLINE Vec load(const T* p) {
    return widen(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <class T>
CVFAST_INLINE Vec load_n(const T* p, int n) {
    return widen(p, _mm256_maskz_loadu_epi16(first(n), p));
}

CVFAST_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
CVFAST_INLINE void store_n(float* p, Vec v, int n) { _mm512_mask_storeu_ps(p, first(n), v); }

template <class T>
CVFAST_INLINE void store(T* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(p, v));
}
template <class T>
CVFAST_INLINE void store_n(T* p, Vec v, int n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow(p, v));
}

#if defined(CVFAST_BF16_DOT)
CVFAST_INLINE void store_two(BFloat16* p, Vec low, Vec high) {
    _mm512_storeu_si512(p, __builtin_bit_cast(__m512i, _mm512_cvtne2ps_pbh(high, low)));
}

// Their lanes in turn: even 0, odd 0, even 1, ...
CVFAST_INLINE __m512i narrow_pairs(Vec evens, Vec odds) {
    const __m512i halves = __builtin_bit_cast(__m512i, _mm512_cvtne2ps_pbh(odds, evens));
    const __m512i low = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i order =
        _mm512_or_si512(low, _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16));
    return _mm512_permutexvar_epi16(order, halves);
}
#endif

CVFAST_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
CVFAST_INLINE Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
CVFAST_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
CVFAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

// Sums of neighbouring lanes, in the low half.
CVFAST_INLINE Vec add_neighbours(Vec v) {
    return _mm512_maskz_compress_ps(0x5555, _mm512_add_ps(v, _mm512_permute_ps(v, 0xb1)));
}

// Of each lane's two bfloat16 numbers the first and the second.
CVFAST_INLINE Vec even(Vec v) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 16));
}
CVFAST_INLINE Vec odd(Vec v) {
    return _mm512_and_ps(v, set1(__builtin_bit_cast(float, 0xffff0000u)));
}

// c plus the dot product of each lane's two bfloat16 numbers.
#if defined(CVFAST_BF16_DOT)
CVFAST_INLINE Vec dot_pairs(Vec a, Vec b, Vec c) {
    return _mm512_dpbf16_ps(c, __builtin_bit_cast(__m512bh, a), __builtin_bit_cast(__m512bh, b));
}
#else
CVFAST_INLINE Vec dot_pairs(Vec a, Vec b, Vec c) {
    return fma(even(a), even(b), fma(odd(a), odd(b), c));
}
#endif

CVFAST_INLINE Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }

// 2^n, n the integer in a lane's low bits.
CVFAST_INLINE Vec pow2(Vec n) {
    const __m512i biased = _mm512_add_epi32(_mm512_castps_si512(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}

// NaN where either is.
CVFAST_INLINE Vec max_nan(Vec a, Vec b) {
    return _mm512_mask_max_ps(a, _mm512_cmp_ps_mask(a, a, _CMP_ORD_Q), a, b);
}

// MAXPS and MINPS return their second operand where either is NaN.
CVFAST_INLINE Vec max_keep_nan(Vec x, float bound) { return _mm512_max_ps(set1(bound), x); }
CVFAST_INLINE Vec min_keep_nan(Vec x, float bound) { return _mm512_min_ps(set1(bound), x); }

CVFAST_INLINE bool all_finite(Vec v) {
    constexpr int kNanOrInfinity = 0x99;  // quiet NaN, the two infinities, signalling NaN
    return _mm512_fpclass_ps_mask(v, kNanOrInfinity) == 0;
}

}  // namespace cvfast::CVFAST_ISA_NAMESPACE
