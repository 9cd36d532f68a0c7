// What the parts of the run-time share.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "fiber.h"

namespace cvfast::emulation {

inline constexpr int kWarp = 32;
inline constexpr unsigned kMaxThreads = 1024;
inline constexpr size_t kMaxShared = size_t{256} << 10;
// On either side of the dynamic shared memory.
inline constexpr size_t kSharedGuard = size_t{64} << 10;
inline constexpr unsigned char kPoison = 0xff;  // NaN in float32, float16 and bfloat16 alike

// This library in memory; the thread-local block is that of the calling thread.
struct Module {
    uintptr_t load = 0, begin = 0, end = 0;
    uintptr_t tls_begin = 0, tls_end = 0;
};

enum class State : unsigned char { fresh, ready, block_barrier, warp_collective, exited };

enum class Collective : unsigned char { barrier, ballot, shuffle, matrices, mma };

struct CopyAsync {
    void* shared;
    const void* global;
    size_t bytes;
    bool valid;  // else zeros
};

struct Thread {
    Context context;
    char* stack;
    unsigned index;
    uint3 position;
    State state;
    Site site;
    int result;
    // A collective's operands.
    Collective collective;
    int variant;  // kind of shuffle, type of mma, 2 x matrices + transposed of ldmatrix
    unsigned mask;
    int argument, width;
    uint64_t bits;
    void* out;
    const void *a, *b;
    // cp.async: copies in order of issue, of which those before each bound are committed.
    std::vector<CopyAsync> copies;
    std::vector<size_t> groups;
};

// What happened last to one byte of shared memory, in ticks of Emulator::now.
struct Shadow {
    uint32_t written, read;
    uint16_t writer, reader;
    bool pending;                 // a cp.async copy is under way
    bool atomic;                  // the last write was
    bool many_lanes, many_warps;  // read by several since the last barrier of the block or warp
};

struct SharedRegion {
    const char* name;
    uintptr_t begin;
    size_t bytes;
    std::vector<Shadow> shadow;
};

// One tensor: `run` contiguous bytes, repeated along each dimension, outermost first.
struct Range {
    uintptr_t begin, end;
    bool writable;
    size_t run;
    struct Dim {
        size_t size, stride;
    };
    std::vector<Dim> dims;

    // False for an access to a gap between runs, which belongs to another slice of the buffer.
    bool contains(uintptr_t address, size_t size) const {
        if (address < begin || address + size > end) return false;
        size_t offset = address - begin;
        for (const Dim& dim : dims) {
            offset -= std::min(offset / dim.stride, dim.size - 1) * dim.stride;
        }
        return offset + size <= run;
    }
};

enum class Access { read, write, atomic };

struct Statistics {
    uint64_t launches, blocks, threads, barriers, accesses;
};

// One launch runs at a time, under `mutex`.
struct Emulator {
    std::recursive_mutex mutex;

    std::string architecture = "sm_89";
    size_t shared_limit = size_t{99} << 10;
    uint64_t seed = 0, random = 0;
    Statistics statistics{};

    Launch launch{};
    Module module{};
    std::vector<Range> ranges;  // of the MemoryScopes
    size_t recent = 0;          // where an access was found last
    uintptr_t shared_arena = 0;
    SharedRegion dynamic{"dynamic", 0, 0, {}}, fixed{"static", 0, 0, {}};

    Context scheduler{};
    std::unique_ptr<Thread[]> threads;
    unsigned count = 0;           // threads of a block
    unsigned waiting = 0;         // at the block's barrier
    std::vector<unsigned> ready;  // in no order
    std::vector<char*> free_stacks;
    uintptr_t stacks = 0;
    Thread* current = nullptr;
    uintptr_t stack = 0;  // of the current thread

    // Time in synchronisations: now, when the block began, its last barrier, its warps' last ones.
    uint32_t now = 0, block_start = 0, block_time = 0;
    uint32_t warp_time[kMaxThreads / kWarp] = {};

    std::string failure;       // of the thread that failed
    std::string host_failure;  // undefined behaviour outside kernels, for the next launch to throw
};

extern Emulator emulator;

// diagnostics.cpp

Module this_module();
std::string format(const char* pattern, ...) __attribute__((format(printf, 1, 2)));
std::string file_line(const char* file, unsigned line);
// The place in a kernel's source that a return address stands for.
std::string source_line(const void* return_address);
std::string site_of(const Thread& thread);
std::string position(unsigned thread);
// The launch, for the end of a message.
std::string where();
// Ends the launch with an error; the block's fibers are abandoned where they stand.
[[noreturn]] void fail(std::string message, const std::string& place);

// memory.cpp

void check_shared(SharedRegion& region, uintptr_t address, size_t bytes, Access access,
                  const void* pc);
void check_other(uintptr_t address, size_t bytes, Access access, const void* pc);
void check_alignment(const void* address, size_t alignment, Access access, const void* pc);

inline bool inside(uintptr_t address, size_t bytes, uintptr_t begin, size_t size) {
    return address - begin < size && address + bytes <= begin + size;
}

inline SharedRegion* shared_region(uintptr_t address, size_t bytes) {
    for (SharedRegion* region : {&emulator.dynamic, &emulator.fixed}) {
        if (inside(address, bytes, region->begin, region->bytes)) return region;
    }
    return nullptr;
}

// Whether the caller is a kernel's thread: instrumented host code, which other threads of the
// process may run meanwhile, is not.
inline bool in_kernel() {
    const auto frame = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
    return frame - emulator.stacks < kMaxThreads * kStackBytes;
}

// Called at every access of instrumented code; `pc` is where it returns to.
inline void check(uintptr_t address, size_t bytes, Access access, const void* pc) {
    if (!in_kernel()) return;
    if (inside(address, bytes, emulator.stack, kStackBytes)) return;
    ++emulator.statistics.accesses;
    if (SharedRegion* region = shared_region(address, bytes)) {
        check_shared(*region, address, bytes, access, pc);
    } else {
        check_other(address, bytes, access, pc);
    }
}

// launch.cpp

// Lets other threads of the block run.
void yield();
void make_ready(Thread& thread);

// collectives.cpp

// If all lanes of the collective's mask that have not exited are there: performs it, releases them.
void try_collective(const Thread& any);

}  // namespace cvfast::emulation
