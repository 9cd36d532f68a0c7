#include "cpu/layout.h"

#include "check.h"

namespace cvfast::check {
namespace {

// An image [n, c, h, w], channels-last or else contiguous in its rows.
template <class T>
struct Layout {
    const bool channels_last;
    Image<T> image;

    Layout(bool channels_last, const int64_t (&n)[4], Random& random)
        : channels_last(channels_last),
          image(channels_last ? Size{n[0], n[2], n[3], n[1]} : Size{n[0], n[1], n[2], n[3]},
                random) {}

    void strides(int64_t (&to)[4]) const {
        to[0] = image.image;
        to[1] = channels_last ? 1 : image.row;
        to[2] = channels_last ? image.row : image.pixel;
        to[3] = channels_last ? image.pixel : 1;
    }
};

template <class T>
void check(Test& test) {
    Random& random = test.random;
    CopyLayoutShape s{
        {random.in(1, 3), random.channels(80), random.in(1, 20), random.in(1, 70)}, {}, {}};
    Layout<T> x(random.one_in(2), s.size, random), out(random.one_in(2), s.size, random);
    x.strides(s.x_stride), out.strides(s.out_stride);
    x.image.fill(random, false);
    test.describe(text(s.size[0], "x", s.size[1], "x", s.size[2], "x", s.size[3],
                       x.channels_last ? ", from" : ", not from", " channels-last",
                       out.channels_last ? ", to" : ", not to", " channels-last"));

    std::vector<Expected> expected;
    out.image.for_elements([&](int64_t n, int64_t i, int64_t j, int64_t k) {
        // i, j, k are h, w, c where channels-last, and else c, h, w.
        if (x.channels_last == out.channels_last) {
            expected.push_back({to_float(x.image.at(n, i, j, k)), 0});
        } else if (x.channels_last) {
            expected.push_back({to_float(x.image.at(n, j, k, i)), 0});
        } else {
            expected.push_back({to_float(x.image.at(n, k, i, j)), 0});
        }
    });
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;
    const CopyLayoutOperands<Bits> o{reinterpret_cast<const Bits*>(x.image.data()),
                                     reinterpret_cast<Bits*>(out.image.data())};
    test.check(s, o, out.image, expected);
}

const Column column{"layout", check<float>, check<BFloat16>, check<Half>};

}  // namespace
}  // namespace cvfast::check
