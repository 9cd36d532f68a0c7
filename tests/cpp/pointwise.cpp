#include "pointwise_weights.h"

namespace cvfast::check {
namespace {

template <class T>
void check(Test& test) {
    Random& random = test.random;
    PointwiseShape s{};
    // Long sums are cut in segments, and large images in blocks.
    const bool deep = random.one_in(4);
    s.batch = random.in(1, 3), s.height = random.in(1, deep ? 4 : 9);
    s.width = random.in(1, deep ? 9 : 33);
    s.in_channels = random.channels(deep ? 1200 : 80),
    s.out_channels = random.channels(deep ? 250 : 150);
    s.activation = random.activation();
    const int64_t stride_h = random.one_in(4) ? 2 : 1, stride_w = random.one_in(4) ? 2 : 1;

    Image<T> x(
        {s.batch, (s.height - 1) * stride_h + 1, (s.width - 1) * stride_w + 1, s.in_channels},
        random);
    Image<T> residual({s.batch, s.height, s.width, s.out_channels}, random);
    Image<T> out({s.batch, s.height, s.width, s.out_channels}, random);
    Image<T> gate({s.batch, 1, 1, s.in_channels}, random);
    Array<float> scale(s.in_channels, random), shift(s.in_channels, random);
    s.x_image = x.image, s.x_row = x.row * stride_h, s.x_pixel = x.pixel * stride_w;
    s.residual_image = residual.image, s.residual_row = residual.row;
    s.residual_pixel = residual.pixel;
    s.out_image = out.image, s.out_row = out.row, s.out_pixel = out.pixel;
    s.gate_image = gate.image;
    const bool special = random.one_in(4);
    x.fill(random, special), residual.fill(random, special), gate.fill(random, special);
    scale.fill(random), shift.fill(random);

    const auto w = random_pointwise_weights<T>(s.in_channels, s.out_channels, random);
    const std::vector<float> rows = pack_pointwise<T>(w);
    const int64_t count = pointwise_packed_rows(s.in_channels, s.out_channels, kPairs<T>);
    if (static_cast<int64_t>(rows.size()) != count * kPointwisePanel) {
        fail("pointwise_packed_rows() counts other rows");
    }
    Array<float> packed(count * kPointwisePanel, random);
    std::copy(rows.begin(), rows.end(), packed.data());

    PointwiseOperands<T> o{x.data(), packed.data(), nullptr, nullptr, nullptr, nullptr, out.data()};
    if (random.one_in(3)) o.scale = scale.data(), o.shift = shift.data();
    if (random.one_in(3)) o.gate = gate.data();
    if (random.one_in(2)) o.residual = residual.data();
    test.describe(text("batch ", s.batch, ", ", s.height, "x", s.width, ", channels ",
                       s.in_channels, " to ", s.out_channels, ", stride ", stride_h, ",", stride_w,
                       o.scale ? ", scale and shift" : "", o.gate ? ", gate" : "",
                       o.residual ? ", residual" : ""));

    // The source, computed, is rounded to bfloat16 before it is multiplied.
    const double roundings = 16 + (kPairs<T> && (o.scale || o.gate) ? 0x1p16 : 0);
    std::vector<Expected> expected;
    std::vector<Sum> source(s.in_channels);
    out.for_elements([&](int64_t n, int64_t y, int64_t column, int64_t channel) {
        for (int64_t c = 0; channel == 0 && c < s.in_channels; ++c) {
            double v = to_float(x.at(n, y * stride_h, column * stride_w, c));
            double magnitude = std::fabs(v);
            if (o.scale) {
                magnitude = std::fabs(v * scale[c]) + std::fabs(shift[c]);
                v = v * scale[c] + shift[c];
                v = v < 0 ? 0 : v;
            }
            if (o.gate) {
                const double g = to_float(gate.at(n, 0, 0, c));
                v *= g, magnitude *= std::fabs(g);
            }
            source[c] = {v, magnitude};
        }
        Sum sum;
        sum.add(w.bias[channel]);
        if (o.residual) sum.add(to_float(residual.at(n, y, column, channel)));
        for (int64_t c = 0; c < s.in_channels; ++c) {
            const double weight = w.at(channel, c);
            sum.add(weight * source[c].value, std::fabs(weight) * source[c].magnitude);
        }
        expected.push_back(sum.expect(roundings, s.activation));
    });
    test.check(s, o, out, expected);
}

const Column column{"pointwise", check<float>, check<BFloat16>, check<Half>};

}  // namespace
}  // namespace cvfast::check
