// Eight float lanes: AVX2, FMA, F16C. Included once, by foreach_isa.h.

namespace cvfast::CVFAST_ISA_NAMESPACE {

inline constexpr int kLanes = 8;
inline constexpr int kVectors = 16;
using Vec = __m256;

CVFAST_INLINE Vec set1(float x) { return _mm256_set1_ps(x); }
CVFAST_INLINE Vec set1_pair(double two) { return _mm256_castpd_ps(_mm256_set1_pd(two)); }

CVFAST_INLINE Vec widen(const Half*, __m128i h) { return _mm256_cvtph_ps(h); }
CVFAST_INLINE Vec widen(const BFloat16*, __m128i h) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}

CVFAST_INLINE __m128i narrow(const Half*, Vec v) {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
CVFAST_INLINE __m128i narrow(const BFloat16*, Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    rounded = _mm256_srli_epi32(rounded, 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}

CVFAST_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }

template <class T>
CVFAST_INLINE Vec load(const T* p) {
    return widen(p, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

template <class T>
CVFAST_INLINE Vec load_n(const T* p, int n) {
    T lanes[kLanes] = {};
    std::memcpy(lanes, p, static_cast<unsigned>(n) * sizeof(T));
    return load(lanes);
}

CVFAST_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }

template <class T>
CVFAST_INLINE void store(T* p, Vec v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(p, v));
}

template <class T>
CVFAST_INLINE void store_n(T* p, Vec v, int n) {
    T lanes[kLanes];
    store(lanes, v);
    std::memcpy(p, lanes, static_cast<unsigned>(n) * sizeof(T));
}

CVFAST_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
CVFAST_INLINE Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
CVFAST_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
CVFAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

// Sums of neighbouring lanes, in the low half.
CVFAST_INLINE Vec add_neighbours(Vec v) {
    const __m256d sums = _mm256_castps_pd(_mm256_hadd_ps(v, v));
    return _mm256_castpd_ps(_mm256_permute4x64_pd(sums, 0x08));
}

// c plus the dot product of each lane's two bfloat16 numbers.
CVFAST_INLINE Vec even(Vec v) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v), 16));
}
CVFAST_INLINE Vec odd(Vec v) {
    return _mm256_and_ps(v, set1(__builtin_bit_cast(float, 0xffff0000u)));
}
CVFAST_INLINE Vec dot_pairs(Vec a, Vec b, Vec c) {
    return fma(even(a), even(b), fma(odd(a), odd(b), c));
}

CVFAST_INLINE Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }

// 2^n, n the integer in a lane's low bits.
CVFAST_INLINE Vec pow2(Vec n) {
    const __m256i biased = _mm256_add_epi32(_mm256_castps_si256(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}

// NaN where either is.
CVFAST_INLINE Vec max_nan(Vec a, Vec b) {
    return _mm256_or_ps(_mm256_max_ps(a, b), _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}

// MAXPS and MINPS return their second operand where either is NaN.
CVFAST_INLINE Vec max_keep_nan(Vec x, float bound) { return _mm256_max_ps(set1(bound), x); }
CVFAST_INLINE Vec min_keep_nan(Vec x, float bound) { return _mm256_min_ps(set1(bound), x); }

CVFAST_INLINE bool all_finite(Vec v) {
    const Vec nan = mul(v, set1(0.f));  // that of an infinity is NaN too
    return _mm256_movemask_ps(_mm256_cmp_ps(nan, nan, _CMP_UNORD_Q)) == 0;
}

}  // namespace cvfast::CVFAST_ISA_NAMESPACE
