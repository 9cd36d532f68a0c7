// The thread pool that a kernel is handed: kernels know no pool of their own.
#pragma once

#include <cstdint>

namespace cvfast {

struct Parallel {
    using Body = void (*)(int64_t begin, int64_t end, void* context);
    // Splits [0, count) into at most `threads` contiguous ranges, and runs `body` on each.
    using For = void (*)(int64_t count, int threads, Body body, void* context);

    int threads;
    For run;

    template <class F>
    void operator()(int64_t count, int use_threads, const F& body) const {
        if (use_threads <= 1 || count <= 1) {
            body(int64_t{0}, count);
            return;
        }
        auto trampoline = [](int64_t begin, int64_t end, void* context) {
            (*static_cast<const F*>(context))(begin, end);
        };
        run(count, use_threads, trampoline, const_cast<F*>(&body));
    }
};

}  // namespace cvfast
