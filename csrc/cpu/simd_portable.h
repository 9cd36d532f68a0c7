// Four float lanes in the compiler's vector extension: runs on every target (SSE2, NEON, ...).
// Included once, by foreach_isa.h.

namespace cvfast::CVFAST_ISA_NAMESPACE {

inline constexpr int kLanes = 4;
inline constexpr int kVectors = 16;  // architectural vector registers
typedef float Vec __attribute__((vector_size(16)));

CVFAST_INLINE Vec set1(float x) { return Vec{x, x, x, x}; }
CVFAST_INLINE Vec set1_pair(double two) {
    typedef double Pairs __attribute__((vector_size(16)));
    return __builtin_bit_cast(Vec, Pairs{two, two});
}

CVFAST_INLINE Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class T>
CVFAST_INLINE Vec load(const T* p) {
    return Vec{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}

template <class T>
CVFAST_INLINE Vec load_n(const T* p, int n) {
    Vec v{};
    for (int i = 0; i < n; ++i) v[i] = to_float(p[i]);
    return v;
}

CVFAST_INLINE void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

template <class T>
CVFAST_INLINE void store(T* p, Vec v) {
    for (int i = 0; i < kLanes; ++i) p[i] = from_float<T>(v[i]);
}

template <class T>
CVFAST_INLINE void store_n(T* p, Vec v, int n) {
    for (int i = 0; i < n; ++i) p[i] = from_float<T>(v[i]);
}

CVFAST_INLINE Vec add(Vec a, Vec b) { return a + b; }
CVFAST_INLINE Vec sub(Vec a, Vec b) { return a - b; }
CVFAST_INLINE Vec mul(Vec a, Vec b) { return a * b; }
CVFAST_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

// Sums of neighbouring lanes, in the low half.
CVFAST_INLINE Vec add_neighbours(Vec v) { return Vec{v[0] + v[1], v[2] + v[3], 0, 0}; }

// c plus the dot product of each lane's two bfloat16 numbers.
typedef uint32_t Bits __attribute__((vector_size(16)));
CVFAST_INLINE Vec even(Vec v) { return __builtin_bit_cast(Vec, __builtin_bit_cast(Bits, v) << 16); }
CVFAST_INLINE Vec odd(Vec v) {
    return __builtin_bit_cast(Vec, __builtin_bit_cast(Bits, v) & 0xffff0000u);
}
CVFAST_INLINE Vec dot_pairs(Vec a, Vec b, Vec c) {
    return fma(even(a), even(b), fma(odd(a), odd(b), c));
}

CVFAST_INLINE Vec div(Vec a, Vec b) { return a / b; }

// 2^n, n the integer in a lane's low bits.
CVFAST_INLINE Vec pow2(Vec n) {
    return __builtin_bit_cast(Vec, (__builtin_bit_cast(Bits, n) + 127) << 23);
}

// NaN where either is.
CVFAST_INLINE Vec max_nan(Vec a, Vec b) { return (a > b) | (a != a) ? a : b; }

// A NaN in x is kept: comparisons with NaN are false.
CVFAST_INLINE Vec max_keep_nan(Vec x, float bound) {
    const Vec b = set1(bound);
    return x < b ? b : x;
}
CVFAST_INLINE Vec min_keep_nan(Vec x, float bound) {
    const Vec b = set1(bound);
    return x > b ? b : x;
}

CVFAST_INLINE bool all_finite(Vec v) {
    const Vec nan = v * 0.f;  // that of an infinity is NaN too
    for (int i = 0; i < kLanes; ++i) {
        if (nan[i] != nan[i]) return false;
    }
    return true;
}

}  // namespace cvfast::CVFAST_ISA_NAMESPACE
