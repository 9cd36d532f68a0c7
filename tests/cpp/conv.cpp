#include "cpu/winograd.h"

#include <bit>

#include "cpu/winograd_1d.h"

#include "check.h"

namespace cvfast::check {
namespace {

using Matrix = std::vector<std::vector<double>>;

// G of the transform of `taps` taps at the six points that winograd_kernel.h names.
Matrix six_points(int64_t taps) {
    const std::vector<double> points{0, 0.625, -0.625, 1.5, -1.5};
    Matrix g;
    for (const double p : points) {
        double scale = 1, power = 1;
        for (const double q : points) scale *= p == q ? 1 : p - q;
        std::vector<double>& row = g.emplace_back();
        for (int64_t tap = 0; tap < taps; ++tap, power *= p) row.push_back(power / scale);
    }
    g.emplace_back(taps, 0.).back() = 1;
    return g;
}

// G of the transform of 3 taps for `out` outputs, 2 or 4.
Matrix kernel_transform(int64_t out) {
    if (out == 4) return six_points(3);
    return {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
}

struct Weights {
    const ConvShape& s;
    std::vector<float> bias, values;  // [out_channels], [out_channels][kernel_h][kernel_w][in]

    double at(int64_t o, int64_t tap, int64_t c) const {
        return values[(o * s.kernel_h * s.kernel_w + tap) * s.in_channels + c];
    }
};

template <class T>
bool multiplies_pairs(const ConvShape& s) {
    return s.algorithm == ConvAlgorithm::winograd_f2_bf16 ||
           (std::is_same_v<T, BFloat16> && s.algorithm == ConvAlgorithm::direct);
}

// The layout that conv.h describes.
template <class T>
std::vector<float> pack(const Weights& w) {
    const ConvShape& s = w.s;
    const bool direct = s.algorithm == ConvAlgorithm::direct;
    const WinogradTile tile = winograd_tile(s.algorithm);
    const bool line = s.algorithm == ConvAlgorithm::winograd_1d;
    const int64_t kernel = s.kernel_h * s.kernel_w;
    const int64_t transformed = direct ? 0 : line ? winograd_1d_entries(kernel) : tile.taps();
    const bool kept = direct || s.algorithm == ConvAlgorithm::winograd_f2_bf16;
    const int64_t taps = transformed + (kept ? kernel : 0);
    const int64_t outputs = winograd_1d_outputs(kernel), groups = winograd_1d_groups(kernel);
    const Matrix along = six_points(7 - outputs);
    const Matrix down = kernel_transform(tile.height), across = kernel_transform(tile.width);
    const auto entry = [&](int64_t o, int64_t tap, int64_t c) {
        if (tap >= transformed) return w.at(o, tap - transformed, c);
        if (line) {
            const int64_t group = tap % groups, last = group == groups - 1;
            double sum = 0;
            for (int64_t i = 0; i < (last ? 7 - outputs : outputs); ++i) {
                sum += along[tap / groups][i] * w.at(o, group * outputs + i, c);
            }
            return sum;
        }
        const int64_t side = tile.width + 2;
        double sum = 0;
        for (int64_t r = 0; r < 3; ++r) {
            for (int64_t k = 0; k < 3; ++k) {
                sum += down[tap / side][r] * across[tap % side][k] * w.at(o, 3 * r + k, c);
            }
        }
        return sum;
    };
    const int64_t words = multiplies_pairs<T>(s) ? (s.in_channels + 1) / 2 : s.in_channels;
    const auto word = [&](int64_t o, int64_t tap, int64_t i) {
        if (!multiplies_pairs<T>(s)) return float(entry(o, tap, i));
        const auto bits = [&](int64_t c) {
            const float weight = c < s.in_channels ? float(entry(o, tap, c)) : 0.f;
            return uint32_t{from_float<BFloat16>(weight).bits};
        };
        return std::bit_cast<float>(bits(2 * i) | bits(2 * i + 1) << 16);
    };
    std::vector<float> packed;
    for (int64_t o = 0; o < s.out_channels; o += kConvPanel) {
        for (int64_t row = 0; row <= taps * words; ++row) {
            for (int64_t lane = o; lane < o + kConvPanel; ++lane) {
                const int64_t tap = row / words;
                packed.push_back(lane >= s.out_channels ? 0.f
                                 : tap == taps          ? w.bias[lane]
                                                        : word(lane, tap, row % words));
            }
        }
    }
    return packed;
}

template <class T>
void check(Test& test) {
    Random& random = test.random;
    ConvShape s{};
    s.batch = random.in(1, 3), s.height = random.in(1, 12), s.width = random.in(1, 33);
    s.x_channels = random.channels(40), s.out_channels = random.channels(70);
    s.kernel_h = random.in(1, 5), s.kernel_w = random.in(1, 5);
    s.stride_h = random.in(1, 3), s.stride_w = random.in(1, 3);
    s.dilation_h = random.one_in(3) ? 2 : 1, s.dilation_w = random.one_in(3) ? 2 : 1;
    constexpr bool bf16 = std::is_same_v<T, BFloat16>;
    s.algorithm = static_cast<ConvAlgorithm>(random.in(0, bf16 ? 5 : 4));
    if (s.algorithm != ConvAlgorithm::direct) {
        s.kernel_h = s.kernel_w = 3;
        if (s.algorithm == ConvAlgorithm::winograd_1d) {
            (random.one_in(2) ? s.kernel_h : s.kernel_w) = 1;
            (s.kernel_h > 1 ? s.kernel_h : s.kernel_w) = 3 + 2 * random.in(0, 2);
        }
        s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
    }
    if (random.one_in(4)) s.x_channels = random.in(1, 4);  // a stem
    if (random.one_in(12)) {                               // rows long enough to be cut
        s.batch = 1, s.height = random.in(1, 3), s.width = random.in(57, 130);
        s.x_channels = random.channels(300), s.out_channels = random.in(1, 5);
    }
    s.in_channels = s.x_channels;
    const bool two = random.one_in(3);
    if (two) {
        s.x_channels = (s.x_channels + 15) / 16 * 16;
        s.in_channels = s.x_channels + random.channels(40);
    }
    s.activation = random.activation();
    const int64_t extent_h = s.dilation_h * (s.kernel_h - 1) + 1;
    const int64_t extent_w = s.dilation_w * (s.kernel_w - 1) + 1;
    s.pad_top = random.in(0, extent_h), s.pad_left = random.in(0, extent_w);
    s.out_height = positions(s.height, s.pad_top, extent_h, s.dilation_h, s.kernel_h, s.stride_h);
    s.out_width = positions(s.width, s.pad_left, extent_w, s.dilation_w, s.kernel_w, s.stride_w);

    Image<T> x({s.batch, s.height, s.width, s.x_channels}, random);
    Image<T> x2({s.batch, s.height, s.width, two ? s.in_channels - s.x_channels : 1}, random);
    const Size out_size{s.batch, s.out_height, s.out_width, s.out_channels};
    Image<T> residual(out_size, random), out(out_size, random);
    s.x = {x.image, x.row, x.pixel}, s.x2 = {x2.image, x2.row, x2.pixel};
    s.residual = {residual.image, residual.row, residual.pixel};
    s.out = {out.image, out.row, out.pixel};
    const bool special = random.one_in(4);
    x.fill(random, special), x2.fill(random, special), residual.fill(random, special);

    Weights w{s, {}, {}};
    for (int64_t i = 0; i < s.out_channels; ++i) w.bias.push_back(element<float>(random, false));
    for (int64_t i = 0; i < s.out_channels * s.kernel_h * s.kernel_w * s.in_channels; ++i) {
        const float value = element<float>(random, false);
        w.values.push_back(multiplies_pairs<T>(s) ? to_float(from_float<T>(value)) : value);
    }
    const std::vector<float> panels = pack<T>(w);
    Array<float> packed(static_cast<int64_t>(panels.size()), random);
    std::copy(panels.begin(), panels.end(), packed.data());

    // A stem may read an image whose channels are planes.
    Image<T> planes({s.batch, s.x_channels, s.height, s.width}, random);
    const bool planar =
        has_few_channels(s) && s.algorithm == ConvAlgorithm::direct && !two && random.one_in(2);
    if (planar) {
        s.x = {planes.image, planes.pixel, 1}, s.x_channel = planes.row;
        planes.for_elements([&](int64_t n, int64_t c, int64_t y, int64_t column) {
            planes.at(n, c, y, column) = x.at(n, y, column, c);
        });
    }

    const ConvOperands<T> o{planar ? planes.data() : x.data(), two ? x2.data() : nullptr,
                            packed.data(), random.one_in(2) ? residual.data() : nullptr,
                            out.data()};
    constexpr const char* kNames[] = {"direct", "F2", "F2x4", "F4", "1d", "F2 bf16"};
    test.describe(text(kNames[static_cast<int>(s.algorithm)], ", batch ", s.batch, ", ", s.height,
                       "x", s.width, " to ", s.out_height, "x", s.out_width, ", channels ",
                       s.x_channels, "+", s.in_channels - s.x_channels, " to ", s.out_channels,
                       ", kernel ", s.kernel_h, "x", s.kernel_w, ", stride ", s.stride_h, ",",
                       s.stride_w, ", dilation ", s.dilation_h, ",", s.dilation_w, ", pad ",
                       s.pad_top, ",", s.pad_left, o.residual ? ", residual" : "",
                       planar ? ", planar" : ""));

    std::vector<Sum> sums;
    out.for_elements([&](int64_t n, int64_t y, int64_t column, int64_t channel) {
        Sum sum;
        sum.add(w.bias[channel]);
        if (o.residual) sum.add(to_float(residual.at(n, y, column, channel)));
        for (int64_t tap = 0; tap < s.kernel_h * s.kernel_w; ++tap) {
            const int64_t iy = y * s.stride_h - s.pad_top + tap / s.kernel_w * s.dilation_h;
            const int64_t ix = column * s.stride_w - s.pad_left + tap % s.kernel_w * s.dilation_w;
            if (iy < 0 || iy >= s.height || ix < 0 || ix >= s.width) continue;
            for (int64_t c = 0; c < s.in_channels; ++c) {
                const T v =
                    c < s.x_channels ? x.at(n, iy, ix, c) : x2.at(n, iy, ix, c - s.x_channels);
                sum.add(to_float(v) * w.at(channel, tap, c));
            }
        }
        sums.push_back(sum);
    });
    // A transform mixes the pixels of a tile, and so their errors.
    double roundings = 16;
    if (s.algorithm != ConvAlgorithm::direct) {
        const bool six_by_six = s.algorithm == ConvAlgorithm::winograd_f4;
        roundings = six_by_six || s.algorithm == ConvAlgorithm::winograd_1d ? 64 : 16;
        // Those of bfloat16 are 2^16 times as large.
        if (s.algorithm == ConvAlgorithm::winograd_f2_bf16) roundings = 4 * 0x1p16;
        double most = 0;
        for (const Sum& sum : sums) {
            if (std::isfinite(sum.magnitude)) most = std::max(most, sum.magnitude);
        }
        for (Sum& sum : sums) sum.magnitude = most;
    }
    std::vector<Expected> expected;
    for (const Sum& sum : sums) expected.push_back(sum.expect(roundings, s.activation));
    test.check(s, o, out, expected);
}

const Column column{"conv", check<float>, check<BFloat16>, check<Half>};

}  // namespace
}  // namespace cvfast::check
