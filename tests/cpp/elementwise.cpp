#include "cpu/elementwise.h"

#include "check.h"

namespace cvfast::check {
namespace {

template <class T>
void check(Test& test) {
    Random& random = test.random;
    ElementwiseShape s{};
    s.batch = random.in(1, 3), s.channels = random.channels(random.one_in(4) ? 900 : 90);
    s.height = random.in(1, 9), s.width = random.in(1, 17);
    s.op = static_cast<ElementwiseOp>(random.in(0, 2));
    s.activation = static_cast<ElementwiseActivation>(random.in(0, 6));
    const bool gate = random.one_in(3);  // one number per image and channel

    const Size size{s.batch, s.height, s.width, s.channels};
    Image<T> x(size, random), out(size, random);
    Image<T> y(gate ? Size{s.batch, 1, 1, s.channels} : size, random);
    Array<float> scale(s.channels, random), shift(s.channels, random);
    s.x_image = x.image, s.x_row = x.row, s.x_pixel = x.pixel;
    s.y_image = y.image;
    if (!gate) s.y_row = y.row, s.y_pixel = y.pixel;
    s.out_image = out.image, s.out_row = out.row, s.out_pixel = out.pixel;
    const bool special = random.one_in(4);
    x.fill(random, special), y.fill(random, special), shift.fill(random);
    for (int64_t c = 0; c < s.channels; ++c) {
        scale[c] = static_cast<float>(random.uniform(-40, 40));  // into the flat ends of sigmoid
    }

    ElementwiseOperands<T> o{x.data(), nullptr, nullptr, nullptr, out.data()};
    if (s.op != ElementwiseOp::none) o.y = y.data();
    if (random.one_in(2)) o.scale = scale.data(), o.shift = shift.data();
    test.describe(text("batch ", s.batch, ", ", s.height, "x", s.width, ", channels ", s.channels,
                       ", op ", static_cast<int>(s.op), ", activation ",
                       static_cast<int>(s.activation), gate ? ", gate" : "",
                       o.scale ? ", scale and shift" : ""));

    std::vector<Expected> expected;
    out.for_elements([&](int64_t n, int64_t row, int64_t column, int64_t c) {
        Sum sum;
        const double v = to_float(x.at(n, row, column, c));
        sum.add(o.scale ? v * scale[c] : v);
        if (o.scale) sum.add(shift[c]);
        const double other = to_float(gate ? y.at(n, 0, 0, c) : y.at(n, row, column, c));
        if (s.op == ElementwiseOp::add) sum.add(other);
        if (s.op == ElementwiseOp::mul) sum.value *= other, sum.magnitude *= std::fabs(other);
        if (s.activation < ElementwiseActivation::sigmoid) {
            expected.push_back(sum.expect(8, static_cast<Activation>(s.activation)));
            return;
        }
        const bool silu = s.activation == ElementwiseActivation::silu;
        Expected e = sum.expect(8, Activation::none);
        e.value = (silu ? e.value : 1) / (1 + std::exp(-e.value));
        expected.push_back(e);
    });
    test.check(s, o, out, expected);
}

const Column column{"elementwise", check<float>, check<BFloat16>, check<Half>};

}  // namespace
}  // namespace cvfast::check
