// The pooling kernels, compiled once per instruction-set level by foreach_isa.h.
//
// A window is reduced down its columns first, then along the row that this leaves: kernel_h +
// kernel_w steps an output instead of kernel_h * kernel_w.

namespace cvfast {

#ifndef CVFAST_POOL_RANGE
#define CVFAST_POOL_RANGE
// What one call computes: rows of one channel block of one image, `strip` outputs at a time.
struct PoolRange {
    int64_t image;
    int64_t channel_begin, channel_end;
    int64_t row_begin, row_end;
    int64_t strip;
};

// The taps of a window along one axis.
struct PoolTaps {
    int64_t first, count;  // those in the image; where their first lies
    int64_t padded;        // how many lie in the padded image

    PoolTaps(int64_t position, int64_t stride, int64_t kernel, int64_t pad, int64_t dilation,
             int64_t size) {
        const int64_t start = position * stride - pad;
        const int64_t before = (std::max<int64_t>(-start, 0) + dilation - 1) / dilation;
        const int64_t within = (std::max<int64_t>(size - start, 0) + dilation - 1) / dilation;
        first = start + before * dilation;
        count = std::max<int64_t>(0, std::min(kernel, within) - before);
        padded = std::min(kernel, size + pad - start);
    }
};

// `taps` rows of numbers, `step` apart from x on, to be combined into one; a row passes through
// relu(scale * x + shift) before and is divided behind, where asked for.
template <class In, class Out>
struct PoolReduction {
    const In* x;
    int64_t step, taps;
    const float* scale;
    const float* shift;
    float divisor;
    Out* out;
};
#endif

namespace CVFAST_ISA_NAMESPACE {

// A maximum is one of the numbers, so that those of 16 bits need not be widened: as unsigned
// integers that are ordered as the numbers are, from minus infinity on. NaN come last, of both
// signs: the negative ones, which are less than minus infinity, wrap.
template <class T>
struct Ordered {
    uint16_t bits;
};

template <PoolKind kKind, class T>
inline constexpr bool kByOrder = kKind == PoolKind::max && sizeof(T) == 2;

// What a strip's columns are reduced to.
template <PoolKind kKind, class T>
using PoolRow = std::conditional_t<kByOrder<kKind, T>, Ordered<T>, float>;

template <int N>
struct WordsOf {
    typedef uint16_t Type __attribute__((vector_size(2 * N)));
    typedef int16_t Signed __attribute__((vector_size(2 * N)));
};
template <int N>
using Words = typename WordsOf<N>::Type;

// Numbers with a sign bit as integers in two's complement, and back.
template <int N>
CVFAST_INLINE Words<N> flip_negative(Words<N> x) {
    const auto sign = reinterpret_cast<typename WordsOf<N>::Signed>(x) >> 15;
    return x ^ (reinterpret_cast<Words<N>>(sign) & 0x7fff);
}

// Minus infinity's.
template <class T>
inline constexpr uint16_t kLeastInteger = 0x8000 | (std::is_same_v<T, Half> ? 0x03ff : 0x007f);

template <class T>
inline constexpr bool kIsOrdered = false;
template <class T>
inline constexpr bool kIsOrdered<Ordered<T>> = true;

template <int N, class T>
CVFAST_INLINE Words<N> load_words(const T* p) {
    Words<N> x;
    std::memcpy(&x, p, sizeof x);
    if constexpr (kIsOrdered<T>) return x;
    return flip_negative<N>(x) - kLeastInteger<T>;
}

template <int N, class T>
CVFAST_INLINE void store_words(T* p, Words<N> x) {
    if constexpr (!kIsOrdered<T>) x = flip_negative<N>(x + kLeastInteger<T>);
    std::memcpy(p, &x, sizeof x);
}

// The greatest of each number's taps, from c on, N at once and what remains by fewer.
template <int N, int kTaps, class In, class Out>
CVFAST_INLINE void reduce_words(const PoolReduction<In, Out>& r, int64_t c, int64_t numbers) {
    const int64_t taps = kTaps ? kTaps : r.taps;
    for (; c + N <= numbers; c += N) {
        const In* x = r.x + c;
        Words<N> most = load_words<N>(x);
        for (int64_t tap = 1; tap < taps; ++tap) {
            const Words<N> next = load_words<N>(x += r.step);
            most = most > next ? most : next;
        }
        store_words<N>(r.out + c, most);
    }
    if constexpr (N > 1) {
        if (c < numbers) reduce_words<N / 2, kTaps>(r, c, numbers);
    }
}

template <PoolKind kKind>
CVFAST_INLINE Vec combine(Vec a, Vec b) {
    if constexpr (kKind == PoolKind::max) return max_nan(a, b);
    return add(a, b);
}

template <class T, bool kPartial>
CVFAST_INLINE Vec load_channels(const T* p, int n) {
    if constexpr (kPartial) return load_n(p, n);
    return load(p);
}

// V vectors from c on; the first `n` numbers of one vector where kPartial. kTaps 0: any number.
template <PoolKind kKind, bool kScale, bool kDivide, int kTaps, int V, bool kPartial, class In,
          class Out>
CVFAST_INLINE void reduce_vectors(const PoolReduction<In, Out>& r, int64_t c, int n) {
    Vec result[V], scale[V], shift[V];
    if constexpr (kScale) {
        CVFAST_UNROLL for (int v = 0; v < V; ++v) {
            scale[v] = load_channels<float, kPartial>(r.scale + c + v * kLanes, n);
            shift[v] = load_channels<float, kPartial>(r.shift + c + v * kLanes, n);
        }
    }
    const In* x = r.x + c;
    const int64_t taps = kTaps ? kTaps : r.taps;
    for (int64_t tap = 0; tap < taps; ++tap, x += r.step) {
        CVFAST_UNROLL for (int v = 0; v < V; ++v) {
            Vec next = load_channels<In, kPartial>(x + v * kLanes, n);
            if constexpr (kScale) next = max_keep_nan(fma(next, scale[v], shift[v]), 0.f);
            result[v] = tap == 0 ? next : combine<kKind>(result[v], next);
        }
    }
    CVFAST_UNROLL for (int v = 0; v < V; ++v) {
        if constexpr (kDivide) result[v] = div(result[v], set1(r.divisor));
        if constexpr (kPartial) {
            store_n(r.out + c, result[v], n);
        } else {
            store(r.out + c + v * kLanes, result[v]);
        }
    }
}

template <PoolKind kKind, bool kScale, bool kDivide, int kTaps, class In, class Out>
CVFAST_INLINE void reduce_taps(const PoolReduction<In, Out>& r, int64_t numbers) {
    if constexpr (kByOrder<kKind, In> && kByOrder<kKind, Out>) {
        return reduce_words<2 * kLanes, kTaps>(r, 0, numbers);
    } else {
        int64_t c = 0;
        for (; c + 4 * kLanes <= numbers; c += 4 * kLanes) {
            reduce_vectors<kKind, kScale, kDivide, kTaps, 4, false>(r, c, kLanes);
        }
        for (; c + kLanes <= numbers; c += kLanes) {
            reduce_vectors<kKind, kScale, kDivide, kTaps, 1, false>(r, c, kLanes);
        }
        if (c < numbers) {
            const int n = static_cast<int>(numbers - c);
            reduce_vectors<kKind, kScale, kDivide, kTaps, 1, true>(r, c, n);
        }
    }
}

// `numbers` numbers of a row; there is a tap at least.
template <PoolKind kKind, bool kScale, bool kDivide, class In, class Out>
CVFAST_INLINE void reduce(const PoolReduction<In, Out>& r, int64_t numbers) {
    switch (r.taps) {
        case 2:
            return reduce_taps<kKind, kScale, kDivide, 2>(r, numbers);
        case 3:
            return reduce_taps<kKind, kScale, kDivide, 3>(r, numbers);
        default:
            return reduce_taps<kKind, kScale, kDivide, 0>(r, numbers);
    }
}

// Down the columns [begin, end) of an output row's windows: a row of sums, or of maxima.
template <PoolKind kKind, bool kScale, class T>
CVFAST_INLINE void reduce_columns(const PoolShape& s, const PoolOperands<T>& o,
                                  const PoolTaps& taps, int64_t channels, int64_t begin,
                                  int64_t end, PoolRow<kKind, T>* row) {
    PoolReduction<T, PoolRow<kKind, T>> r{o.x + taps.first * s.x_row + begin * s.x_pixel,
                                          s.dilation_h * s.x_row,
                                          taps.count,
                                          o.scale,
                                          o.shift,
                                          1.f,
                                          row};
    if (!kScale && s.x_pixel == channels) {
        reduce<kKind, false, false>(r, (end - begin) * channels);
        return;
    }
    for (int64_t column = begin; column < end; ++column) {
        reduce<kKind, kScale, false>(r, channels);
        r.x += s.x_pixel;
        r.out += channels;
    }
}

// `channels` channels of the outputs [begin, end) of row y, of the image that the operands point
// to.
template <PoolKind kKind, class T>
void pool_strip(const PoolShape& s, const PoolOperands<T>& o, int64_t channels, int64_t y,
                int64_t begin, int64_t end, void* scratch) {
    auto* row = static_cast<PoolRow<kKind, T>*>(scratch);
    const PoolTaps down(y, s.stride_h, s.kernel_h, s.pad_h, s.dilation_h, s.height);
    const int64_t left = std::clamp<int64_t>(begin * s.stride_w - s.pad_w, 0, s.width);
    const int64_t last = (end - 1) * s.stride_w - s.pad_w + (s.kernel_w - 1) * s.dilation_w;
    const int64_t right = std::clamp<int64_t>(last + 1, left, s.width);
    if (down.count > 0) {
        if (kKind == PoolKind::average && o.scale != nullptr) {
            reduce_columns<kKind, true>(s, o, down, channels, left, right, row);
        } else {
            reduce_columns<kKind, false>(s, o, down, channels, left, right, row);
        }
    }
    T* out = o.out + y * s.out_row + begin * s.out_pixel;
    for (int64_t column = begin; column < end; ++column, out += s.out_pixel) {
        const PoolTaps along(column, s.stride_w, s.kernel_w, s.pad_w, s.dilation_w, s.width);
        if (down.count == 0 || along.count == 0) {
            const float empty = kKind == PoolKind::max ? -__builtin_inff() : 0.f;
            std::fill_n(out, channels, from_float<T>(empty));
            continue;
        }
        int64_t divisor = s.divisor;
        if (divisor == 0) {
            divisor = s.count_padding ? down.padded * along.padded : down.count * along.count;
        }
        const PoolReduction<PoolRow<kKind, T>, T> r{row + (along.first - left) * channels,
                                                    s.dilation_w * channels,
                                                    along.count,
                                                    nullptr,
                                                    nullptr,
                                                    static_cast<float>(divisor),
                                                    out};
        reduce<kKind, false, kKind == PoolKind::average>(r, channels);
    }
}

template <class T>
void pool_rows(const PoolShape& s, const PoolOperands<T>& operands, const PoolRange& range,
               void* scratch) {
    const int64_t channels = range.channel_end - range.channel_begin;
    PoolOperands<T> o = operands;
    o.x += range.image * s.x_image + range.channel_begin;
    o.out += range.image * s.out_image + range.channel_begin;
    if (o.scale != nullptr) {
        o.scale += range.channel_begin;
        o.shift += range.channel_begin;
    }
    // Rows of the image are read from left to right, so that what lies in memory streams.
    for (int64_t y = range.row_begin; y < range.row_end; ++y) {
        for (int64_t begin = 0; begin < s.out_width; begin += range.strip) {
            const int64_t end = std::min(begin + range.strip, s.out_width);
            if (s.kind == PoolKind::max) {
                pool_strip<PoolKind::max>(s, o, channels, y, begin, end, scratch);
            } else {
                pool_strip<PoolKind::average>(s, o, channels, y, begin, end, scratch);
            }
        }
    }
}

// Sums of so many pixels are added in pairs, and the sums of those again: the error of a mean of
// 112x112 pixels is that of adding 16 and 10 numbers.
inline constexpr int64_t kSegmentPixels = 16;
inline constexpr int kMostLevels = 48;

// Sums of V vectors of channels, added up like a binary counter: level l holds that of 2^l
// segments.
template <int V>
struct PairwiseSum {
    int64_t segments = 0;
    Vec levels[kMostLevels][V];

    CVFAST_INLINE void push(Vec (&sum)[V]) {
        int level = 0;
        for (; segments >> level & 1; ++level) {
            CVFAST_UNROLL for (int v = 0; v < V; ++v) sum[v] = add(levels[level][v], sum[v]);
        }
        CVFAST_UNROLL for (int v = 0; v < V; ++v) levels[level][v] = sum[v];
        ++segments;
    }

    CVFAST_INLINE void total(Vec (&sum)[V]) const {
        CVFAST_UNROLL for (int v = 0; v < V; ++v) sum[v] = set1(0.f);
        for (int level = 0; segments >> level; ++level) {
            if (segments >> level & 1) {
                CVFAST_UNROLL for (int v = 0; v < V; ++v) sum[v] = add(levels[level][v], sum[v]);
            }
        }
    }
};

template <bool kScale, int V, bool kPartial, class T>
void global_pool_vectors(const GlobalPoolShape& s, const GlobalPoolOperands<T>& o, int64_t c,
                         int n) {
    Vec scale[V], shift[V];
    if constexpr (kScale) {
        CVFAST_UNROLL for (int v = 0; v < V; ++v) {
            scale[v] = load_channels<float, kPartial>(o.scale + c + v * kLanes, n);
            shift[v] = load_channels<float, kPartial>(o.shift + c + v * kLanes, n);
        }
    }
    PairwiseSum<V> sums;
    Vec sum[V];
    for (int64_t y = 0; y < s.height; ++y) {
        const T* x = o.x + y * s.x_row + c;
        for (int64_t begin = 0; begin < s.width; begin += kSegmentPixels) {
            const int64_t pixels = std::min(kSegmentPixels, s.width - begin);
            CVFAST_UNROLL for (int v = 0; v < V; ++v) sum[v] = set1(0.f);
            for (int64_t pixel = 0; pixel < pixels; ++pixel, x += s.x_pixel) {
                CVFAST_UNROLL for (int v = 0; v < V; ++v) {
                    Vec next = load_channels<T, kPartial>(x + v * kLanes, n);
                    if constexpr (kScale) next = max_keep_nan(fma(next, scale[v], shift[v]), 0.f);
                    sum[v] = add(sum[v], next);
                }
            }
            sums.push(sum);
        }
    }
    sums.total(sum);
    const Vec pixels = set1(float(s.height * s.width));
    CVFAST_UNROLL for (int v = 0; v < V; ++v) {
        const Vec mean = div(sum[v], pixels);
        if constexpr (kPartial) {
            store_n(o.out + c, mean, n);
        } else {
            store(o.out + c + v * kLanes, mean);
        }
    }
}

template <bool kScale, class T>
CVFAST_INLINE void global_pool_channels_of(const GlobalPoolShape& s, const GlobalPoolOperands<T>& o,
                                           int64_t c, int64_t end) {
    for (; c + 4 * kLanes <= end; c += 4 * kLanes) {
        global_pool_vectors<kScale, 4, false>(s, o, c, kLanes);
    }
    for (; c + 2 * kLanes <= end; c += 2 * kLanes) {
        global_pool_vectors<kScale, 2, false>(s, o, c, kLanes);
    }
    for (; c + kLanes <= end; c += kLanes) {
        global_pool_vectors<kScale, 1, false>(s, o, c, kLanes);
    }
    if (c < end) global_pool_vectors<kScale, 1, true>(s, o, c, static_cast<int>(end - c));
}

// Channels [begin, end) of the image that the operands point to.
template <class T>
void global_pool_channels(const GlobalPoolShape& s, const GlobalPoolOperands<T>& o, int64_t begin,
                          int64_t end) {
    if (o.scale != nullptr) {
        global_pool_channels_of<true>(s, o, begin, end);
    } else {
        global_pool_channels_of<false>(s, o, begin, end);
    }
}

}  // namespace CVFAST_ISA_NAMESPACE
}  // namespace cvfast
