#include "cpu/call.h"

#include <new>

namespace cvfast {

void* thread_scratch(int64_t bytes) {
    constexpr std::align_val_t kAlignment{64};
    struct Free {
        void operator()(void* p) const { ::operator delete(p, kAlignment); }
    };
    static thread_local std::unique_ptr<void, Free> memory;
    static thread_local int64_t size = 0;
    if (size < bytes) {
        size = 0;
        memory.reset();
        memory.reset(::operator new(static_cast<std::size_t>(bytes), kAlignment));
        size = bytes;
    }
    return memory.get();
}

}  // namespace cvfast
