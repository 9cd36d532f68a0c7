// What the compiler's ThreadSanitizer and UndefinedBehaviorSanitizer passes call. Neither of their
// own run-times is linked, so that the library loads into any Python.
#include "state.h"

using cvfast::emulation::Access;
using cvfast::emulation::emulator;

#define CVFAST_HOOK extern "C" __attribute__((visibility("hidden"), used))

#define CVFAST_ACCESS(name, bytes, access)                                                    \
    CVFAST_HOOK void __tsan_##name(void* address) {                                           \
        cvfast::emulation::check(reinterpret_cast<uintptr_t>(address), bytes, Access::access, \
                                 __builtin_return_address(0));                                \
    }
#define CVFAST_ACCESSES(bytes)                        \
    CVFAST_ACCESS(read##bytes, bytes, read)           \
    CVFAST_ACCESS(write##bytes, bytes, write)         \
    CVFAST_ACCESS(unaligned_read##bytes, bytes, read) \
    CVFAST_ACCESS(unaligned_write##bytes, bytes, write)
CVFAST_ACCESS(read1, 1, read)
CVFAST_ACCESS(write1, 1, write)
CVFAST_ACCESSES(2)
CVFAST_ACCESSES(4)
CVFAST_ACCESSES(8)
CVFAST_ACCESSES(16)

#define CVFAST_RANGE(access)                                                                  \
    CVFAST_HOOK void __tsan_##access##_range(void* address, unsigned long bytes) {            \
        cvfast::emulation::check(reinterpret_cast<uintptr_t>(address), bytes, Access::access, \
                                 __builtin_return_address(0));                                \
    }
CVFAST_RANGE(read)
CVFAST_RANGE(write)

CVFAST_HOOK void __tsan_init() {}
CVFAST_HOOK void __tsan_func_entry(void*) {}
CVFAST_HOOK void __tsan_func_exit() {}
// Of the guards of function-local statics in host code.
CVFAST_HOOK char __tsan_atomic8_load(const volatile char* address, int) {
    return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}

namespace {

struct SourceLocation {
    const char* file;
    uint32_t line, column;
};

struct TypeDescriptor {
    uint16_t kind, info;
    char name[1];
};

struct TypeMismatch {
    SourceLocation location;
    const TypeDescriptor* type;
    unsigned char log_alignment, kind;
};

struct OutOfBounds {
    SourceLocation location;
    const TypeDescriptor *array, *index;
};

void undefined(const std::string& message, const SourceLocation& location) {
    const std::string place = cvfast::emulation::file_line(location.file, location.line);
    if (cvfast::emulation::in_kernel()) cvfast::emulation::fail(message, place);
    emulator.host_failure = message + " at " + place + ", outside a kernel";
}

}  // namespace

CVFAST_HOOK void __ubsan_handle_type_mismatch_v1(TypeMismatch* data, uintptr_t pointer) {
    const size_t alignment = size_t{1} << data->log_alignment;
    undefined(pointer == 0 ? std::string("null pointer to ") + data->type->name
                           : cvfast::emulation::format(
                                 "misaligned access: %s at 0x%zx, which is not a multiple of %zu",
                                 data->type->name, pointer, alignment),
              data->location);
}

CVFAST_HOOK void __ubsan_handle_out_of_bounds(OutOfBounds* data, uintptr_t index) {
    undefined(cvfast::emulation::format("out of bounds of an array: index %td of %s",
                                        static_cast<ptrdiff_t>(index), data->array->name),
              data->location);
}

#define CVFAST_OVERFLOW(name, what)                                                          \
    CVFAST_HOOK void __ubsan_handle_##name(SourceLocation* location, uintptr_t, uintptr_t) { \
        undefined(what, *location);                                                          \
    }
CVFAST_OVERFLOW(add_overflow, "signed integer overflow in an addition")
CVFAST_OVERFLOW(sub_overflow, "signed integer overflow in a subtraction")
CVFAST_OVERFLOW(mul_overflow, "signed integer overflow in a multiplication")
CVFAST_OVERFLOW(divrem_overflow, "integer division by zero or overflow")
CVFAST_OVERFLOW(shift_out_of_bounds, "shift by a negative or too large number of bits")

CVFAST_HOOK void __ubsan_handle_negate_overflow(SourceLocation* location, uintptr_t) {
    undefined("signed integer overflow in a negation", *location);
}
