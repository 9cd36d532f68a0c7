#include "cpu/engine.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <new>
#include <thread>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cvfast {
namespace {

constexpr std::size_t kLine = 64;

// Large arenas ask for pages of 2 MB, which the address caches hold more of: on Granite Rapids, a
// U-Net takes 0.96 of the time. Small ones fit those caches, and would be rounded up.
constexpr std::size_t kLargePage = std::size_t{2} << 20;
constexpr int64_t kLargeArena = int64_t{16} << 20;

struct FreeAligned {
    std::align_val_t alignment{kLine};
    void operator()(char* p) const { ::operator delete(p, alignment); }
};
using Memory = std::unique_ptr<char, FreeAligned>;

Memory allocate(int64_t bytes) {
    const auto size = static_cast<std::size_t>(bytes);
    const std::align_val_t alignment{bytes >= kLargeArena ? kLargePage : kLine};
    Memory memory(static_cast<char*>(::operator new(size, alignment)), {alignment});
#if defined(MADV_HUGEPAGE)
    // Only a wish: where it is not granted, pages are as small as elsewhere.
    if (bytes >= kLargeArena) madvise(memory.get(), size, MADV_HUGEPAGE);
#endif
    return memory;
}

int64_t round_up(int64_t bytes) {
    constexpr int64_t line = kLine;
    return (bytes + line - 1) / line * line;
}

struct alignas(kLine) Counter {
    std::atomic<int64_t> value{0};
};

// Of a call's tasks, the first of worker `worker`: its own share, which others take from only when
// theirs is done. So a worker finds in its caches what it wrote a layer before.
int64_t first_task(int64_t tasks, int worker, int workers) {
    return (tasks * worker + workers - 1) / workers;
}

// Tasks claimed at a time: a quarter of a worker's share, so that the rest can be taken over.
int64_t claim(int64_t tasks, int workers) {
    return std::max<int64_t>(1, tasks / (int64_t{4} * workers));
}

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Waits until `counter` is 0. The other threads are at work and need some microseconds; one that
// lost its core needs ours.
void wait_for_zero(const std::atomic<int64_t>& counter) {
    constexpr int kSpins = 4096;
    for (int spin = 0; counter.load(std::memory_order_acquire) != 0; ++spin) {
        if (spin < kSpins) {
            pause();
        } else {
            std::this_thread::yield();
        }
    }
}

int64_t now() {
    const auto time = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(time).count();
}

}  // namespace

// What one run writes to.
struct Plan::Run {
    Memory arena;
    std::vector<std::unique_ptr<Call>> calls;
    std::unique_ptr<Counter[]> next;       // [call][worker], the worker's next unclaimed task
    std::unique_ptr<Counter[]> remaining;  // [phase], tasks
};

Plan::~Plan() = default;

int Plan::arena_count() const {
    const std::scoped_lock lock(mutex_);
    return runs_;
}

std::unique_ptr<Plan::Run> Plan::acquire() {
    {
        const std::scoped_lock lock(mutex_);
        if (!idle_.empty()) {
            auto run = std::move(idle_.back());
            idle_.pop_back();
            return run;
        }
        ++runs_;
    }
    auto run = std::make_unique<Run>();
    run->arena = allocate(arena_bytes_);
    for (const auto& call : calls_) run->calls.push_back(call->clone());
    for (const Relocation& r : in_arena_) {
        run->calls[r.call]->set_pointer(r.pointer, run->arena.get() + r.offset);
    }
    run->next = std::make_unique<Counter[]>(calls_.size() * threads_);
    run->remaining = std::make_unique<Counter[]>(phases_.size());
    return run;
}

void Plan::run(std::span<void* const> externals, const Parallel& parallel, PhaseTime* times) {
    auto run = acquire();
    for (const Relocation& r : in_externals_) {
        run->calls[r.call]->set_pointer(r.pointer,
                                        static_cast<char*>(externals[r.space - 1]) + r.offset);
    }
    for (std::size_t call = 0; call < calls_.size(); ++call) {
        for (int worker = 0; worker < threads_; ++worker) {
            run->next[call * threads_ + worker].value.store(
                first_task(tasks_[call], worker, threads_), std::memory_order_relaxed);
        }
    }
    for (std::size_t phase = 0; phase < phases_.size(); ++phase) {
        run->remaining[phase].value.store(phases_[phase].tasks, std::memory_order_relaxed);
    }
    // A pool that has fewer threads free gives one of them several workers: the first will do, for
    // no work waits for a certain worker.
    parallel(threads_, threads_,
             [&](int64_t begin, int64_t) { work(*run, static_cast<int>(begin), times); });
    const std::scoped_lock lock(mutex_);
    idle_.push_back(std::move(run));
}

void Plan::work(Run& run, int worker, PhaseTime* times) const {
    int64_t begun = times ? now() : 0;
    for (std::size_t phase = 0; phase < phases_.size(); ++phase) {
        const auto [first_call, last_call, tasks, scratch_bytes, scratch_offset] = phases_[phase];
        char* scratch = run.arena.get() + scratch_offset + worker * scratch_bytes;
        int64_t done = 0;
        for (int call = first_call; call < last_call; ++call) {
            const int64_t step = claim(tasks_[call], threads_);
            for (int i = 0; i < threads_; ++i) {
                const int owner = (worker + i) % threads_;
                const int64_t last = first_task(tasks_[call], owner + 1, threads_);
                auto& next = run.next[static_cast<std::size_t>(call) * threads_ + owner].value;
                while (next.load(std::memory_order_relaxed) < last) {
                    const int64_t begin = next.fetch_add(step, std::memory_order_relaxed);
                    if (begin >= last) break;
                    const int64_t end = std::min(begin + step, last);
                    run.calls[call]->run(begin, end, scratch);
                    done += end - begin;
                }
            }
        }
        auto& remaining = run.remaining[phase].value;
        if (done) remaining.fetch_sub(done, std::memory_order_acq_rel);
        const int64_t finished = times ? now() : 0;
        wait_for_zero(remaining);
        if (times) {
            const int64_t end = now();
            times[phase].waited.fetch_add(end - finished, std::memory_order_relaxed);
            if (worker == 0) times[phase].elapsed += end - begun;
            begun = end;
        }
    }
}

PlanBuilder::PlanBuilder(std::vector<Space> spaces, int threads)
    : spaces_(std::move(spaces)), plan_(new Plan) {
    plan_->threads_ = threads;
    plan_->externals_ = static_cast<int>(spaces_.size()) - 1;
}

void PlanBuilder::append(std::unique_ptr<Call> call) {
    const int index = plan_->call_count();
    for (int i = 0; i < call->pointer_count(); ++i) {
        const auto* pointer = static_cast<const char*>(call->pointer(i));
        for (std::size_t s = 0; pointer && s < spaces_.size(); ++s) {
            const Space& space = spaces_[s];
            const int64_t offset = pointer - space.begin;
            if (offset < 0 || offset >= space.bytes) continue;
            auto& list = s == 0 ? plan_->in_arena_ : plan_->in_externals_;
            list.push_back({index, i, static_cast<int>(s), offset});
            break;
        }
    }
    const Cut cut = call->cut(plan_->threads_, most_scratch_);
    plan_->tasks_.push_back(cut.tasks);
    scratch_bytes_ = std::max(scratch_bytes_, round_up(cut.scratch_bytes));
    plan_->calls_.push_back(std::move(call));
}

int64_t PlanBuilder::barrier() {
    const int end = plan_->call_count();
    Phase phase{phase_begin_, end, 0, std::exchange(scratch_bytes_, 0), 0};
    for (int call = phase.begin; call < end; ++call) phase.tasks += plan_->tasks_[call];
    plan_->phases_.push_back(phase);
    phase_begin_ = end;
    return phase.scratch_bytes * plan_->threads_;
}

std::unique_ptr<Plan> PlanBuilder::finish(int64_t arena_bytes, std::span<const int64_t> scratch) {
    plan_->arena_bytes_ = arena_bytes;
    for (std::size_t phase = 0; phase < scratch.size(); ++phase) {
        plan_->phases_[phase].scratch_offset = scratch[phase];
    }
    return std::move(plan_);
}

}  // namespace cvfast
