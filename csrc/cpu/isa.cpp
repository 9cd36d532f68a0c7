#include "cpu/isa.h"

#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cvfast {
namespace {

#if defined(__x86_64__)

constexpr bool has(uint32_t word, int bit) { return (word >> bit) & 1u; }

// XCR0: the register files that the operating system saves on a context switch.
uint64_t saved_state() {
    uint32_t low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t{high} << 32) | low;
}

// AMX needs the kernel's permission, for the process and for good: its registers enlarge what is
// saved for a signal handler, and Linux then refuses alternate stacks that are too small for it.
bool may_use_tiles() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

Isa detect() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::portable;
    const bool fma = has(c, 12), osxsave = has(c, 27), avx = has(c, 28), f16c = has(c, 29);
    if (!osxsave) return Isa::portable;
    const uint64_t state = saved_state();
    constexpr uint64_t kYmm = 0x06, kZmm = 0xe6;  // XMM+YMM; and opmask, upper ZMM, ZMM16-31
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::portable;
    const bool avx2 = has(b, 5);
    if (!(avx && fma && f16c && avx2 && (state & kYmm) == kYmm)) return Isa::portable;
    const bool avx512 = has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31);  // F, DQ, BW, VL
    if (!(avx512 && (state & kZmm) == kZmm)) return Isa::avx2;
    const bool amx = has(d, 22) && has(d, 24);  // BF16, TILE
    const bool bf16 = __get_cpuid_count(7, 1, &a, &b, &c, &d) && has(a, 5);
    if (!bf16) return Isa::avx512;
    constexpr uint64_t kTiles = 0x60000;  // their shapes and contents
    return amx && (state & kTiles) == kTiles && may_use_tiles() ? Isa::avx512_amx
                                                                : Isa::avx512_bf16;
}

#elif defined(__aarch64__)

Isa detect() { return Isa::neon; }

#else

Isa detect() { return Isa::portable; }

#endif

std::atomic<Isa>& active() {
    static std::atomic<Isa> level{best_isa()};
    return level;
}

}  // namespace

Isa best_isa() {
    static const Isa best = detect();
    return best;
}

Isa current_isa() { return active().load(std::memory_order_relaxed); }

bool has_amx() {
#if defined(__x86_64__)
    return current_isa() == Isa::avx512_amx;
#else
    return false;
#endif
}

bool select_isa(Isa level) {
    if (level > best_isa()) return false;
    active().store(level, std::memory_order_relaxed);
    return true;
}

}  // namespace cvfast
