// Plans: recorded kernel calls over one arena, run from first to last by one call. See
// docs/engine.md.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "common/parallel.h"
#include "cpu/call.h"

namespace cvfast {

// Memory that lies elsewhere at each run: the arena, or a tensor that the caller hands in.
struct Space {
    const char* begin;  // while the plan is recorded
    int64_t bytes;
};

// Where a call holds a pointer into a space.
struct Relocation {
    int call, pointer;
    int space;
    int64_t offset;
};

// Calls [begin, end) may run at once: none reads or overwrites what another writes.
struct Phase {
    int begin, end;
    int64_t tasks;
    int64_t scratch_bytes;   // of each thread
    int64_t scratch_offset;  // of the first thread's, in the arena; the others' follow
};

// Nanoseconds of a phase: from its beginning to its end, and those that its threads spent waiting
// for each other at the end, all threads together.
struct PhaseTime {
    int64_t elapsed = 0;
    std::atomic<int64_t> waited{0};
};

// May be run by several threads at once: each run has an arena and operands of its own, which are
// kept for later runs.
class Plan {
  public:
    ~Plan();

    // `externals` are the spaces after the arena. With `times` not null, the times of each phase
    // are added to it.
    void run(std::span<void* const> externals, const Parallel& parallel, PhaseTime* times);

    int64_t arena_bytes() const { return arena_bytes_; }
    int call_count() const { return static_cast<int>(calls_.size()); }
    int phase_count() const { return static_cast<int>(phases_.size()); }
    int external_count() const { return externals_; }
    // Arenas that exist: as many as runs were ever under way at once.
    int arena_count() const;

  private:
    friend class PlanBuilder;
    struct Run;

    Plan() = default;
    std::unique_ptr<Run> acquire();
    void work(Run& run, int worker, PhaseTime* times) const;

    int threads_ = 1;
    int externals_ = 0;
    int64_t arena_bytes_ = 0;
    std::vector<std::unique_ptr<Call>> calls_;
    std::vector<int64_t> tasks_;  // of each call
    std::vector<Phase> phases_;
    std::vector<Relocation> in_arena_, in_externals_;

    mutable std::mutex mutex_;
    std::vector<std::unique_ptr<Run>> idle_;
    int runs_ = 0;
};

class PlanBuilder {
  public:
    // The first space is the arena.
    PlanBuilder(std::vector<Space> spaces, int threads);

    // What the threads may take together as scratch memory, of calls that follow.
    void limit_scratch(int64_t bytes) { most_scratch_ = bytes / plan_->threads_ / 64 * 64; }
    void append(std::unique_ptr<Call> call);
    // Ends a phase: what follows may read and overwrite what came before. Returns the bytes of
    // scratch memory that its threads need together.
    int64_t barrier();
    int phase_count() const { return plan_->phase_count(); }
    // `scratch`: where in the arena, which takes `arena_bytes` by now, that of each phase lies.
    std::unique_ptr<Plan> finish(int64_t arena_bytes, std::span<const int64_t> scratch);

  private:
    std::vector<Space> spaces_;
    std::unique_ptr<Plan> plan_;
    int phase_begin_ = 0;
    int64_t most_scratch_ = kAnyScratch;  // of each thread
    int64_t scratch_bytes_ = 0;           // of each thread, in the phase that is being recorded
};

}  // namespace cvfast
