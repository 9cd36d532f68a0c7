// Activations on float vectors; NaN passes through as in PyTorch. Included once per ISA, by
// foreach_isa.h.

namespace cvfast::CVFAST_ISA_NAMESPACE {

CVFAST_INLINE Vec relu6(Vec x) { return min_keep_nan(max_keep_nan(x, 0.f), 6.f); }

CVFAST_INLINE Vec hardswish(Vec x) {
    return mul(mul(x, relu6(add(x, set1(3.f)))), set1(1.f / 6.f));
}

}  // namespace cvfast::CVFAST_ISA_NAMESPACE
