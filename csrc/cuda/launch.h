// How kernels meet the CUDA run-time: one launch wrapper, and dynamic shared memory. With
// CVFAST_EMULATION the same names come from the host emulation (tests/emulation).
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include <cuda_runtime.h>

namespace cvfast::cuda {

// The elements of one tensor, which a kernel may read and, if `writable`, write.
struct Extent {
    static constexpr int kMaxDims = 5;

    const void* data;
    bool writable;
    int dims;
    int64_t element_bytes;
    int64_t size[kMaxDims];
    int64_t stride[kMaxDims];  // in elements
};

// `tensor` has the members of torch::stable::Tensor that are used here.
template <class Tensor>
Extent extent(const Tensor& tensor, bool writable = false) {
    Extent e{tensor.const_data_ptr(),
             writable,
             static_cast<int>(tensor.dim()),
             static_cast<int64_t>(tensor.element_size()),
             {},
             {}};
    for (int i = 0; i < e.dims && i < Extent::kMaxDims; ++i) {
        e.size[i] = tensor.size(i);
        e.stride[i] = tensor.stride(i);
    }
    return e;
}

template <class Tensor>
Extent writable(const Tensor& tensor) {
    return extent(tensor, true);
}

}  // namespace cvfast::cuda

#ifdef CVFAST_EMULATION

#include "emulation/launch.h"

#else

namespace cvfast::cuda {

// States, for as long as it lives, the tensors that kernels may touch. The emulation checks every
// access against it and fills what is writable with NaN; on a GPU it is nothing.
class MemoryScope {
  public:
    MemoryScope(std::initializer_list<Extent>) {}
};

// Dynamic shared memory beyond this needs the kernel's consent.
inline constexpr size_t kDefaultSharedBytes = 48 * 1024;

// Lets `kernel`, which has no static shared memory, have as much as the current device gives a
// block: always as much, since a thread that launches it with less must not take it from another's
// launch.
template <class... Params>
cudaError_t allow_shared_memory(void (*kernel)(Params...)) {
    int device = 0, most = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error != cudaSuccess) return error;
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
}

// Launches `kernel` with `shared_bytes` of dynamic shared memory; returns what went wrong.
template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, Args&&... args) {
    cudaError_t error = cudaSuccess;
    if (shared_bytes > kDefaultSharedBytes) error = allow_shared_memory(kernel);
    if (error == cudaSuccess) {
        cudaLaunchConfig_t config{};
        config.gridDim = grid;
        config.blockDim = block;
        config.dynamicSmemBytes = shared_bytes;
        config.stream = stream;
        error = cudaLaunchKernelEx(&config, kernel, static_cast<Args&&>(args)...);
    }
    // The error is the caller's now: the run-time would blame the next call for it, too.
    if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
    return error;
}

#ifdef __CUDACC__
// The block's dynamic shared memory, aligned to 16 bytes.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
    extern __shared__ __align__(16) unsigned char memory[];
    return reinterpret_cast<T*>(memory);
}
#endif

}  // namespace cvfast::cuda

#endif  // CVFAST_EMULATION
