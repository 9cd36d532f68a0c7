// The PTX instructions that kernels use, a function each; inline assembly stands nowhere else.
// With CVFAST_EMULATION the same functions come from the host emulation (tests/emulation).
// Semantics and fragment layouts: PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution
#pragma once

#include <cstdint>
#include <cstring>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#ifdef CVFAST_EMULATION

#include "emulation/ptx.h"

#else

namespace cvfast::cuda {

// The address that instructions on shared memory take.
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// max and min that return NaN if either operand is NaN.
__device__ __forceinline__ float max_nan(float a, float b) {
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

__device__ __forceinline__ float min_nan(float a, float b) {
    float r;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

__device__ __forceinline__ __half2 max_nan(__half2 a, __half2 b) { return __hmax2_nan(a, b); }
__device__ __forceinline__ __half2 min_nan(__half2 a, __half2 b) { return __hmin2_nan(a, b); }
__device__ __forceinline__ __nv_bfloat162 max_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
    return __hmax2_nan(a, b);
}
__device__ __forceinline__ __nv_bfloat162 min_nan(__nv_bfloat162 a, __nv_bfloat162 b) {
    return __hmin2_nan(a, b);
}

// cp.async: starts the copy of 4, 8 or 16 bytes, both addresses aligned to that many; zeros if not
// `valid`, and then `global` is not read. The data are there for the issuing thread after
// cp_async_wait, for others after a barrier that follows it.
__device__ __forceinline__ void cp_async_4(void* shared, const void* global, bool valid = true) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(valid ? 4 : 0)
                 : "memory");
}

__device__ __forceinline__ void cp_async_8(void* shared, const void* global, bool valid = true) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(valid ? 8 : 0)
                 : "memory");
}

// Past L1, unlike the two above.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
                 : "memory");
}

// Makes one group of the thread's copies since the last commit; the group may be empty.
__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most the newest `Pending` groups of the thread are under way.
template <int Pending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Loads N = 1, 2 or 4 matrices of 8x8 16-bit elements from shared memory. Lane 8 i + r gives the
// address of row r of matrix i (16 bytes, aligned to 16). Lane l receives, of matrix i in r[i],
// row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1.
template <int N>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[N], const void* row) {
    static_assert(N == 1 || N == 2 || N == 4);
    if constexpr (N == 1) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                     : "=r"(r[0])
                     : "r"(shared_address(row))
                     : "memory");
    } else if constexpr (N == 2) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(shared_address(row))
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
    }
}

// The same of each matrix transposed: lane l receives rows 2 (l % 4) and 2 (l % 4) + 1 of column
// l / 4.
template <int N>
__device__ __forceinline__ void ldmatrix_transposed(uint32_t (&r)[N], const void* row) {
    static_assert(N == 1 || N == 2 || N == 4);
    if constexpr (N == 1) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                     : "=r"(r[0])
                     : "r"(shared_address(row))
                     : "memory");
    } else if constexpr (N == 2) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(r[0]), "=r"(r[1])
                     : "r"(shared_address(row))
                     : "memory");
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(shared_address(row))
                     : "memory");
    }
}

// c += a b, for 16x16 a and 16x8 b of T = __half or __nv_bfloat16, c float. With g = lane / 4 and
// t = lane % 4, a register of a pair of elements holding the lower column (a) or row (b) first:
// a[0] is row g, columns 2t and 2t + 1; a[1] row g + 8; a[2] and a[3] the same 8 columns on;
// b[0] is column g, rows 2t and 2t + 1; b[1] 8 rows on;
// c[0], c[1] are row g, columns 2t and 2t + 1; c[2], c[3] row g + 8.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&c)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The nearest TF32 number, ties away from zero, as a float whose low 13 bits are not used.
__device__ __forceinline__ uint32_t to_tf32(float x) {
    uint32_t r;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return r;
}

// c += a b, for 16x8 a and 8x8 b of TF32, c float. With g and t as above: a[0] is row g, column t;
// a[1] row g + 8; a[2] and a[3] the same 4 columns on; b[0] is row t, column g; b[1] row t + 4;
// c as above.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads 4, 8 or 16 bytes, aligned to as many, that nothing writes while the kernel runs.
template <class T>
__device__ __forceinline__ T load_read_only(const T* global) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    uint32_t r[sizeof(T) / 4];
    const size_t address = __cvta_generic_to_global(global);
    if constexpr (sizeof(T) == 4) {
        asm("ld.global.nc.u32 %0, [%1];" : "=r"(r[0]) : "l"(address));
    } else if constexpr (sizeof(T) == 8) {
        asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "l"(address));
    } else {
        asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
            : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
            : "l"(address));
    }
    T value;
    std::memcpy(&value, r, sizeof(T));
    return value;
}

// Stores 4, 8 or 16 bytes, aligned to as many, that are not read again soon: first to be evicted.
template <class T>
__device__ __forceinline__ void store_streaming(T* global, const T& value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    uint32_t r[sizeof(T) / 4];
    std::memcpy(r, &value, sizeof(T));
    const size_t address = __cvta_generic_to_global(global);
    if constexpr (sizeof(T) == 4) {
        asm volatile("st.global.cs.u32 [%0], %1;" ::"l"(address), "r"(r[0]) : "memory");
    } else if constexpr (sizeof(T) == 8) {
        asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(r[0]), "r"(r[1])
                     : "memory");
    } else {
        asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(r[0]),
                     "r"(r[1]), "r"(r[2]), "r"(r[3])
                     : "memory");
    }
}

}  // namespace cvfast::cuda

#endif  // CVFAST_EMULATION
