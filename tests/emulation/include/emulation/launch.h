// The emulated half of csrc/cuda/launch.h.
#pragma once

#include <mutex>
#include <tuple>
#include <utility>

namespace cvfast::emulation {

struct Launch {
    void (*body)(const void* arguments);
    const void* arguments;
    size_t argument_bytes;
    const void* kernel;
    dim3 grid, block;
    size_t shared_bytes;
};

// Runs the grid to its end.
// Throws std::runtime_error that names kernel, block, thread and place for whatever is wrong.
void run(const Launch& launch);

}  // namespace cvfast::emulation

namespace cvfast::cuda {

class MemoryScope {
  public:
    MemoryScope(std::initializer_list<Extent> extents);
    ~MemoryScope();
    MemoryScope(const MemoryScope&) = delete;
    MemoryScope& operator=(const MemoryScope&) = delete;

  private:
    std::unique_lock<std::recursive_mutex> lock_;
    size_t outer_;
};

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t, Args&&... args) {
    using Call = std::pair<void (*)(Params...), std::tuple<Params...>>;
    const Call call{kernel, std::tuple<Params...>(std::forward<Args>(args)...)};
    const auto body = [](const void* arguments) {
        const auto& [function, values] = *static_cast<const Call*>(arguments);
        std::apply(function, values);
    };
    emulation::run({body, &call, sizeof(call), reinterpret_cast<const void*>(kernel), grid, block,
                    shared_bytes});
    return cudaSuccess;
}

template <class T>
T* dynamic_shared() {
    return static_cast<T*>(emulation::dynamic_shared_base());
}

}  // namespace cvfast::cuda
