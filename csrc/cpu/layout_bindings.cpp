#include "cpu/layout.h"

#include "cpu/bindings.h"

namespace cvfast {
namespace {

void copy_layout_cpu_out(const Tensor& x, Tensor out) {
    bool fits = x.dim() == 4 && out.dim() == 4;
    CopyLayoutShape s{};
    for (int i = 0; i < 4 && fits; ++i) {
        fits = x.size(i) == out.size(i);
        s.size[i] = x.size(i);
        s.x_stride[i] = x.stride(i);
        s.out_stride[i] = out.stride(i);
    }
    STD_TORCH_CHECK(fits, "cvfast::copy_layout_cpu: x and out must be [N, C, H, W] of one size");
    STD_TORCH_CHECK(out.is_cpu() && x.scalar_type() == out.scalar_type(),
                    "cvfast::copy_layout_cpu: out must have the dtype of x and be on the CPU");
    with_element_type("copy_layout_cpu", x, [&]<class T>(std::type_identity<T>) {
        using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
        submit(s, CopyLayoutOperands<Bits>{static_cast<const Bits*>(x.const_data_ptr()),
                                           static_cast<Bits*>(out.mutable_data_ptr())});
    });
}

Tensor to_channels_last_cpu(const Tensor& x) {
    STD_TORCH_CHECK(x.dim() == 4, "cvfast::to_channels_last_cpu: x must be [N, C, H, W], got ",
                    x.dim(), " dimensions");
    const int64_t sizes[] = {x.size(0), x.size(1), x.size(2), x.size(3)};
    Tensor out = torch::stable::empty(sizes, x.scalar_type(), std::nullopt, std::nullopt,
                                      std::nullopt, MemoryFormat::ChannelsLast);
    copy_layout_cpu_out(x, out);
    return out;
}

void to_channels_last_cpu_out(const Tensor& x, Tensor out) {
    STD_TORCH_CHECK(out.dim() == 4 && channels_adjacent(out),
                    "cvfast::to_channels_last_cpu: out must be channels-last (stride 1 along C)");
    copy_layout_cpu_out(x, out);
}

}  // namespace
}  // namespace cvfast

STABLE_TORCH_LIBRARY_IMPL(cvfast, CPU, m) {
    m.impl("to_channels_last_cpu", TORCH_BOX(&cvfast::to_channels_last_cpu));
    m.impl("to_channels_last_cpu.out", TORCH_BOX(&cvfast::to_channels_last_cpu_out));
    m.impl("copy_layout_cpu.out", TORCH_BOX(&cvfast::copy_layout_cpu_out));
}
