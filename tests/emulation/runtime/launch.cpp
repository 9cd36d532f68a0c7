// Runs grids: the scheduler, and the barrier of a block.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <utility>

#include <sys/mman.h>

#include "state.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cvfast::emulation {
namespace {

uint32_t random_below(uint32_t bound) {
    // splitmix64
    uint64_t z = emulator.random += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<uint32_t>(((z ^ (z >> 31)) >> 32) * bound >> 32);
}

void release_barrier() {
    int count = 0;
    for (unsigned i = 0; i < emulator.count; ++i) {
        Thread& thread = emulator.threads[i];
        if (thread.site.line() != emulator.current->site.line() ||
            thread.site.file_name() != emulator.current->site.file_name()) {
            fail("divergent barrier: thread " + position(i) + " waits at another one, " +
                     file_line(thread.site.file_name(), thread.site.line()),
                 file_line(emulator.current->site.file_name(), emulator.current->site.line()));
        }
        count += thread.result != 0;
    }
    for (unsigned i = 0; i < emulator.count; ++i) {
        emulator.threads[i].result = count;
        make_ready(emulator.threads[i]);
    }
    emulator.waiting = 0;
    emulator.block_time = ++emulator.now;
    ++emulator.statistics.barriers;
}

// Who waits where, when nobody can go on.
std::string deadlock() {
    std::string text;
    bool divergent = false;
    for (unsigned i = 0; i < emulator.count;) {
        const Thread& thread = emulator.threads[i];
        const auto same = [&](const Thread& other) {
            return other.state == thread.state &&
                   (thread.state == State::exited || site_of(other) == site_of(thread));
        };
        unsigned end = i + 1;
        while (end < emulator.count && same(emulator.threads[end])) ++end;
        divergent |= thread.state == State::block_barrier;
        text += "\n  threads " + position(i) + " to " + position(end - 1);
        if (thread.state == State::exited) {
            text += " have exited";
        } else {
            text += (thread.state == State::block_barrier ? " wait at a barrier, "
                                                          : " wait in a warp collective, ") +
                    site_of(thread);
        }
        i = end;
        if (text.size() > 1500) {
            text += "\n  ...";
            break;
        }
    }
    return std::string("cvfast emulation: ") +
           (divergent ? "divergent barrier: not every thread of the block arrives"
                      : "divergent warp collective: not every lane of the mask arrives") +
           format(" in block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z) + text + where();
}

void thread_main() {
    emulator.launch.body(emulator.launch.arguments);
    Thread& self = *emulator.current;
    self.state = State::exited;
    const unsigned first = self.index / kWarp * kWarp;
    for (unsigned i = first; i < std::min(first + kWarp, emulator.count); ++i) {
        if (emulator.threads[i].state == State::warp_collective)
            try_collective(emulator.threads[i]);
    }
    yield();
    __builtin_unreachable();
}

void begin_region(SharedRegion& region) {
    std::memset(reinterpret_cast<void*>(region.begin), kPoison, region.bytes);
    if (region.shadow.size() < region.bytes) region.shadow.resize(region.bytes);
}

void run_block() {
    Emulator& e = emulator;
    e.block_start = e.block_time = ++e.now;
    std::fill(std::begin(e.warp_time), std::end(e.warp_time), e.now);
    begin_region(e.dynamic);
    begin_region(e.fixed);
    e.waiting = 0;
    e.ready.clear();
    for (unsigned i = 0; i < e.count; ++i) {
        Thread& thread = e.threads[i];
        thread.state = State::fresh;
        thread.copies.clear();
        thread.groups.clear();
        e.ready.push_back(i);
    }
    ++e.statistics.blocks;
    e.statistics.threads += e.count;
    unsigned exited = 0;
    while (exited < e.count) {
        if (e.ready.empty()) throw std::runtime_error(deadlock());
        const uint32_t pick = random_below(static_cast<uint32_t>(e.ready.size()));
        Thread& thread = e.threads[e.ready[pick]];
        e.ready[pick] = e.ready.back();
        e.ready.pop_back();
        if (thread.state == State::fresh) {
            thread.stack = e.free_stacks.back();
            e.free_stacks.pop_back();
            thread.context.start(thread.stack, thread_main);
        }
        thread.state = State::ready;
        threadIdx = thread.position;
        e.current = &thread;
        e.stack = reinterpret_cast<uintptr_t>(thread.stack);
        Context::change(e.scheduler, thread.context);
        e.current = nullptr;
        if (!e.failure.empty()) throw std::runtime_error(std::exchange(e.failure, {}));
        if (thread.state == State::exited) {
            e.free_stacks.push_back(thread.stack);
            ++exited;
        }
    }
}

// Static shared memory is known by its use: what the first block has written.
void check_static_shared() {
    const Emulator& e = emulator;
    const size_t used = static_cast<size_t>(
        std::count_if(e.fixed.shadow.begin(), e.fixed.shadow.end(),
                      [&](const Shadow& shadow) { return shadow.written >= e.block_start; }));
    if (used + e.launch.shared_bytes > e.shared_limit) {
        throw std::runtime_error(
            format("cvfast emulation: too much shared memory: %s allows a block %zu bytes, and it "
                   "has written %zu of static arrays beside the dynamic ones",
                   e.architecture.c_str(), e.shared_limit, used) +
            where());
    }
}

void* map(size_t bytes) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return memory;
}

void prepare() {
    Emulator& e = emulator;
    if (!e.stacks) {
        e.stacks = reinterpret_cast<uintptr_t>(map(kMaxThreads * kStackBytes));
        e.shared_arena = reinterpret_cast<uintptr_t>(map(kMaxShared + 2 * kSharedGuard));
        e.threads = std::make_unique<Thread[]>(kMaxThreads);
    }
    e.free_stacks.clear();
    for (unsigned i = kMaxThreads; i-- > 0;) {
        e.free_stacks.push_back(reinterpret_cast<char*>(e.stacks) + i * kStackBytes);
    }
    if (e.now > UINT32_MAX / 2) {  // before the clock wraps, forget all that it has stamped
        e.dynamic.shadow.clear();
        e.fixed.shadow.clear();
        e.now = 0;
    }
}

void check_launch(const Launch& l) {
    const auto reject = [&](const std::string& what) {
        emulator.launch = l;
        throw std::runtime_error("cvfast emulation: " + what + where());
    };
    const dim3 &g = l.grid, &b = l.block;
    if (b.x == 0 || b.y == 0 || b.z == 0) reject("empty block");
    if (uint64_t{b.x} * b.y * b.z > kMaxThreads || b.z > 64) {
        reject("too many threads: a block has at most 1024, and 64 along z");
    }
    if (g.x == 0 || g.y == 0 || g.z == 0) reject("empty grid");
    if (g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) {
        reject("too large a grid: at most 2147483647 blocks along x, 65535 along y and z");
    }
    if (l.shared_bytes > emulator.shared_limit) {
        reject(format("too much shared memory: %s allows a block %zu bytes",
                      emulator.architecture.c_str(), emulator.shared_limit));
    }
    if (!emulator.host_failure.empty()) reject(std::exchange(emulator.host_failure, {}));
}

}  // namespace

void yield() {
    Thread& self = *emulator.current;
    Context::change(self.context, emulator.scheduler);
}

void make_ready(Thread& thread) {
    thread.state = State::ready;
    emulator.ready.push_back(thread.index);
}

void run(const Launch& launch) {
    Emulator& e = emulator;
    const std::lock_guard lock(e.mutex);
    check_launch(launch);
    prepare();
    e.launch = launch;
    e.module = this_module();
    ++e.statistics.launches;
    // Aligned to 16 bytes and no more, which is all that CUDA promises.
    e.dynamic.begin = e.shared_arena + kSharedGuard + 16;
    e.dynamic.bytes = launch.shared_bytes;
    e.fixed.begin = e.module.tls_begin;
    e.fixed.bytes = e.module.tls_end - e.module.tls_begin;
    gridDim = launch.grid;
    blockDim = launch.block;
    const dim3 &g = launch.grid, &b = launch.block;
    e.count = b.x * b.y * b.z;
    for (unsigned i = 0; i < e.count; ++i) {
        e.threads[i].index = i;
        e.threads[i].position = {i % b.x, i / b.x % b.y, i / b.x / b.y};
    }
    // A random order of the blocks: multiplication by a number coprime to their count.
    const uint64_t blocks = uint64_t{g.x} * g.y * g.z;
    const uint64_t start =
        random_below(static_cast<uint32_t>(std::min<uint64_t>(blocks, 1u << 31)));
    uint64_t step = 1 + random_below(static_cast<uint32_t>(std::min<uint64_t>(blocks, 1u << 31)));
    while (std::gcd(step, blocks) != 1) ++step;
    for (uint64_t i = 0, block = start; i < blocks; ++i, block = (block + step) % blocks) {
        blockIdx = {static_cast<unsigned>(block % g.x), static_cast<unsigned>(block / g.x % g.y),
                    static_cast<unsigned>(block / g.x / g.y)};
        run_block();
        if (i == 0) check_static_shared();
    }
}

int block_barrier(int predicate, Site site) {
    Thread& self = *emulator.current;
    self.site = site;
    self.result = predicate != 0;
    self.state = State::block_barrier;
    if (++emulator.waiting == emulator.count) release_barrier();
    yield();
    return self.result;
}

}  // namespace cvfast::emulation

// What Python calls.

using cvfast::emulation::emulator;

#define CVFAST_API extern "C" __attribute__((visibility("default")))

CVFAST_API void cvfast_emulation_seed(uint64_t seed) {
    const std::lock_guard lock(emulator.mutex);
    emulator.seed = emulator.random = seed;
}

CVFAST_API void cvfast_emulation_architecture(const char* name, size_t shared_bytes_per_block) {
    const std::lock_guard lock(emulator.mutex);
    emulator.architecture = name;
    emulator.shared_limit = std::min(shared_bytes_per_block, cvfast::emulation::kMaxShared);
}

CVFAST_API void cvfast_emulation_statistics(cvfast::emulation::Statistics* statistics) {
    const std::lock_guard lock(emulator.mutex);
    *statistics = emulator.statistics;
}
