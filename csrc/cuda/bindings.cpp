// Binds the CUDA kernels to the operators that cvfast/ops defines. The only CUDA source that sees
// torch, and of torch only the stable ABI. With CVFAST_EMULATION the kernels are those of the host
// emulation, and the operators take CPU tensors.
#include <dlfcn.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/depthwise.h"
#include "cuda/inverted_residual.h"
#include "cuda/launch.h"

namespace {

using cvfast::cuda::extent;
using cvfast::cuda::writable;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef CVFAST_EMULATION

bool on_device(const Tensor& tensor) { return tensor.is_cpu(); }

struct DeviceScope {
    explicit DeviceScope(const Tensor&) {}
    cudaStream_t stream() const { return nullptr; }
};

#else

bool on_device(const Tensor& tensor) { return tensor.is_cuda(); }

// Makes a tensor's device the current one; its stream is torch's current one there.
class DeviceScope {
  public:
    explicit DeviceScope(const Tensor& tensor)
        : index_(tensor.get_device_index()), guard_(index_) {}
    cudaStream_t stream() const {
        static const GetStream get_stream = find_get_stream();
        void* stream = nullptr;
        STD_TORCH_CHECK(get_stream && get_stream(index_, &stream) == AOTI_TORCH_SUCCESS,
                        "cvfast: torch has no current stream for device ", index_);
        return static_cast<cudaStream_t>(stream);
    }

  private:
    using GetStream = decltype(&aoti_torch_get_current_cuda_stream);

    // Looked up at run time: a build against a CPU build of torch can name no library that has it.
    static GetStream find_get_stream() {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        void* function = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
        return reinterpret_cast<GetStream>(function);
    }

    int32_t index_;
    torch::stable::accelerator::DeviceGuard guard_;
};

#endif

cvfast::Activation parse_activation(const char* op, const std::string& name) {
    using enum cvfast::Activation;
    for (const auto known : {none, relu, relu6, hardswish}) {
        if (name == cvfast::kActivationNames[static_cast<int>(known)]) return known;
    }
    STD_TORCH_CHECK(false, op, ": unknown activation '", name,
                    "'; expected none, relu, relu6 or hardswish");
    return none;
}

// Window positions along one axis, whose padding is `pads` in all.
int64_t positions(int64_t size, int64_t pads, int64_t dilation, int64_t kernel, int64_t stride) {
    const int64_t free = size + pads - dilation * (kernel - 1) - 1;
    return free < 0 ? 0 : free / stride + 1;
}

void check_image(const char* op, const char* name, const Tensor& image) {
    STD_TORCH_CHECK(image.dim() == 4, op, ": ", name, " must be [N, C, H, W], got ", image.dim(),
                    " dimensions");
    STD_TORCH_CHECK(on_device(image), op, ": ", name, " is not on the device of the kernel");
    STD_TORCH_CHECK(image.size(1) == 1 || image.stride(1) == 1, op, ": ", name,
                    " must be channels-last (stride 1 along C); use "
                    "contiguous(memory_format=torch.channels_last)");
}

using Pair = std::vector<int64_t>;

// `padding`: (vertical, horizontal), or (top, left, bottom, right).
void check_geometry(const char* op, const Pair& kernel_size, const Pair& stride,
                    const Pair& padding) {
    STD_TORCH_CHECK(kernel_size.size() == 2 && stride.size() == 2 &&
                        (padding.size() == 2 || padding.size() == 4),
                    op, ": kernel_size and stride take two numbers each, padding two or four");
    for (int i = 0; i < 2; ++i) {
        STD_TORCH_CHECK(kernel_size[i] > 0 && stride[i] > 0, op,
                        ": kernel_size and stride must be positive");
    }
    for (const int64_t pad : padding) {
        STD_TORCH_CHECK(pad >= 0, op, ": padding must not be negative");
    }
}

// Of the shape: everything but the strides of images. `image` is the size [N, C, H, W] of x.
cvfast::DepthwiseShape make_shape(const char* op, const std::array<int64_t, 4>& image,
                                  int64_t multiplier, const Pair& kernel_size, const Pair& stride,
                                  const Pair& padding, const Pair& dilation,
                                  const std::string& activation) {
    check_geometry(op, kernel_size, stride, padding);
    STD_TORCH_CHECK(dilation.size() == 2 && dilation[0] > 0 && dilation[1] > 0, op,
                    ": dilation takes two positive numbers");
    cvfast::DepthwiseShape s{};
    s.batch = image[0], s.channels = image[1], s.height = image[2], s.width = image[3];
    s.multiplier = multiplier;
    s.kernel_h = kernel_size[0], s.kernel_w = kernel_size[1];
    s.stride_h = stride[0], s.stride_w = stride[1];
    s.pad_top = padding[0], s.pad_left = padding[1];
    s.dilation_h = dilation[0], s.dilation_w = dilation[1];
    s.activation = parse_activation(op, activation);
    s.out_height = positions(s.height, padding[0] + padding[padding.size() - 2], s.dilation_h,
                             s.kernel_h, s.stride_h);
    s.out_width =
        positions(s.width, padding[1] + padding.back(), s.dilation_w, s.kernel_w, s.stride_w);
    STD_TORCH_CHECK(s.out_height > 0 && s.out_width > 0, op,
                    ": the kernel is larger than the padded image ", s.height, "x", s.width);
    return s;
}

// Along an axis of one element torch may report any stride.
int64_t stride_of(const Tensor& t, int64_t axis) { return t.size(axis) > 1 ? t.stride(axis) : 0; }

void set_x_strides(cvfast::DepthwiseShape& s, const Tensor& x) {
    s.x_image = stride_of(x, 0), s.x_row = stride_of(x, 2), s.x_pixel = stride_of(x, 3);
}

void set_out_strides(cvfast::DepthwiseShape& s, const Tensor& out) {
    s.out_image = stride_of(out, 0), s.out_row = stride_of(out, 2), s.out_pixel = stride_of(out, 3);
}

void check_same_device(const char* op, const char* name, const Tensor& tensor,
                       const Tensor& other) {
    STD_TORCH_CHECK(tensor.device() == other.device(), op, ": ", name,
                    " is on another device than the image");
}

// That `image` can be written or read beside `other`, with this size [N, C, H, W].
void check_sized_image(const char* op, const char* name, const Tensor& image, const Tensor& other,
                       const std::array<int64_t, 4>& size) {
    check_image(op, name, image);
    check_same_device(op, name, image, other);
    STD_TORCH_CHECK(image.scalar_type() == other.scalar_type(), op, ": ", name,
                    " must have the dtype of the image");
    for (int i = 0; i < 4; ++i) {
        STD_TORCH_CHECK(image.size(i) == size[i], op, ": ", name, " must be [", size[0], ", ",
                        size[1], ", ", size[2], ", ", size[3], "]");
    }
}

// `image`: what is convolved with them.
void check_packed(const char* op, const cvfast::DepthwiseShape& s, const Tensor& packed,
                  const Tensor& image) {
    constexpr int64_t kPanel = cvfast::kDepthwisePanel;
    STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Float && packed.is_contiguous() &&
                        packed.dim() == 4 && packed.size(1) == s.panels() &&
                        packed.size(2) == s.taps() + 1 && packed.size(3) == kPanel,
                    op, ": packed does not come from prepack() for a ", s.kernel_h, "x", s.kernel_w,
                    " kernel over ", s.channels, " channels");
    check_same_device(op, "packed", packed, image);
}

// That `grad` and `output`, if there is one, have the shape of the forward pass's output.
void check_gradient(const char* op, const cvfast::DepthwiseShape& s, const Tensor& grad,
                    const std::optional<Tensor>& output) {
    const auto fits = [&](const Tensor& t) {
        return t.size(0) == s.batch && t.size(1) == s.channels * s.multiplier &&
               t.size(2) == s.out_height && t.size(3) == s.out_width &&
               t.scalar_type() == grad.scalar_type();
    };
    check_image(op, "grad", grad);
    STD_TORCH_CHECK(fits(grad), op, ": grad must be [", s.batch, ", ", s.channels * s.multiplier,
                    ", ", s.out_height, ", ", s.out_width, "]");
    const bool masked = s.activation != cvfast::Activation::none;
    STD_TORCH_CHECK(s.activation != cvfast::Activation::hardswish, op,
                    ": the gradient is not fused with hardswish; activation must be none, relu or "
                    "relu6");
    STD_TORCH_CHECK(!masked || output.has_value(), op,
                    ": relu and relu6 need the output of the forward pass");
    if (!masked) return;
    check_image(op, "output", *output);
    check_same_device(op, "output", *output, grad);
    STD_TORCH_CHECK(fits(*output), op, ": output must have the shape and dtype of grad");
}

template <class T>
cvfast::cuda::DepthwiseMask<T> make_mask(const cvfast::DepthwiseShape& s,
                                         const std::optional<Tensor>& output) {
    if (s.activation == cvfast::Activation::none) return {};
    return {static_cast<const T*>(output->const_data_ptr()), stride_of(*output, 0),
            stride_of(*output, 2), stride_of(*output, 3)};
}

cvfast::cuda::DepthwiseLaunch make_launch(const char* op, const std::vector<int64_t>& numbers) {
    cvfast::cuda::DepthwiseLaunch launch{};
    const std::string error = cvfast::cuda::parse_launch(numbers, launch);
    STD_TORCH_CHECK(error.empty(), op, ": ", error);
    return launch;
}

// Calls run<T>() for the element type of `tensor`, which returns what went wrong.
template <class Run>
void for_element_type(const char* op, const char* name, const Tensor& tensor, const Run& run) {
    std::string error;
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            error = run(std::type_identity<float>{});
            break;
        case ScalarType::BFloat16:
            error = run(std::type_identity<__nv_bfloat16>{});
            break;
        case ScalarType::Half:
            error = run(std::type_identity<__half>{});
            break;
        default:
            STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16 or float16");
    }
    STD_TORCH_CHECK(error.empty(), op, ": ", error);
}

Tensor empty_image(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
    const int64_t sizes[] = {n, c, h, w};
    return torch::stable::empty(sizes, like.scalar_type(), std::nullopt, like.device(),
                                std::nullopt, MemoryFormat::ChannelsLast);
}

// The shape of a forward pass but for the strides of its output.
cvfast::DepthwiseShape forward_shape(const char* op, const Tensor& x, const Tensor& packed,
                                     const Pair& kernel_size, const Pair& stride,
                                     const Pair& padding, const Pair& dilation,
                                     const std::string& activation) {
    check_image(op, "x", x);
    auto s = make_shape(op, {x.size(0), x.size(1), x.size(2), x.size(3)},
                        packed.dim() == 4 ? packed.size(0) : 0, kernel_size, stride, padding,
                        dilation, activation);
    check_packed(op, s, packed, x);
    set_x_strides(s, x);
    return s;
}

void run_depthwise(const char* op, cvfast::DepthwiseShape& s, const Tensor& x, const Tensor& packed,
                   const std::vector<int64_t>& launch_numbers, const Tensor& out) {
    const auto launch = make_launch(op, launch_numbers);
    const DeviceScope device(x);
    set_out_strides(s, out);
    const cvfast::cuda::MemoryScope scope({extent(x), extent(packed), writable(out)});
    for_element_type(op, "x", x, [&]<class T>(std::type_identity<T>) {
        return cvfast::cuda::depthwise<T>(s, static_cast<const T*>(x.const_data_ptr()),
                                          static_cast<const float*>(packed.const_data_ptr()),
                                          static_cast<T*>(out.mutable_data_ptr()), launch,
                                          device.stream());
    });
}

Tensor depthwise(const Tensor& x, const Tensor& packed, const Pair& kernel_size, const Pair& stride,
                 const Pair& padding, const Pair& dilation, const std::string& activation,
                 const std::vector<int64_t>& launch) {
    constexpr const char* op = "cvfast::depthwise_cuda";
    auto s = forward_shape(op, x, packed, kernel_size, stride, padding, dilation, activation);
    const DeviceScope device(x);
    Tensor out = empty_image(x, s.batch, s.channels * s.multiplier, s.out_height, s.out_width);
    run_depthwise(op, s, x, packed, launch, out);
    return out;
}

void depthwise_out(const Tensor& x, const Tensor& packed, const Pair& kernel_size,
                   const Pair& stride, const Pair& padding, const Pair& dilation,
                   const std::string& activation, const std::vector<int64_t>& launch, Tensor out) {
    constexpr const char* op = "cvfast::depthwise_cuda";
    auto s = forward_shape(op, x, packed, kernel_size, stride, padding, dilation, activation);
    check_sized_image(op, "out", out, x,
                      {s.batch, s.channels * s.multiplier, s.out_height, s.out_width});
    run_depthwise(op, s, x, packed, launch, out);
}

Tensor depthwise_backward_input(const Tensor& grad, const std::optional<Tensor>& output,
                                const Tensor& packed, const Pair& image_size,
                                const Pair& kernel_size, const Pair& stride, const Pair& padding,
                                const Pair& dilation, const std::string& activation,
                                const std::vector<int64_t>& launch_numbers) {
    constexpr const char* op = "cvfast::depthwise_backward_input_cuda";
    const int64_t multiplier = packed.dim() == 4 ? packed.size(0) : 0;
    STD_TORCH_CHECK(grad.dim() == 4 && image_size.size() == 2, op,
                    ": grad must be [N, m*C, H', W'], image_size (H, W)");
    STD_TORCH_CHECK(multiplier > 0 && grad.size(1) % multiplier == 0, op,
                    ": packed does not come from prepack() for ", grad.size(1), " output channels");
    auto s = make_shape(op, {grad.size(0), grad.size(1) / multiplier, image_size[0], image_size[1]},
                        multiplier, kernel_size, stride, padding, dilation, activation);
    check_packed(op, s, packed, grad);
    check_gradient(op, s, grad, output);
    const auto launch = make_launch(op, launch_numbers);
    const DeviceScope device(grad);
    Tensor grad_x = empty_image(grad, s.batch, s.channels, s.height, s.width);
    set_x_strides(s, grad_x);
    set_out_strides(s, grad);
    const cvfast::cuda::MemoryScope scope(
        {extent(grad), extent(output ? *output : grad), extent(packed), writable(grad_x)});
    for_element_type(op, "grad", grad, [&]<class T>(std::type_identity<T>) {
        return cvfast::cuda::depthwise_backward_input<T>(
            s, static_cast<const T*>(grad.const_data_ptr()), make_mask<T>(s, output),
            static_cast<const float*>(packed.const_data_ptr()),
            static_cast<T*>(grad_x.mutable_data_ptr()), launch, device.stream());
    });
    return grad_x;
}

Tensor depthwise_backward_weight(const Tensor& grad, const std::optional<Tensor>& output,
                                 const Tensor& x, const Pair& kernel_size, const Pair& stride,
                                 const Pair& padding, const Pair& dilation,
                                 const std::string& activation,
                                 const std::vector<int64_t>& launch_numbers) {
    constexpr const char* op = "cvfast::depthwise_backward_weight_cuda";
    check_image(op, "x", x);
    STD_TORCH_CHECK(grad.dim() == 4 && x.size(1) > 0 && grad.size(1) % x.size(1) == 0, op,
                    ": grad must be [N, m*C, H', W'] for the C = ", x.size(1), " channels of x");
    STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), op, ": grad and x differ in dtype");
    check_same_device(op, "grad", grad, x);
    auto s = make_shape(op, {x.size(0), x.size(1), x.size(2), x.size(3)}, grad.size(1) / x.size(1),
                        kernel_size, stride, padding, dilation, activation);
    check_gradient(op, s, grad, output);
    const auto launch = make_launch(op, launch_numbers);
    const DeviceScope device(grad);
    set_x_strides(s, x);
    set_out_strides(s, grad);
    const int64_t sizes[] = {s.multiplier, s.panels(), s.taps() + 1, cvfast::kDepthwisePanel};
    const int64_t part_sizes[] = {cvfast::cuda::depthwise_backward_weight_parts(s, launch) *
                                  s.packed_size()};
    Tensor packed_grad = torch::stable::empty(sizes, ScalarType::Float, std::nullopt, x.device());
    Tensor parts = torch::stable::empty(part_sizes, ScalarType::Float, std::nullopt, x.device());
    const cvfast::cuda::MemoryScope scope({extent(grad), extent(output ? *output : grad), extent(x),
                                           writable(parts), writable(packed_grad)});
    for_element_type(op, "x", x, [&]<class T>(std::type_identity<T>) {
        return cvfast::cuda::depthwise_backward_weight<T>(
            s, static_cast<const T*>(grad.const_data_ptr()), make_mask<T>(s, output),
            static_cast<const T*>(x.const_data_ptr()),
            static_cast<float*>(parts.mutable_data_ptr()),
            static_cast<float*>(packed_grad.mutable_data_ptr()), launch, device.stream());
    });
    return packed_grad;
}

int64_t depthwise_shared_bytes(int64_t kernel, int64_t stride, int64_t element_size,
                               const std::string& pass, const std::vector<int64_t>& numbers) {
    constexpr const char* op = "cvfast::depthwise_cuda_shared_bytes";
    using cvfast::cuda::DepthwisePass;
    const auto launch = make_launch(op, numbers);
    STD_TORCH_CHECK(pass == "forward" || pass == "backward_input" || pass == "backward_weight", op,
                    ": unknown pass '", pass,
                    "'; expected forward, backward_input or backward_weight");
    return cvfast::cuda::depthwise_shared_bytes(pass == "forward" ? DepthwisePass::forward
                                                : pass == "backward_input"
                                                    ? DepthwisePass::backward_input
                                                    : DepthwisePass::backward_weight,
                                                kernel, stride, element_size, launch);
}

// A matrix that GPU kernels read in 16-byte vectors: [rows][columns], columns a multiple of 16.
void check_matrix(const char* op, const char* name, const Tensor& matrix, const Tensor& x,
                  int64_t rows, int64_t columns) {
    columns = (columns + 15) / 16 * 16;
    check_same_device(op, name, matrix, x);
    STD_TORCH_CHECK(matrix.dim() == 2 && matrix.size(0) == rows && matrix.size(1) == columns &&
                        matrix.is_contiguous() && matrix.scalar_type() == x.scalar_type() &&
                        reinterpret_cast<uintptr_t>(matrix.const_data_ptr()) % 16 == 0,
                    op, ": ", name, " must be [", rows, ", ", columns,
                    "], contiguous, in the dtype of x, from cvfast.ops.pointwise.prepack_gpu");
}

void check_bias(const char* op, const char* name, const Tensor& bias, const Tensor& x,
                int64_t channels) {
    channels = (channels + 15) / 16 * 16;
    check_same_device(op, name, bias, x);
    STD_TORCH_CHECK(bias.dim() == 1 && bias.size(0) == channels && bias.is_contiguous() &&
                        bias.scalar_type() == ScalarType::Float &&
                        reinterpret_cast<uintptr_t>(bias.const_data_ptr()) % 16 == 0,
                    op, ": ", name, " must be [", channels,
                    "], float32, from cvfast.ops.pointwise.prepack_gpu");
}

template <class T>
const T* data_of(const std::optional<Tensor>& tensor) {
    return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

// The shape of a block up to its depthwise convolution; its operands up to there are checked.
cvfast::InvertedResidualShape make_block(const char* op, const Tensor& x,
                                         const std::optional<Tensor>& expand,
                                         const std::optional<Tensor>& expand_bias,
                                         const Tensor& depthwise, int64_t hidden,
                                         const Pair& kernel_size, const Pair& stride,
                                         const Pair& padding, const std::string& expand_activation,
                                         const std::string& depthwise_activation) {
    constexpr int64_t kPanel = cvfast::kDepthwisePanel;
    check_image(op, "x", x);
    check_geometry(op, kernel_size, stride, padding);
    STD_TORCH_CHECK(hidden > 0, op, ": hidden must be positive");
    STD_TORCH_CHECK(expand.has_value() == expand_bias.has_value(), op,
                    ": expand and expand_bias come together");
    if (expand) {
        check_matrix(op, "expand", *expand, x, x.size(1), hidden);
        check_bias(op, "expand_bias", *expand_bias, x, hidden);
    }
    check_same_device(op, "depthwise", depthwise, x);
    STD_TORCH_CHECK(depthwise.scalar_type() == ScalarType::Float && depthwise.is_contiguous() &&
                        depthwise.dim() == 4 && depthwise.size(0) == 1 &&
                        depthwise.size(1) == (hidden + kPanel - 1) / kPanel &&
                        depthwise.size(2) == kernel_size[0] * kernel_size[1] + 1 &&
                        depthwise.size(3) == kPanel &&
                        reinterpret_cast<uintptr_t>(depthwise.const_data_ptr()) % 16 == 0,
                    op, ": depthwise does not come from depthwise.prepack() for a ", kernel_size[0],
                    "x", kernel_size[1], " kernel over ", hidden, " channels");
    cvfast::InvertedResidualShape s{};
    s.batch = x.size(0), s.in_channels = x.size(1), s.height = x.size(2), s.width = x.size(3);
    s.hidden = hidden;
    s.kernel_h = kernel_size[0], s.kernel_w = kernel_size[1];
    s.stride_h = stride[0], s.stride_w = stride[1];
    s.pad_top = padding[0], s.pad_left = padding[1];
    s.out_height =
        positions(s.height, padding[0] + padding[padding.size() - 2], 1, s.kernel_h, s.stride_h);
    s.out_width = positions(s.width, padding[1] + padding.back(), 1, s.kernel_w, s.stride_w);
    STD_TORCH_CHECK(s.out_height > 0 && s.out_width > 0, op,
                    ": the kernel is larger than the padded image ", s.height, "x", s.width);
    s.x_image = stride_of(x, 0), s.x_row = stride_of(x, 2), s.x_pixel = stride_of(x, 3);
    s.expand_activation = parse_activation(op, expand_activation);
    s.depthwise_activation = parse_activation(op, depthwise_activation);
    return s;
}

void set_block_output(cvfast::InvertedResidualShape& s, const Tensor& out) {
    s.out_image = stride_of(out, 0), s.out_row = stride_of(out, 2), s.out_pixel = stride_of(out, 3);
}

cvfast::cuda::InvertedResidualLaunch make_block_launch(const char* op,
                                                       const std::vector<int64_t>& numbers) {
    cvfast::cuda::InvertedResidualLaunch launch{};
    const std::string error = cvfast::cuda::parse_launch(numbers, launch);
    STD_TORCH_CHECK(error.empty(), op, ": ", error);
    return launch;
}

// Calls run<T>() for the element type of x, which returns what went wrong.
template <class Run>
void for_half_type(const char* op, const Tensor& x, const Run& run) {
    STD_TORCH_CHECK(x.scalar_type() != ScalarType::Float, op,
                    ": x must be bfloat16 or float16; float32 is served by backend triton");
    for_element_type(op, "x", x, [&]<class T>(std::type_identity<T> type) -> std::string {
        if constexpr (std::is_same_v<T, float>) {
            return "x must be bfloat16 or float16";
        } else {
            return run(type);
        }
    });
}

void inverted_residual(const Tensor& x, const std::optional<Tensor>& expand,
                       const std::optional<Tensor>& expand_bias, const Tensor& depthwise,
                       const Tensor& project, const Tensor& project_bias,
                       const std::optional<Tensor>& residual, int64_t hidden,
                       const Pair& kernel_size, const Pair& stride, const Pair& padding,
                       const std::string& expand_activation,
                       const std::string& depthwise_activation, const std::string& activation,
                       const std::vector<int64_t>& launch_numbers, Tensor out) {
    constexpr const char* op = "cvfast::inverted_residual_cuda";
    auto s = make_block(op, x, expand, expand_bias, depthwise, hidden, kernel_size, stride, padding,
                        expand_activation, depthwise_activation);
    check_image(op, "out", out);
    s.out_channels = out.size(1);
    const std::array<int64_t, 4> size{s.batch, s.out_channels, s.out_height, s.out_width};
    check_sized_image(op, "out", out, x, size);
    check_matrix(op, "project", project, x, hidden, s.out_channels);
    check_bias(op, "project_bias", project_bias, x, s.out_channels);
    if (residual) {
        check_sized_image(op, "residual", *residual, x, size);
        s.residual_image = stride_of(*residual, 0), s.residual_row = stride_of(*residual, 2);
        s.residual_pixel = stride_of(*residual, 3);
    }
    set_block_output(s, out);
    s.activation = parse_activation(op, activation);
    const auto launch = make_block_launch(op, launch_numbers);
    const DeviceScope device(x);
    const int64_t part_sizes[] = {cvfast::cuda::inverted_residual_partials(s, true, launch)};
    std::optional<Tensor> partials;
    if (part_sizes[0] > 0) {
        partials = torch::stable::empty(part_sizes, ScalarType::Float, std::nullopt, x.device());
    }
    const auto optional = [&](const std::optional<Tensor>& t) { return extent(t ? *t : x); };
    const cvfast::cuda::MemoryScope scope(
        {extent(x), optional(expand), optional(expand_bias), extent(depthwise), extent(project),
         extent(project_bias), optional(residual), partials ? writable(*partials) : extent(x),
         writable(out)});
    for_half_type(op, x, [&]<class T>(std::type_identity<T>) {
        cvfast::cuda::InvertedResidualTensors<T> t{};
        t.x = static_cast<const T*>(x.const_data_ptr());
        t.expand = data_of<T>(expand), t.expand_bias = data_of<float>(expand_bias);
        t.depthwise = static_cast<const float*>(depthwise.const_data_ptr());
        t.project = static_cast<const T*>(project.const_data_ptr());
        t.project_bias = static_cast<const float*>(project_bias.const_data_ptr());
        t.residual = data_of<T>(residual);
        t.out = static_cast<T*>(out.mutable_data_ptr());
        t.partials = partials ? static_cast<float*>(partials->mutable_data_ptr()) : nullptr;
        return cvfast::cuda::inverted_residual(s, t, launch, device.stream());
    });
}

void inverted_residual_squeeze(const Tensor& x, const std::optional<Tensor>& expand,
                               const std::optional<Tensor>& expand_bias, const Tensor& depthwise,
                               int64_t hidden, const Pair& kernel_size, const Pair& stride,
                               const Pair& padding, const std::string& expand_activation,
                               const std::string& depthwise_activation,
                               const std::vector<int64_t>& launch_numbers, Tensor out,
                               Tensor row_means) {
    constexpr const char* op = "cvfast::inverted_residual_squeeze_cuda";
    auto s = make_block(op, x, expand, expand_bias, depthwise, hidden, kernel_size, stride, padding,
                        expand_activation, depthwise_activation);
    check_sized_image(op, "out", out, x, {s.batch, hidden, s.out_height, s.out_width});
    check_sized_image(op, "row_means", row_means, x, {s.batch, hidden, s.out_height, 1});
    set_block_output(s, out);
    s.means_image = stride_of(row_means, 0), s.means_row = stride_of(row_means, 2);
    const auto launch = make_block_launch(op, launch_numbers);
    const DeviceScope device(x);
    const auto optional = [&](const std::optional<Tensor>& t) { return extent(t ? *t : x); };
    const cvfast::cuda::MemoryScope scope({extent(x), optional(expand), optional(expand_bias),
                                           extent(depthwise), writable(out), writable(row_means)});
    for_half_type(op, x, [&]<class T>(std::type_identity<T>) {
        cvfast::cuda::InvertedResidualTensors<T> t{};
        t.x = static_cast<const T*>(x.const_data_ptr());
        t.expand = data_of<T>(expand), t.expand_bias = data_of<float>(expand_bias);
        t.depthwise = static_cast<const float*>(depthwise.const_data_ptr());
        t.out = static_cast<T*>(out.mutable_data_ptr());
        t.means = static_cast<T*>(row_means.mutable_data_ptr());
        return cvfast::cuda::inverted_residual(s, t, launch, device.stream());
    });
}

int64_t inverted_residual_shared_bytes(int64_t channels, int64_t hidden, int64_t out_channels,
                                       const Pair& size, int64_t kernel, int64_t stride,
                                       bool expands, const std::vector<int64_t>& numbers) {
    constexpr const char* op = "cvfast::inverted_residual_cuda_shared_bytes";
    STD_TORCH_CHECK(size.size() == 2, op, ": size must be (H, W)");
    cvfast::InvertedResidualShape s{};
    s.in_channels = channels, s.hidden = hidden, s.out_channels = out_channels;
    s.height = size[0], s.width = size[1];
    s.kernel_h = s.kernel_w = kernel, s.stride_h = s.stride_w = stride;
    return cvfast::cuda::inverted_residual_shared_bytes(s, expands, out_channels > 0,
                                                        make_block_launch(op, numbers));
}

}  // namespace

#ifdef CVFAST_EMULATION
STABLE_TORCH_LIBRARY_IMPL(cvfast, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(cvfast, CUDA, m) {
#endif
    m.impl("depthwise_cuda_launch", TORCH_BOX(&depthwise));
    m.impl("depthwise_cuda_launch.out", TORCH_BOX(&depthwise_out));
    m.impl("depthwise_backward_input_cuda_launch", TORCH_BOX(&depthwise_backward_input));
    m.impl("depthwise_backward_weight_cuda_launch", TORCH_BOX(&depthwise_backward_weight));
    m.impl("inverted_residual_cuda_launch", TORCH_BOX(&inverted_residual));
    m.impl("inverted_residual_squeeze_cuda_launch", TORCH_BOX(&inverted_residual_squeeze));
}

STABLE_TORCH_LIBRARY_IMPL(cvfast, CompositeExplicitAutograd, m) {
    m.impl("depthwise_cuda_shared_bytes", TORCH_BOX(&depthwise_shared_bytes));
    m.impl("inverted_residual_cuda_shared_bytes", TORCH_BOX(&inverted_residual_shared_bytes));
}
