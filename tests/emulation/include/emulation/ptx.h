// The emulated half of csrc/cuda/ptx.cuh, which says what the functions do.
#pragma once

#include <cmath>
#include <limits>

#include "emulation/runtime.h"

namespace cvfast::cuda {

using emulation::Site;

inline float max_nan(float a, float b) {
    return a != a || b != b ? std::numeric_limits<float>::quiet_NaN() : std::fmax(a, b);
}

inline float min_nan(float a, float b) {
    return a != a || b != b ? std::numeric_limits<float>::quiet_NaN() : std::fmin(a, b);
}

template <class S>
emulation::Float16x2<S> max_nan(emulation::Float16x2<S> a, emulation::Float16x2<S> b) {
    return {max_nan(float(a.x), float(b.x)), max_nan(float(a.y), float(b.y))};
}

template <class S>
emulation::Float16x2<S> min_nan(emulation::Float16x2<S> a, emulation::Float16x2<S> b) {
    return {min_nan(float(a.x), float(b.x)), min_nan(float(a.y), float(b.y))};
}

inline void cp_async_4(void* shared, const void* global, bool valid = true) {
    emulation::copy_async(shared, global, 4, valid);
}

inline void cp_async_8(void* shared, const void* global, bool valid = true) {
    emulation::copy_async(shared, global, 8, valid);
}

inline void cp_async_16(void* shared, const void* global, bool valid = true) {
    emulation::copy_async(shared, global, 16, valid);
}

inline void cp_async_commit() { emulation::copy_async_commit(); }

template <int Pending>
void cp_async_wait() {
    emulation::copy_async_wait(Pending);
}

template <int N>
void ldmatrix(uint32_t (&r)[N], const void* row, Site site = Site::current()) {
    static_assert(N == 1 || N == 2 || N == 4);
    emulation::load_matrices(r, N, false, row, site);
}

template <int N>
void ldmatrix_transposed(uint32_t (&r)[N], const void* row, Site site = Site::current()) {
    static_assert(N == 1 || N == 2 || N == 4);
    emulation::load_matrices(r, N, true, row, site);
}

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  Site site = Site::current()) {
    constexpr bool is_half = std::is_same_v<T, __half>;
    static_assert(is_half || std::is_same_v<T, __nv_bfloat16>);
    emulation::multiply_matrices(is_half ? emulation::Mma::half : emulation::Mma::bfloat16, c, a, b,
                                 site);
}

inline uint32_t to_tf32(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffffffu;
    return (bits + 0x1000u) & 0xffffe000u;
}

inline void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Site site = Site::current()) {
    emulation::multiply_matrices(emulation::Mma::tf32, c, a, b, site);
}

template <class T>
T load_read_only(const T* global) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    emulation::read_access(global, sizeof(T));
    T value;
    std::memcpy(&value, global, sizeof(T));
    return value;
}

template <class T>
void store_streaming(T* global, const T& value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    emulation::write_access(global, sizeof(T));
    std::memcpy(global, &value, sizeof(T));
}

}  // namespace cvfast::cuda
