#include "fiber.h"

#ifdef __x86_64__

asm(R"(
.text
.globl cvfast_emulation_switch
.hidden cvfast_emulation_switch
.type cvfast_emulation_switch, @function
cvfast_emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size cvfast_emulation_switch, .-cvfast_emulation_switch
)");

#endif
