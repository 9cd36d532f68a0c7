// 16-bit storage types and their exact scalar conversions, shared by every backend.
#pragma once

#include <bit>
#include <cstdint>

namespace cvfast {

struct BFloat16 {
    uint16_t bits;
};

struct Half {
    uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

inline float to_float(Half x) {
    const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
    const uint32_t magnitude = x.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) {  // infinity or NaN
        return std::bit_cast<float>(sign | 0x7f800000u | (magnitude << 13));
    }
    // Placing the magnitude in the low half of the float range makes normals and subnormals alike
    // off by exactly 2^112; the product is exact.
    const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | sign);
}

template <class T>
T from_float(float x);

template <>
inline float from_float<float>(float x) {
    return x;
}

// Round to nearest, ties to even; NaN stays NaN.
template <>
inline BFloat16 from_float<BFloat16>(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline Half from_float<Half>(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;
    } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
        half = 0x7c00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: the adder rounds at the subnormal ulp
        const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
        half = std::bit_cast<uint32_t>(shifted) - 0x3f000000u;
    } else {
        half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    }
    return {static_cast<uint16_t>(sign | half)};
}

}  // namespace cvfast
