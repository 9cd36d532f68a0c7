// Kernels with one fault each: the emulation must name it.
#include "cuda/ptx.cuh"
#include "harness.h"

using namespace cvfast::cuda;

namespace {

constexpr int kThreads = 64;

__global__ void missing_barrier(float* out, const float* in) {
    float* shared = dynamic_shared<float>();
    shared[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    const float left = shared[(threadIdx.x + 1) % kThreads];
    shared[threadIdx.x] = left;
    out[threadIdx.x] = left;
}

__global__ void missing_first_barrier(float* out, const float* in) {
    __shared__ float shared[kThreads];
    shared[threadIdx.x] = in[threadIdx.x];
    out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void missing_warp_barrier(float* out, const float* in) {
    float* shared = dynamic_shared<float>();
    shared[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    shared[threadIdx.x] += 1;
    out[threadIdx.x] = shared[threadIdx.x ^ 1];
}

__global__ void warp_barrier_across_warps(float* out, const float* in) {
    float* shared = dynamic_shared<float>();
    shared[threadIdx.x] = 0;
    __syncthreads();
    shared[threadIdx.x] = in[threadIdx.x];
    __syncwarp();
    out[threadIdx.x] = shared[threadIdx.x ^ 32];
}

__global__ void same_address(float* out, const float* in) {
    float* shared = dynamic_shared<float>();
    shared[threadIdx.x / 2] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = shared[threadIdx.x / 2];
}

__global__ void missing_wait(float* out, const float* in) {
    float* shared = dynamic_shared<float>();
    cp_async_4(&shared[threadIdx.x], &in[threadIdx.x]);
    cp_async_commit();
    out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void wait_for_too_few(float* out, const float* in) {
    float* shared = dynamic_shared<float>();
    cp_async_4(&shared[threadIdx.x], &in[threadIdx.x]);
    cp_async_commit();
    cp_async_wait<1>();
    out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void wait_without_barrier(float* out, const float* in) {
    float* shared = dynamic_shared<float>();
    shared[threadIdx.x] = 0;
    __syncthreads();
    cp_async_4(&shared[threadIdx.x], &in[threadIdx.x]);
    cp_async_commit();
    cp_async_wait<0>();
    out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void halo(float* out, const float* in) {
    const int i = threadIdx.x;
    out[i] = in[max(i - 1, 0)] + in[i] + in[i + 1];
}

__global__ void write_past_end(float* out, const float* in) {
    out[threadIdx.x + 1] = in[threadIdx.x];
}

__global__ void write_input(float* out, const float* in) {
    const_cast<float*>(in)[threadIdx.x] = out[threadIdx.x];
}

__global__ void null_pointer(float* out, const float* in) {
    out[threadIdx.x] = in[threadIdx.x] > 1e30f ? 0.0f : *reinterpret_cast<float*>(4 * threadIdx.x);
}

__global__ void misaligned_load(float* out, const float* in) {
    const float4 v = *reinterpret_cast<const float4*>(in + threadIdx.x % 4);
    out[threadIdx.x] = v.x + v.w;
}

__global__ void misaligned_hinted_load(float* out, const float* in) {
    out[threadIdx.x] = load_read_only(reinterpret_cast<const float2*>(in + threadIdx.x % 2)).x;
}

__global__ void misaligned_store(float* out, const float* in) {
    if (threadIdx.x == 5) *reinterpret_cast<float2*>(out + 5) = make_float2(in[0], in[1]);
}

__global__ void misaligned_copy(float* out, const float* in) {
    float* shared = dynamic_shared<float>();
    if (threadIdx.x == 0) cp_async_16(shared, in + 1);
    cp_async_commit();
    cp_async_wait<0>();
    if (threadIdx.x == 0) out[0] = shared[0];
}

__global__ void past_dynamic(float* out, const float* in) {
    float* shared = dynamic_shared<float>();
    shared[threadIdx.x + 1] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void past_static(float* out, const float* in) {
    __shared__ float shared[kThreads];
    __shared__ float other[kThreads];
    shared[threadIdx.x] = other[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = shared[threadIdx.x + 1] + other[threadIdx.x];
}

__global__ void past_registers(float* out, const float* in) {
    float values[4];
    for (int i = 0; i < 4; ++i) values[i] = in[i];
    out[threadIdx.x] = values[threadIdx.x % 5];
}

__global__ void divergent_branch(float* out, const float* in) {
    float* shared = dynamic_shared<float>();
    shared[threadIdx.x] = in[threadIdx.x];
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void early_exit(float* out, const float* in) {
    float* shared = dynamic_shared<float>();
    if (threadIdx.x >= 48) return;
    shared[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void shuffle_exited(float* out, const float* in) {
    if (threadIdx.x % 32 >= 24) return;
    out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 16);
}

__global__ void shuffle_outside_mask(float* out, const float* in) {
    const unsigned mask = threadIdx.x % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
    out[threadIdx.x] = __shfl_sync(mask, in[threadIdx.x], 0);
}

__global__ void shuffle_branch(float* out, const float* in) {
    float v = in[threadIdx.x];
    if (threadIdx.x % 2) v = __shfl_xor_sync(0xffffffffu, v, 2);
    __syncthreads();
    out[threadIdx.x] = v;
}

__global__ void uninitialised(float* out, const float* in) {
    float* shared = dynamic_shared<float>();
    if (threadIdx.x != 7) shared[threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void index_overflow(float* out, const float* in) {
    const int scale = in[0] > 1e30f ? 1 : 1 << 26;
    out[threadIdx.x] = in[int(threadIdx.x) * scale * 2 > 0];
}

__global__ void static_and_dynamic(float* out, const float* in) {
    __shared__ float fixed[160 * kThreads];
    for (int i = threadIdx.x; i < 160 * kThreads; i += kThreads) fixed[i] = in[threadIdx.x];
    out[threadIdx.x] = fixed[threadIdx.x];
}

__global__ void nothing(float*, const float*) {}

using Kernel = void (*)(float*, const float*);

}  // namespace

#define KERNEL(name)                                                                              \
    EXPORT broken_##name(float* out, const float* in, size_t shared, const unsigned* size) {      \
        return outcome([&] {                                                                      \
            const MemoryScope scope({span(out, kThreads), span(in, kThreads)});                   \
            return launch(name, dim3(size[0], size[1], size[2]), dim3(size[3], size[4], size[5]), \
                          shared, nullptr, out, in);                                              \
        });                                                                                       \
    }

KERNEL(missing_barrier)
KERNEL(missing_first_barrier)
KERNEL(missing_warp_barrier)
KERNEL(warp_barrier_across_warps)
KERNEL(same_address)
KERNEL(missing_wait)
KERNEL(wait_for_too_few)
KERNEL(wait_without_barrier)
KERNEL(halo)
KERNEL(write_past_end)
KERNEL(write_input)
KERNEL(null_pointer)
KERNEL(misaligned_load)
KERNEL(misaligned_hinted_load)
KERNEL(misaligned_store)
KERNEL(misaligned_copy)
KERNEL(past_dynamic)
KERNEL(past_static)
KERNEL(past_registers)
KERNEL(divergent_branch)
KERNEL(early_exit)
KERNEL(shuffle_exited)
KERNEL(shuffle_outside_mask)
KERNEL(shuffle_branch)
KERNEL(uninitialised)
KERNEL(index_overflow)
KERNEL(static_and_dynamic)
KERNEL(nothing)

// Channels 8 to 15 of 16, channels-last: a slice, whose neighbours are not the kernel's to touch.
EXPORT broken_slice(float* out, const float* in, int channel) {
    return outcome([&] {
        const MemoryScope scope(
            {span(out, kThreads), Extent{in + 8, false, 2, 4, {4, 8}, {16, 1}}});
        return launch(halo, 1, 1, 0, nullptr, out, in + 8 + channel);
    });
}
