// Collectives of a warp: barriers, votes, shuffles, ldmatrix, mma.
#include <bit>

#include "common/types.h"
#include "state.h"

namespace cvfast::emulation {
namespace {

// The lane that a shuffle reads from.
int shuffle_source(const Thread& thread, int lane) {
    const int first = lane & ~(thread.width - 1), last = first + thread.width - 1;
    int source = lane;
    switch (static_cast<Shuffle>(thread.variant)) {
        case Shuffle::index:
            return first + (thread.argument & (thread.width - 1));
        case Shuffle::up:
            source = lane - thread.argument;
            return source < first ? lane : source;
        case Shuffle::down:
            source = lane + thread.argument;
            return source > last ? lane : source;
        case Shuffle::exclusive_or:
            source = lane ^ thread.argument;
            return source > last ? lane : source;
    }
    return lane;
}

// An operand in a register: its lower or upper 16 bits, or all of it.
float operand(Mma type, const void* registers, int index, int half = 0) {
    const uint32_t word = static_cast<const uint32_t*>(registers)[index];
    if (type == Mma::tf32) return std::bit_cast<float>(word & 0xffffe000u);
    const auto bits = static_cast<uint16_t>(word >> (16 * half));
    return type == Mma::half ? to_float(Half{bits}) : to_float(BFloat16{bits});
}

// PTX ISA, "Matrix fragments for mma.m16n8k16" and "... mma.m16n8k8". It leaves the order and the
// rounding of sums open: they are of double here, rounded once.
void complete_mma(Thread* const lanes) {
    const auto type = static_cast<Mma>(lanes[0].variant);
    const int depth = type == Mma::tf32 ? 8 : 16;
    float a[16][16], b[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
        const int g = lane / 4, t = lane % 4;
        const Thread& thread = lanes[lane];
        for (int r = 0; r < 4; ++r) {
            const int row = g + 8 * (r % 2);
            if (type == Mma::tf32) {
                a[row][t + 4 * (r / 2)] = operand(type, thread.a, r);
                if (r < 2) b[t + 4 * r][g] = operand(type, thread.b, r);
                continue;
            }
            for (int half = 0; half < 2; ++half) {
                a[row][2 * t + half + 8 * (r / 2)] = operand(type, thread.a, r, half);
                if (r < 2) b[2 * t + half + 8 * r][g] = operand(type, thread.b, r, half);
            }
        }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
        const int g = lane / 4, t = lane % 4;
        auto* c = static_cast<float*>(lanes[lane].out);
        for (int i = 0; i < 4; ++i) {
            const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
            double sum = c[i];
            for (int k = 0; k < depth; ++k) sum += double{a[row][k]} * b[k][column];
            c[i] = static_cast<float>(sum);
        }
    }
}

void complete_matrices(Thread* const lanes) {
    const int count = lanes[0].variant / 2;
    const bool transposed = lanes[0].variant % 2;
    for (int lane = 0; lane < kWarp; ++lane) {
        auto* registers = static_cast<uint32_t*>(lanes[lane].out);
        for (int i = 0; i < count; ++i) {
            const auto element = [&](int row, int column) -> uint32_t {
                return static_cast<const uint16_t*>(lanes[8 * i + row].a)[column];
            };
            const int g = lane / 4, t = lane % 4;
            registers[i] = transposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                                      : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
        }
    }
}

// The caller has set the operands.
Thread& collective(Collective kind, int variant, unsigned mask, Site site) {
    Thread& self = *emulator.current;
    if (!(mask >> (self.index % kWarp) & 1)) {
        fail(format("warp collective: the mask 0x%08x leaves out the calling lane", mask),
             file_line(site.file_name(), site.line()));
    }
    self.collective = kind;
    self.variant = variant;
    self.mask = mask;
    self.site = site;
    self.state = State::warp_collective;
    try_collective(self);
    yield();
    return self;
}

void require_whole_warp(const Thread& self, const char* instruction) {
    if (!self.result) {
        fail(format("%s needs all 32 lanes of the warp, and some have exited", instruction),
             site_of(self));
    }
}

}  // namespace

// If all lanes of the collective's mask that have not exited are there: performs it, releases them.
void try_collective(const Thread& any) {
    const unsigned first = any.index / kWarp * kWarp;
    const unsigned mask = any.mask;
    Thread* lanes = &emulator.threads[first];
    unsigned live = 0;
    for (unsigned lane = 0; lane < kWarp && first + lane < emulator.count; ++lane) {
        const Thread& thread = lanes[lane];
        if (!(mask >> lane & 1) || thread.state == State::exited) continue;
        if (thread.state != State::warp_collective || thread.mask != mask ||
            thread.collective != any.collective || thread.variant != any.variant) {
            return;
        }
        live |= 1u << lane;
    }
    const auto for_live = [&](auto&& body) {
        for (unsigned lane = 0; lane < kWarp; ++lane) {
            if (live >> lane & 1) body(lane, lanes[lane]);
        }
    };
    switch (any.collective) {
        case Collective::barrier:
            emulator.warp_time[first / kWarp] = ++emulator.now;
            break;
        case Collective::ballot: {
            unsigned votes = 0;
            for_live([&](unsigned lane, Thread& t) { votes |= (t.bits ? 1u : 0u) << lane; });
            for_live([&](unsigned, Thread& t) { t.bits = votes; });
            break;
        }
        case Collective::shuffle: {
            uint64_t values[kWarp] = {};
            for_live([&](unsigned lane, Thread& t) { values[lane] = t.bits; });
            for_live([&](unsigned lane, Thread& t) {
                const int source = shuffle_source(t, static_cast<int>(lane));
                t.result = live >> source & 1 ? -1 : source;
                t.bits = values[source];
            });
            break;
        }
        case Collective::matrices:
        case Collective::mma:
            for_live([&](unsigned, Thread& t) { t.result = live == 0xffffffffu; });
            if (live != 0xffffffffu) break;
            any.collective == Collective::mma ? complete_mma(lanes) : complete_matrices(lanes);
            break;
    }
    for_live([](unsigned, Thread& t) { make_ready(t); });
}

void warp_barrier(unsigned mask, Site site) { collective(Collective::barrier, 0, mask, site); }

unsigned ballot(unsigned mask, bool predicate, Site site) {
    emulator.current->bits = predicate;
    return static_cast<unsigned>(collective(Collective::ballot, 0, mask, site).bits);
}

unsigned active_mask() {
    unsigned mask = 0;
    const unsigned first = emulator.current->index / kWarp * kWarp;
    for (unsigned lane = 0; lane < kWarp && first + lane < emulator.count; ++lane) {
        mask |= (emulator.threads[first + lane].state != State::exited ? 1u : 0u) << lane;
    }
    return mask;
}

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t bits, int argument, int width, Site site) {
    Thread& self = *emulator.current;
    if (width < 1 || width > kWarp || !std::has_single_bit(static_cast<unsigned>(width))) {
        fail(format("shuffle: the width %d is no power of two up to 32", width),
             file_line(site.file_name(), site.line()));
    }
    self.argument = argument;
    self.width = width;
    self.bits = bits;
    collective(Collective::shuffle, static_cast<int>(kind), mask, site);
    if (self.result >= 0) {
        fail(format("shuffle with an inactive lane: lane %u reads lane %d, which has exited or is "
                    "not in the mask 0x%08x",
                    self.index % kWarp, self.result, mask),
             site_of(self));
    }
    return self.bits;
}

void load_matrices(uint32_t* registers, int count, bool transposed, const void* row, Site site) {
    Thread& self = *emulator.current;
    if (self.index % kWarp < static_cast<unsigned>(8 * count)) {
        const void* pc = __builtin_return_address(0);
        check_alignment(row, 16, Access::read, pc);
        if (!shared_region(reinterpret_cast<uintptr_t>(row), 16)) {
            check_other(reinterpret_cast<uintptr_t>(row), 16, Access::read, pc);
            fail("ldmatrix from memory that is not shared", site_of(self));
        }
        check(reinterpret_cast<uintptr_t>(row), 16, Access::read, pc);
    }
    self.out = registers;
    self.a = row;
    require_whole_warp(collective(Collective::matrices, 2 * count + transposed, 0xffffffffu, site),
                       "ldmatrix");
}

void multiply_matrices(Mma type, float* c, const uint32_t* a, const uint32_t* b, Site site) {
    Thread& self = *emulator.current;
    self.out = c;
    self.a = a;
    self.b = b;
    require_whole_warp(collective(Collective::mma, static_cast<int>(type), 0xffffffffu, site),
                       "mma");
}

}  // namespace cvfast::emulation
