#include "cpu/pool.h"

#include "cpu/bindings.h"

namespace cvfast {
namespace {

// PyTorch's rule: the last window starts in the image or its left padding.
int64_t pooled_size(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                    bool ceil_mode) {
    const int64_t free = size + 2 * pad - dilation * (kernel - 1) - 1;
    if (free < 0 && !(ceil_mode && free + stride > 0)) return 0;
    int64_t count = (free + (ceil_mode ? stride - 1 : 0)) / stride + 1;
    if (ceil_mode && (count - 1) * stride >= size + pad) --count;
    return count;
}

void check_scale(const char* op, const Tensor& x, const std::optional<Tensor>& scale,
                 const std::optional<Tensor>& shift) {
    STD_TORCH_CHECK(scale.has_value() == shift.has_value(), "cvfast::", op,
                    ": scale and shift come together");
    const auto check = [&](const char* name, const Tensor& v) {
        STD_TORCH_CHECK(v.dim() == 1 && v.size(0) == x.size(1) && v.is_contiguous() && v.is_cpu() &&
                            v.scalar_type() == ScalarType::Float,
                        "cvfast::", op, ": ", name, " must be a contiguous float32 [", x.size(1),
                        "] on the CPU");
    };
    if (scale) {
        check("scale", *scale);
        check("shift", *shift);
    }
}

PoolShape pool_shape(const Tensor& x, const std::string& kind,
                     const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                     bool ceil_mode, bool count_include_pad, std::optional<int64_t> divisor,
                     const std::optional<Tensor>& scale, const std::optional<Tensor>& shift) {
    STD_TORCH_CHECK(x.dim() == 4, "cvfast::pool_cpu: x must be [N, C, H, W], got ", x.dim(),
                    " dimensions");
    check_image("pool_cpu", "x", x, x, {x.size(0), x.size(1), x.size(2), x.size(3)});
    STD_TORCH_CHECK(kind == "max" || kind == "avg", "cvfast::pool_cpu: unknown kind '", kind,
                    "'; expected max or avg");
    STD_TORCH_CHECK(kernel_size.size() == 2 && stride.size() == 2 && padding.size() == 2 &&
                        dilation.size() == 2,
                    "cvfast::pool_cpu: kernel_size, stride, padding and dilation take two numbers "
                    "each");
    for (int i = 0; i < 2; ++i) {
        STD_TORCH_CHECK(kernel_size[i] > 0 && stride[i] > 0 && dilation[i] > 0,
                        "cvfast::pool_cpu: kernel_size, stride and dilation must be positive");
        STD_TORCH_CHECK(padding[i] >= 0 && padding[i] <= kernel_size[i] / 2,
                        "cvfast::pool_cpu: padding must lie between 0 and half the kernel size, "
                        "got ",
                        padding[i], " for ", kernel_size[i]);
    }
    PoolShape s{};
    s.kind = kind == "max" ? PoolKind::max : PoolKind::average;
    if (s.kind == PoolKind::max) {
        STD_TORCH_CHECK(!divisor && !scale,
                        "cvfast::pool_cpu: divisor_override, scale and shift are for kind avg");
    } else {
        STD_TORCH_CHECK(dilation[0] == 1 && dilation[1] == 1,
                        "cvfast::pool_cpu: kind avg takes dilation 1");
        STD_TORCH_CHECK(divisor != 0, "cvfast::pool_cpu: divisor_override must not be 0");
        check_scale("pool_cpu", x, scale, shift);
    }
    s.batch = x.size(0), s.channels = x.size(1), s.height = x.size(2), s.width = x.size(3);
    s.x_image = x.stride(0), s.x_row = x.stride(2), s.x_pixel = x.stride(3);
    if (s.width == 1) s.x_pixel = s.channels;
    s.kernel_h = kernel_size[0], s.kernel_w = kernel_size[1];
    s.stride_h = stride[0], s.stride_w = stride[1];
    s.pad_h = padding[0], s.pad_w = padding[1];
    s.dilation_h = dilation[0], s.dilation_w = dilation[1];
    s.count_padding = count_include_pad;
    s.divisor = divisor.value_or(0);
    s.out_height = pooled_size(s.height, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h, ceil_mode);
    s.out_width = pooled_size(s.width, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w, ceil_mode);
    STD_TORCH_CHECK(s.height > 0 && s.width > 0 && s.out_height > 0 && s.out_width > 0,
                    "cvfast::pool_cpu: the kernel is larger than the padded image ", s.height, "x",
                    s.width);
    return s;
}

void run_pool(PoolShape s, const Tensor& x, const std::optional<Tensor>& scale,
              const std::optional<Tensor>& shift, Tensor& out) {
    check_image("pool_cpu", "out", out, x, {s.batch, s.channels, s.out_height, s.out_width});
    s.out_image = out.stride(0), s.out_row = out.stride(2), s.out_pixel = out.stride(3);
    with_element_type("pool_cpu", x, [&]<class T>(std::type_identity<T>) {
        submit(s, PoolOperands<T>{static_cast<const T*>(x.const_data_ptr()),
                                  data_or_null<float>(scale), data_or_null<float>(shift),
                                  static_cast<T*>(out.mutable_data_ptr())});
    });
}

Tensor empty_image(const Tensor& x, int64_t height, int64_t width) {
    const int64_t sizes[] = {x.size(0), x.size(1), height, width};
    return torch::stable::empty(sizes, x.scalar_type(), std::nullopt, std::nullopt, std::nullopt,
                                MemoryFormat::ChannelsLast);
}

Tensor pool_cpu(const Tensor& x, const std::string& kind, const std::vector<int64_t>& kernel_size,
                const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                const std::vector<int64_t>& dilation, bool ceil_mode, bool count_include_pad,
                std::optional<int64_t> divisor, const std::optional<Tensor>& scale,
                const std::optional<Tensor>& shift) {
    const auto s = pool_shape(x, kind, kernel_size, stride, padding, dilation, ceil_mode,
                              count_include_pad, divisor, scale, shift);
    Tensor out = empty_image(x, s.out_height, s.out_width);
    run_pool(s, x, scale, shift, out);
    return out;
}

void pool_cpu_out(const Tensor& x, const std::string& kind, const std::vector<int64_t>& kernel_size,
                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                  const std::vector<int64_t>& dilation, bool ceil_mode, bool count_include_pad,
                  std::optional<int64_t> divisor, const std::optional<Tensor>& scale,
                  const std::optional<Tensor>& shift, Tensor out) {
    run_pool(pool_shape(x, kind, kernel_size, stride, padding, dilation, ceil_mode,
                        count_include_pad, divisor, scale, shift),
             x, scale, shift, out);
}

void global_pool_cpu_out(const Tensor& x, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& shift, Tensor out) {
    STD_TORCH_CHECK(x.dim() == 4, "cvfast::global_pool_cpu: x must be [N, C, H, W], got ", x.dim(),
                    " dimensions");
    check_image("global_pool_cpu", "x", x, x, {x.size(0), x.size(1), x.size(2), x.size(3)});
    STD_TORCH_CHECK(x.size(2) > 0 && x.size(3) > 0,
                    "cvfast::global_pool_cpu: x has no pixels to average");
    check_image("global_pool_cpu", "out", out, x, {x.size(0), x.size(1), 1, 1});
    check_scale("global_pool_cpu", x, scale, shift);
    GlobalPoolShape s{};
    s.batch = x.size(0), s.channels = x.size(1), s.height = x.size(2), s.width = x.size(3);
    const PixelStrides strides(x, s.batch, s.height, s.width);
    s.x_image = strides.image, s.x_row = strides.row, s.x_pixel = strides.pixel;
    if (s.x_row == s.width * s.x_pixel) {  // one long row
        s.width *= s.height;
        s.height = 1;
    }
    s.out_image = out.stride(0);
    with_element_type("global_pool_cpu", x, [&]<class T>(std::type_identity<T>) {
        submit(s, GlobalPoolOperands<T>{static_cast<const T*>(x.const_data_ptr()),
                                        data_or_null<float>(scale), data_or_null<float>(shift),
                                        static_cast<T*>(out.mutable_data_ptr())});
    });
}

Tensor global_pool_cpu(const Tensor& x, const std::optional<Tensor>& scale,
                       const std::optional<Tensor>& shift) {
    STD_TORCH_CHECK(x.dim() == 4, "cvfast::global_pool_cpu: x must be [N, C, H, W], got ", x.dim(),
                    " dimensions");
    Tensor out = empty_image(x, 1, 1);
    global_pool_cpu_out(x, scale, shift, out);
    return out;
}

}  // namespace
}  // namespace cvfast

STABLE_TORCH_LIBRARY_IMPL(cvfast, CPU, m) {
    m.impl("pool_cpu", TORCH_BOX(&cvfast::pool_cpu));
    m.impl("pool_cpu.out", TORCH_BOX(&cvfast::pool_cpu_out));
    m.impl("global_pool_cpu", TORCH_BOX(&cvfast::global_pool_cpu));
    m.impl("global_pool_cpu.out", TORCH_BOX(&cvfast::global_pool_cpu_out));
}
