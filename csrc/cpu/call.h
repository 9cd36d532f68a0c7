// A kernel call as data: an operator runs it at once, a plan keeps it and runs it later.
//
// Every kernel offers, as overloads over its Shape (plain numbers) and Operands (pointers only):
//
//   make_plan(shape, operands, threads[, most_scratch])            a Cut and what else it decides
//   run_tasks(shape, operands, plan, begin, end, scratch)          tasks [begin, end), this thread
//
// Tasks write disjoint parts of the output, and run in any order on any thread. Kernels whose
// blocks can be smaller keep to `most_scratch` bytes of scratch memory a thread, where that leaves
// blocks worth their while.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#include "common/parallel.h"

namespace cvfast {

inline constexpr int64_t kAnyScratch = std::numeric_limits<int64_t>::max();

struct Cut {
    int64_t tasks;
    int threads;            // that pay
    int64_t scratch_bytes;  // that each thread needs, aligned to 64 bytes
};

// Memory of the calling thread's, aligned to 64 bytes; kept, and grown where a call needs more.
void* thread_scratch(int64_t bytes);

template <class Shape, class Operands>
auto plan_within(const Shape& shape, const Operands& operands, int threads,
                 [[maybe_unused]] int64_t most_scratch) {
    if constexpr (requires { make_plan(shape, operands, threads, most_scratch); }) {
        return make_plan(shape, operands, threads, most_scratch);
    } else {
        return make_plan(shape, operands, threads);
    }
}

template <class Shape, class Operands>
void run_now(const Shape& shape, const Operands& operands, const Parallel& parallel) {
    const auto plan = make_plan(shape, operands, parallel.threads);
    parallel(plan.tasks, plan.threads, [&](int64_t begin, int64_t end) {
        run_tasks(shape, operands, plan, begin, end, thread_scratch(plan.scratch_bytes));
    });
}

class Call {
  public:
    virtual ~Call() = default;
    virtual std::unique_ptr<Call> clone() const = 0;
    // Cuts the call for up to `threads` threads; comes before run().
    virtual Cut cut(int threads, int64_t most_scratch) = 0;
    virtual void run(int64_t begin, int64_t end, void* scratch) const = 0;
    virtual int pointer_count() const = 0;
    virtual const void* pointer(int index) const = 0;
    virtual void set_pointer(int index, const void* value) = 0;
};

template <class Shape, class Operands>
class CallOf final : public Call {
    static_assert(std::is_trivially_copyable_v<Operands> && sizeof(Operands) % sizeof(void*) == 0,
                  "operands hold pointers only");

  public:
    CallOf(const Shape& shape, const Operands& operands) : shape_(shape), operands_(operands) {}

    std::unique_ptr<Call> clone() const override { return std::make_unique<CallOf>(*this); }

    Cut cut(int threads, int64_t most_scratch) override {
        return plan_ = plan_within(shape_, operands_, threads, most_scratch);
    }

    void run(int64_t begin, int64_t end, void* scratch) const override {
        run_tasks(shape_, operands_, plan_, begin, end, scratch);
    }

    int pointer_count() const override { return sizeof(Operands) / sizeof(void*); }

    const void* pointer(int index) const override {
        const void* value;
        std::memcpy(&value, bytes(operands_) + index * sizeof value, sizeof value);
        return value;
    }

    void set_pointer(int index, const void* value) override {
        std::memcpy(bytes(operands_) + index * sizeof value, &value, sizeof value);
    }

  private:
    template <class T>
    static auto bytes(T& operands) {
        using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
        return reinterpret_cast<Byte*>(&operands);
    }

    Shape shape_;
    Operands operands_;
    decltype(make_plan(std::declval<Shape>(), std::declval<Operands>(), 1)) plan_{};
};

}  // namespace cvfast
