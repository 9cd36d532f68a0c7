// Four float lanes: NEON, which every aarch64 has. Included once, by foreach_isa.h.

namespace cvfast::CVFAST_ISA_NAMESPACE {

inline constexpr int kLanes = 4;
inline constexpr int kVectors = 32;
using Vec = float32x4_t;

CVFAST_INLINE Vec set1(float x) { return vdupq_n_f32(x); }
CVFAST_INLINE Vec set1_pair(double two) { return vreinterpretq_f32_f64(vdupq_n_f64(two)); }

CVFAST_INLINE Vec widen(const Half*, uint16x4_t h) { return vcvt_f32_f16(vreinterpret_f16_u16(h)); }
CVFAST_INLINE Vec widen(const BFloat16*, uint16x4_t h) {
    return vreinterpretq_f32_u32(vshll_n_u16(h, 16));
}

CVFAST_INLINE uint16x4_t narrow(const Half*, Vec v) {
    return vreinterpret_u16_f16(vcvt_f16_f32(v));
}
// Integer rounding: BFCVT is not part of every aarch64.
CVFAST_INLINE uint16x4_t narrow(const BFloat16*, Vec v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t number = vceqq_f32(v, v);
    return vshrn_n_u32(vbslq_u32(number, rounded, vdupq_n_u32(0x7fc00000)), 16);
}

CVFAST_INLINE Vec load(const float* p) { return vld1q_f32(p); }

template <class T>
CVFAST_INLINE Vec load(const T* p) {
    return widen(p, vld1_u16(reinterpret_cast<const uint16_t*>(p)));
}

template <class T>
CVFAST_INLINE Vec load_n(const T* p, int n) {
    T lanes[kLanes] = {};
    std::memcpy(lanes, p, static_cast<unsigned>(n) * sizeof(T));
    return load(lanes);
}

CVFAST_INLINE void store(float* p, Vec v) { vst1q_f32(p, v); }

template <class T>
CVFAST_INLINE void store(T* p, Vec v) {
    vst1_u16(reinterpret_cast<uint16_t*>(p), narrow(p, v));
}

template <class T>
CVFAST_INLINE void store_n(T* p, Vec v, int n) {
    T lanes[kLanes];
    store(lanes, v);
    std::memcpy(p, lanes, static_cast<unsigned>(n) * sizeof(T));
}

CVFAST_INLINE Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
CVFAST_INLINE Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
CVFAST_INLINE Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
CVFAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }

// Sums of neighbouring lanes, in the low half.
CVFAST_INLINE Vec add_neighbours(Vec v) { return vpaddq_f32(v, v); }

// c plus the dot product of each lane's two bfloat16 numbers.
CVFAST_INLINE Vec even(Vec v) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(v), 16));
}
CVFAST_INLINE Vec odd(Vec v) {
    const uint32x4_t high = vdupq_n_u32(0xffff0000u);
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), high));
}
CVFAST_INLINE Vec dot_pairs(Vec a, Vec b, Vec c) {
    return fma(even(a), even(b), fma(odd(a), odd(b), c));
}

CVFAST_INLINE Vec div(Vec a, Vec b) { return vdivq_f32(a, b); }

// 2^n, n the integer in a lane's low bits.
CVFAST_INLINE Vec pow2(Vec n) {
    const uint32x4_t exponent = vaddq_u32(vreinterpretq_u32_f32(n), vdupq_n_u32(127));
    return vreinterpretq_f32_u32(vshlq_n_u32(exponent, 23));
}

// FMAX and FMIN return NaN where either operand is.
CVFAST_INLINE Vec max_nan(Vec a, Vec b) { return vmaxq_f32(a, b); }
CVFAST_INLINE Vec max_keep_nan(Vec x, float bound) { return vmaxq_f32(x, set1(bound)); }
CVFAST_INLINE Vec min_keep_nan(Vec x, float bound) { return vminq_f32(x, set1(bound)); }

CVFAST_INLINE bool all_finite(Vec v) {
    const Vec nan = mul(v, set1(0.f));  // that of an infinity is NaN too
    return vminvq_u32(vceqq_f32(nan, nan)) != 0;
}

}  // namespace cvfast::CVFAST_ISA_NAMESPACE
