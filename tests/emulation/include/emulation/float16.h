// float16 and bfloat16 as CUDA's headers offer them: arithmetic in float, rounded once.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/types.h"
#include "cuda_runtime.h"

namespace cvfast::emulation {

template <class Storage>
struct alignas(2) Float16 {
    uint16_t bits;

    Float16() = default;
    Float16(float x) : bits(from_float<Storage>(x).bits) {}
    operator float() const { return to_float(Storage{bits}); }
};

template <class S>
struct alignas(4) Float16x2 {
    Float16<S> x, y;

    Float16x2() = default;
    Float16x2(Float16<S> x, Float16<S> y) : x(x), y(y) {}
};

// a b + c, rounded once: the double is exact but for its last bit, which then stands for the rest.
template <class S>
Float16<S> fused_multiply_add(Float16<S> a, Float16<S> b, Float16<S> c) {
    const double product = double{float(a)} * float(b);
    const double sum = product + float(c);
    auto narrow = static_cast<float>(sum);
    if (narrow != sum && std::isfinite(narrow)) {
        if (std::fabs(narrow) > std::fabs(sum)) narrow = std::nextafterf(narrow, 0.0f);
        narrow = std::bit_cast<float>(std::bit_cast<uint32_t>(narrow) | 1u);
    }
    return narrow;
}

}  // namespace cvfast::emulation

#define CVFAST_F16 cvfast::emulation::Float16<S>
#define CVFAST_F16X2 cvfast::emulation::Float16x2<S>
#define CVFAST_BINARY(name, expression)                    \
    template <class S>                                     \
    CVFAST_F16 name(CVFAST_F16 l, CVFAST_F16 r) {          \
        const float a = l, b = r;                          \
        return expression;                                 \
    }                                                      \
    template <class S>                                     \
    CVFAST_F16X2 name##2(CVFAST_F16X2 l, CVFAST_F16X2 r) { \
        return {name(l.x, r.x), name(l.y, r.y)};           \
    }
CVFAST_BINARY(__hadd, a + b)
CVFAST_BINARY(__hsub, a - b)
CVFAST_BINARY(__hmul, a* b)
CVFAST_BINARY(__hdiv, a / b)
CVFAST_BINARY(__hmax, fmaxf(a, b))
CVFAST_BINARY(__hmin, fminf(a, b))
CVFAST_BINARY(__hmax_nan, a != a || b != b ? NAN : fmaxf(a, b))
CVFAST_BINARY(__hmin_nan, a != a || b != b ? NAN : fminf(a, b))
#undef CVFAST_BINARY

#define CVFAST_OPERATOR(op, name)                              \
    template <class S>                                         \
    CVFAST_F16 operator op(CVFAST_F16 a, CVFAST_F16 b) {       \
        return name(a, b);                                     \
    }                                                          \
    template <class S>                                         \
    CVFAST_F16X2 operator op(CVFAST_F16X2 a, CVFAST_F16X2 b) { \
        return name##2(a, b);                                  \
    }
CVFAST_OPERATOR(+, __hadd)
CVFAST_OPERATOR(-, __hsub)
CVFAST_OPERATOR(*, __hmul)
CVFAST_OPERATOR(/, __hdiv)
#undef CVFAST_OPERATOR

template <class S>
CVFAST_F16 __hfma(CVFAST_F16 a, CVFAST_F16 b, CVFAST_F16 c) {
    return cvfast::emulation::fused_multiply_add(a, b, c);
}
template <class S>
CVFAST_F16X2 __hfma2(CVFAST_F16X2 a, CVFAST_F16X2 b, CVFAST_F16X2 c) {
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
template <class S>
CVFAST_F16 __hneg(CVFAST_F16 x) {
    x.bits ^= 0x8000u;
    return x;
}
template <class S>
bool __hisnan(CVFAST_F16 x) {
    return std::isnan(float(x));
}
template <class S>
float __low2float(CVFAST_F16X2 v) {
    return v.x;
}
template <class S>
float __high2float(CVFAST_F16X2 v) {
    return v.y;
}
#undef CVFAST_F16
#undef CVFAST_F16X2
