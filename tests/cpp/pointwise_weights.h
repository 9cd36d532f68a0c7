// Pointwise weights, as they are and as csrc/cpu/pointwise.h packs them.
#pragma once

#include <bit>

#include "cpu/pointwise.h"

#include "check.h"

namespace cvfast::check {

template <class T>
constexpr bool kPairs = std::is_same_v<T, BFloat16>;

struct PointwiseWeights {
    int64_t in_channels, out_channels;
    std::vector<float> bias, matrix;  // [out_channels], [out_channels][in_channels]

    double at(int64_t o, int64_t c) const { return matrix[o * in_channels + c]; }
};

// Word `i` of output channel `o`: the bias, then the weights of one or two input channels.
template <class T>
float pointwise_word(const PointwiseWeights& w, int64_t o, int64_t i) {
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
std::vector<float> pack_pointwise(const PointwiseWeights& w) {
    const int64_t words = kPairs<T> ? (w.in_channels + 1) / 2 : w.in_channels;
    std::vector<float> packed;
    for (int64_t o = 0; o < w.out_channels; o += kPointwisePanel) {
        const int64_t lanes = std::min<int64_t>(kPointwisePanel, w.out_channels - o);
        if (lanes > kPointwisePanel / 2) {
            for (int64_t i = 0; i <= words; ++i) {
                for (int64_t lane = 0; lane < kPointwisePanel; ++lane) {
                    packed.push_back(lane < lanes ? pointwise_word<T>(w, o + lane, i) : 0.f);
                }
            }
            continue;
        }
        // A half panel: the bias, then two words of each channel at a time.
        for (int64_t i = -1; i <= words; i += 2) {
            for (int64_t lane = 0; lane < kPointwisePanel; ++lane) {
                const int64_t at = i < 0 ? (lane % 2 ? -1 : 0) : i + lane % 2;
                const bool used = lane / 2 < lanes && at >= 0 && at <= words;
                packed.push_back(used ? pointwise_word<T>(w, o + lane / 2, at) : 0.f);
            }
        }
    }
    return packed;
}

template <class T>
PointwiseWeights random_pointwise_weights(int64_t in_channels, int64_t out_channels,
                                          Random& random) {
    PointwiseWeights w{in_channels, out_channels, {}, {}};
    for (int64_t i = 0; i < out_channels; ++i) w.bias.push_back(element<float>(random, false));
    for (int64_t i = 0; i < out_channels * in_channels; ++i) {
        const float exact = element<float>(random, false);
        w.matrix.push_back(kPairs<T> ? to_float(from_float<BFloat16>(exact)) : exact);
    }
    return w;
}

}  // namespace cvfast::check
