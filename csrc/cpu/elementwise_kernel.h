// The elementwise kernel, compiled once per instruction-set level by foreach_isa.h.

namespace cvfast {

#ifndef CVFAST_ELEMENTWISE_BLOCK
#define CVFAST_ELEMENTWISE_BLOCK
// What one call computes: `channels` of each of `pixels` pixels, from where the operands point.
template <class T>
struct ElementwiseBlock {
    ElementwiseOperands<T> operands;
    int64_t pixels, channels;
    int64_t x_pixel, y_pixel, out_pixel;
    ElementwiseOp op;
    ElementwiseActivation activation;
};
#endif

namespace CVFAST_ISA_NAMESPACE {

// e^x to 1 ulp; infinity above float's range, 0 below that of its normal numbers.
CVFAST_INLINE Vec exponential(Vec x) {
    x = min_keep_nan(max_keep_nan(x, -87.3f), 89.f);
    // Adding 1.5 * 2^23 - 1 leaves the low bits with n - 1, n the integer nearest to x / ln 2; and
    // 2^(n - 1) is finite where e^x is.
    const Vec magic = set1(0x1.8p23f - 1.f);
    const Vec shifted = fma(x, set1(0x1.715476p+0f), magic);
    const Vec n = sub(shifted, magic);
    // ln 2 in two parts, the first of so few bits that its products with n are exact.
    const Vec r = fma(n, set1(0x1.bd0106p-13f), fma(n, set1(-0x1.63p-1f), x));
    // (e^r - 1 - r) / r^2 on [-ln 2 / 2, ln 2 / 2]: minimax, e^r is off by 3.1e-9 at most.
    Vec p = set1(0.0013814467f);
    p = fma(p, r, set1(0.0083687808f));
    p = fma(p, r, set1(0.041668393f));
    p = fma(p, r, set1(0.1666652f));
    p = fma(p, r, set1(0.49999994f));
    p = fma(mul(r, r), p, r);
    return mul(fma(p, set1(2.f), set1(2.f)), pow2(shifted));
}

CVFAST_INLINE Vec one_plus_exp_minus(Vec x) {
    return add(set1(1.f), exponential(sub(set1(0.f), x)));
}

template <int V>
CVFAST_INLINE void activate_elementwise(Vec (&v)[1][V], ElementwiseActivation activation) {
    switch (activation) {
        case ElementwiseActivation::sigmoid:
            CVFAST_UNROLL for (int i = 0; i < V; ++i) {
                v[0][i] = div(set1(1.f), one_plus_exp_minus(v[0][i]));
            }
            return;
        case ElementwiseActivation::silu:
            CVFAST_UNROLL for (int i = 0; i < V; ++i) {
                v[0][i] = div(v[0][i], one_plus_exp_minus(v[0][i]));
            }
            return;
        default:
            activate_all(v, static_cast<Activation>(activation));
    }
}

// V vectors of channels of a pixel from c on; the first `n` of one vector where kPartial.
template <class T, int V, bool kPartial>
CVFAST_INLINE void elementwise_vectors(const ElementwiseBlock<T>& b, const T* x, const T* y, T* out,
                                       int64_t c, int n) {
    const auto channels = [&](const auto* p, int i) {
        if constexpr (kPartial) return load_n(p + c, n);
        return load(p + c + i * kLanes);
    };
    Vec v[1][V];
    CVFAST_UNROLL for (int i = 0; i < V; ++i) v[0][i] = channels(x, i);
    if (b.operands.scale != nullptr) {
        CVFAST_UNROLL for (int i = 0; i < V; ++i) {
            v[0][i] = fma(v[0][i], channels(b.operands.scale, i), channels(b.operands.shift, i));
        }
    }
    if (b.op == ElementwiseOp::add) {
        CVFAST_UNROLL for (int i = 0; i < V; ++i) v[0][i] = add(v[0][i], channels(y, i));
    } else if (b.op == ElementwiseOp::mul) {
        CVFAST_UNROLL for (int i = 0; i < V; ++i) v[0][i] = mul(v[0][i], channels(y, i));
    }
    activate_elementwise(v, b.activation);
    CVFAST_UNROLL for (int i = 0; i < V; ++i) {
        if constexpr (kPartial) {
            store_n(out + c, v[0][i], n);
        } else {
            store(out + c + i * kLanes, v[0][i]);
        }
    }
}

template <class T>
void elementwise_block(const ElementwiseBlock<T>& block) {
    const ElementwiseBlock<T> b = block;  // a local copy: stores of vectors may alias the other
    const T *x = b.operands.x, *y = b.operands.y;
    T* out = b.operands.out;
    for (int64_t pixel = 0; pixel < b.pixels; ++pixel) {
        int64_t c = 0;
        for (; c + 4 * kLanes <= b.channels; c += 4 * kLanes) {
            elementwise_vectors<T, 4, false>(b, x, y, out, c, kLanes);
        }
        for (; c + kLanes <= b.channels; c += kLanes) {
            elementwise_vectors<T, 1, false>(b, x, y, out, c, kLanes);
        }
        if (c < b.channels) {
            elementwise_vectors<T, 1, true>(b, x, y, out, c, static_cast<int>(b.channels - c));
        }
        x += b.x_pixel;
        if (y != nullptr) y += b.y_pixel;
        out += b.out_pixel;
    }
}

}  // namespace CVFAST_ISA_NAMESPACE
}  // namespace cvfast
