#include "cpu/bindings.h"
#include "cpu/inverted_residual.h"

namespace cvfast {
namespace {

using OptionalTensor = std::optional<Tensor>;
using Numbers = std::vector<int64_t>;

void check_pointwise_weights(const char* op, const char* name, const Tensor& packed,
                             const Tensor& x, int64_t in_channels, int64_t out_channels) {
    const bool pairs = x.scalar_type() == ScalarType::BFloat16;
    STD_TORCH_CHECK(packed.is_cpu() && packed.is_contiguous() && packed.dim() == 2 &&
                        packed.scalar_type() == (pairs ? ScalarType::Int : ScalarType::Float) &&
                        packed.size(0) == pointwise_packed_rows(in_channels, out_channels, pairs) &&
                        packed.size(1) == kPointwisePanel,
                    "cvfast::", op, ": ", name, " does not come from pointwise.prepack() for ",
                    in_channels, " to ", out_channels, " channels of x's dtype");
}

// Everything but what concerns the output.
InvertedResidualShape block_shape(const char* op, const Tensor& x, const OptionalTensor& expand,
                                  const Tensor& depthwise, int64_t hidden,
                                  const Numbers& kernel_size, const Numbers& stride,
                                  const Numbers& padding, const std::string& expand_activation,
                                  const std::string& depthwise_activation) {
    STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "cvfast::", op, ": x must be [N, C, H, W]");
    STD_TORCH_CHECK(channels_adjacent(x), "cvfast::", op,
                    ": x must be channels-last (stride 1 along C); use "
                    "x.contiguous(memory_format=torch.channels_last)");
    STD_TORCH_CHECK(kernel_size.size() == 2 && stride.size() == 2, "cvfast::", op,
                    ": kernel_size and stride take two numbers each");
    for (int i = 0; i < 2; ++i) {
        STD_TORCH_CHECK(kernel_size[i] > 0 && stride[i] > 0, "cvfast::", op,
                        ": kernel_size and stride must be positive");
    }
    const Padding pads = parse_padding(op, padding);
    InvertedResidualShape s{};
    s.batch = x.size(0), s.in_channels = x.size(1), s.height = x.size(2), s.width = x.size(3);
    s.hidden = hidden;
    STD_TORCH_CHECK(s.height > 0 && s.width > 0, "cvfast::", op, ": x has no pixels");
    s.kernel_h = kernel_size[0], s.kernel_w = kernel_size[1];
    s.stride_h = stride[0], s.stride_w = stride[1];
    s.pad_top = pads.top, s.pad_left = pads.left;
    s.out_height = positions(s.height + pads.top + pads.bottom, 0, 1, s.kernel_h, s.stride_h);
    s.out_width = positions(s.width + pads.left + pads.right, 0, 1, s.kernel_w, s.stride_w);
    STD_TORCH_CHECK(s.out_height > 0 && s.out_width > 0, "cvfast::", op,
                    ": the kernel is larger than the padded image ", s.height, "x", s.width);
    s.expand_activation = parse_activation(expand_activation);
    s.depthwise_activation = parse_activation(depthwise_activation);

    if (expand) {
        check_pointwise_weights(op, "expand", *expand, x, s.in_channels, hidden);
    } else {
        STD_TORCH_CHECK(hidden == s.in_channels, "cvfast::", op, ": hidden is ", hidden,
                        ", but without expand it is x's ", s.in_channels, " channels");
    }
    constexpr int64_t kPanel = kDepthwisePanel;
    STD_TORCH_CHECK(
        depthwise.scalar_type() == ScalarType::Float && depthwise.is_cpu() &&
            depthwise.is_contiguous() && depthwise.dim() == 4 && depthwise.size(0) == 1 &&
            depthwise.size(1) == (hidden + kPanel - 1) / kPanel &&
            depthwise.size(2) == s.kernel_h * s.kernel_w + 1 && depthwise.size(3) == kPanel,
        "cvfast::", op, ": depthwise does not come from depthwise.prepack() for a ", s.kernel_h,
        "x", s.kernel_w, " kernel over ", hidden, " channels");

    const PixelStrides from(x, s.batch, s.height, s.width);
    s.x_image = from.image, s.x_row = from.row, s.x_pixel = from.pixel;
    return s;
}

void set_out(InvertedResidualShape& s, const char* op, const Tensor& x, int64_t channels,
             const Tensor& out) {
    check_image(op, "out", out, x, {s.batch, channels, s.out_height, s.out_width});
    s.out_channels = channels;
    const PixelStrides to(out, s.batch, s.out_height, s.out_width);
    s.out_image = to.image, s.out_row = to.row, s.out_pixel = to.pixel;
}

Tensor empty_image(const Tensor& x, int64_t channels, int64_t height, int64_t width) {
    const int64_t sizes[] = {x.size(0), channels, height, width};
    return torch::stable::empty(sizes, x.scalar_type(), std::nullopt, std::nullopt, std::nullopt,
                                MemoryFormat::ChannelsLast);
}

void run_block(InvertedResidualShape s, const Tensor& x, const OptionalTensor& expand,
               const Tensor& depthwise, const Tensor& project, const OptionalTensor& residual,
               const std::string& activation, const Tensor& out) {
    constexpr const char* kOp = "inverted_residual_cpu";
    STD_TORCH_CHECK(out.dim() == 4, "cvfast::", kOp, ": out must be [N, C, H, W]");
    set_out(s, kOp, x, out.size(1), out);
    check_pointwise_weights(kOp, "project", project, x, s.hidden, s.out_channels);
    s.activation = parse_activation(activation);
    if (residual) {
        check_image(kOp, "residual", *residual, x,
                    {s.batch, s.out_channels, s.out_height, s.out_width});
        const PixelStrides added(*residual, s.batch, s.out_height, s.out_width);
        s.residual_image = added.image, s.residual_row = added.row, s.residual_pixel = added.pixel;
    }
    with_element_type(kOp, x, [&]<class T>(std::type_identity<T>) {
        submit(s, InvertedResidualOperands<T>{
                      static_cast<const T*>(x.const_data_ptr()), data_or_null<float>(expand),
                      static_cast<const float*>(depthwise.const_data_ptr()),
                      static_cast<const float*>(project.const_data_ptr()),
                      data_or_null<T>(residual), static_cast<T*>(out.mutable_data_ptr()), nullptr});
    });
}

Tensor inverted_residual_cpu(const Tensor& x, const OptionalTensor& expand, const Tensor& depthwise,
                             const Tensor& project, const OptionalTensor& residual, int64_t hidden,
                             int64_t out_channels, const Numbers& kernel_size,
                             const Numbers& stride, const Numbers& padding,
                             const std::string& expand_activation,
                             const std::string& depthwise_activation,
                             const std::string& activation) {
    const auto s = block_shape("inverted_residual_cpu", x, expand, depthwise, hidden, kernel_size,
                               stride, padding, expand_activation, depthwise_activation);
    Tensor out = empty_image(x, out_channels, s.out_height, s.out_width);
    run_block(s, x, expand, depthwise, project, residual, activation, out);
    return out;
}

void inverted_residual_cpu_out(const Tensor& x, const OptionalTensor& expand,
                               const Tensor& depthwise, const Tensor& project,
                               const OptionalTensor& residual, int64_t hidden,
                               const Numbers& kernel_size, const Numbers& stride,
                               const Numbers& padding, const std::string& expand_activation,
                               const std::string& depthwise_activation,
                               const std::string& activation, Tensor out) {
    run_block(block_shape("inverted_residual_cpu", x, expand, depthwise, hidden, kernel_size,
                          stride, padding, expand_activation, depthwise_activation),
              x, expand, depthwise, project, residual, activation, out);
}

void run_squeeze(InvertedResidualShape s, const Tensor& x, const OptionalTensor& expand,
                 const Tensor& depthwise, const Tensor& out, const Tensor& row_means) {
    constexpr const char* kOp = "inverted_residual_squeeze_cpu";
    set_out(s, kOp, x, s.hidden, out);
    check_image(kOp, "row_means", row_means, x, {s.batch, s.hidden, s.out_height, 1});
    const PixelStrides means(row_means, s.batch, s.out_height, 1);
    s.means_image = means.image, s.means_row = means.row;
    with_element_type(kOp, x, [&]<class T>(std::type_identity<T>) {
        submit(s, InvertedResidualOperands<T>{
                      static_cast<const T*>(x.const_data_ptr()), data_or_null<float>(expand),
                      static_cast<const float*>(depthwise.const_data_ptr()), nullptr, nullptr,
                      static_cast<T*>(out.mutable_data_ptr()),
                      static_cast<T*>(row_means.mutable_data_ptr())});
    });
}

std::tuple<Tensor, Tensor> inverted_residual_squeeze_cpu(
    const Tensor& x, const OptionalTensor& expand, const Tensor& depthwise, int64_t hidden,
    const Numbers& kernel_size, const Numbers& stride, const Numbers& padding,
    const std::string& expand_activation, const std::string& depthwise_activation) {
    const auto s =
        block_shape("inverted_residual_squeeze_cpu", x, expand, depthwise, hidden, kernel_size,
                    stride, padding, expand_activation, depthwise_activation);
    Tensor out = empty_image(x, hidden, s.out_height, s.out_width);
    Tensor row_means = empty_image(x, hidden, s.out_height, 1);
    run_squeeze(s, x, expand, depthwise, out, row_means);
    return {out, row_means};
}

void inverted_residual_squeeze_cpu_out(const Tensor& x, const OptionalTensor& expand,
                                       const Tensor& depthwise, int64_t hidden,
                                       const Numbers& kernel_size, const Numbers& stride,
                                       const Numbers& padding, const std::string& expand_activation,
                                       const std::string& depthwise_activation, Tensor out,
                                       Tensor row_means) {
    run_squeeze(block_shape("inverted_residual_squeeze_cpu", x, expand, depthwise, hidden,
                            kernel_size, stride, padding, expand_activation, depthwise_activation),
                x, expand, depthwise, out, row_means);
}

}  // namespace
}  // namespace cvfast

STABLE_TORCH_LIBRARY_IMPL(cvfast, CPU, m) {
    m.impl("inverted_residual_cpu", TORCH_BOX(&cvfast::inverted_residual_cpu));
    m.impl("inverted_residual_cpu.out", TORCH_BOX(&cvfast::inverted_residual_cpu_out));
    m.impl("inverted_residual_squeeze_cpu", TORCH_BOX(&cvfast::inverted_residual_squeeze_cpu));
    m.impl("inverted_residual_squeeze_cpu.out",
           TORCH_BOX(&cvfast::inverted_residual_squeeze_cpu_out));
}
