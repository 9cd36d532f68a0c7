// Records plans and runs them: cvfast/engine/plan.py has the other half.
#include <unordered_map>

#include "cpu/bindings.h"
#include "cpu/engine.h"

namespace cvfast {
namespace {

thread_local std::unique_ptr<PlanBuilder> recording;

std::mutex plans_mutex;
std::unordered_map<int64_t, std::shared_ptr<Plan>> plans;
int64_t last_plan = 0;

std::shared_ptr<Plan> find_plan(int64_t id) {
    const std::scoped_lock lock(plans_mutex);
    const auto found = plans.find(id);
    STD_TORCH_CHECK(found != plans.end(), "cvfast: there is no plan ", id);
    return found->second;
}

int64_t bytes_spanned(const Tensor& t) {
    int64_t last = 0;
    for (int64_t d = 0; d < t.dim(); ++d) {
        if (t.size(d) == 0) return 0;
        last += (t.size(d) - 1) * t.stride(d);
    }
    return (last + 1) * t.element_size();
}

void plan_record(const Tensor& arena, const std::vector<Tensor>& externals, int64_t threads) {
    STD_TORCH_CHECK(!recording, "cvfast::plan_record: this thread is recording a plan already");
    STD_TORCH_CHECK(threads > 0, "cvfast::plan_record: threads must be positive");
    std::vector<Space> spaces;
    spaces.push_back({static_cast<const char*>(arena.const_data_ptr()), bytes_spanned(arena)});
    for (const Tensor& t : externals) {
        STD_TORCH_CHECK(t.is_cpu(), "cvfast::plan_record: tensors must be on the CPU");
        spaces.push_back({static_cast<const char*>(t.const_data_ptr()), bytes_spanned(t)});
    }
    recording = std::make_unique<PlanBuilder>(std::move(spaces), static_cast<int>(threads));
}

void plan_limit_scratch(int64_t bytes) {
    STD_TORCH_CHECK(recording, "cvfast::plan_limit_scratch: no plan is being recorded");
    STD_TORCH_CHECK(bytes >= 0, "cvfast::plan_limit_scratch: bytes must not be negative");
    recording->limit_scratch(bytes);
}

int64_t plan_barrier() {
    STD_TORCH_CHECK(recording, "cvfast::plan_barrier: no plan is being recorded");
    return recording->barrier();
}

int64_t plan_finish(int64_t arena_bytes, const std::vector<int64_t>& scratch) {
    STD_TORCH_CHECK(recording, "cvfast::plan_finish: no plan is being recorded");
    STD_TORCH_CHECK(static_cast<int>(scratch.size()) == recording->phase_count(),
                    "cvfast::plan_finish: scratch memory of ", recording->phase_count(),
                    " phases needs a place, got ", scratch.size());
    std::shared_ptr<Plan> plan = recording->finish(arena_bytes, scratch);
    recording.reset();
    const std::scoped_lock lock(plans_mutex);
    plans.emplace(++last_plan, std::move(plan));
    return last_plan;
}

void plan_abandon() { recording.reset(); }

void plan_delete(int64_t id) {
    const std::scoped_lock lock(plans_mutex);
    plans.erase(id);
}

void run(Plan& plan, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs,
         PhaseTime* times) {
    std::vector<void*> externals;
    for (const Tensor& t : inputs) externals.push_back(const_cast<void*>(t.const_data_ptr()));
    for (const Tensor& t : outputs) externals.push_back(t.mutable_data_ptr());
    STD_TORCH_CHECK(static_cast<int>(externals.size()) == plan.external_count(),
                    "cvfast::plan_run: the plan was recorded with ", plan.external_count(),
                    " tensors, got ", externals.size());
    plan.run(externals, torch_pool(), times);
}

void plan_run(int64_t id, const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) {
    run(*find_plan(id), inputs, outputs, nullptr);
}

std::vector<int64_t> plan_profile(int64_t id, const std::vector<Tensor>& inputs,
                                  const std::vector<Tensor>& outputs) {
    const auto plan = find_plan(id);
    std::vector<PhaseTime> times(plan->phase_count());
    run(*plan, inputs, outputs, times.data());
    std::vector<int64_t> nanoseconds;
    for (const PhaseTime& time : times) {
        nanoseconds.push_back(time.elapsed);
        nanoseconds.push_back(time.waited);
    }
    return nanoseconds;
}

std::vector<int64_t> plan_memory(int64_t id) {
    const auto plan = find_plan(id);
    return {plan->arena_bytes(), plan->arena_count()};
}

}  // namespace

PlanBuilder* recorder() { return recording.get(); }

}  // namespace cvfast

STABLE_TORCH_LIBRARY_IMPL(cvfast, CompositeExplicitAutograd, m) {
    m.impl("plan_record", TORCH_BOX(&cvfast::plan_record));
    m.impl("plan_limit_scratch", TORCH_BOX(&cvfast::plan_limit_scratch));
    m.impl("plan_barrier", TORCH_BOX(&cvfast::plan_barrier));
    m.impl("plan_finish", TORCH_BOX(&cvfast::plan_finish));
    m.impl("plan_abandon", TORCH_BOX(&cvfast::plan_abandon));
    m.impl("plan_delete", TORCH_BOX(&cvfast::plan_delete));
    m.impl("plan_run", TORCH_BOX(&cvfast::plan_run));
    m.impl("plan_profile", TORCH_BOX(&cvfast::plan_profile));
    m.impl("plan_memory", TORCH_BOX(&cvfast::plan_memory));
}
