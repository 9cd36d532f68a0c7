// The part of CUDA C++ that kernels use, as plain C++ over the emulation's run-time.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <math.h>

#include "emulation/runtime.h"

#define __global__
#define __device__
#define __host__
#define __constant__ static
// A copy for each operating-system thread, which runs one block at a time.
#define __shared__ static thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

// Vector types, aligned as CUDA aligns them: vec(float, float, 4, 8, 16) declares float1 to float4.
#define CVFAST_VECTORS(name, T, align1, align2, align4)                   \
    struct alignas(align1) name##1 { T x; };                              \
    struct alignas(align2) name##2 { T x, y; };                           \
    struct alignas(align1) name##3 { T x, y, z; };                        \
    struct alignas(align4) name##4 { T x, y, z, w; };                     \
    constexpr name##1 make_##name##1(T x) { return {x}; }                 \
    constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }         \
    constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
    constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

CVFAST_VECTORS(char, signed char, 1, 2, 4)
CVFAST_VECTORS(uchar, unsigned char, 1, 2, 4)
CVFAST_VECTORS(short, short, 2, 4, 8)
CVFAST_VECTORS(ushort, unsigned short, 2, 4, 8)
CVFAST_VECTORS(int, int, 4, 8, 16)
CVFAST_VECTORS(uint, unsigned, 4, 8, 16)
CVFAST_VECTORS(longlong, long long, 8, 16, 16)
CVFAST_VECTORS(ulonglong, unsigned long long, 8, 16, 16)
CVFAST_VECTORS(float, float, 4, 8, 16)
CVFAST_VECTORS(double, double, 8, 16, 16)
#undef CVFAST_VECTORS

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// Of the thread that runs; the scheduler sets them.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = struct CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : "invalid argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

// Barriers and warp collectives.
using cvfast::emulation::Site;

inline void __syncthreads(Site site = Site::current()) {
    cvfast::emulation::block_barrier(0, site);
}
inline int __syncthreads_count(int predicate, Site site = Site::current()) {
    return cvfast::emulation::block_barrier(predicate, site);
}
inline int __syncthreads_or(int predicate, Site site = Site::current()) {
    return cvfast::emulation::block_barrier(predicate, site) > 0;
}
inline int __syncthreads_and(int predicate, Site site = Site::current()) {
    return cvfast::emulation::block_barrier(predicate == 0, site) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, Site site = Site::current()) {
    cvfast::emulation::warp_barrier(mask, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, Site site = Site::current()) {
    return cvfast::emulation::ballot(mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, Site site = Site::current()) {
    return cvfast::emulation::ballot(mask, predicate != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, Site site = Site::current()) {
    return cvfast::emulation::ballot(mask, predicate == 0, site) == 0;
}
inline unsigned __activemask() { return cvfast::emulation::active_mask(); }

namespace cvfast::emulation {

template <class T>
T shuffle_value(Shuffle kind, unsigned mask, T value, int argument, int width, Site site) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    bits = shuffle(kind, mask, bits, argument, width, site);
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

}  // namespace cvfast::emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, Site site = Site::current()) {
    using namespace cvfast::emulation;
    return shuffle_value(Shuffle::index, mask, value, lane, width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 Site site = Site::current()) {
    using namespace cvfast::emulation;
    return shuffle_value(Shuffle::up, mask, value, static_cast<int>(delta), width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   Site site = Site::current()) {
    using namespace cvfast::emulation;
    return shuffle_value(Shuffle::down, mask, value, static_cast<int>(delta), width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  Site site = Site::current()) {
    using namespace cvfast::emulation;
    return shuffle_value(Shuffle::exclusive_or, mask, value, lane_mask, width, site);
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// Threads switch only at barriers and collectives, so a plain update is atomic; the run-time checks
// the access.
#define CVFAST_ATOMIC(name, expression)                                                        \
    template <class T>                                                                         \
    __attribute__((no_sanitize("thread"))) T name(T* address, std::type_identity_t<T> value) { \
        cvfast::emulation::atomic_access(address, sizeof(T));                                  \
        const T old = *address;                                                                \
        *address = expression;                                                                 \
        return old;                                                                            \
    }
CVFAST_ATOMIC(atomicAdd, static_cast<T>(old + value))
CVFAST_ATOMIC(atomicSub, static_cast<T>(old - value))
CVFAST_ATOMIC(atomicMax, old < value ? value : old)
CVFAST_ATOMIC(atomicMin, value < old ? value : old)
CVFAST_ATOMIC(atomicExch, value)
#undef CVFAST_ATOMIC

template <class T>
__attribute__((no_sanitize("thread"))) T atomicCAS(T* address, std::type_identity_t<T> expected,
                                                   std::type_identity_t<T> value) {
    cvfast::emulation::atomic_access(address, sizeof(T));
    const T old = *address;
    if (old == expected) *address = value;
    return old;
}

// Arithmetic. Functions that are approximate on a GPU are exact here.
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a < b ? b : a; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a < b ? b : a; }
inline unsigned long min(unsigned long a, unsigned long b) { return a < b ? a : b; }
inline unsigned long max(unsigned long a, unsigned long b) { return a < b ? b : a; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __saturatef(float x) { return x >= 0.0f ? fminf(x, 1.0f) : 0.0f; }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __mulhi(int a, int b) { return static_cast<int>((int64_t{a} * b) >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>((uint64_t{a} * b) >> 32);
}

template <class T>
T __ldg(const T* address) {
    return *address;
}
