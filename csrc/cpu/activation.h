// Activations on float vectors; NaN passes through as in PyTorch. Included once per ISA, by
// foreach_isa.h.

namespace cvfast::CVFAST_ISA_NAMESPACE {

CVFAST_INLINE Vec relu6(Vec x) { return min_keep_nan(max_keep_nan(x, 0.f), 6.f); }

CVFAST_INLINE Vec hardsigmoid(Vec x) { return mul(relu6(add(x, set1(3.f))), set1(1.f / 6.f)); }

CVFAST_INLINE Vec hardswish(Vec x) {
    return mul(mul(x, relu6(add(x, set1(3.f)))), set1(1.f / 6.f));
}

CVFAST_INLINE Vec activate(Vec x, Activation activation) {
    switch (activation) {
        case Activation::none:
            return x;
        case Activation::relu:
            return max_keep_nan(x, 0.f);
        case Activation::relu6:
            return relu6(x);
        case Activation::hardswish:
            return hardswish(x);
        case Activation::hardsigmoid:
            return hardsigmoid(x);
    }
    return x;
}

// All vectors of a register tile.
template <int kRows, int kColumns>
CVFAST_INLINE void activate_all(Vec (&tile)[kRows][kColumns], Activation activation) {
    if (activation == Activation::none) return;
    CVFAST_UNROLL for (int r = 0; r < kRows; ++r) {
        CVFAST_UNROLL for (int c = 0; c < kColumns; ++c) {
            tile[r][c] = activate(tile[r][c], activation);
        }
    }
}

}  // namespace cvfast::CVFAST_ISA_NAMESPACE
