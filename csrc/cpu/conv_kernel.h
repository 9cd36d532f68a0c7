// Direct convolution, compiled once per instruction-set level by foreach_isa.h.
//
// The input rows that a block of outputs reads are brought into scratch memory once, as float, with
// the padding's zeros and in the order that tiles read them; all output channels then read them
// from there. An element is copied once per block, not once per tap.

#include "cpu/tile_product.h"

namespace cvfast {

#ifndef CVFAST_CONV_BLOCK
#define CVFAST_CONV_BLOCK
// What one task computes; ends are exclusive.
struct ConvBlock {
    int64_t image_begin, image_end;
    int64_t row_begin, row_end;
    int64_t column_begin, column_end;
    int64_t panel_begin, panel_end;
};

// Scratch memory of a block: input rows as [row][channel block][phase][position][16]. Column u of
// the padded block is position u / stride of phase u % stride, so that neighbouring outputs read
// neighbouring positions at any stride.
struct PackedRows {
    int64_t positions;  // per phase
    int64_t block;      // floats, of one channel block of one row
    int64_t row;
    int64_t rows;  // per image
    int64_t floats() const { return row * rows; }
};

inline PackedRows packed_rows(const ConvShape& s, int64_t rows, int64_t columns) {
    PackedRows p;
    const int64_t width = (columns - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1;
    p.positions = (width + s.stride_w - 1) / s.stride_w;
    p.block = s.stride_w * p.positions * 16;
    p.row = (s.in_channels + 15) / 16 * p.block;
    p.rows = (rows - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
    return p;
}
#endif

namespace CVFAST_ISA_NAMESPACE {

inline void fill_zero(float* p, int64_t count) {
    std::memset(p, 0, static_cast<size_t>(count) * sizeof(float));
}

template <class T>
CVFAST_INLINE void pack_pixel(const T* x, int channels, float* packed) {
    CVFAST_UNROLL for (int v = 0; v < kPanelVectors; ++v) {
        const int n = channels - v * kLanes;
        if (n >= kLanes) {
            store(packed + v * kLanes, load(x + v * kLanes));
        } else if (n > 0) {
            store(packed + v * kLanes, load_n(x + v * kLanes, n));
        }
    }
}

template <class T>
void pack_image(const ConvShape& s, const ConvOperands<T>& o, const ConvBlock& b,
                const PackedRows& p, int64_t image, float* packed) {
    const int64_t blocks = (s.in_channels + kBlock - 1) / kBlock;
    const int64_t top = b.row_begin * s.stride_h - s.pad_top;
    const int64_t left = b.column_begin * s.stride_w - s.pad_left;
    for (int64_t i = 0; i < p.rows; ++i) {
        const int64_t y = top + i;
        for (int64_t block = 0; block < blocks; ++block, packed += p.block) {
            if (y < 0 || y >= s.height) {
                fill_zero(packed, p.block);
                continue;
            }
            const BlockSource<T> source = block_source(s, o, block);
            const T* row = source.x + image * source.strides.image + y * source.strides.row;
            for (int64_t phase = 0; phase < s.stride_w; ++phase) {
                float* to = packed + phase * p.positions * kBlock;
                // Positions [begin, end) lie in the image.
                const int64_t first = left + phase;
                const int64_t begin =
                    std::clamp((-first + s.stride_w - 1) / s.stride_w, int64_t{0}, p.positions);
                const int64_t end =
                    std::clamp((s.width - first + s.stride_w - 1) / s.stride_w, begin, p.positions);
                fill_zero(to, begin * kBlock);
                const T* x = row + (first + begin * s.stride_w) * source.strides.pixel;
                const int64_t pixel = s.stride_w * source.strides.pixel;
                if (source.channels == kBlock) {
                    for (int64_t q = begin; q < end; ++q, x += pixel) {
                        pack_pixel(x, kBlock, to + q * kBlock);
                    }
                } else {
                    for (int64_t q = begin; q < end; ++q, x += pixel) {
                        pack_pixel(x, source.channels, to + q * kBlock);
                    }
                }
                fill_zero(to + end * kBlock, (p.positions - end) * kBlock);
            }
        }
    }
}

// Bias, residual and activation of `pixels` neighbouring pixels, whose sums lie at `sums`.
template <class T>
void finish_pixels(const ConvShape& s, const ConvOperands<T>& o, const float* sums, int64_t image,
                   int64_t row, int64_t column, int64_t pixels, int64_t panel, int64_t panels) {
    const int64_t channel = panel * kConvPanel;
    const int64_t rows = s.kernel_h * s.kernel_w * s.in_channels;  // before that of the bias
    T* out = o.out + image * s.out.image + row * s.out.row + column * s.out.pixel + channel;
    const T* residual = o.residual ? o.residual + image * s.residual.image + row * s.residual.row +
                                         column * s.residual.pixel + channel
                                   : nullptr;
    for (int64_t c = 0; c < panels * kConvPanel && channel + c < s.out_channels; c += kLanes) {
        const int n = static_cast<int>(std::min<int64_t>(kLanes, s.out_channels - channel - c));
        const float* bias =
            o.packed + ((channel + c) / kConvPanel * (rows + 1) + rows) * kConvPanel;
        const Vec shift = load(bias + c % kConvPanel);
        for (int64_t p = 0; p < pixels; ++p) {
            finish(load(sums + p * kTilePanels * kConvPanel + c), shift,
                   residual ? residual + p * s.residual.pixel + c : nullptr,
                   out + p * s.out.pixel + c, n, s.activation);
        }
    }
}

template <class T>
void conv_block(const ConvShape& s, const ConvOperands<T>& o, const ConvBlock& b, void* scratch) {
    const int64_t columns = b.column_end - b.column_begin;
    const PackedRows p = packed_rows(s, b.row_end - b.row_begin, columns);
    const int64_t taps = s.kernel_h * s.kernel_w;

    float* sums = static_cast<float*>(scratch);
    auto* offsets = reinterpret_cast<int64_t*>(sums + kTilePixels * kTilePanels * kConvPanel);
    float* packed = reinterpret_cast<float*>(offsets + (taps + 7) / 8 * 8);
    for (int64_t r = 0, tap = 0; r < s.kernel_h; ++r) {
        for (int64_t k = 0; k < s.kernel_w; ++k, ++tap) {
            const int64_t u = k * s.dilation_w;
            offsets[tap] =
                r * s.dilation_h * p.row + (u % s.stride_w * p.positions + u / s.stride_w) * kBlock;
        }
    }
    for (int64_t image = b.image_begin; image < b.image_end; ++image) {
        pack_image(s, o, b, p, image, packed + (image - b.image_begin) * p.floats());
    }

    TileProduct t;
    t.taps = offsets;
    t.tap_count = taps;
    t.channels = s.in_channels;
    t.block = p.block;
    t.panel = (taps * s.in_channels + 1) * kConvPanel;
    t.out = sums;
    t.out_pixel = kTilePanels * kConvPanel;
    // Narrow images: a tile takes pixels of two rows.
    const bool pairs = 2 * columns <= kTilePixels;
    const int64_t tiles = (columns + kTilePixels - 1) / kTilePixels;
    for (int64_t panel = b.panel_begin; panel < b.panel_end; panel += kTilePanels) {
        const int64_t panels = std::min<int64_t>(kTilePanels, b.panel_end - panel);
        t.b = o.packed + panel * t.panel;
        for (int64_t image = b.image_begin; image < b.image_end; ++image) {
            const float* first = packed + (image - b.image_begin) * p.floats();
            for (int64_t row = b.row_begin; row < b.row_end; ++row) {
                t.a[0] = first + (row - b.row_begin) * s.stride_h * p.row;
                if (pairs && row + 1 < b.row_end) {
                    t.a[1] = t.a[0] + s.stride_h * p.row;
                    tile_product<2>(columns, panels, t);
                    finish_pixels(s, o, sums, image, row, b.column_begin, columns, panel, panels);
                    finish_pixels(s, o, sums + columns * t.out_pixel, image, row + 1,
                                  b.column_begin, columns, panel, panels);
                    ++row;
                    continue;
                }
                const float* a = t.a[0];
                for (int64_t tile = 0; tile < tiles; ++tile) {
                    // Tiles of almost equal width: a rest of one pixel would run at a low rate.
                    const int64_t begin = tile * columns / tiles;
                    const int64_t pixels = (tile + 1) * columns / tiles - begin;
                    t.a[0] = a + begin * kBlock;
                    tile_product<1>(pixels, panels, t);
                    finish_pixels(s, o, sums, image, row, b.column_begin + begin, pixels, panel,
                                  panels);
                }
            }
        }
    }
}

}  // namespace CVFAST_ISA_NAMESPACE
}  // namespace cvfast
