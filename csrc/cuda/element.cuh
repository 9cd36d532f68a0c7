// The element types of kernels, float, __half and __nv_bfloat16: conversion, words of 4 bytes, and
// activations.
#pragma once

#include "common/activation.h"
#include "cuda/ptx.cuh"

namespace cvfast::cuda {

// Channels of one thread of a tile kernel, in a word of 4 bytes.
template <class T>
inline constexpr int kLanes = 4 / sizeof(T);

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
    return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// A word of channels in shared or global memory.
__device__ __forceinline__ void load_word(const float* p, float (&v)[1]) { v[0] = *p; }
__device__ __forceinline__ void load_word(const __half* p, float (&v)[2]) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(p));
    v[0] = pair.x, v[1] = pair.y;
}
__device__ __forceinline__ void load_word(const __nv_bfloat16* p, float (&v)[2]) {
    const float2 pair = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(p));
    v[0] = pair.x, v[1] = pair.y;
}

// A word of channels as it is stored.
template <class T>
struct Packed;
template <>
struct Packed<float> {
    using Word = float;
    static __device__ __forceinline__ Word pack(const float (&v)[1]) { return v[0]; }
    static __device__ __forceinline__ Word fill(float v) { return v; }
};
template <>
struct Packed<__half> {
    using Word = __half2;
    static __device__ __forceinline__ Word pack(const float (&v)[2]) {
        return __floats2half2_rn(v[0], v[1]);
    }
    static __device__ __forceinline__ Word fill(float v) { return __float2half2_rn(v); }
};
template <>
struct Packed<__nv_bfloat16> {
    using Word = __nv_bfloat162;
    static __device__ __forceinline__ Word pack(const float (&v)[2]) {
        return __floats2bfloat162_rn(v[0], v[1]);
    }
    static __device__ __forceinline__ Word fill(float v) { return __float2bfloat162_rn(v); }
};

template <class T>
__device__ __forceinline__ void store_word(T* p, typename Packed<T>::Word word) {
    *reinterpret_cast<typename Packed<T>::Word*>(p) = word;
}

__device__ __forceinline__ float relu6(float x) { return min_nan(max_nan(x, 0.f), 6.f); }

__device__ __forceinline__ float hardswish(float x) { return x * relu6(x + 3.f) * (1.f / 6.f); }

__device__ __forceinline__ float activate(float x, Activation activation) {
    switch (activation) {
        case Activation::none:
            return x;
        case Activation::relu:
            return max_nan(x, 0.f);
        case Activation::relu6:
            return relu6(x);
        case Activation::hardswish:
            return hardswish(x);
        case Activation::hardsigmoid:  // which the bindings refuse
            break;
    }
    return x;
}

// Sums, activated and rounded. ReLU and ReLU6 come after rounding, which is monotonic and leaves 0
// and 6 as they are: the results are the same, and one instruction takes a whole word. The choice
// stands outside the loops, since it is the same for all.
template <class T, int A, int B>
__device__ __forceinline__ void activate_words(float (&sum)[A][B][kLanes<T>], Activation activation,
                                               typename Packed<T>::Word (&word)[A][B]) {
    const auto for_each = [](auto f) {
#pragma unroll
        for (int a = 0; a < A; ++a) {
#pragma unroll
            for (int b = 0; b < B; ++b) f(a, b);
        }
    };
    if (activation == Activation::hardswish) {
        for_each([&](int a, int b) {
#pragma unroll
            for (int l = 0; l < kLanes<T>; ++l) sum[a][b][l] = hardswish(sum[a][b][l]);
        });
    }
    for_each([&](int a, int b) { word[a][b] = Packed<T>::pack(sum[a][b]); });
    if (activation == Activation::relu || activation == Activation::relu6) {
        const auto zero = Packed<T>::fill(0.f);
        for_each([&](int a, int b) { word[a][b] = max_nan(word[a][b], zero); });
    }
    if (activation == Activation::relu6) {
        const auto six = Packed<T>::fill(6.f);
        for_each([&](int a, int b) { word[a][b] = min_nan(word[a][b], six); });
    }
}

}  // namespace cvfast::cuda
