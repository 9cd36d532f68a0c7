// Kernels without a fault: the emulation must run them, and get them right.
#include "cuda/ptx.cuh"
#include "harness.h"

using namespace cvfast::cuda;

namespace {

// sum[b] = sum of x[b, :]; every warp by shuffles, the warps through shared memory.
__global__ void row_sums(float* sum, const float* x, int length) {
    __shared__ float partial[32];
    float total = 0;
    for (int i = threadIdx.x; i < length; i += blockDim.x) total += x[blockIdx.x * length + i];
    for (int step = 16; step > 0; step /= 2) total += __shfl_xor_sync(0xffffffffu, total, step);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = total;
    __syncthreads();
    if (threadIdx.x < 32) {
        total = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : 0.0f;
        for (int step = 16; step > 0; step /= 2) {
            total += __shfl_down_sync(0xffffffffu, total, step);
        }
        if (threadIdx.x == 0) sum[blockIdx.x] = total;
    }
}

constexpr int kTile = 16;

template <class T>
__global__ void transpose(T* out, const T* in, int rows, int columns) {
    __shared__ T tile[kTile][kTile + 1];
    int row = blockIdx.y * kTile + threadIdx.y, column = blockIdx.x * kTile + threadIdx.x;
    if (row < rows && column < columns) tile[threadIdx.y][threadIdx.x] = in[row * columns + column];
    __syncthreads();
    row = blockIdx.x * kTile + threadIdx.y, column = blockIdx.y * kTile + threadIdx.x;
    if (row < columns && column < rows) out[row * rows + column] = tile[threadIdx.x][threadIdx.y];
}

// out[i] = sum of x[s, i] over s, the slices arriving through a ring of buffers.
template <int Stages>
__global__ void ring_sum(float4* out, const float4* x, int slices, int count) {
    float4* ring = dynamic_shared<float4>();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    const auto issue = [&](int slice) {
        const bool valid = slice < slices && i < count;
        if (slice < slices) {
            cp_async_16(&ring[slice % Stages * blockDim.x + threadIdx.x],
                        valid ? &x[slice * count + i] : x, valid);
        }
        cp_async_commit();
    };
    for (int slice = 0; slice < Stages - 1; ++slice) issue(slice);
    float4 sum = make_float4(0, 0, 0, 0);
    for (int slice = 0; slice < slices; ++slice) {
        issue(slice + Stages - 1);
        cp_async_wait<Stages - 1>();
        __syncthreads();
        // The neighbour's copy, so that the barriers are needed.
        const float4 v = ring[slice % Stages * blockDim.x + (threadIdx.x ^ 1)];
        sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
        __syncthreads();
    }
    if ((i ^ 1) < count) out[i ^ 1] = sum;
}

template <class T>
__global__ void copy_narrow(T* out, const T* in, int valid) {
    T* shared = dynamic_shared<T>();
    if constexpr (sizeof(T) == 4) {
        cp_async_4(&shared[threadIdx.x], &in[threadIdx.x], int(threadIdx.x) < valid);
    } else {
        cp_async_8(&shared[threadIdx.x], &in[threadIdx.x], int(threadIdx.x) < valid);
    }
    cp_async_commit();
    cp_async_wait<0>();
    out[threadIdx.x] = shared[threadIdx.x];
}

// One warp: c[16, 8] = a[16, depth] b[depth, 8]; 16-bit operands by ldmatrix from shared memory.
template <class T>
__global__ void matmul(float* c, const T* a, const T* b, int depth) {
    T* tile_a = dynamic_shared<T>();
    T* tile_b = tile_a + 16 * 16;
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    float sum[4] = {};
    for (int k = 0; k < depth; k += 16) {
        for (int i = lane; i < 16 * 16; i += 32) tile_a[i] = a[i / 16 * depth + k + i % 16];
        for (int i = lane; i < 16 * 8; i += 32) tile_b[i] = b[k * 8 + i];
        __syncwarp();
        uint32_t fa[4], fb[2];
        ldmatrix(fa, &tile_a[lane % 16 * 16 + lane / 16 * 8]);
        ldmatrix_transposed(fb, &tile_b[lane % 16 * 8]);
        mma_m16n8k16<T>(sum, fa, fb);
        __syncwarp();
    }
    for (int i = 0; i < 4; ++i) c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}

template <>
__global__ void matmul<float>(float* c, const float* a, const float* b, int depth) {
    const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
    float sum[4] = {};
    for (int k = 0; k < depth; k += 8) {
        uint32_t fa[4], fb[2];
        for (int i = 0; i < 4; ++i) {
            fa[i] = to_tf32(a[(g + 8 * (i % 2)) * depth + k + t + 4 * (i / 2)]);
        }
        for (int i = 0; i < 2; ++i) fb[i] = to_tf32(b[(k + t + 4 * i) * 8 + g]);
        mma_m16n8k8_tf32(sum, fa, fb);
    }
    for (int i = 0; i < 4; ++i) c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}

// c[lane][4] += mma of a[lane][4] and b[lane][2], registers as they come.
template <int Type>
__global__ void mma_registers(float* c, const uint32_t* a, const uint32_t* b) {
    float fc[4];
    uint32_t fa[4], fb[2];
    for (int i = 0; i < 4; ++i) fc[i] = c[threadIdx.x * 4 + i], fa[i] = a[threadIdx.x * 4 + i];
    for (int i = 0; i < 2; ++i) fb[i] = b[threadIdx.x * 2 + i];
    if constexpr (Type == 0) mma_m16n8k16<__half>(fc, fa, fb);
    if constexpr (Type == 1) mma_m16n8k16<__nv_bfloat16>(fc, fa, fb);
    if constexpr (Type == 2) mma_m16n8k8_tf32(fc, fa, fb);
    for (int i = 0; i < 4; ++i) c[threadIdx.x * 4 + i] = fc[i];
}

// out[lane][N] = what ldmatrix gives of N matrices of 8 rows of 8.
template <int N, bool Transposed>
__global__ void matrix_registers(uint32_t* out, const uint16_t* in) {
    uint16_t* shared = dynamic_shared<uint16_t>();
    for (int i = threadIdx.x; i < N * 64; i += 32) shared[i] = in[i];
    __syncwarp();
    uint32_t r[N];
    const uint16_t* row = &shared[threadIdx.x % (8 * N) * 8];
    Transposed ? ldmatrix_transposed(r, row) : ldmatrix(r, row);
    for (int i = 0; i < N; ++i) out[threadIdx.x * N + i] = r[i];
}

// out[0..2] = __syncthreads_count, _or, _and of `x[thread] > 0`; out[3] = ballot of warp 0.
__global__ void votes(int* out, const float* x) {
    const bool positive = x[threadIdx.x] > 0;
    const int count = __syncthreads_count(positive);
    const int any = __syncthreads_or(positive), all = __syncthreads_and(positive);
    const unsigned ballot = __ballot_sync(0xffffffffu, positive);
    if (threadIdx.x == 0) out[0] = count, out[1] = any, out[2] = all, out[3] = int(ballot);
}

__global__ void histogram(int* bins, const int* x, int count) {
    __shared__ int local[16];
    if (threadIdx.x < 16) local[threadIdx.x] = 0;
    __syncthreads();
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) atomicAdd(&local[x[i]], 1);
    __syncthreads();
    if (threadIdx.x < 16) atomicAdd(&bins[threadIdx.x], local[threadIdx.x]);
}

__global__ void zero(int* bins) { bins[threadIdx.x] = 0; }

template <class T>
__global__ void copy_hinted(T* out, const T* in) {
    store_streaming(&out[threadIdx.x], load_read_only(&in[threadIdx.x]));
}

// Arithmetic of float16 or bfloat16: sum, product and fused multiply-add of each triple.
template <class T>
__global__ void arithmetic(T* out, const T* in) {
    const T a = in[3 * threadIdx.x], b = in[3 * threadIdx.x + 1], c = in[3 * threadIdx.x + 2];
    out[3 * threadIdx.x] = __hadd(a, b);
    out[3 * threadIdx.x + 1] = __hmul(a, b);
    out[3 * threadIdx.x + 2] = __hfma(a, b, c);
}

}  // namespace

EXPORT run_row_sums(float* sum, const float* x, int rows, int length, int threads) {
    return outcome([&] {
        const MemoryScope scope({span(sum, rows), span(x, int64_t{rows} * length)});
        return launch(row_sums, rows, threads, 0, nullptr, sum, x, length);
    });
}

EXPORT run_transpose(float* out, const float* in, int rows, int columns) {
    return outcome([&] {
        const MemoryScope scope({span(out, rows * columns), span(in, rows * columns)});
        const dim3 grid((columns + kTile - 1) / kTile, (rows + kTile - 1) / kTile);
        return launch(transpose<float>, grid, dim3(kTile, kTile), 0, nullptr, out, in, rows,
                      columns);
    });
}

EXPORT run_ring_sum(float* out, const float* x, int slices, int count) {
    return outcome([&] {
        constexpr int kStages = 3, kThreads = 64;
        const MemoryScope scope({span(out, 4 * count), span(x, int64_t{4} * slices * count)});
        return launch(ring_sum<kStages>, (count + kThreads - 1) / kThreads, kThreads,
                      kStages * kThreads * sizeof(float4), nullptr, reinterpret_cast<float4*>(out),
                      reinterpret_cast<const float4*>(x), slices, count);
    });
}

EXPORT run_copy_narrow(void* out, const void* in, int count, int bytes, int valid) {
    return outcome([&] {
        const auto run = [&]<class T>(T* to, const T* from) {
            const MemoryScope scope({span(to, count), span(from, valid)});
            return launch(copy_narrow<T>, 1, count, count * sizeof(T), nullptr, to, from, valid);
        };
        if (bytes == 4) return run(static_cast<float*>(out), static_cast<const float*>(in));
        return run(static_cast<float2*>(out), static_cast<const float2*>(in));
    });
}

EXPORT run_matmul(float* c, const void* a, const void* b, int depth, int type) {
    return outcome([&] {
        const auto run = [&]<class T>(const T* left, const T* right) {
            const MemoryScope scope({span(c, 128), span(left, 16 * depth), span(right, 8 * depth)});
            return launch(matmul<T>, 1, 32, 24 * 16 * sizeof(T), nullptr, c, left, right, depth);
        };
        if (type == 0) return run(static_cast<const __half*>(a), static_cast<const __half*>(b));
        if (type == 1) {
            return run(static_cast<const __nv_bfloat16*>(a), static_cast<const __nv_bfloat16*>(b));
        }
        return run(static_cast<const float*>(a), static_cast<const float*>(b));
    });
}

EXPORT run_mma_registers(float* c, const uint32_t* a, const uint32_t* b, int type, int lanes) {
    return outcome([&] {
        const float initial = c[0];
        const MemoryScope scope({span(c, 128), span(a, 128), span(b, 64)});
        for (int i = 0; i < 128; ++i) c[i] = initial;
        const auto kernel = type == 0   ? mma_registers<0>
                            : type == 1 ? mma_registers<1>
                                        : mma_registers<2>;
        return launch(kernel, 1, lanes, 0, nullptr, c, a, b);
    });
}

EXPORT run_matrix_registers(uint32_t* out, const uint16_t* in, int count, bool transposed) {
    return outcome([&] {
        const MemoryScope scope({span(out, 32 * count), span(in, 64 * count)});
        const auto kernel = transposed ? (count == 1   ? matrix_registers<1, true>
                                          : count == 2 ? matrix_registers<2, true>
                                                       : matrix_registers<4, true>)
                                       : (count == 1   ? matrix_registers<1, false>
                                          : count == 2 ? matrix_registers<2, false>
                                                       : matrix_registers<4, false>);
        return launch(kernel, 1, 32, count * 128, nullptr, out, in);
    });
}

EXPORT run_votes(int* out, const float* x, int threads) {
    return outcome([&] {
        const MemoryScope scope({span(out, 4), span(x, threads)});
        return launch(votes, 1, threads, 0, nullptr, out, x);
    });
}

EXPORT run_histogram(int* bins, const int* x, int count) {
    return outcome([&] {
        const MemoryScope scope({span(bins, 16), span(x, count)});
        const cudaError_t error = launch(zero, 1, 16, 0, nullptr, bins);
        if (error != cudaSuccess) return error;
        return launch(histogram, (count + 63) / 64, 64, 0, nullptr, bins, x, count);
    });
}

EXPORT run_copy_hinted(void* out, const void* in, int count, int bytes) {
    return outcome([&] {
        const auto run = [&]<class T>(T* to, const T* from) {
            const MemoryScope scope({span(to, count), span(from, count)});
            return launch(copy_hinted<T>, 1, count, 0, nullptr, to, from);
        };
        if (bytes == 4) return run(static_cast<float*>(out), static_cast<const float*>(in));
        if (bytes == 8) return run(static_cast<uint2*>(out), static_cast<const uint2*>(in));
        return run(static_cast<float4*>(out), static_cast<const float4*>(in));
    });
}

EXPORT run_arithmetic(void* out, const void* in, int count, bool bfloat16) {
    return outcome([&] {
        const auto run = [&]<class T>(T* to, const T* from) {
            const MemoryScope scope({span(to, 3 * count), span(from, 3 * count)});
            return launch(arithmetic<T>, 1, count, 0, nullptr, to, from);
        };
        if (bfloat16) {
            return run(static_cast<__nv_bfloat16*>(out), static_cast<const __nv_bfloat16*>(in));
        }
        return run(static_cast<__half*>(out), static_cast<const __half*>(in));
    });
}
