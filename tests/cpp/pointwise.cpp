#include "cpu/pointwise.h"

#include <bit>

#include "check.h"

namespace cvfast::check {
namespace {

template <class T>
constexpr bool kPairs = std::is_same_v<T, BFloat16>;

struct Weights {
    int64_t in_channels, out_channels;
    std::vector<float> bias, matrix;  // [out_channels], [out_channels][in_channels]

    double at(int64_t o, int64_t c) const { return matrix[o * in_channels + c]; }
};

// Word `i` of output channel `o`: the bias, then the weights of one or two input channels.
template <class T>
float word(const Weights& w, int64_t o, int64_t i) {
    if (i == 0) return w.bias[o];
    const auto weight = [&](int64_t c) {
        return c < w.in_channels ? w.matrix[o * w.in_channels + c] : 0.f;
    };
    if constexpr (!kPairs<T>) return weight(i - 1);
    const uint32_t low = from_float<BFloat16>(weight(2 * i - 2)).bits;
    const uint32_t high = from_float<BFloat16>(weight(2 * i - 1)).bits;
    return std::bit_cast<float>(low | high << 16);
}

// The layout that pointwise.h describes.
template <class T>
std::vector<float> pack(const Weights& w) {
    const int64_t words = kPairs<T> ? (w.in_channels + 1) / 2 : w.in_channels;
    std::vector<float> packed;
    for (int64_t o = 0; o < w.out_channels; o += kPointwisePanel) {
        const int64_t lanes = std::min<int64_t>(kPointwisePanel, w.out_channels - o);
        if (lanes > kPointwisePanel / 2) {
            for (int64_t i = 0; i <= words; ++i) {
                for (int64_t lane = 0; lane < kPointwisePanel; ++lane) {
                    packed.push_back(lane < lanes ? word<T>(w, o + lane, i) : 0.f);
                }
            }
            continue;
        }
        // A half panel: the bias, then two words of each channel at a time.
        for (int64_t i = -1; i <= words; i += 2) {
            for (int64_t lane = 0; lane < kPointwisePanel; ++lane) {
                const int64_t at = i < 0 ? (lane % 2 ? -1 : 0) : i + lane % 2;
                const bool used = lane / 2 < lanes && at >= 0 && at <= words;
                packed.push_back(used ? word<T>(w, o + lane / 2, at) : 0.f);
            }
        }
    }
    return packed;
}

template <class T>
void check(Test& test) {
    Random& random = test.random;
    PointwiseShape s{};
    // Long sums are cut in segments, and large images in blocks.
    const bool deep = random.one_in(4);
    s.batch = random.in(1, 3), s.height = random.in(1, deep ? 4 : 9);
    s.width = random.in(1, deep ? 9 : 33);
    s.in_channels = random.channels(deep ? 1200 : 80), s.out_channels = random.channels(150);
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

    Weights w{s.in_channels, s.out_channels, {}, {}};
    for (int64_t i = 0; i < s.out_channels; ++i) w.bias.push_back(element<float>(random, false));
    for (int64_t i = 0; i < s.out_channels * s.in_channels; ++i) {
        const float exact = element<float>(random, false);
        w.matrix.push_back(kPairs<T> ? to_float(from_float<BFloat16>(exact)) : exact);
    }
    const std::vector<float> rows = pack<T>(w);
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
