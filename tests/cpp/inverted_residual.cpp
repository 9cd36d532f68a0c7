#include "cpu/inverted_residual.h"

#include "check.h"
#include "pointwise_weights.h"

namespace cvfast::check {
namespace {

// What the next step reads: the activated value, and the magnitude that bounds its error.
Sum activated(const Sum& sum, Activation activation) {
    const double value = sum.expect(0, activation).value;
    const double magnitude = std::isfinite(sum.magnitude) ? 1.5 * sum.magnitude : 0;
    return {value, std::max(magnitude, std::fabs(value))};
}

void add_product(Sum& sum, double weight, const Sum& factor) {
    sum.add(weight * factor.value, std::fabs(weight) * factor.magnitude);
}

template <class T>
void check(Test& test) {
    Random& random = test.random;
    InvertedResidualShape s{};
    s.batch = random.in(1, 3), s.height = random.in(1, 20), s.width = random.in(1, 24);
    const bool expands = random.one_in(2), projects = !random.one_in(3);
    // Wide ones are computed in several chunks.
    s.hidden = random.channels(random.one_in(4) ? 500 : 90);
    s.in_channels = expands ? random.channels(40) : s.hidden;
    s.out_channels = projects ? random.channels(70) : s.hidden;
    s.kernel_h = 2 * random.in(0, 3) + 1, s.kernel_w = 2 * random.in(0, 3) + 1;
    s.stride_h = random.in(1, 2), s.stride_w = random.in(1, 2);
    s.pad_top = random.in(0, s.kernel_h / 2), s.pad_left = random.in(0, s.kernel_w / 2);
    s.out_height = positions(s.height, s.pad_top, s.kernel_h, 1, s.kernel_h, s.stride_h);
    s.out_width = positions(s.width, s.pad_left, s.kernel_w, 1, s.kernel_w, s.stride_w);
    s.expand_activation = random.activation();
    s.depthwise_activation = random.activation();
    s.activation = projects ? random.activation() : Activation::none;

    Image<T> x({s.batch, s.height, s.width, s.in_channels}, random);
    const Size out_size{s.batch, s.out_height, s.out_width, s.out_channels};
    Image<T> residual(out_size, random), out(out_size, random);
    Image<T> means({s.batch, s.out_height, 1, s.hidden}, random);
    s.x_image = x.image, s.x_row = x.row, s.x_pixel = x.pixel;
    s.residual_image = residual.image, s.residual_row = residual.row;
    s.residual_pixel = residual.pixel;
    s.out_image = out.image, s.out_row = out.row, s.out_pixel = out.pixel;
    s.means_image = means.image, s.means_row = means.row;
    const bool special = random.one_in(4);
    x.fill(random, special), residual.fill(random, special);

    const auto expand = random_pointwise_weights<T>(s.in_channels, s.hidden, random);
    const auto project = random_pointwise_weights<T>(s.hidden, s.out_channels, random);
    const std::vector<float> expand_words = pack_pointwise<T>(expand);
    const std::vector<float> project_words = pack_pointwise<T>(project);
    const Array<float> expand_packed(static_cast<int64_t>(expand_words.size()), random);
    const Array<float> project_packed(static_cast<int64_t>(project_words.size()), random);
    std::copy(expand_words.begin(), expand_words.end(), expand_packed.data());
    std::copy(project_words.begin(), project_words.end(), project_packed.data());
    const int64_t taps = s.kernel_h * s.kernel_w;
    const int64_t panels = (s.hidden + kDepthwisePanel - 1) / kDepthwisePanel;
    const Array<float> depthwise(panels * (taps + 1) * kDepthwisePanel, random);
    for (int64_t i = 0; i < depthwise.size(); ++i) {
        const int64_t c = i / kDepthwisePanel / (taps + 1) * kDepthwisePanel + i % kDepthwisePanel;
        depthwise[i] = c < s.hidden ? weight_element<T>(random) : 0.f;
    }
    const auto tap_weight = [&](int64_t c, int64_t tap) -> double {
        const int64_t row = c / kDepthwisePanel * (taps + 1) + tap;
        return depthwise[row * kDepthwisePanel + c % kDepthwisePanel];
    };

    InvertedResidualOperands<T> o{x.data(), nullptr,    depthwise.data(), nullptr,
                                  nullptr,  out.data(), nullptr};
    if (expands) o.expand = expand_packed.data();
    if (projects) o.project = project_packed.data();
    if (projects && random.one_in(2)) o.residual = residual.data();
    if (!projects && random.one_in(2)) o.means = means.data();
    test.describe(text("batch ", s.batch, ", ", s.height, "x", s.width, " to ", s.out_height, "x",
                       s.out_width, ", channels ", s.in_channels, " to ", s.hidden, " to ",
                       s.out_channels, ", kernel ", s.kernel_h, "x", s.kernel_w, ", stride ",
                       s.stride_h, ",", s.stride_w, ", pad ", s.pad_top, ",", s.pad_left,
                       expands ? ", expands" : "", projects ? ", projects" : "",
                       o.residual ? ", residual" : "", o.means ? ", means" : ""));

    // Channel by channel, as for_elements() counts.
    std::vector<Sum> hidden, convolved;
    x.for_elements([&](int64_t n, int64_t y, int64_t column, int64_t channel) {
        if (!expands) {
            const double v = to_float(x.at(n, y, column, channel));
            hidden.push_back({v, std::fabs(v)});
            return;
        }
        for (int64_t h = 0; channel == 0 && h < s.hidden; ++h) {
            Sum sum;
            sum.add(expand.bias[h]);
            for (int64_t c = 0; c < s.in_channels; ++c) {
                sum.add(expand.at(h, c) * to_float(x.at(n, y, column, c)));
            }
            hidden.push_back(activated(sum, s.expand_activation));
        }
    });
    for (int64_t pixel = 0; pixel < s.batch * s.out_height * s.out_width; ++pixel) {
        const int64_t n = pixel / s.out_width / s.out_height;
        const int64_t top = pixel / s.out_width % s.out_height * s.stride_h - s.pad_top;
        const int64_t left = pixel % s.out_width * s.stride_w - s.pad_left;
        for (int64_t c = 0; c < s.hidden; ++c) {
            Sum sum;
            sum.add(tap_weight(c, taps));
            for (int64_t tap = 0; tap < taps; ++tap) {
                const int64_t iy = top + tap / s.kernel_w, ix = left + tap % s.kernel_w;
                if (iy < 0 || iy >= s.height || ix < 0 || ix >= s.width) continue;
                add_product(sum, tap_weight(c, tap),
                            hidden[((n * s.height + iy) * s.width + ix) * s.hidden + c]);
            }
            convolved.push_back(activated(sum, s.depthwise_activation));
        }
    }
    // Two intermediate results are rounded to T.
    constexpr double kUnit = std::is_same_v<T, float>  ? 1
                             : std::is_same_v<T, Half> ? 0x1p13
                                                       : 0x1p16;
    const double roundings = 64 + 2 * kUnit;
    std::vector<Expected> expected, expected_means;
    int64_t at = 0;
    out.for_elements([&](int64_t n, int64_t y, int64_t column, int64_t channel) {
        Sum sum;
        if (projects) {
            sum.add(project.bias[channel]);
            if (o.residual) sum.add(to_float(residual.at(n, y, column, channel)));
            for (int64_t c = 0; c < s.hidden; ++c) {
                add_product(sum, project.at(channel, c),
                            convolved[at / s.out_channels * s.hidden + c]);
            }
        } else {
            sum = convolved[at];
        }
        ++at;
        expected.push_back(sum.expect(roundings, s.activation));
    });
    test.check(s, o, out, expected);
    if (!o.means) return;
    means.for_elements([&](int64_t n, int64_t y, int64_t, int64_t c) {
        Sum sum;
        for (int64_t column = 0; column < s.out_width; ++column) {
            const int64_t pixel = (n * s.out_height + y) * s.out_width + column;
            add_product(sum, 1.0 / double(s.out_width), convolved[pixel * s.hidden + c]);
        }
        expected_means.push_back(sum.expect(roundings, Activation::none));
    });
    test.check(s, o, means, expected_means);
}

const Column column{"inverted_residual", check<float>, check<BFloat16>, check<Half>};

}  // namespace
}  // namespace cvfast::check
