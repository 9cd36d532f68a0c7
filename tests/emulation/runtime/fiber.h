// A context of execution with a stack of its own: what a CUDA thread runs on.
#pragma once

#include <algorithm>
#include <cstddef>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cvfast::emulation {

inline constexpr size_t kStackBytes = size_t{256} << 10;

#ifdef __x86_64__

// Saves the callee-saved registers on the stack and its pointer in *from; resumes at `to`. A tenth
// of swapcontext's time, which calls the kernel.
extern "C" void cvfast_emulation_switch(void** from, void* to);

struct Context {
    void* stack_pointer;

    void start(char* stack, void (*entry)()) {
        // `entry` finds the stack as after a call: 8 bytes off a multiple of 16.
        auto** top = reinterpret_cast<void**>(stack + kStackBytes) - 1;
        *--top = reinterpret_cast<void*>(entry);
        stack_pointer = top - 6;
        std::fill_n(static_cast<void**>(stack_pointer), 6, nullptr);
    }
    static void change(Context& from, Context& to) {
        cvfast_emulation_switch(&from.stack_pointer, to.stack_pointer);
    }
};

#else

struct Context {
    ucontext_t context;

    void start(char* stack, void (*entry)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = kStackBytes;
        context.uc_link = nullptr;
        makecontext(&context, entry, 0);
    }
    static void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};

#endif

}  // namespace cvfast::emulation
