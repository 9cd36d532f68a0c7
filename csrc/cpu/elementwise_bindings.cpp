#include "cpu/elementwise.h"

#include "cpu/bindings.h"

namespace cvfast {
namespace {

constexpr std::string_view kOpNames[] = {"none", "add", "mul"};
constexpr std::string_view kElementwiseActivationNames[] = {
    "none", "relu", "relu6", "hardswish", "hardsigmoid", "sigmoid", "silu"};

// The place of `name` among `known`.
template <class Enum, std::size_t kCount>
Enum parse(const std::string& name, const std::string_view (&known)[kCount], const char* expected) {
    for (std::size_t i = 0; i < kCount; ++i) {
        if (name == known[i]) return static_cast<Enum>(i);
    }
    STD_TORCH_CHECK(false, "cvfast::elementwise_cpu: unknown ", expected);
    return {};
}

void check_vector(const char* name, const Tensor& v, int64_t channels) {
    STD_TORCH_CHECK(v.dim() == 1 && v.size(0) == channels && v.is_contiguous() && v.is_cpu() &&
                        v.scalar_type() == ScalarType::Float,
                    "cvfast::elementwise_cpu: ", name, " must be a contiguous float32 [", channels,
                    "] on the CPU");
}

void elementwise_cpu_out(const Tensor& x, const std::optional<Tensor>& y, const std::string& op,
                         const std::string& activation, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& shift, Tensor out) {
    STD_TORCH_CHECK(x.dim() == 4, "cvfast::elementwise_cpu: x must be [N, C, H, W], got ", x.dim(),
                    " dimensions");
    const int64_t sizes[] = {x.size(0), x.size(1), x.size(2), x.size(3)};
    const auto [n, c, h, w] = sizes;
    check_image("elementwise_cpu", "x", x, x, sizes);
    check_image("elementwise_cpu", "out", out, x, sizes);
    ElementwiseShape s{};
    s.batch = n, s.channels = c, s.height = h, s.width = w;
    const PixelStrides xs(x, n, h, w), os(out, n, h, w);
    s.x_image = xs.image, s.x_row = xs.row, s.x_pixel = xs.pixel;
    s.out_image = os.image, s.out_row = os.row, s.out_pixel = os.pixel;
    s.op =
        parse<ElementwiseOp>(op, kOpNames, ("op '" + op + "'; expected none, add or mul").c_str());
    s.activation = parse<ElementwiseActivation>(
        activation, kElementwiseActivationNames,
        ("activation '" + activation +
         "'; expected none, relu, relu6, hardswish, hardsigmoid, sigmoid or silu")
            .c_str());
    STD_TORCH_CHECK(y.has_value() == (s.op != ElementwiseOp::none), "cvfast::elementwise_cpu: op '",
                    op, "' takes ", y ? "no y" : "a y");
    if (y) {
        const bool one_image = y->dim() == 4 && y->size(0) == 1;
        const bool gate = y->dim() == 4 && y->size(2) == 1 && y->size(3) == 1;
        check_image("elementwise_cpu", "y", *y, x,
                    {one_image ? 1 : n, c, gate ? 1 : h, gate ? 1 : w});
        const PixelStrides ys(*y, n, h, w);
        s.y_image = one_image ? 0 : y->stride(0);
        s.y_row = gate ? 0 : ys.row;
        s.y_pixel = gate ? 0 : ys.pixel;
    }
    STD_TORCH_CHECK(scale.has_value() == shift.has_value(),
                    "cvfast::elementwise_cpu: scale and shift come together");
    if (scale) {
        check_vector("scale", *scale, c);
        check_vector("shift", *shift, c);
    }
    with_element_type("elementwise_cpu", x, [&]<class T>(std::type_identity<T>) {
        submit(s,
               ElementwiseOperands<T>{static_cast<const T*>(x.const_data_ptr()), data_or_null<T>(y),
                                      data_or_null<float>(scale), data_or_null<float>(shift),
                                      static_cast<T*>(out.mutable_data_ptr())});
    });
}

Tensor elementwise_cpu(const Tensor& x, const std::optional<Tensor>& y, const std::string& op,
                       const std::string& activation, const std::optional<Tensor>& scale,
                       const std::optional<Tensor>& shift) {
    STD_TORCH_CHECK(x.dim() == 4, "cvfast::elementwise_cpu: x must be [N, C, H, W], got ", x.dim(),
                    " dimensions");
    const int64_t sizes[] = {x.size(0), x.size(1), x.size(2), x.size(3)};
    Tensor out = torch::stable::empty(sizes, x.scalar_type(), std::nullopt, std::nullopt,
                                      std::nullopt, MemoryFormat::ChannelsLast);
    elementwise_cpu_out(x, y, op, activation, scale, shift, out);
    return out;
}

}  // namespace
}  // namespace cvfast

STABLE_TORCH_LIBRARY_IMPL(cvfast, CPU, m) {
    m.impl("elementwise_cpu", TORCH_BOX(&cvfast::elementwise_cpu));
    m.impl("elementwise_cpu.out", TORCH_BOX(&cvfast::elementwise_cpu_out));
}
