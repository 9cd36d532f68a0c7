// Binds the CPU kernels to the operators that cvfast/ops defines. The only file that sees torch,
// and of torch only the stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/conv.h"
#include "cpu/depthwise.h"
#include "cpu/isa.h"
#include "cpu/pointwise.h"

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
                    "'; expected none, relu, relu6, hardswish or hardsigmoid");
    return cvfast::Activation::none;
}

// Window positions along one axis.
int64_t positions(int64_t size, int64_t pad, int64_t dilation, int64_t kernel, int64_t stride) {
    const int64_t free = size + 2 * pad - dilation * (kernel - 1) - 1;
    return free < 0 ? 0 : free / stride + 1;
}

bool channels_adjacent(const Tensor& t) { return t.size(1) == 1 || t.stride(1) == 1; }

// An image operand of `op`, of x's dtype and of this size.
void check_image(const char* op, const char* name, const Tensor& t, const Tensor& x,
                 const int64_t (&sizes)[4]) {
    bool fits = t.dim() == 4;
    for (int i = 0; i < 4 && fits; ++i) fits = t.size(i) == sizes[i];
    STD_TORCH_CHECK(fits, "cvfast::", op, ": ", name, " must be [", sizes[0], ", ", sizes[1], ", ",
                    sizes[2], ", ", sizes[3], "]");
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == x.scalar_type(), "cvfast::", op, ": ", name,
                    " must have the dtype of x and be on the CPU");
    STD_TORCH_CHECK(channels_adjacent(t), "cvfast::", op, ": ", name,
                    " must be channels-last (stride 1 along C); use "
                    "contiguous(memory_format=torch.channels_last)");
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
    return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// Calls `run` with the type of x's elements.
template <class Run>
void with_element_type(const char* op, const Tensor& x, const Run& run) {
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
            STD_TORCH_CHECK(false, "cvfast::", op, ": x must be float32, bfloat16 or float16");
    }
}

Tensor depthwise_cpu(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& kernel_size,
                     const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                     const std::vector<int64_t>& dilation, const std::string& activation) {
    STD_TORCH_CHECK(x.dim() == 4, "cvfast::depthwise_cpu: x must be [N, C, H, W], got ", x.dim(),
                    " dimensions");
    STD_TORCH_CHECK(channels_adjacent(x),
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
    with_element_type("depthwise_cpu", x, [&]<class T>(std::type_identity<T>) {
        cvfast::depthwise(s, static_cast<const T*>(x.const_data_ptr()), weights,
                          static_cast<T*>(out.mutable_data_ptr()), torch_pool());
    });
    return out;
}

// Distances, in elements, between the pixels, rows and images of a channels-last tensor of this
// size. Where there is but one, torch's stride means nothing; it becomes the one that lets rows and
// images run into each other.
struct PixelStrides {
    int64_t image, row, pixel;

    PixelStrides(const Tensor& t, int64_t batch, int64_t height, int64_t width,
                 const std::vector<int64_t>& step = {1, 1})
        : image(t.stride(0)), row(t.stride(2) * step[0]), pixel(t.stride(3) * step[1]) {
        if (width == 1) pixel = height == 1 ? image : row;
        if (height == 1) row = pixel * width;
        if (batch == 1) image = row * height;
    }
};

void check_vector(const char* name, const std::optional<Tensor>& vector, int64_t channels) {
    if (!vector) return;
    STD_TORCH_CHECK(vector->is_cpu() && vector->scalar_type() == ScalarType::Float &&
                        vector->dim() == 1 && vector->size(0) == channels &&
                        vector->is_contiguous(),
                    "cvfast::pointwise_cpu: ", name, " must be ", channels,
                    " contiguous float32 numbers, one per channel of x");
}

Tensor pointwise_out(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& stride,
                     const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                     const std::optional<Tensor>& gate, const std::optional<Tensor>& residual,
                     const std::string& activation, Tensor out) {
    STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "cvfast::pointwise_cpu: x must be [N, C, H, W]");
    STD_TORCH_CHECK(channels_adjacent(x),
                    "cvfast::pointwise_cpu: x must be channels-last (stride 1 along C); use "
                    "x.contiguous(memory_format=torch.channels_last)");
    STD_TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0,
                    "cvfast::pointwise_cpu: stride takes two positive numbers");
    STD_TORCH_CHECK(out.dim() == 4, "cvfast::pointwise_cpu: out must be [N, C, H, W]");
    cvfast::PointwiseShape s{};
    s.batch = x.size(0), s.in_channels = x.size(1), s.out_channels = out.size(1);
    s.height = (x.size(2) + stride[0] - 1) / stride[0];
    s.width = (x.size(3) + stride[1] - 1) / stride[1];
    s.activation = parse_activation(activation);
    const int64_t sizes[4] = {s.batch, s.out_channels, s.height, s.width};
    check_image("pointwise_cpu", "out", out, x, sizes);
    if (residual) check_image("pointwise_cpu", "residual", *residual, x, sizes);
    STD_TORCH_CHECK(scale.has_value() == shift.has_value(),
                    "cvfast::pointwise_cpu: scale and shift come together");
    check_vector("scale", scale, s.in_channels);
    check_vector("shift", shift, s.in_channels);
    STD_TORCH_CHECK(
        !gate || (gate->is_cpu() && gate->scalar_type() == x.scalar_type() && gate->dim() == 2 &&
                  gate->size(0) == s.batch && gate->size(1) == s.in_channels &&
                  (s.in_channels == 1 || gate->stride(1) == 1)),
        "cvfast::pointwise_cpu: gate must be [", s.batch, ", ", s.in_channels,
        "] with adjacent channels and of x's dtype");

    const bool pairs = x.scalar_type() == ScalarType::BFloat16;
    const int64_t rows = cvfast::pointwise_packed_rows(s.in_channels, s.out_channels, pairs);
    STD_TORCH_CHECK(packed.is_cpu() && packed.is_contiguous() && packed.dim() == 2 &&
                        packed.scalar_type() == (pairs ? ScalarType::Int : ScalarType::Float) &&
                        packed.size(0) == rows && packed.size(1) == cvfast::kPointwisePanel,
                    "cvfast::pointwise_cpu: packed does not come from prepack() for ",
                    s.in_channels, " to ", s.out_channels, " channels of x's dtype");

    const PixelStrides from(x, s.batch, s.height, s.width, stride);
    s.x_image = from.image, s.x_row = from.row, s.x_pixel = from.pixel;
    const PixelStrides to(out, s.batch, s.height, s.width);
    s.out_image = to.image, s.out_row = to.row, s.out_pixel = to.pixel;
    if (residual) {
        const PixelStrides added(*residual, s.batch, s.height, s.width);
        s.residual_image = added.image, s.residual_row = added.row, s.residual_pixel = added.pixel;
    }
    if (gate) s.gate_image = gate->stride(0);

    with_element_type("pointwise_cpu", x, [&]<class T>(std::type_identity<T>) {
        const cvfast::PointwiseOperands<T> operands{
            static_cast<const T*>(x.const_data_ptr()),
            static_cast<const float*>(packed.const_data_ptr()),
            data_or_null<float>(scale),
            data_or_null<float>(shift),
            data_or_null<T>(gate),
            data_or_null<T>(residual),
            static_cast<T*>(out.mutable_data_ptr())};
        cvfast::pointwise(s, operands, torch_pool());
    });
    return out;
}

Tensor pointwise_cpu(const Tensor& x, const Tensor& packed, int64_t out_channels,
                     const std::vector<int64_t>& stride, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& shift, const std::optional<Tensor>& gate,
                     const std::optional<Tensor>& residual, const std::string& activation) {
    STD_TORCH_CHECK(x.dim() == 4 && stride.size() == 2 && stride[0] > 0 && stride[1] > 0,
                    "cvfast::pointwise_cpu: x must be [N, C, H, W], and stride two positive "
                    "numbers");
    const int64_t sizes[] = {x.size(0), out_channels, (x.size(2) + stride[0] - 1) / stride[0],
                             (x.size(3) + stride[1] - 1) / stride[1]};
    Tensor out = torch::stable::empty(sizes, x.scalar_type(), std::nullopt, std::nullopt,
                                      std::nullopt, MemoryFormat::ChannelsLast);
    return pointwise_out(x, packed, stride, scale, shift, gate, residual, activation, out);
}

// Which algorithm weights of this shape were packed for: that tells from the number of their taps.
std::optional<cvfast::ConvAlgorithm> packed_for(const cvfast::ConvShape& s, const Tensor& packed) {
    using enum cvfast::ConvAlgorithm;
    constexpr int64_t kPanel = cvfast::kConvPanel;
    if (!(packed.scalar_type() == ScalarType::Float && packed.is_cpu() && packed.is_contiguous() &&
          packed.dim() == 3 && s.out_channels > 0 &&
          packed.size(0) == (s.out_channels + kPanel - 1) / kPanel && packed.size(2) == kPanel)) {
        return std::nullopt;
    }
    const auto taps = [&](int64_t count) { return packed.size(1) == count * s.in_channels + 1; };
    if (taps(s.kernel_h * s.kernel_w)) return direct;
    const bool winograd = s.kernel_h == 3 && s.kernel_w == 3 && s.stride_h == 1 &&
                          s.stride_w == 1 && s.dilation_h == 1 && s.dilation_w == 1;
    if (winograd && taps(16)) return winograd_f2;
    if (winograd && taps(36)) return winograd_f4;
    return std::nullopt;
}

cvfast::ImageStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(2), t.stride(3)}; }

cvfast::ConvShape conv_shape(const Tensor& x, const std::optional<Tensor>& x2,
                             const std::vector<int64_t>& kernel_size, int64_t out_channels,
                             const std::vector<int64_t>& stride,
                             const std::vector<int64_t>& padding,
                             const std::vector<int64_t>& dilation, const std::string& activation) {
    STD_TORCH_CHECK(x.dim() == 4, "cvfast::conv_cpu: x must be [N, C, H, W], got ", x.dim(),
                    " dimensions");
    check_image("conv_cpu", "x", x, x, {x.size(0), x.size(1), x.size(2), x.size(3)});
    STD_TORCH_CHECK(kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2 &&
                        dilation.size() == 2,
                    "cvfast::conv_cpu: kernel_size, stride, padding and dilation take two numbers "
                    "each");
    for (int i = 0; i < 2; ++i) {
        STD_TORCH_CHECK(kernel_size[i] > 0 && stride[i] > 0 && dilation[i] > 0 && padding[i] >= 0,
                        "cvfast::conv_cpu: kernel_size, stride and dilation must be positive, "
                        "padding not negative");
    }
    cvfast::ConvShape s{};
    s.batch = x.size(0), s.height = x.size(2), s.width = x.size(3);
    s.in_channels = s.x_channels = x.size(1);
    s.x = strides_of(x);
    if (x2) {
        STD_TORCH_CHECK(x2->dim() == 4, "cvfast::conv_cpu: x2 must be [N, C, H, W], got ",
                        x2->dim(), " dimensions");
        check_image("conv_cpu", "x2", *x2, x, {s.batch, x2->size(1), s.height, s.width});
        STD_TORCH_CHECK(s.x_channels % 16 == 0,
                        "cvfast::conv_cpu: with x2, the channels of x must "
                        "be a multiple of 16, got ",
                        s.x_channels);
        s.in_channels += x2->size(1);
        s.x2 = strides_of(*x2);
    }
    s.kernel_h = kernel_size[0], s.kernel_w = kernel_size[1];
    s.stride_h = stride[0], s.stride_w = stride[1];
    s.pad_top = padding[0], s.pad_left = padding[1];
    s.dilation_h = dilation[0], s.dilation_w = dilation[1];
    s.out_channels = out_channels;
    s.out_height = positions(s.height, s.pad_top, s.dilation_h, s.kernel_h, s.stride_h);
    s.out_width = positions(s.width, s.pad_left, s.dilation_w, s.kernel_w, s.stride_w);
    s.activation = parse_activation(activation);
    STD_TORCH_CHECK(s.out_height > 0 && s.out_width > 0,
                    "cvfast::conv_cpu: the kernel is larger than the padded image ", s.height, "x",
                    s.width);
    return s;
}

void run_conv(cvfast::ConvShape s, const Tensor& x, const Tensor& packed,
              const std::optional<Tensor>& residual, const std::optional<Tensor>& x2, Tensor& out) {
    check_image("conv_cpu", "out", out, x, {s.batch, s.out_channels, s.out_height, s.out_width});
    s.out = strides_of(out);
    if (residual) {
        check_image("conv_cpu", "residual", *residual, x,
                    {s.batch, s.out_channels, s.out_height, s.out_width});
        s.residual = strides_of(*residual);
    }
    const auto algorithm = packed_for(s, packed);
    STD_TORCH_CHECK(algorithm, "cvfast::conv_cpu: packed does not come from prepack() for a ",
                    s.kernel_h, "x", s.kernel_w, " kernel from ", s.in_channels, " to ",
                    s.out_channels,
                    " channels; algorithms of Winograd's take stride and dilation 1");
    if (s.batch == 0) return;
    const cvfast::Parallel parallel = torch_pool();
    const cvfast::ConvPlan plan = cvfast::conv_plan(s, *algorithm, parallel.threads);
    // torch aligns what it allocates to 64 bytes.
    const int64_t bytes[] = {cvfast::conv_workspace_bytes(plan)};
    Tensor workspace = torch::stable::empty(bytes, ScalarType::Byte);
    with_element_type("conv_cpu", x, [&]<class T>(std::type_identity<T>) {
        const cvfast::ConvOperands<T> operands{
            static_cast<const T*>(x.const_data_ptr()), data_or_null<T>(x2),
            static_cast<const float*>(packed.const_data_ptr()), data_or_null<T>(residual),
            static_cast<T*>(out.mutable_data_ptr())};
        cvfast::conv(s, plan, operands, workspace.mutable_data_ptr(), parallel);
    });
}

Tensor conv_cpu(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& residual,
                const std::optional<Tensor>& x2, const std::vector<int64_t>& kernel_size,
                int64_t out_channels, const std::vector<int64_t>& stride,
                const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                const std::string& activation) {
    const auto s =
        conv_shape(x, x2, kernel_size, out_channels, stride, padding, dilation, activation);
    const int64_t sizes[] = {s.batch, s.out_channels, s.out_height, s.out_width};
    Tensor out = torch::stable::empty(sizes, x.scalar_type(), std::nullopt, std::nullopt,
                                      std::nullopt, MemoryFormat::ChannelsLast);
    run_conv(s, x, packed, residual, x2, out);
    return out;
}

void conv_cpu_out(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& residual,
                  const std::optional<Tensor>& x2, const std::vector<int64_t>& kernel_size,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation, const std::string& activation, Tensor out) {
    STD_TORCH_CHECK(out.dim() == 4, "cvfast::conv_cpu: out must be [N, C, H, W], got ", out.dim(),
                    " dimensions");
    const auto s =
        conv_shape(x, x2, kernel_size, out.size(1), stride, padding, dilation, activation);
    run_conv(s, x, packed, residual, x2, out);
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

STABLE_TORCH_LIBRARY_IMPL(cvfast, CPU, m) {
    m.impl("depthwise_cpu", TORCH_BOX(&depthwise_cpu));
    m.impl("pointwise_cpu", TORCH_BOX(&pointwise_cpu));
    m.impl("pointwise_cpu.out", TORCH_BOX(&pointwise_out));
    m.impl("conv_cpu", TORCH_BOX(&conv_cpu));
    m.impl("conv_cpu_out", TORCH_BOX(&conv_cpu_out));
}

STABLE_TORCH_LIBRARY_IMPL(cvfast, CompositeExplicitAutograd, m) {
    m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
    m.impl("cpu_isa_levels", TORCH_BOX(&cpu_isa_levels));
    m.impl("cpu_select_isa", TORCH_BOX(&cpu_select_isa));
}
