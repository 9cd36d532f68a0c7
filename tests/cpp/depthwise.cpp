#include "cpu/depthwise.h"

#include "check.h"

namespace cvfast::check {
namespace {

template <class T>
void check(Test& test) {
    Random& random = test.random;
    DepthwiseShape s{};
    s.batch = random.in(1, 3), s.channels = random.channels(random.one_in(8) ? 300 : 70);
    s.height = random.in(1, 20), s.width = random.in(1, 40);
    s.multiplier = random.one_in(4) ? random.in(2, 3) : 1;
    s.kernel_h = random.in(1, 7), s.kernel_w = random.in(1, 7);
    if (random.one_in(2)) s.kernel_h = s.kernel_w = 2 * random.in(1, 3) + 1;
    s.stride_h = random.in(1, 3), s.stride_w = random.in(1, 3);
    s.dilation_h = random.one_in(3) ? random.in(1, 3) : 1;
    s.dilation_w = random.one_in(3) ? random.in(1, 3) : 1;
    s.activation = random.activation();
    const int64_t extent_h = s.dilation_h * (s.kernel_h - 1) + 1;
    const int64_t extent_w = s.dilation_w * (s.kernel_w - 1) + 1;
    s.pad_top = random.in(0, extent_h), s.pad_left = random.in(0, extent_w);
    s.out_height = positions(s.height, s.pad_top, extent_h, s.dilation_h, s.kernel_h, s.stride_h);
    s.out_width = positions(s.width, s.pad_left, extent_w, s.dilation_w, s.kernel_w, s.stride_w);

    Image<T> x({s.batch, s.height, s.width, s.channels}, random);
    Image<T> out({s.batch, s.out_height, s.out_width, s.channels * s.multiplier}, random);
    s.x_image = x.image, s.x_row = x.row, s.x_pixel = x.pixel;
    s.out_image = out.image, s.out_row = out.row, s.out_pixel = out.pixel;
    x.fill(random, random.one_in(4));
    Array<float> packed(s.packed_size(), random);
    for (int64_t i = 0; i < packed.size(); ++i) {
        const int64_t lane = i % kDepthwisePanel;
        const int64_t panel = i / kDepthwisePanel / (s.taps() + 1) % s.panels();
        const bool used = panel * kDepthwisePanel + lane < s.channels;
        packed[i] = used ? weight_element<T>(random) : 0.f;
    }
    const auto weight = [&](int64_t c, int64_t j, int64_t tap) -> double {
        const int64_t panel = j * s.panels() + c / kDepthwisePanel;
        return packed[(panel * (s.taps() + 1) + tap) * kDepthwisePanel + c % kDepthwisePanel];
    };

    test.describe(text("batch ", s.batch, ", channels ", s.channels, " x ", s.multiplier, ", ",
                       s.height, "x", s.width, " to ", s.out_height, "x", s.out_width, ", kernel ",
                       s.kernel_h, "x", s.kernel_w, ", stride ", s.stride_h, ",", s.stride_w,
                       ", dilation ", s.dilation_h, ",", s.dilation_w, ", pad ", s.pad_top, ",",
                       s.pad_left));
    std::vector<Expected> expected;
    out.for_elements([&](int64_t n, int64_t y, int64_t column, int64_t o) {
        const int64_t c = o / s.multiplier, j = o % s.multiplier;
        Sum sum;
        sum.add(weight(c, j, s.taps()));
        for (int64_t r = 0; r < s.kernel_h; ++r) {
            for (int64_t k = 0; k < s.kernel_w; ++k) {
                const int64_t iy = y * s.stride_h - s.pad_top + r * s.dilation_h;
                const int64_t ix = column * s.stride_w - s.pad_left + k * s.dilation_w;
                if (iy < 0 || iy >= s.height || ix < 0 || ix >= s.width) continue;
                sum.add(to_float(x.at(n, iy, ix, c)) * weight(c, j, r * s.kernel_w + k));
            }
        }
        expected.push_back(sum.expect(8, s.activation));
    });
    test.check(s, DepthwiseOperands<T>{x.data(), packed.data(), out.data()}, out, expected);
}

const Column column{"depthwise", check<float>, check<BFloat16>, check<Half>};

}  // namespace
}  // namespace cvfast::check
