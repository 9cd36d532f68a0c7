#include "cpu/pointwise.h"

#include "cpu/bindings.h"

namespace cvfast {
namespace {

void check_vector(const char* name, const std::optional<Tensor>& vector, int64_t channels) {
    if (!vector) return;
    STD_TORCH_CHECK(vector->is_cpu() && vector->scalar_type() == ScalarType::Float &&
                        vector->dim() == 1 && vector->size(0) == channels &&
                        vector->is_contiguous(),
                    "cvfast::pointwise_cpu: ", name, " must be ", channels,
                    " contiguous float32 numbers, one per channel of x");
}

void pointwise_cpu_out(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& stride,
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
    PointwiseShape s{};
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
    const int64_t rows = pointwise_packed_rows(s.in_channels, s.out_channels, pairs);
    STD_TORCH_CHECK(packed.is_cpu() && packed.is_contiguous() && packed.dim() == 2 &&
                        packed.scalar_type() == (pairs ? ScalarType::Int : ScalarType::Float) &&
                        packed.size(0) == rows && packed.size(1) == kPointwisePanel,
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
        const PointwiseOperands<T> operands{static_cast<const T*>(x.const_data_ptr()),
                                            static_cast<const float*>(packed.const_data_ptr()),
                                            data_or_null<float>(scale),
                                            data_or_null<float>(shift),
                                            data_or_null<T>(gate),
                                            data_or_null<T>(residual),
                                            static_cast<T*>(out.mutable_data_ptr())};
        submit(s, operands);
    });
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
    pointwise_cpu_out(x, packed, stride, scale, shift, gate, residual, activation, out);
    return out;
}

}  // namespace
}  // namespace cvfast

STABLE_TORCH_LIBRARY_IMPL(cvfast, CPU, m) {
    m.impl("pointwise_cpu", TORCH_BOX(&cvfast::pointwise_cpu));
    m.impl("pointwise_cpu.out", TORCH_BOX(&cvfast::pointwise_cpu_out));
}
