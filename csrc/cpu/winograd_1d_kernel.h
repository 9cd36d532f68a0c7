// Winograd convolution of kernels of one column at stride 1, along that column; compiled once per
// instruction-set level by foreach_isa.h. Kernels of one row come as columns of transposed images.
//
// Six interpolation points give m outputs of r taps, m + r = 7. A kernel of more taps is a sum of
// groups m taps apart, so that the six rows which a tile of outputs reads with one group are those
// which the tile above reads with the next: they are transformed once. Each of the six transformed
// outputs is a matrix product over groups and channels.

#include "cpu/winograd_kernel.h"

namespace cvfast {

#ifndef CVFAST_WINOGRAD_1D_BLOCK
#define CVFAST_WINOGRAD_1D_BLOCK
// What one task computes: tiles [tile_begin, tile_end) of the columns [line_begin, line_end),
// counted image by image; ends are exclusive.
struct Winograd1dBlock {
    int64_t line_begin, line_end;
    int64_t tile_begin, tile_end;
    int64_t panel_begin, panel_end;
};

// Scratch memory of a block: inputs as [tap][channel block][tile][line][16], products as
// [tap][tile][line][products].
struct Winograd1dScratch {
    int64_t input_tap, product_tap;  // floats
    int64_t runs;                    // of a product, listed behind them
    int64_t inputs() const { return kWinograd1dPoints * input_tap; }
    int64_t products() const { return kWinograd1dPoints * product_tap; }
    int64_t bytes() const {
        return (inputs() + products()) * int64_t{sizeof(float)} + runs * int64_t{sizeof(TileRun)};
    }
};

inline Winograd1dScratch winograd_1d_scratch(const ConvShape& s, int64_t lines, int64_t tiles) {
    const int64_t blocks = (s.in_channels + kBlock - 1) / kBlock;
    const int64_t groups = winograd_1d_groups(s.kernel_h);
    Winograd1dScratch w;
    w.input_tap = apart(blocks * (tiles + groups - 1) * lines * kBlock);
    w.product_tap = apart(tiles * lines * 2 * kConvPanel);
    w.runs = groups * blocks;
    return w;
}
#endif

namespace CVFAST_ISA_NAMESPACE {

// Back from the transformed kernel: g = kBack u, of a group of three, four or five taps.
template <int kTaps>
struct Back;
template <>
struct Back<3> : F4 {
    static constexpr float kBack[3][kIn] = {
        {aa * bb}, {0, a * (aa - bb), a * (bb - aa)}, {0, 0, 0, 0, 0, 1}};
};
template <>
struct Back<4> : F4 {
    static constexpr float kBack[4][kIn] = {{aa * bb},
                                            {0, a * (aa - bb), a * (bb - aa), 0, 0, -aa},
                                            {-bb, aa - bb, aa - bb},
                                            {0, 0, 0, 0, 0, 1}};
};
template <>
struct Back<5> : F4 {
    static constexpr float kBack[5][kIn] = {{aa * bb},
                                            {0, -a * bb, a * bb, -aa * b, aa * b},
                                            {-bb, aa - bb, aa - bb, 0, 0, -aa},
                                            {0, a, -a, b, -b},
                                            {0, 0, 0, 0, 0, 1}};
};

// Products of a sum at most: the rounding error of a sum grows with its length.
inline constexpr int64_t kLongestSum = 192;

// Where a column begins; steps from one to the next.
struct LineWalk {
    int64_t columns, image, column;

    LineWalk(const ConvShape& s, int64_t line)
        : columns(s.out_width), image(line / columns), column(line % columns) {}
    void next() {
        if (++column < columns) return;
        column = 0;
        ++image;
    }
};

// Transforms six rows of neighbouring columns, of one vector of channels.
template <class T, bool kPartial>
void transform_rows(const ConvShape& s, const T* x, const ImageStrides& strides, int64_t row,
                    LineWalk walk, int64_t lines, int n, float* to, int64_t tap) {
    const int begin = static_cast<int>(std::clamp<int64_t>(-row, 0, F4::kIn));
    const int end = static_cast<int>(std::clamp<int64_t>(s.height - row, begin, F4::kIn));
    for (; lines > 0; --lines, walk.next(), to += kBlock) {
        const int64_t column = walk.column - s.pad_left;
        const bool inside = column >= 0 && column < s.width;
        const T* p = x + walk.image * strides.image + row * strides.row + column * strides.pixel;
        Vec v[F4::kIn];
        if (begin == 0 && end == F4::kIn && inside) {
            input_column<F4, T, kPartial>(p, strides.row, 0, F4::kIn, true, n, v);
        } else {
            input_column<F4, T, kPartial>(p, strides.row, begin, end, inside, n, v);
        }
        CVFAST_UNROLL for (int i = 0; i < F4::kIn; ++i) store(to + i * tap, v[i]);
    }
}

template <class T>
void transform_lines(const ConvShape& s, const ConvOperands<T>& o, const Winograd1dBlock& b,
                     int64_t tap, float* to) {
    const int64_t tile_end = b.tile_end + winograd_1d_groups(s.kernel_h) - 1;
    const int64_t lines = b.line_end - b.line_begin;
    const LineWalk walk(s, b.line_begin);
    for (int64_t block = 0; block * kBlock < s.in_channels; ++block) {
        const BlockSource<T> source = block_source(s, o, block);
        for (int64_t tile = b.tile_begin; tile < tile_end; ++tile, to += lines * kBlock) {
            const int64_t row = tile * winograd_1d_outputs(s.kernel_h) - s.pad_top;
            for (int c = 0; c < source.channels; c += kLanes) {
                if (const int n = source.channels - c; n >= kLanes) {
                    transform_rows<T, false>(s, source.x + c, source.strides, row, walk, lines,
                                             kLanes, to + c, tap);
                } else {
                    transform_rows<T, true>(s, source.x + c, source.strides, row, walk, lines, n,
                                            to + c, tap);
                }
            }
        }
    }
}

// One output pixel of one vector of channels as the direct sum, on the kernel that the transformed
// one gives back. Where an input is not finite, or a transform overflowed.
template <int kOut, class T>
__attribute__((noinline)) Vec direct_line_pixel(const ConvShape& s, const ConvOperands<T>& o,
                                                int64_t image, int64_t row, int64_t column,
                                                const float* u) {
    constexpr auto& kBack = Back<7 - kOut>::kBack;
    const int64_t groups = winograd_1d_groups(s.kernel_h), x = column - s.pad_left;
    float sums[kLanes] = {};
    for (int64_t r = 0; r < s.kernel_h; ++r) {
        const int64_t y = row + r - s.pad_top;
        if (x < 0 || x >= s.width || y < 0 || y >= s.height) continue;
        const int64_t group = std::min(r / kOut, groups - 1), tap = r - group * kOut;
        for (int64_t c = 0; c < s.in_channels; ++c) {
            const bool first = c < s.x_channels;
            const ImageStrides& strides = first ? s.x : s.x2;
            const T* p = first ? o.x + c : o.x2 + (c - s.x_channels);
            p += image * strides.image + y * strides.row + x * strides.pixel;
            for (int lane = 0; lane < kLanes; ++lane) {
                double weight = 0, magnitude = 0;
                for (int i = 0; i < F4::kIn; ++i) {
                    const int64_t at = (i * groups + group) * s.in_channels + c;
                    const double term = double(kBack[tap][i]) * u[at * kConvPanel + lane];
                    weight += term;
                    magnitude += term < 0 ? -term : term;
                }
                // Infinity times zero is NaN: what rounding made of a zero has to be one again.
                const bool rounding = (weight < 0 ? -weight : weight) < magnitude * 0x1p-22;
                sums[lane] += to_float(*p) * (rounding ? 0.f : static_cast<float>(weight));
            }
        }
    }
    return load(sums);
}

// Transforms the products of one or two panels back, and finishes and stores their outputs.
template <int kOut, class T>
void finish_lines(const ConvShape& s, const ConvOperands<T>& o, const Winograd1dBlock& b,
                  int64_t panel, int64_t panels, const float* products, int64_t tap) {
    const int64_t rows = winograd_1d_entries(s.kernel_h) * s.in_channels;
    const float* weights = o.packed + panel * (rows + 1) * kConvPanel;
    const int64_t first = panel * kConvPanel;
    const int lanes =
        static_cast<int>(std::min<int64_t>(panels * kConvPanel, s.out_channels - first));
    for (int64_t tile = b.tile_begin; tile < b.tile_end; ++tile) {
        const int64_t row = tile * kOut;
        const int64_t height = std::min<int64_t>(kOut, s.out_height - row);
        LineWalk walk(s, b.line_begin);
        for (int64_t line = b.line_begin; line < b.line_end;
             ++line, walk.next(), products += kTilePanels * kConvPanel) {
            T* out = o.out + walk.image * s.out.image + row * s.out.row +
                     walk.column * s.out.pixel + first;
            const T* residual = o.residual ? o.residual + walk.image * s.residual.image +
                                                 row * s.residual.row +
                                                 walk.column * s.residual.pixel + first
                                           : nullptr;
            for (int c = 0; c < lanes; c += kLanes) {
                Vec m[F4::kIn], y[F4::kOut];
                CVFAST_UNROLL for (int i = 0; i < F4::kIn; ++i) m[i] = load(products + i * tap + c);
                const Vec at_infinity = m[F4::kIn - 1];
                m[F4::kIn - 1] = set1(0.f);
                F4::output(m, y);
                y[kOut - 1] = add(y[kOut - 1], at_infinity);
                Vec sum = y[0];
                CVFAST_UNROLL for (int j = 1; j < kOut; ++j) sum = add(sum, y[j]);
                const bool finite = all_finite(sum);
                const float* u =
                    weights + c / kConvPanel * (rows + 1) * kConvPanel + c % kConvPanel;
                const Vec bias = load(u + rows * kConvPanel);
                CVFAST_UNROLL for (int j = 0; j < kOut; ++j) {
                    if (j >= height) break;
                    if (!finite) [[unlikely]] {
                        y[j] = direct_line_pixel<kOut>(s, o, walk.image, row + j, walk.column, u);
                    }
                    finish(y[j], bias, residual ? residual + j * s.residual.row + c : nullptr,
                           out + j * s.out.row + c, std::min(kLanes, lanes - c), s.activation);
                }
            }
        }
    }
}

template <class T>
void winograd_1d_block(const ConvShape& s, const ConvOperands<T>& o, const Winograd1dBlock& b,
                       void* scratch) {
    const int64_t lines = b.line_end - b.line_begin, tiles = b.tile_end - b.tile_begin;
    const int64_t pixels = tiles * lines, groups = winograd_1d_groups(s.kernel_h);
    const Winograd1dScratch w = winograd_1d_scratch(s, lines, tiles);
    float* inputs = static_cast<float*>(scratch);
    float* products = inputs + w.inputs();
    auto* runs = reinterpret_cast<TileRun*>(products + w.products());
    for (int64_t group = 0, i = 0; group < groups; ++group) {
        for (int64_t c = 0; c < s.in_channels; c += kBlock, ++i) {
            runs[i] = {(c / kBlock * (tiles + groups - 1) + group) * lines * kBlock,
                       (group * s.in_channels + c) * kConvPanel,
                       std::min<int64_t>(kBlock, s.in_channels - c)};
        }
    }
    transform_lines(s, o, b, w.input_tap, inputs);

    TileProduct<float> t{};
    t.pixel = kBlock;
    t.b_row = kConvPanel;
    t.panel = (winograd_1d_entries(s.kernel_h) * s.in_channels + 1) * kConvPanel;
    TileResult<float> result{};
    result.out_pixel = result.residual_pixel = kTilePanels * kConvPanel;
    const int64_t parts = (pixels + kTilePixels - 1) / kTilePixels;
    const int64_t passes = (w.runs * kBlock + kLongestSum - 1) / kLongestSum;
    for (int64_t panel = b.panel_begin; panel < b.panel_end; panel += kTilePanels) {
        const int64_t panels = std::min<int64_t>(kTilePanels, b.panel_end - panel);
        const bool last = panel + panels == b.panel_end;
        result.channels = panels * kConvPanel;
        for (int tap = 0; tap < kWinograd1dPoints; ++tap) {
            const int64_t rows_of_tap = groups * s.in_channels;
            t.b = o.packed + panel * t.panel + tap * rows_of_tap * kConvPanel;
            const float* after = last ? nullptr : o.packed + (panel + panels) * t.panel;
            const bool more = tap + 1 < kWinograd1dPoints;
            t.fetch_ahead(more ? t.b + rows_of_tap * kConvPanel : after, parts);
            // Of a group's taps the last meets infinity, and only the last group has that many.
            const int64_t absent = tap == kWinograd1dPoints - 1 ? w.runs - w.runs / groups : 0;
            const int64_t count = w.runs - absent;
            for (int64_t pass = 0; pass < passes; ++pass) {
                t.runs = runs + absent + pass * count / passes;
                t.run_count = (pass + 1) * count / passes - pass * count / passes;
                for (int64_t part = 0; part < parts; ++part) {
                    // Parts of almost equal height: a rest of one would run at a low rate.
                    const int64_t begin = part * pixels / parts;
                    t.a[0] = inputs + tap * w.input_tap + begin * kBlock;
                    result.out[0] = products + tap * w.product_tap + begin * result.out_pixel;
                    result.residual[0] = pass > 0 ? result.out[0] : nullptr;
                    tile_product<1>((part + 1) * pixels / parts - begin, t, result);
                }
            }
        }
        switch (winograd_1d_outputs(s.kernel_h)) {
            case 2:
                finish_lines<2>(s, o, b, panel, panels, products, w.product_tap);
                break;
            case 3:
                finish_lines<3>(s, o, b, panel, panels, products, w.product_tap);
                break;
            default:
                finish_lines<4>(s, o, b, panel, panels, products, w.product_tap);
        }
    }
}

}  // namespace CVFAST_ISA_NAMESPACE
}  // namespace cvfast
