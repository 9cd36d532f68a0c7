#include "cpu/depthwise.h"

#include "cpu/bindings.h"

namespace cvfast {
namespace {

DepthwiseShape depthwise_shape(const Tensor& x, const Tensor& packed,
                               const std::vector<int64_t>& kernel_size,
                               const std::vector<int64_t>& stride,
                               const std::vector<int64_t>& padding,
                               const std::vector<int64_t>& dilation,
                               const std::string& activation) {
    STD_TORCH_CHECK(x.dim() == 4, "cvfast::depthwise_cpu: x must be [N, C, H, W], got ", x.dim(),
                    " dimensions");
    STD_TORCH_CHECK(channels_adjacent(x),
                    "cvfast::depthwise_cpu: x must be channels-last (stride 1 along C); use "
                    "x.contiguous(memory_format=torch.channels_last)");
    STD_TORCH_CHECK(kernel_size.size() == 2 && stride.size() == 2 && dilation.size() == 2,
                    "cvfast::depthwise_cpu: kernel_size, stride and dilation take two numbers "
                    "each");
    for (int i = 0; i < 2; ++i) {
        STD_TORCH_CHECK(kernel_size[i] > 0 && stride[i] > 0 && dilation[i] > 0,
                        "cvfast::depthwise_cpu: kernel_size, stride and dilation must be "
                        "positive");
    }
    const Padding pad = parse_padding("depthwise_cpu", padding);
    DepthwiseShape s{};
    s.batch = x.size(0), s.channels = x.size(1), s.height = x.size(2), s.width = x.size(3);
    s.x_image = x.stride(0), s.x_row = x.stride(2), s.x_pixel = x.stride(3);
    s.kernel_h = kernel_size[0], s.kernel_w = kernel_size[1];
    s.stride_h = stride[0], s.stride_w = stride[1];
    s.pad_top = pad.top, s.pad_left = pad.left;
    s.dilation_h = dilation[0], s.dilation_w = dilation[1];
    s.activation = parse_activation(activation);
    s.multiplier = packed.dim() == 4 ? packed.size(0) : 0;

    constexpr int64_t kPanel = kDepthwisePanel;
    STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Float && packed.is_cpu() &&
                        packed.is_contiguous() && packed.dim() == 4 &&
                        packed.size(1) == (s.channels + kPanel - 1) / kPanel &&
                        packed.size(2) == s.kernel_h * s.kernel_w + 1 && packed.size(3) == kPanel,
                    "cvfast::depthwise_cpu: packed does not come from prepack() for a ", s.kernel_h,
                    "x", s.kernel_w, " kernel over ", s.channels, " channels");

    s.out_height =
        positions(s.height + pad.top + pad.bottom, 0, s.dilation_h, s.kernel_h, s.stride_h);
    s.out_width =
        positions(s.width + pad.left + pad.right, 0, s.dilation_w, s.kernel_w, s.stride_w);
    STD_TORCH_CHECK(s.out_height > 0 && s.out_width > 0,
                    "cvfast::depthwise_cpu: the kernel is larger than the padded image ", s.height,
                    "x", s.width);
    return s;
}

void run_depthwise(DepthwiseShape s, const Tensor& x, const Tensor& packed, Tensor& out) {
    check_image("depthwise_cpu", "out", out, x,
                {s.batch, s.channels * s.multiplier, s.out_height, s.out_width});
    s.out_image = out.stride(0), s.out_row = out.stride(2), s.out_pixel = out.stride(3);
    with_element_type("depthwise_cpu", x, [&]<class T>(std::type_identity<T>) {
        submit(s, DepthwiseOperands<T>{static_cast<const T*>(x.const_data_ptr()),
                                       static_cast<const float*>(packed.const_data_ptr()),
                                       static_cast<T*>(out.mutable_data_ptr())});
    });
}

Tensor depthwise_cpu(const Tensor& x, const Tensor& packed, const std::vector<int64_t>& kernel_size,
                     const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                     const std::vector<int64_t>& dilation, const std::string& activation) {
    const auto s = depthwise_shape(x, packed, kernel_size, stride, padding, dilation, activation);
    const int64_t sizes[] = {s.batch, s.channels * s.multiplier, s.out_height, s.out_width};
    Tensor out = torch::stable::empty(sizes, x.scalar_type(), std::nullopt, std::nullopt,
                                      std::nullopt, MemoryFormat::ChannelsLast);
    run_depthwise(s, x, packed, out);
    return out;
}

void depthwise_cpu_out(const Tensor& x, const Tensor& packed,
                       const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                       const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                       const std::string& activation, Tensor out) {
    run_depthwise(depthwise_shape(x, packed, kernel_size, stride, padding, dilation, activation), x,
                  packed, out);
}

}  // namespace
}  // namespace cvfast

STABLE_TORCH_LIBRARY_IMPL(cvfast, CPU, m) {
    m.impl("depthwise_cpu", TORCH_BOX(&cvfast::depthwise_cpu));
    m.impl("depthwise_cpu.out", TORCH_BOX(&cvfast::depthwise_cpu_out));
}
