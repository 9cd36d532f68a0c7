#include "cpu/pool.h"

#include "check.h"

namespace cvfast::check {
namespace {

// relu(scale * x + shift), where there are a scale and a shift.
template <class T, class Operands>
void add_scaled(Sum& sum, const Operands& o, T x, int64_t c) {
    double v = to_float(x), magnitude = std::fabs(v);
    if (o.scale) {
        magnitude = std::fabs(v * o.scale[c]) + std::fabs(o.shift[c]);
        v = v * o.scale[c] + o.shift[c];
        v = v < 0 ? 0 : v;
    }
    sum.add(v, magnitude);
}

// Windows along one axis; with `ceil` the last may reach beyond the padding, but begins before it.
int64_t windows(int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation,
                bool ceil) {
    const int64_t count =
        positions(size, pad, pad + (ceil ? stride - 1 : 0), dilation, kernel, stride);
    return ceil && (count - 1) * stride >= size + pad ? count - 1 : count;
}

template <class T>
void check_pool(Test& test) {
    Random& random = test.random;
    PoolShape s{};
    s.kind = random.one_in(2) ? PoolKind::max : PoolKind::average;
    s.batch = random.in(1, 3), s.channels = random.channels(random.one_in(4) ? 300 : 70);
    s.height = random.in(7, 16), s.width = random.in(7, 40);
    s.kernel_h = random.in(1, 4), s.kernel_w = random.in(1, 4);
    s.stride_h = random.in(1, 3), s.stride_w = random.in(1, 3);
    s.pad_h = random.in(0, s.kernel_h / 2), s.pad_w = random.in(0, s.kernel_w / 2);
    s.dilation_h = s.dilation_w = 1;
    if (s.kind == PoolKind::max) s.dilation_h = random.in(1, 2), s.dilation_w = random.in(1, 2);
    s.count_padding = random.one_in(2);
    s.divisor = s.kind == PoolKind::average && random.one_in(4) ? random.in(1, 9) : 0;
    const bool ceil = random.one_in(2);
    s.out_height = windows(s.height, s.kernel_h, s.stride_h, s.pad_h, s.dilation_h, ceil);
    s.out_width = windows(s.width, s.kernel_w, s.stride_w, s.pad_w, s.dilation_w, ceil);

    Image<T> x({s.batch, s.height, s.width, s.channels}, random);
    Image<T> out({s.batch, s.out_height, s.out_width, s.channels}, random);
    Array<float> scale(s.channels, random), shift(s.channels, random);
    s.x_image = x.image, s.x_row = x.row, s.x_pixel = x.pixel;
    s.out_image = out.image, s.out_row = out.row, s.out_pixel = out.pixel;
    x.fill(random, random.one_in(4)), scale.fill(random), shift.fill(random);
    PoolOperands<T> o{x.data(), nullptr, nullptr, out.data()};
    if (s.kind == PoolKind::average && random.one_in(3)) {
        o.scale = scale.data(), o.shift = shift.data();
    }
    test.describe(text(s.kind == PoolKind::max ? "max" : "average", ", batch ", s.batch,
                       ", channels ", s.channels, ", ", s.height, "x", s.width, " to ",
                       s.out_height, "x", s.out_width, ", kernel ", s.kernel_h, "x", s.kernel_w,
                       ", stride ", s.stride_h, ",", s.stride_w, ", pad ", s.pad_h, ",", s.pad_w,
                       ", dilation ", s.dilation_h, ",", s.dilation_w, ", divisor ", s.divisor,
                       o.scale ? ", scale and shift" : ""));

    std::vector<Expected> expected;
    out.for_elements([&](int64_t n, int64_t y, int64_t column, int64_t c) {
        Sum sum;
        double most = -std::numeric_limits<double>::infinity();
        int64_t inside = 0, padded = 0;
        for (int64_t tap = 0; tap < s.kernel_h * s.kernel_w; ++tap) {
            const int64_t iy = y * s.stride_h - s.pad_h + tap / s.kernel_w * s.dilation_h;
            const int64_t ix = column * s.stride_w - s.pad_w + tap % s.kernel_w * s.dilation_w;
            padded += iy < s.height + s.pad_h && ix < s.width + s.pad_w;
            if (iy < 0 || iy >= s.height || ix < 0 || ix >= s.width) continue;
            ++inside;
            const double v = to_float(x.at(n, iy, ix, c));
            most = std::isnan(v) || v > most ? v : most;
            add_scaled(sum, o, x.at(n, iy, ix, c), c);
            if (std::isnan(v)) break;
        }
        if (s.kind == PoolKind::max) {
            expected.push_back({most, 0});
            return;
        }
        const int64_t divisor = s.divisor ? s.divisor : s.count_padding ? padded : inside;
        sum.value = inside ? sum.value / double(divisor) : 0;
        expected.push_back(sum.expect(8, Activation::none));
    });
    test.check(s, o, out, expected);
}

template <class T>
void check_global_pool(Test& test) {
    Random& random = test.random;
    GlobalPoolShape s{};
    s.batch = random.in(1, 4), s.channels = random.channels(200);
    s.height = random.in(1, 20), s.width = random.in(1, 40);
    Image<T> x({s.batch, s.height, s.width, s.channels}, random);
    Image<T> out({s.batch, 1, 1, s.channels}, random);
    Array<float> scale(s.channels, random), shift(s.channels, random);
    s.x_image = x.image, s.x_row = x.row, s.x_pixel = x.pixel, s.out_image = out.image;
    x.fill(random, random.one_in(4)), scale.fill(random), shift.fill(random);
    GlobalPoolOperands<T> o{x.data(), nullptr, nullptr, out.data()};
    if (random.one_in(2)) o.scale = scale.data(), o.shift = shift.data();
    test.describe(text("batch ", s.batch, ", ", s.height, "x", s.width, ", channels ", s.channels,
                       o.scale ? ", scale and shift" : ""));

    std::vector<Expected> expected;
    out.for_elements([&](int64_t n, int64_t, int64_t, int64_t c) {
        Sum sum;
        for (int64_t i = 0; i < s.height * s.width; ++i) {
            add_scaled(sum, o, x.at(n, i / s.width, i % s.width, c), c);
        }
        const double pixels = double(s.height * s.width);
        sum.value /= pixels, sum.magnitude /= pixels;
        expected.push_back(sum.expect(8, Activation::none));
    });
    test.check(s, o, out, expected);
}

const Column pool{"pool", check_pool<float>, check_pool<BFloat16>, check_pool<Half>};
const Column global_pool{"global_pool", check_global_pool<float>, check_global_pool<BFloat16>,
                         check_global_pool<Half>};

}  // namespace
}  // namespace cvfast::check
