#include "cpu/conv.h"

#include "cpu/bindings.h"
#include "cpu/winograd.h"
#include "cpu/winograd_1d.h"

namespace cvfast {
namespace {

// Which algorithm weights of this shape were packed for: the number of their taps tells, and for
// those whose words are pairs, the dtype.
std::optional<ConvAlgorithm> packed_for(const ConvShape& s, const Tensor& x, const Tensor& packed) {
    using enum ConvAlgorithm;
    constexpr int64_t kPanel = kConvPanel;
    if (!(packed.is_cpu() && packed.is_contiguous() && packed.dim() == 3 && s.out_channels > 0 &&
          packed.size(0) == (s.out_channels + kPanel - 1) / kPanel && packed.size(2) == kPanel)) {
        return std::nullopt;
    }
    const bool pairs = x.scalar_type() == ScalarType::BFloat16;
    const auto packed_as = [&](ScalarType words, int64_t rows) {
        return packed.scalar_type() == words && packed.size(1) == rows + 1;
    };
    const int64_t taps = s.kernel_h * s.kernel_w;
    if (pairs ? packed_as(ScalarType::Int, taps * conv_words<BFloat16>(s.in_channels))
              : packed_as(ScalarType::Float, taps * s.in_channels)) {
        return direct;
    }
    if (winograd_1d_serves(s) &&
        packed_as(ScalarType::Float, winograd_1d_entries(taps) * s.in_channels)) {
        return winograd_1d;
    }
    const bool winograd = s.kernel_h == 3 && s.kernel_w == 3 && s.stride_h == 1 &&
                          s.stride_w == 1 && s.dilation_h == 1 && s.dilation_w == 1;
    if (!winograd) return std::nullopt;
    for (const ConvAlgorithm algorithm : {winograd_f2, winograd_f2x4, winograd_f4}) {
        const int64_t rows = winograd_tile(algorithm).taps() * s.in_channels;
        if (packed_as(ScalarType::Float, rows)) return algorithm;
    }
    const int64_t taps_and_kept = winograd_tile(winograd_f2_bf16).taps() + kWinogradKept<BFloat16>;
    if (pairs && packed_as(ScalarType::Int, taps_and_kept * conv_words<BFloat16>(s.in_channels))) {
        return winograd_f2_bf16;
    }
    return std::nullopt;
}

ImageStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(2), t.stride(3)}; }

ConvShape conv_shape(const Tensor& x, const std::optional<Tensor>& x2,
                     const std::vector<int64_t>& kernel_size, int64_t out_channels,
                     const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                     const std::vector<int64_t>& dilation, const std::string& activation) {
    STD_TORCH_CHECK(x.dim() == 4, "cvfast::conv_cpu: x must be [N, C, H, W], got ", x.dim(),
                    " dimensions");
    STD_TORCH_CHECK(x.is_cpu(), "cvfast::conv_cpu: x must be on the CPU");
    STD_TORCH_CHECK(kernel_size.size() == 2 && stride.size() == 2 && dilation.size() == 2,
                    "cvfast::conv_cpu: kernel_size, stride and dilation take two numbers each");
    const Padding pad = parse_padding("conv_cpu", padding);
    for (int i = 0; i < 2; ++i) {
        STD_TORCH_CHECK(kernel_size[i] > 0 && stride[i] > 0 && dilation[i] > 0,
                        "cvfast::conv_cpu: kernel_size, stride and dilation must be positive");
    }
    ConvShape s{};
    s.batch = x.size(0), s.height = x.size(2), s.width = x.size(3);
    s.in_channels = s.x_channels = x.size(1);
    s.x = strides_of(x);
    s.x_channel = channels_adjacent(x) ? 1 : x.stride(1);
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
    s.pad_top = pad.top, s.pad_left = pad.left;
    s.dilation_h = dilation[0], s.dilation_w = dilation[1];
    s.out_channels = out_channels;
    s.out_height =
        positions(s.height + pad.top + pad.bottom, 0, s.dilation_h, s.kernel_h, s.stride_h);
    s.out_width =
        positions(s.width + pad.left + pad.right, 0, s.dilation_w, s.kernel_w, s.stride_w);
    s.activation = parse_activation(activation);
    // Pixels of a single column lie side by side, whatever their stride.
    if (s.width == 1 && s.x_channel != 1) s.x.pixel = 1;
    STD_TORCH_CHECK(s.x_channel == 1 || (has_few_channels(s) && s.x.pixel == 1),
                    "cvfast::conv_cpu: x must be channels-last (stride 1 along C); or, with fewer "
                    "than 16 channels, contiguous. Use "
                    "contiguous(memory_format=torch.channels_last)");
    STD_TORCH_CHECK(s.out_height > 0 && s.out_width > 0,
                    "cvfast::conv_cpu: the kernel is larger than the padded image ", s.height, "x",
                    s.width);
    return s;
}

void run_conv(ConvShape s, const Tensor& x, const Tensor& packed,
              const std::optional<Tensor>& residual, const std::optional<Tensor>& x2, Tensor& out) {
    check_image("conv_cpu", "out", out, x, {s.batch, s.out_channels, s.out_height, s.out_width});
    s.out = strides_of(out);
    if (residual) {
        check_image("conv_cpu", "residual", *residual, x,
                    {s.batch, s.out_channels, s.out_height, s.out_width});
        s.residual = strides_of(*residual);
    }
    const auto algorithm = packed_for(s, x, packed);
    STD_TORCH_CHECK(algorithm,
                    "cvfast::conv_cpu: packed does not come from prepack(..., dtype=x.dtype) "
                    "for a ",
                    s.kernel_h, "x", s.kernel_w, " kernel from ", s.in_channels, " to ",
                    s.out_channels,
                    " channels; algorithms of Winograd's take stride and dilation 1");
    s.algorithm = *algorithm;
    STD_TORCH_CHECK(s.x_channel == 1 || s.algorithm == ConvAlgorithm::direct,
                    "cvfast::conv_cpu: weights packed for Winograd's algorithms need a "
                    "channels-last x; pack them for 'direct'");
    if (s.batch == 0) return;
    with_element_type("conv_cpu", x, [&]<class T>(std::type_identity<T>) {
        const ConvOperands<T> operands{
            static_cast<const T*>(x.const_data_ptr()), data_or_null<T>(x2),
            static_cast<const float*>(packed.const_data_ptr()), data_or_null<T>(residual),
            static_cast<T*>(out.mutable_data_ptr())};
        submit(s, operands);
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

}  // namespace
}  // namespace cvfast

STABLE_TORCH_LIBRARY_IMPL(cvfast, CPU, m) {
    m.impl("conv_cpu", TORCH_BOX(&cvfast::conv_cpu));
    m.impl("conv_cpu.out", TORCH_BOX(&cvfast::conv_cpu_out));
}
