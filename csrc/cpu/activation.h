// Activations on float vectors; NaN passes through as in PyTorch. Included once per ISA, by
// foreach_isa.h.

namespace cvfast::CVFAST_ISA_NAMESPACE {

CVFAST_INLINE Vec relu6(Vec x) { return min_keep_nan(max_keep_nan(x, 0.f), 6.f); }

CVFAST_INLINE Vec hardsigmoid(Vec x) { return mul(relu6(add(x, set1(3.f))), set1(1.f / 6.f)); }

CVFAST_INLINE Vec hardswish(Vec x) {
    return mul(mul(x, relu6(add(x, set1(3.f)))), set1(1.f / 6.f));
}

template <Activation kActivation>
CVFAST_INLINE Vec activate_as(Vec x) {
    if constexpr (kActivation == Activation::relu) return max_keep_nan(x, 0.f);
    if constexpr (kActivation == Activation::relu6) return relu6(x);
    if constexpr (kActivation == Activation::hardswish) return hardswish(x);
    if constexpr (kActivation == Activation::hardsigmoid) return hardsigmoid(x);
    return x;
}

template <Activation kActivation, int kRows, int kColumns>
CVFAST_INLINE void activate_all_as(Vec (&tile)[kRows][kColumns]) {
    CVFAST_UNROLL for (int r = 0; r < kRows; ++r) {
        CVFAST_UNROLL for (int c = 0; c < kColumns; ++c) {
            tile[r][c] = activate_as<kActivation>(tile[r][c]);
        }
    }
}

// All vectors of a register tile.
template <int kRows, int kColumns>
CVFAST_INLINE void activate_all(Vec (&tile)[kRows][kColumns], Activation activation) {
    switch (activation) {
        case Activation::none:
            return;
        case Activation::relu:
            return activate_all_as<Activation::relu>(tile);
        case Activation::relu6:
            return activate_all_as<Activation::relu6>(tile);
        case Activation::hardswish:
            return activate_all_as<Activation::hardswish>(tile);
        case Activation::hardsigmoid:
            return activate_all_as<Activation::hardsigmoid>(tile);
    }
}

CVFAST_INLINE Vec activate(Vec x, Activation activation) {
    Vec tile[1][1] = {{x}};
    activate_all(tile, activation);
    return tile[0][0];
}

}  // namespace cvfast::CVFAST_ISA_NAMESPACE
