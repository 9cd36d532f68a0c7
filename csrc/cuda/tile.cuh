// Tiles between global memory, shared memory and the fragments of matrix instructions.
#pragma once

#include <cstdint>

#include "cuda/element.cuh"
#include "cuda/ptx.cuh"

namespace cvfast::cuda {

// A channels-last image in global memory; strides in elements.
template <class T>
struct View {
    T* data;
    int64_t image, row, pixel;
    int height, width;

    __device__ T* at(int n, int y, int x) const { return data + n * image + y * row + x * pixel; }
};

template <class T>
View<T> make_view(T* data, int64_t image, int64_t row, int64_t pixel, int64_t height,
                  int64_t width) {
    return {data, image, row, pixel, static_cast<int>(height), static_cast<int>(width)};
}

// Whether all channels of a pixel can be accessed `bytes` at a time.
template <class T>
bool whole(const View<T>& view, int64_t channels, int64_t bytes) {
    const int64_t n = bytes / static_cast<int64_t>(sizeof(T));
    return reinterpret_cast<uintptr_t>(view.data) % bytes == 0 && view.image % n == 0 &&
           view.row % n == 0 && view.pixel % n == 0 && channels % n == 0;
}

// Matrices of 16-bit elements in shared memory stand in rows of a multiple of kMatrix elements and
// kVector more: an odd number of 16-byte units, so that the eight rows that ldmatrix reads at a
// time lie in different banks.
inline constexpr int kMatrix = 16;
inline constexpr int kVector = 8;  // elements in 16 bytes

__host__ __device__ constexpr int matrix_pitch(int columns) { return columns + kVector; }

static_assert(matrix_pitch(kMatrix) * 2 / 16 % 2 == 1 &&
              matrix_pitch(2 * kMatrix) * 2 / 16 % 2 == 1);

__host__ __device__ constexpr int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// The first element that ldmatrix reads for this lane of a kMatrix x kMatrix matrix. As it lies,
// its four 8x8 parts are fragment a of an mma; transposed, they are fragments b of two, 8 columns
// each.
__device__ __forceinline__ int matrix_offset(int pitch) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    return lane % kMatrix * pitch + lane / kMatrix * kVector;
}

// c += a b, for a 16x16 b in the registers of a transposed load; c is two fragments side by side.
template <class T>
__device__ __forceinline__ void multiply(float (&c)[2][4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[4]) {
    const uint32_t left[2] = {b[0], b[1]}, right[2] = {b[2], b[3]};
    mma_m16n8k16<T>(c[0], a, left);
    mma_m16n8k16<T>(c[1], a, right);
}

// A thread's share of the 16-byte vectors of a matrix's rows: four neighbouring threads take the
// vectors of one row in turn. Calls f(row, vector).
template <class F>
__device__ __forceinline__ void for_each_vector(int rows, int vectors, F f) {
    constexpr int kThreads = 4;
    for (int row = threadIdx.x / kThreads; row < rows; row += blockDim.x / kThreads) {
        for (int v = threadIdx.x % kThreads; v < vectors; v += kThreads) f(row, v);
    }
}

// Starts the copy of a matrix whose rows are aligned to 16 bytes; rows from `valid` on are zeros.
template <class T>
__device__ __forceinline__ void copy_matrix(T* target, int target_pitch, const T* source,
                                            int source_pitch, int rows, int valid, int vectors) {
    for_each_vector(rows, vectors, [&](int row, int v) {
        const T* from = source + static_cast<int64_t>(row) * source_pitch + v * kVector;
        cp_async_16(target + row * target_pitch + v * kVector, from, row < valid);
    });
}

// Starts the copy of `count` floats, a multiple of four.
__device__ __forceinline__ void copy_floats(float* target, const float* source, int count) {
    for (int i = threadIdx.x * 4; i < count; i += blockDim.x * 4) {
        cp_async_16(target + i, source + i);
    }
}

// Copies kVector channels of a pixel, of which `channels` exist; the others are zeros. `aligned`:
// either all exist and are aligned to 16 bytes, or none exists; then the copy is only started.
template <class T>
__device__ __forceinline__ void copy_channels(T* target, const T* source, int channels,
                                              bool aligned) {
    if (aligned) {
        cp_async_16(target, source, channels > 0);
    } else {
#pragma unroll
        for (int c = 0; c < kVector; ++c) target[c] = c < channels ? source[c] : from_float<T>(0.f);
    }
}

// Stores kVector channels of a pixel, of which `channels` exist.
template <class T>
__device__ __forceinline__ void store_channels(T* target, const uint4& vector, int channels,
                                               bool aligned) {
    if (aligned) {
        *reinterpret_cast<uint4*>(target) = vector;
    } else {
        const uint32_t words[] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
        for (int c = 0; c < kVector; c += 2) {
            float pair[2];
            load_word(reinterpret_cast<const T*>(&words[c / 2]), pair);
            if (c < channels) target[c] = from_float<T>(pair[0]);
            if (c + 1 < channels) target[c + 1] = from_float<T>(pair[1]);
        }
    }
}

// Clears 16-bit elements, a multiple of kVector from an aligned one on.
template <class T>
__device__ __forceinline__ void clear(T* first, int count) {
    for (int i = threadIdx.x * kVector; i < count; i += blockDim.x * kVector) {
        *reinterpret_cast<uint4*>(first + i) = uint4{};
    }
}

}  // namespace cvfast::cuda
