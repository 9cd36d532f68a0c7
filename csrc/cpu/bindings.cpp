// Binds the CPU kernels to the operators that cvfast/ops defines. The only file that sees torch,
// and of torch only the stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/depthwise.h"
#include "cpu/isa.h"

namespace {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

cvfast::Parallel torch_pool() {
    const auto run = [](int64_t count, int threads, cvfast::Parallel::Body body, void* context) {
        const int64_t grain = (count + threads - 1) / threads;
        STD_TORCH_CHECK(torch_parallel_for(0, count, grain, body, context) == AOTI_TORCH_SUCCESS,
                        "cvfast: torch's thread pool failed");
    };
    return {static_cast<int>(torch::stable::get_num_threads()), run};
}

cvfast::Activation parse_activation(const std::string& name) {
    for (int i = 0; const auto known : cvfast::kActivationNames) {
        if (name == known) return static_cast<cvfast::Activation>(i);
        ++i;
    }
    STD_TORCH_CHECK(false, "cvfast: unknown activation '", name,
                    "'; expected none, relu, relu6 or hardswish");
    return cvfast::Activation::none;
}

// Window positions along one axis.
int64_t positions(int64_t size, int64_t pad, int64_t dilation, int64_t kernel, int64_t stride) {
    const int64_t free = size + 2 * pad - dilation * (kernel - 1) - 1;
    return free < 0 ? 0 : free / stride + 1;
}

Tensor depthwise_cpu(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& kernel_size,
                     const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                     const std::vector<int64_t>& dilation, const std::string& activation) {
    STD_TORCH_CHECK(x.dim() == 4, "cvfast::depthwise_cpu: x must be [N, C, H, W], got ", x.dim(),
                    " dimensions");
    STD_TORCH_CHECK(x.size(1) == 1 || x.stride(1) == 1,
                    "cvfast::depthwise_cpu: x must be channels-last (stride 1 along C); use "
                    "x.contiguous(memory_format=torch.channels_last)");
    STD_TORCH_CHECK(kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2 &&
                        dilation.size() == 2,
                    "cvfast::depthwise_cpu: kernel_size, stride, padding and dilation take "
                    "two numbers each");
    for (int i = 0; i < 2; ++i) {
        STD_TORCH_CHECK(kernel_size[i] > 0 && stride[i] > 0 && dilation[i] > 0 && padding[i] >= 0,
                        "cvfast::depthwise_cpu: kernel_size, stride and dilation must be positive, "
                        "padding not negative");
    }
    cvfast::DepthwiseShape s{};
    s.batch = x.size(0), s.channels = x.size(1), s.height = x.size(2), s.width = x.size(3);
    s.x_image = x.stride(0), s.x_row = x.stride(2), s.x_pixel = x.stride(3);
    s.kernel_h = kernel_size[0], s.kernel_w = kernel_size[1];
    s.stride_h = stride[0], s.stride_w = stride[1];
    s.pad_top = padding[0], s.pad_left = padding[1];
    s.dilation_h = dilation[0], s.dilation_w = dilation[1];
    s.activation = parse_activation(activation);
    s.multiplier = packed.dim() == 4 ? packed.size(0) : 0;

    constexpr int64_t kPanel = cvfast::kDepthwisePanel;
    STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Float && packed.is_cpu() &&
                        packed.is_contiguous() && packed.dim() == 4 &&
                        packed.size(1) == (s.channels + kPanel - 1) / kPanel &&
                        packed.size(2) == s.kernel_h * s.kernel_w + 1 && packed.size(3) == kPanel,
                    "cvfast::depthwise_cpu: packed does not come from prepack() for a ", s.kernel_h,
                    "x", s.kernel_w, " kernel over ", s.channels, " channels");

    s.out_height = positions(s.height, s.pad_top, s.dilation_h, s.kernel_h, s.stride_h);
    s.out_width = positions(s.width, s.pad_left, s.dilation_w, s.kernel_w, s.stride_w);
    STD_TORCH_CHECK(s.out_height > 0 && s.out_width > 0,
                    "cvfast::depthwise_cpu: the kernel is larger than the padded image ", s.height,
                    "x", s.width);
    const int64_t out_channels = s.channels * s.multiplier;
    const int64_t sizes[] = {s.batch, out_channels, s.out_height, s.out_width};
    Tensor out = torch::stable::empty(sizes, x.scalar_type(), std::nullopt, std::nullopt,
                                      std::nullopt, MemoryFormat::ChannelsLast);
    s.out_pixel = out_channels;
    s.out_row = s.out_pixel * s.out_width;
    s.out_image = s.out_row * s.out_height;

    const auto* weights = static_cast<const float*>(packed.const_data_ptr());
    const auto run = [&]<class T>(std::type_identity<T>) {
        cvfast::depthwise(s, static_cast<const T*>(x.const_data_ptr()), weights,
                          static_cast<T*>(out.mutable_data_ptr()), torch_pool());
    };
    switch (x.scalar_type()) {
        case ScalarType::Float:
            run(std::type_identity<float>{});
            break;
        case ScalarType::BFloat16:
            run(std::type_identity<cvfast::BFloat16>{});
            break;
        case ScalarType::Half:
            run(std::type_identity<cvfast::Half>{});
            break;
        default:
            STD_TORCH_CHECK(false, "cvfast::depthwise_cpu: x must be float32, bfloat16 or float16");
    }
    return out;
}

std::string cpu_isa_levels() {
    std::string names;
    for (int level = 0; level <= static_cast<int>(cvfast::best_isa()); ++level) {
        if (level) names += ',';
        names += cvfast::kIsaNames[level];
    }
    return names;
}

std::string cpu_isa() {
    return std::string(cvfast::kIsaNames[static_cast<int>(cvfast::current_isa())]);
}

void cpu_select_isa(const std::string& name) {
    for (int level = 0; level < cvfast::kIsaCount; ++level) {
        if (name == cvfast::kIsaNames[level] &&
            cvfast::select_isa(static_cast<cvfast::Isa>(level))) {
            return;
        }
    }
    STD_TORCH_CHECK(false, "instruction-set level '", name, "' is not available; this machine has ",
                    cpu_isa_levels());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(cvfast, CPU, m) { m.impl("depthwise_cpu", TORCH_BOX(&depthwise_cpu)); }

STABLE_TORCH_LIBRARY_IMPL(cvfast, CompositeExplicitAutograd, m) {
    m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
    m.impl("cpu_isa_levels", TORCH_BOX(&cpu_isa_levels));
    m.impl("cpu_select_isa", TORCH_BOX(&cpu_select_isa));
}
