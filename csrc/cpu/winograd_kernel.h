// Winograd convolution of 3x3 kernels at stride 1, compiled once per instruction-set level by
// foreach_isa.h.
//
// A block of tiles goes through three steps: inputs are transformed into scratch memory that stays
// in L2, each of the 16 to 36 transformed taps is a matrix product over the channels, and the
// products are transformed back. The last two run for one or two panels of output channels at a
// time, so that products stay in L2 as well.
//
// A tile is transformed along its rows and along its columns, each by a transform of its own: R
// works down the rows of a tile, C across its columns. The products multiply words of W, as those
// of TileProduct: floats, or pairs of BFloat16, to which transformed inputs and kernels are then
// rounded.

#include "cpu/tile_product.h"

namespace cvfast {

#ifndef CVFAST_WINOGRAD_BLOCK
#define CVFAST_WINOGRAD_BLOCK
// What one task computes: tiles [tile_begin, tile_end) of the batch, counted row by row and image
// by image; ends are exclusive.
struct WinogradBlock {
    int64_t tile_begin, tile_end;
    int64_t panel_begin, panel_end;
};

// Scratch memory of `tiles` tiles: inputs as [tap][block of words][tile][16], products as
// [tap][tile][products].
struct WinogradScratch {
    int64_t input_tap, product_tap;  // words
    int64_t inputs, products;        // words of all taps
    int64_t runs;                    // of a tile's product, listed behind them
    int64_t bytes() const {
        return (inputs + products) * int64_t{sizeof(float)} + runs * int64_t{sizeof(TileRun)};
    }
};

// One line more than whole pages: the taps of a tile would otherwise share a set of the L1 cache.
inline int64_t apart(int64_t words) {
    constexpr int64_t kPage = 1024, kLine = 16;
    return (words + kPage - 1) / kPage * kPage + kLine;
}

inline WinogradScratch winograd_scratch(int64_t words, int64_t taps, int64_t tiles) {
    WinogradScratch w;
    w.input_tap = apart((words + kBlock - 1) / kBlock * tiles * kBlock);
    w.product_tap = apart(tiles * 2 * kConvPanel);
    w.inputs = taps * w.input_tap;
    w.products = taps * w.product_tap;
    w.runs = (words + kBlock - 1) / kBlock;
    return w;
}
#endif

namespace CVFAST_ISA_NAMESPACE {

// F(2, 3), interpolation points 0, 1, -1, infinity.
struct F2 {
    static constexpr int kOut = 2;
    static constexpr int kIn = 4;

    static CVFAST_INLINE void input(const Vec (&d)[kIn], Vec (&v)[kIn]) {
        v[0] = sub(d[0], d[2]);
        v[1] = add(d[1], d[2]);
        v[2] = sub(d[2], d[1]);
        v[3] = sub(d[1], d[3]);
    }
    static CVFAST_INLINE void output(const Vec (&m)[kIn], Vec (&y)[kOut]) {
        y[0] = add(add(m[0], m[1]), m[2]);
        y[1] = sub(sub(m[1], m[2]), m[3]);
    }
    // Back from the transformed kernel: g = kInverse u.
    static constexpr float kInverse[3][kIn] = {{1, 0, 0, 0}, {0, 1, -1, 0}, {0, 0, 0, 1}};
};

// F(4, 3), interpolation points 0, a, -a, b, -b, infinity. With a = 5/8 and b = 3/2 the root mean
// square error of F(4x4, 3x3) is 0.45 times that of the usual 1 and 2 (on 128 channels).
struct F4 {
    static constexpr int kOut = 4;
    static constexpr int kIn = 6;
    static constexpr float a = 0.625f, b = 1.5f;
    static constexpr float aa = a * a, bb = b * b;

    static CVFAST_INLINE void input(const Vec (&d)[kIn], Vec (&v)[kIn]) {
        const Vec product = set1(aa * bb), sum = set1(-(aa + bb));
        v[0] = fma(product, d[0], fma(sum, d[2], d[4]));
        v[5] = fma(product, d[1], fma(sum, d[3], d[5]));
        const Vec even_a = fma(set1(-bb), d[2], d[4]), odd_a = fma(set1(-bb), d[1], d[3]);
        const Vec even_b = fma(set1(-aa), d[2], d[4]), odd_b = fma(set1(-aa), d[1], d[3]);
        v[1] = fma(set1(a), odd_a, even_a);
        v[2] = fma(set1(-a), odd_a, even_a);
        v[3] = fma(set1(b), odd_b, even_b);
        v[4] = fma(set1(-b), odd_b, even_b);
    }
    static CVFAST_INLINE void output(const Vec (&m)[kIn], Vec (&y)[kOut]) {
        const Vec even_a = add(m[1], m[2]), odd_a = mul(set1(a), sub(m[1], m[2]));
        const Vec even_b = add(m[3], m[4]), odd_b = mul(set1(b), sub(m[3], m[4]));
        y[0] = add(add(m[0], even_a), even_b);
        y[1] = add(odd_a, odd_b);
        y[2] = fma(set1(aa), even_a, mul(set1(bb), even_b));
        y[3] = fma(set1(aa), odd_a, fma(set1(bb), odd_b, m[5]));
    }
    // u[1] - u[2] = 2 a g[1] / n, with n = 2 aa (aa - bb).
    static constexpr float kInverse[3][kIn] = {
        {aa * bb, 0, 0, 0, 0, 0}, {0, a * (aa - bb), a * (bb - aa), 0, 0, 0}, {0, 0, 0, 0, 0, 1}};
};

// The source of one channel block: which tensor, and from which channel.
template <class T>
struct BlockSource {
    const T* x;  // channel 0 of the block, at pixel 0 of row 0 of image 0
    ImageStrides strides;
    int channels;
};

template <class T>
CVFAST_INLINE BlockSource<T> block_source(const ConvShape& s, const ConvOperands<T>& o,
                                          int64_t block) {
    const int64_t c = block * kBlock;
    const int channels = static_cast<int>(std::min<int64_t>(kBlock, s.in_channels - c));
    if (c < s.x_channels) return {o.x + c, s.x, channels};
    return {o.x2 + (c - s.x_channels), s.x2, channels};
}

// Adds bias and residual to sums of one pixel, activates and stores: `n` channels of one vector.
template <class T>
CVFAST_INLINE void finish(Vec sum, Vec bias, const T* residual, T* out, int n,
                          Activation activation) {
    sum = add(sum, bias);
    if (n == kLanes) {
        if (residual) sum = add(sum, load(residual));
        store(out, activate(sum, activation));
    } else {
        if (residual) sum = add(sum, load_n(residual, n));
        store_n(out, activate(sum, activation), n);
    }
}

struct TilePosition {
    int64_t image, y, x;
};

// Where tiles lie; steps from one to the next.
struct TileWalk {
    int64_t down, across;
    TilePosition at;

    TileWalk(const ConvShape& s, int64_t height, int64_t width, int64_t tile)
        : down((s.out_height + height - 1) / height), across((s.out_width + width - 1) / width) {
        at = {tile / across / down, tile / across % down, tile % across};
    }
    void next() {
        if (++at.x < across) return;
        at.x = 0;
        if (++at.y < down) return;
        at.y = 0;
        ++at.image;
    }
};

// Loads one column of a tile's input and transforms it. Rows [row_begin, row_end) lie in the image.
template <class R, class T, bool kPartial>
CVFAST_INLINE void input_column(const T* x, int64_t row, int row_begin, int row_end, bool inside,
                                int n, Vec (&v)[R::kIn]) {
    Vec d[R::kIn];
    CVFAST_UNROLL for (int i = 0; i < R::kIn; ++i) {
        if (inside && i >= row_begin && i < row_end) {
            if constexpr (kPartial) {
                d[i] = load_n(x + i * row, n);
            } else {
                d[i] = load(x + i * row);
            }
        } else {
            d[i] = set1(0.f);
        }
    }
    R::input(d, v);
}

// Columns between the one that is transformed and the one that is asked for: rows of large images
// are far apart. One thread, bfloat16: 64 channels of 256x256 take 0.95 of the time, small images
// 0.99.
inline constexpr int kColumnsAhead = 12;

// Transforms `tiles` neighbouring tiles of one row, of one vector of channels. Tiles overlap by two
// columns, which are transformed once.
template <class R, class C, class W, class T, bool kPartial>
void input_row(const ConvShape& s, const T* x, const ImageStrides& strides, TilePosition at,
               int64_t tiles, int n, W* to, int64_t tap) {
    const int64_t y = at.y * R::kOut - s.pad_top;
    int64_t column = at.x * C::kOut - s.pad_left;
    const int row_begin = static_cast<int>(std::clamp<int64_t>(-y, 0, R::kIn));
    const int row_end = static_cast<int>(std::clamp<int64_t>(s.height - y, row_begin, R::kIn));
    x += at.image * strides.image + y * strides.row;
    Vec columns[C::kIn][R::kIn];
    const auto read = [&](int i) {
        const int64_t at_column = column + i;
        const bool inside = at_column >= 0 && at_column < s.width;
        const T* p = x + at_column * strides.pixel;
        if (row_begin == 0 && row_end == R::kIn && inside) {
            CVFAST_UNROLL for (int r = 0; r < R::kIn; ++r) {
                __builtin_prefetch(p + r * strides.row + kColumnsAhead * strides.pixel);
            }
            input_column<R, T, kPartial>(p, strides.row, 0, R::kIn, true, n, columns[i]);
        } else {
            input_column<R, T, kPartial>(p, strides.row, row_begin, row_end, inside, n, columns[i]);
        }
    };
    constexpr int kShared = C::kIn - C::kOut;
    CVFAST_UNROLL for (int i = 0; i < kShared; ++i) read(i);
    for (int64_t t = 0; t < tiles; ++t, column += C::kOut, to += kBlock * kConvWord<W>) {
        CVFAST_UNROLL for (int i = kShared; i < C::kIn; ++i) read(i);
        CVFAST_UNROLL for (int i = 0; i < R::kIn; ++i) {
            Vec line[C::kIn], v[C::kIn];
            CVFAST_UNROLL for (int j = 0; j < C::kIn; ++j) line[j] = columns[j][i];
            C::input(line, v);
            CVFAST_UNROLL for (int j = 0; j < C::kIn; ++j) store(to + (i * C::kIn + j) * tap, v[j]);
        }
        CVFAST_UNROLL for (int i = 0; i < kShared; ++i) {
            CVFAST_UNROLL for (int j = 0; j < R::kIn; ++j) {
                columns[i][j] = columns[i + C::kOut][j];
            }
        }
    }
}

// `tap`: elements of W from one to the next.
template <class R, class C, class W, class T>
void transform_inputs(const ConvShape& s, const ConvOperands<T>& o, const WinogradBlock& b,
                      W* inputs, int64_t tap) {
    constexpr int64_t kWord = kConvWord<W>;
    const int64_t tiles = b.tile_end - b.tile_begin;
    const int64_t blocks = (s.in_channels + kBlock - 1) / kBlock;
    for (int64_t block = 0; block < blocks; ++block) {
        const BlockSource<T> source = block_source(s, o, block);
        for (int c = 0; c < source.channels; c += kLanes) {
            const int n = std::min(kLanes, source.channels - c);
            W* to = inputs + (block / kWord * tiles * kWord + block % kWord) * kBlock + c;
            TileWalk walk(s, R::kOut, C::kOut, b.tile_begin);
            for (int64_t t = 0; t < tiles;) {
                const int64_t run = std::min(tiles - t, walk.across - walk.at.x);
                if (n == kLanes) {
                    input_row<R, C, W, T, false>(s, source.x + c, source.strides, walk.at, run, n,
                                                 to + t * kBlock * kWord, tap);
                } else {
                    input_row<R, C, W, T, true>(s, source.x + c, source.strides, walk.at, run, n,
                                                to + t * kBlock * kWord, tap);
                }
                t += run;
                walk.at.x += run - 1;
                walk.next();
            }
        }
    }
}

// Two neighbouring channels of a pixel as one word; the second is zero if there is only one.
CVFAST_INLINE Vec broadcast_pair(const BFloat16* p, bool both) {
    const uint32_t bits = p[0].bits | (both ? uint32_t{p[1].bits} << 16 : 0);
    return set1(__builtin_bit_cast(float, bits));
}

// One output pixel of one vector of channels as the direct sum, on the kernel that the transformed
// one gives back or, in pairs, that lies behind it. Where an input is not finite, or a transform
// overflowed: the transforms mix the pixels of a tile, and infinity minus infinity is NaN.
template <class R, class C, class W, class T>
__attribute__((noinline)) Vec direct_pixel(const ConvShape& s, const ConvOperands<T>& o,
                                           int64_t image, int64_t row, int64_t column,
                                           const float* u) {
    const int64_t words = conv_words<W>(s.in_channels);
    Vec sum = set1(0.f);
    for (int r = 0; r < 3; ++r) {
        const int64_t y = row + r - s.pad_top;
        if (y < 0 || y >= s.height) continue;
        for (int k = 0; k < 3; ++k) {
            const int64_t x = column + k - s.pad_left;
            if (x < 0 || x >= s.width) continue;
            for (int64_t word = 0; word < words; ++word) {
                const int64_t c = word * kConvWord<W>;
                const bool first = c < s.x_channels;
                const ImageStrides& strides = first ? s.x : s.x2;
                const T* p = first ? o.x + c : o.x2 + (c - s.x_channels);
                p += image * strides.image + y * strides.row + x * strides.pixel;
                if constexpr (kConvWord<W> == 2) {
                    const int64_t at = (R::kIn * C::kIn + 3 * r + k) * words + word;
                    const Vec pair = broadcast_pair(p, c + 1 < s.in_channels);
                    sum = dot_pairs(pair, load(u + at * kConvPanel), sum);
                    continue;
                }
                Vec weight = set1(0.f);
                for (int i = 0; i < R::kIn; ++i) {
                    for (int j = 0; j < C::kIn; ++j) {
                        const float factor = R::kInverse[r][i] * C::kInverse[k][j];
                        if (factor == 0) continue;
                        const int64_t at = (i * C::kIn + j) * words + word;
                        weight = fma(set1(factor), load(u + at * kConvPanel), weight);
                    }
                }
                sum = fma(set1(to_float(*p)), weight, sum);
            }
        }
    }
    return sum;
}

// Rows of a panel of weights before that of the bias.
template <class R, class C, class W>
int64_t weight_rows(const ConvShape& s) {
    return (R::kIn * C::kIn + kWinogradKept<W>)*conv_words<W>(s.in_channels);
}

// Transforms the products of one panel back, and finishes and stores its outputs.
template <class R, class C, class W, class T>
void transform_outputs(const ConvShape& s, const ConvOperands<T>& o, const WinogradBlock& b,
                       int64_t panel, const float* products, int64_t tap) {
    const int64_t rows = weight_rows<R, C, W>(s);
    const float* weights = o.packed + panel * (rows + 1) * kConvPanel;
    const int64_t first = panel * kConvPanel;
    const int lanes = static_cast<int>(std::min<int64_t>(kConvPanel, s.out_channels - first));
    for (int c = 0; c < lanes; c += kLanes) {
        const int n = std::min(kLanes, lanes - c);
        const Vec bias = load(weights + rows * kConvPanel + c);
        const float* from = products + c;
        TileWalk walk(s, R::kOut, C::kOut, b.tile_begin);
        for (int64_t t = b.tile_begin; t < b.tile_end;
             ++t, walk.next(), from += kTilePanels * kConvPanel) {
            Vec half[R::kIn][C::kOut], y[R::kOut][C::kOut];
            CVFAST_UNROLL for (int i = 0; i < R::kIn; ++i) {
                Vec m[C::kIn];
                CVFAST_UNROLL for (int j = 0; j < C::kIn; ++j) {
                    m[j] = load(from + (i * C::kIn + j) * tap);
                }
                C::output(m, half[i]);
            }
            Vec sum = set1(0.f);
            CVFAST_UNROLL for (int j = 0; j < C::kOut; ++j) {
                Vec m[R::kIn], column[R::kOut];
                CVFAST_UNROLL for (int i = 0; i < R::kIn; ++i) m[i] = half[i][j];
                R::output(m, column);
                CVFAST_UNROLL for (int i = 0; i < R::kOut; ++i) {
                    y[i][j] = column[i];
                    sum = add(sum, column[i]);
                }
            }
            const bool finite = all_finite(sum);
            const int64_t image = walk.at.image;
            const int64_t row = walk.at.y * R::kOut, column = walk.at.x * C::kOut;
            const int64_t height = std::min<int64_t>(R::kOut, s.out_height - row);
            const int64_t width = std::min<int64_t>(C::kOut, s.out_width - column);
            T* out =
                o.out + image * s.out.image + row * s.out.row + column * s.out.pixel + first + c;
            const T* residual = o.residual
                                    ? o.residual + image * s.residual.image + row * s.residual.row +
                                          column * s.residual.pixel + first + c
                                    : nullptr;
            CVFAST_UNROLL for (int i = 0; i < R::kOut; ++i) {
                if (i >= height) break;
                CVFAST_UNROLL for (int j = 0; j < C::kOut; ++j) {
                    if (j >= width) break;
                    if (!finite) [[unlikely]] {
                        y[i][j] =
                            direct_pixel<R, C, W>(s, o, image, row + i, column + j, weights + c);
                    }
                    finish(
                        y[i][j], bias,
                        residual ? residual + i * s.residual.row + j * s.residual.pixel : nullptr,
                        out + i * s.out.row + j * s.out.pixel, n, s.activation);
                }
            }
        }
    }
}

template <class R, class C, class W, class T>
void winograd_block(const ConvShape& s, const ConvOperands<T>& o, const WinogradBlock& b,
                    void* scratch) {
    constexpr int kTaps = R::kIn * C::kIn;
    const int64_t tiles = b.tile_end - b.tile_begin, words = conv_words<W>(s.in_channels);
    const WinogradScratch w = winograd_scratch(words, kTaps, tiles);
    float* inputs = static_cast<float*>(scratch);
    float* products = inputs + w.inputs;
    auto* runs = reinterpret_cast<TileRun*>(products + w.products);
    for (int64_t i = 0; i < w.runs; ++i) {
        runs[i] = {i * tiles * kBlock, i * kBlock * kConvPanel,
                   std::min<int64_t>(kBlock, words - i * kBlock)};
    }
    transform_inputs<R, C>(s, o, b, static_cast<W*>(scratch), w.input_tap * kConvWord<W>);

    TileProduct<W> t{};
    t.pixel = kBlock;
    t.runs = runs;
    t.run_count = w.runs;
    t.b_row = kConvPanel;
    t.panel = (weight_rows<R, C, W>(s) + 1) * kConvPanel;
    TileResult<float> result{};
    result.out_pixel = kTilePanels * kConvPanel;
    const int64_t parts = (tiles + kTilePixels - 1) / kTilePixels;
    for (int64_t panel = b.panel_begin; panel < b.panel_end; panel += kTilePanels) {
        const int64_t panels = std::min<int64_t>(kTilePanels, b.panel_end - panel);
        const bool last = panel + panels == b.panel_end;
        result.channels = panels * kConvPanel;
        for (int tap = 0; tap < kTaps; ++tap) {
            t.b = o.packed + panel * t.panel + tap * words * kConvPanel;
            const float* after = last ? nullptr : o.packed + (panel + panels) * t.panel;
            t.fetch_ahead(tap + 1 < kTaps ? t.b + words * kConvPanel : after, parts);
            for (int64_t part = 0; part < parts; ++part) {
                // Parts of almost equal height: a rest of one would run at a low rate.
                const int64_t begin = part * tiles / parts;
                t.a[0] = inputs + tap * w.input_tap + begin * kBlock;
                result.out[0] = products + tap * w.product_tap + begin * result.out_pixel;
                tile_product<1>((part + 1) * tiles / parts - begin, t, result);
            }
        }
        for (int64_t i = 0; i < panels; ++i) {
            transform_outputs<R, C, W>(s, o, b, panel + i, products + i * kConvPanel,
                                       w.product_tap);
        }
    }
}

template <class T>
void winograd_f2_block(const ConvShape& s, const ConvOperands<T>& o, const WinogradBlock& b,
                       void* scratch) {
    winograd_block<F2, F2, float>(s, o, b, scratch);
}

template <class T>
void winograd_f2x4_block(const ConvShape& s, const ConvOperands<T>& o, const WinogradBlock& b,
                         void* scratch) {
    winograd_block<F2, F4, float>(s, o, b, scratch);
}

template <class T>
void winograd_f4_block(const ConvShape& s, const ConvOperands<T>& o, const WinogradBlock& b,
                       void* scratch) {
    winograd_block<F4, F4, float>(s, o, b, scratch);
}

inline void winograd_f2_bf16_block(const ConvShape& s, const ConvOperands<BFloat16>& o,
                                   const WinogradBlock& b, void* scratch) {
    winograd_block<F2, F2, BFloat16>(s, o, b, scratch);
}

}  // namespace CVFAST_ISA_NAMESPACE
}  // namespace cvfast
