#include "cpu/bindings.h"

#include "cpu/isa.h"
#include "cpu/machine.h"
#include "cpu/pointwise.h"

namespace cvfast {

Parallel torch_pool() {
    const auto run = [](int64_t count, int threads, Parallel::Body body, void* context) {
        const int64_t grain = (count + threads - 1) / threads;
        STD_TORCH_CHECK(torch_parallel_for(0, count, grain, body, context) == AOTI_TORCH_SUCCESS,
                        "cvfast: torch's thread pool failed");
    };
    return {static_cast<int>(torch::stable::get_num_threads()), run};
}

Activation parse_activation(const std::string& name) {
    for (int i = 0; const auto known : kActivationNames) {
        if (name == known) return static_cast<Activation>(i);
        ++i;
    }
    STD_TORCH_CHECK(false, "cvfast: unknown activation '", name,
                    "'; expected none, relu, relu6, hardswish or hardsigmoid");
    return Activation::none;
}

namespace {

std::string cpu_isa_levels() {
    std::string names;
    for (int level = 0; level <= static_cast<int>(best_isa()); ++level) {
        if (level) names += ',';
        names += kIsaNames[level];
    }
    return names;
}

std::string cpu_isa() { return std::string(kIsaNames[static_cast<int>(current_isa())]); }

bool cpu_amx_takes_floats(int64_t pixels, int64_t in_channels, int64_t out_channels) {
    return has_amx() && amx_takes_floats(pixels, in_channels, out_channels);
}

void cpu_select_isa(const std::string& name) {
    for (int level = 0; level < kIsaCount; ++level) {
        if (name == kIsaNames[level] && select_isa(static_cast<Isa>(level))) {
            return;
        }
    }
    STD_TORCH_CHECK(false, "instruction-set level '", name, "' is not available; this machine has ",
                    cpu_isa_levels());
}

}  // namespace
}  // namespace cvfast

STABLE_TORCH_LIBRARY_IMPL(cvfast, CompositeExplicitAutograd, m) {
    m.impl("cpu_isa", TORCH_BOX(&cvfast::cpu_isa));
    m.impl("cpu_isa_levels", TORCH_BOX(&cvfast::cpu_isa_levels));
    m.impl("cpu_select_isa", TORCH_BOX(&cvfast::cpu_select_isa));
    m.impl("cpu_amx_takes_floats", TORCH_BOX(&cvfast::cpu_amx_takes_floats));
    m.impl("cpu_l2_bytes", TORCH_BOX(&cvfast::l2_bytes));
    m.impl("cpu_l3_bytes", TORCH_BOX(&cvfast::l3_bytes));
}
