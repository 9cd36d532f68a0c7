// Direct convolution, compiled once per instruction-set level by foreach_isa.h.
//
// The input rows that a block of outputs reads are brought into scratch memory once, as 32-bit
// words (a float, or two channels of bfloat16), with the padding's zeros and in the order that
// tiles read them; all output channels then read them from there. An element is copied once per
// block, not once per tap. Taps whose row lies above or below the image are left out.

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

// Scratch memory of a block, in words: its input rows, in one of three orders.
//
// blocked   [row][channel block][phase][position][word of 16 channels]; column u of the padded
//           block is position u / stride of phase u % stride, so that neighbouring outputs read
//           neighbouring positions at any stride
// pixels    [row][column][channel], few channels: a kernel row's products lie in a run
// planes    [row][word][column], few channels of a source whose columns are adjacent; BFloat16 in
//           any layout: a run of pixels with an odd number of channels would end in half a word
enum class RowOrder { blocked, pixels, planes };

struct PackedRows {
    RowOrder order;
    int64_t columns;    // of the padded block
    int64_t positions;  // blocked: per phase
    int64_t pixel;      // from output to output
    int64_t block;      // blocked: from channel block to channel block
    int64_t row;
    int64_t rows;  // per image
    int64_t words() const { return row * rows; }
};

template <class T>
inline constexpr int64_t kBlockWords = kBlock / kConvWord<T>;

template <class T>
RowOrder row_order(const ConvShape& s) {
    if (!has_few_channels(s)) return RowOrder::blocked;
    return s.x_channel == 1 && kConvWord<T> == 1 ? RowOrder::pixels : RowOrder::planes;
}

template <class T>
PackedRows packed_rows(const ConvShape& s, int64_t rows, int64_t columns) {
    PackedRows p{};
    p.order = row_order<T>(s);
    p.columns = (columns - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1;
    p.rows = (rows - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
    if (p.order == RowOrder::blocked) {
        // An odd number: channel blocks a multiple of 4096 bytes apart would share an L1 set.
        p.positions = (p.columns + s.stride_w - 1) / s.stride_w | 1;
        p.pixel = kBlockWords<T>;
        p.block = s.stride_w * p.positions * kBlockWords<T>;
        p.row = (s.in_channels + kBlock - 1) / kBlock * p.block;
    } else {
        p.pixel = p.order == RowOrder::pixels ? s.stride_w * s.in_channels : s.stride_w;
        p.row = conv_words<T>(s.in_channels) * p.columns;
    }
    return p;
}

// Runs of the products of one output, per kernel row. Taps that are neighbours share a run.
template <class T>
int64_t runs_per_kernel_row(const ConvShape& s) {
    const RowOrder order = row_order<T>(s);
    if (order == RowOrder::blocked) return s.kernel_w * ((s.in_channels + kBlock - 1) / kBlock);
    const int64_t lines = order == RowOrder::planes ? conv_words<T>(s.in_channels) : 1;
    return lines * (s.dilation_w == 1 ? 1 : s.kernel_w);
}

template <class T>
int64_t run_list_bytes(const ConvShape& s) {
    const int64_t bytes = s.kernel_h * runs_per_kernel_row<T>(s) * int64_t{sizeof(TileRun)};
    return (bytes + 63) / 64 * 64;
}

// Scratch memory of a block for AMX: offsets of the runs, then the input rows, then the weights.
// Rows are in the order of outputs: [phase][row / stride], as many for each phase.
struct AmxRows {
    int64_t columns, rows;             // of the padded block, multiples of the strides
    int64_t pixel, row, image, piece;  // bytes
    int64_t run_count, runs_per_row, run_values;
    int64_t pieces;

    int64_t run_bytes() const { return (run_count * int64_t{sizeof(int64_t)} + 63) / 64 * 64; }
    int64_t bytes() const { return pieces * piece; }
};

template <class T>
AmxRows amx_rows(const ConvShape& s, int64_t images, int64_t out_rows, int64_t out_columns) {
    AmxRows p{};
    const auto padded = [](int64_t outputs, int64_t stride, int64_t kernel, int64_t dilation) {
        return (outputs - 1 + ((kernel - 1) * dilation + stride) / stride) * stride;
    };
    p.columns = padded(out_columns, s.stride_w, s.kernel_w, s.dilation_w);
    p.rows = padded(out_rows, s.stride_h, s.kernel_h, s.dilation_h);
    const int64_t channels = conv_words<T>(s.in_channels) * kConvWord<T>;
    p.pixel = channels * int64_t{sizeof(BFloat16)};
    p.row = p.columns * p.pixel;
    p.image = p.rows * p.row;
    p.pieces = kAmxPieces<T>;
    p.piece = (images * p.image + int64_t{sizeof(BFloat16)} + 63) / 64 * 64;
    p.runs_per_row = s.dilation_w == 1 ? 1 : s.kernel_w;
    p.run_count = s.kernel_h * p.runs_per_row;
    p.run_values = (s.dilation_w == 1 ? s.kernel_w : 1) * channels;
    return p;
}
#endif

namespace CVFAST_ISA_NAMESPACE {

inline void fill_zero(float* words, int64_t count) {
    std::memset(words, 0, static_cast<size_t>(count) * sizeof(float));
}

// Copies neighbouring elements, as float.
template <class T>
CVFAST_INLINE void copy(const T* x, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(to + i, load(x + i));
    if (i < count) {
        const int n = static_cast<int>(count - i);
        store_n(to + i, load_n(x + i, n), n);
    }
}

// Copies a pixel's channel block.
template <class T>
CVFAST_INLINE void pack_block(const T* x, float* to) {
    if constexpr (kConvWord<T> == 2) {
        std::memcpy(to, x, kBlock * sizeof(T));
    } else {
        CVFAST_UNROLL for (int v = 0; v < kBlock; v += kLanes) store(to + v, load(x + v));
    }
}

// Copies a pixel's last `n` channels, fewer than a block, and zeros behind them.
template <class T>
CVFAST_INLINE void pack_partial(const T* x, int n, float* to) {
    if constexpr (kConvWord<T> == 2) {
        T block[kBlock] = {};
        std::memcpy(block, x, static_cast<unsigned>(n) * sizeof(T));
        pack_block(block, to);
    } else {
        CVFAST_UNROLL for (int v = 0; v < kBlock; v += kLanes) {
            if (n - v >= kLanes) {
                store(to + v, load(x + v));
            } else {
                store(to + v, n > v ? load_n(x + v, n - v) : set1(0.f));
            }
        }
    }
}

// Packs channels [c, c + channels), those of one source, of one row; c is a multiple of 16. `x` is
// the source's pixel at the block's first column, which may lie left of the image.
template <class T>
void pack_blocked(const ConvShape& s, const PackedRows& p, const T* x, int64_t x_pixel, int64_t c,
                  int64_t channels, int64_t left, float* row) {
    row += c / kBlock * p.block;
    const int64_t blocks = (channels + kBlock - 1) / kBlock;
    for (int64_t phase = 0; phase < s.stride_w; ++phase, row += p.positions * p.pixel) {
        // Positions [begin, end) lie in the image.
        const int64_t first = left + phase;
        const int64_t begin =
            std::clamp((-first + s.stride_w - 1) / s.stride_w, int64_t{0}, p.positions);
        const int64_t end =
            std::clamp((s.width - first + s.stride_w - 1) / s.stride_w, begin, p.positions);
        for (int64_t block = 0; block < blocks; ++block) {
            fill_zero(row + block * p.block, begin * p.pixel);
            fill_zero(row + block * p.block + end * p.pixel, (p.positions - end) * p.pixel);
        }
        // Block by block: written in the order of memory, which matters more than reading so.
        for (int64_t block = 0; block < blocks; ++block) {
            const T* from = x + (phase + begin * s.stride_w) * x_pixel + block * kBlock;
            float* to = row + block * p.block + begin * p.pixel;
            const int64_t step = s.stride_w * x_pixel, n = channels - block * kBlock;
            if (n >= kBlock) {
                for (int64_t q = begin; q < end; ++q, from += step, to += kBlockWords<T>) {
                    pack_block(from, to);
                }
            } else {
                for (int64_t q = begin; q < end; ++q, from += step, to += kBlockWords<T>) {
                    pack_partial(from, static_cast<int>(n), to);
                }
            }
        }
    }
}

// Pairs of channels as planes. `high` may be null: zeros.
CVFAST_INLINE void pack_pairs(const BFloat16* low, const BFloat16* high, int64_t pixel,
                              int64_t count, float* to) {
    for (int64_t q = 0; q < count; ++q) {
        const uint32_t odd = high ? high[q * pixel].bits : 0;
        const uint32_t word = low[q * pixel].bits | odd << 16;
        std::memcpy(to + q, &word, sizeof word);
    }
}

inline void pack_few_channels(const ConvShape& s, const PackedRows& p, const BFloat16* x,
                              int64_t left, float* row) {
    const int64_t begin = std::clamp(-left, int64_t{0}, p.columns);
    const int64_t end = std::clamp(s.width - left, begin, p.columns);
    x += begin * s.x.pixel;
    for (int64_t c = 0; c < s.in_channels; c += 2, x += 2 * s.x_channel, row += p.columns) {
        const BFloat16* high = c + 1 < s.in_channels ? x + s.x_channel : nullptr;
        fill_zero(row, begin);
        if (s.x.pixel == 1) {  // a constant: the compiler uses vectors
            pack_pairs(x, high, 1, end - begin, row + begin);
        } else {
            pack_pairs(x, high, s.x.pixel, end - begin, row + begin);
        }
        fill_zero(row + end, p.columns - end);
    }
}

template <class T>
void pack_few_channels(const ConvShape& s, const PackedRows& p, const T* x, int64_t left,
                       float* row) {
    const int64_t begin = std::clamp(-left, int64_t{0}, p.columns);
    const int64_t end = std::clamp(s.width - left, begin, p.columns);
    const bool planes = p.order == RowOrder::planes;
    const int64_t lines = planes ? s.in_channels : 1;
    const int64_t each = planes ? 1 : s.in_channels;  // of a column
    x += begin * s.x.pixel;
    for (int64_t line = 0; line < lines; ++line, x += s.x_channel, row += p.columns * each) {
        fill_zero(row, begin * each);
        if (s.x.pixel == each) {
            copy(x, (end - begin) * each, row + begin * each);
        } else {
            for (int64_t q = begin; q < end; ++q) {
                copy(x + (q - begin) * s.x.pixel, each, row + q * each);
            }
        }
        fill_zero(row + end * each, (p.columns - end) * each);
    }
}

template <class T>
void pack_image(const ConvShape& s, const ConvOperands<T>& o, const ConvBlock& b,
                const PackedRows& p, int64_t image, float* packed) {
    const int64_t top = b.row_begin * s.stride_h - s.pad_top;
    const int64_t left = b.column_begin * s.stride_w - s.pad_left;
    const int64_t begin = std::max(-top, int64_t{0}), end = std::min(p.rows, s.height - top);
    for (int64_t i = begin; i < end; ++i) {
        const auto first = [&](const T* source, const ImageStrides& strides) {
            return source + image * strides.image + (top + i) * strides.row + left * strides.pixel;
        };
        float* row = packed + i * p.row;
        if (p.order != RowOrder::blocked) {
            pack_few_channels(s, p, first(o.x, s.x), left, row);
            continue;
        }
        pack_blocked(s, p, first(o.x, s.x), s.x.pixel, 0, s.x_channels, left, row);
        if (const int64_t more = s.in_channels - s.x_channels; more > 0) {
            pack_blocked(s, p, first(o.x2, s.x2), s.x2.pixel, s.x_channels, more, left, row);
        }
    }
}

// Lists the runs, kernel row by kernel row.
template <class T>
void list_runs(const ConvShape& s, const PackedRows& p, TileRun* run) {
    const int64_t words = conv_words<T>(s.in_channels);
    for (int64_t r = 0; r < s.kernel_h; ++r) {
        const int64_t a = r * s.dilation_h * p.row;
        const int64_t b = r * s.kernel_w * words * kConvPanel;
        if (p.order != RowOrder::blocked) {
            const bool planes = p.order == RowOrder::planes;
            const int64_t lines = planes ? words : 1, each = planes ? 1 : words;
            const int64_t taps = s.dilation_w == 1 ? s.kernel_w : 1;  // of a run
            for (int64_t line = 0; line < lines; ++line) {
                for (int64_t k = 0; k < s.kernel_w; k += taps) {
                    *run++ = {a + line * p.columns + k * s.dilation_w * each,
                              b + (k * words + line) * kConvPanel, taps * each};
                }
            }
        } else {
            for (int64_t k = 0; k < s.kernel_w; ++k) {
                const int64_t u = k * s.dilation_w;
                const int64_t at = (u % s.stride_w * p.positions + u / s.stride_w) * p.pixel;
                for (int64_t w = 0; w < words; w += kBlockWords<T>) {
                    *run++ = {a + at + w / kBlockWords<T> * p.block,
                              b + (k * words + w) * kConvPanel,
                              std::min(kBlockWords<T>, words - w)};
                }
            }
        }
    }
}

// Kernel rows [begin, end) lie in the image, for outputs of row `row`.
struct KernelRows {
    int64_t begin, end;
    bool operator==(const KernelRows&) const = default;
};

inline KernelRows kernel_rows(const ConvShape& s, int64_t row) {
    const int64_t top = row * s.stride_h - s.pad_top;
    const int64_t begin =
        std::clamp((-top + s.dilation_h - 1) / s.dilation_h, int64_t{0}, s.kernel_h);
    const int64_t end =
        std::clamp((s.height - top + s.dilation_h - 1) / s.dilation_h, begin, s.kernel_h);
    return {begin, end};
}

// Words that are summed one after another; the sums of such segments are added to each other. One
// long sum of 18900 float products had three times the error of PyTorch's; few outputs PyTorch sums
// in many lanes.
inline int64_t conv_segment(int64_t out_channels) { return out_channels <= 8 ? 64 : 512; }

template <class T>
void conv_block(const ConvShape& s, const ConvOperands<T>& o, const ConvBlock& b, void* scratch) {
    const int64_t columns = b.column_end - b.column_begin;
    const PackedRows p = packed_rows<T>(s, b.row_end - b.row_begin, columns);
    auto* runs = static_cast<TileRun*>(scratch);
    float* packed = reinterpret_cast<float*>(static_cast<char*>(scratch) + run_list_bytes<T>(s));
    list_runs<T>(s, p, runs);
    for (int64_t image = b.image_begin; image < b.image_end; ++image) {
        pack_image(s, o, b, p, image, packed + (image - b.image_begin) * p.words());
    }

    const int64_t words = conv_words<T>(s.in_channels);
    const int64_t rows_of_panel = s.kernel_h * s.kernel_w * words;  // before the bias
    TileProduct<T> t{};
    t.pixel = p.pixel;
    t.panel = (rows_of_panel + 1) * kConvPanel;
    t.b_row = (p.order == RowOrder::planes ? words : 1) * kConvPanel;
    TileResult<T> result{};
    result.residual_pixel = s.residual.pixel;
    result.out_pixel = s.out.pixel;
    result.activation = s.activation;
    const int64_t kernel_row_runs = runs_per_kernel_row<T>(s);
    const int64_t segment =
        std::max<int64_t>(1, conv_segment(s.out_channels) * kernel_row_runs / (s.kernel_w * words));
    alignas(64) float sums[kTilePixels * kTileVectors * kLanes];
    // Narrow images: a tile takes pixels of two rows.
    const bool pairs = 2 * columns <= kTilePixels;
    const int64_t tiles = (columns + kTilePixels - 1) / kTilePixels;
    const int64_t row_groups = (b.row_end - b.row_begin + pairs) / (1 + pairs);
    const int64_t tiles_of_panel = (b.image_end - b.image_begin) * row_groups * tiles;
    // Two register tiles' weights and the rows must have room.
    const int64_t held = (b.image_end - b.image_begin) * p.words() + 2 * kTilePanels * t.panel;
    const bool ahead = held * int64_t{sizeof(float)} <= l2_bytes();
    for (int64_t panel = b.panel_begin; panel < b.panel_end; panel += kTilePanels) {
        const int64_t panels = std::min<int64_t>(kTilePanels, b.panel_end - panel);
        const int64_t channel = panel * kConvPanel;
        t.b = o.packed + panel * t.panel;
        result.bias = t.b + rows_of_panel * kConvPanel;
        result.channels = std::min(panels * kConvPanel, s.out_channels - channel);
        const bool last = panel + panels == b.panel_end;
        t.fetch_ahead(ahead && !last ? t.b + panels * t.panel : nullptr, tiles_of_panel);
        for (int64_t image = b.image_begin; image < b.image_end; ++image) {
            for (int64_t row = b.row_begin; row < b.row_end; ++row) {
                const KernelRows kernel = kernel_rows(s, row);
                const TileRun* const first = runs + kernel.begin * kernel_row_runs;
                const TileRun* const last = runs + kernel.end * kernel_row_runs;
                const bool pair = pairs && row + 1 < b.row_end && kernel_rows(s, row + 1) == kernel;
                for (int64_t tile = 0; tile < tiles; ++tile) {
                    // Tiles of almost equal width: a rest of one pixel would run at a low rate.
                    const int64_t begin = tile * columns / tiles;
                    const int64_t pixels = (tile + 1) * columns / tiles - begin;
                    const int64_t column = b.column_begin + begin;
                    for (int g = 0; g <= pair; ++g) {
                        const int64_t y = row + g;
                        t.a[g] = packed + (image - b.image_begin) * p.words() +
                                 (y - b.row_begin) * s.stride_h * p.row + begin * p.pixel;
                        result.out[g] = o.out + image * s.out.image + y * s.out.row +
                                        column * s.out.pixel + channel;
                        if (o.residual) {
                            result.residual[g] = o.residual + image * s.residual.image +
                                                 y * s.residual.row + column * s.residual.pixel +
                                                 channel;
                        }
                    }
                    t.runs = first;
                    do {
                        t.run_count = std::min<int64_t>(segment, last - t.runs);
                        t.sums_before = t.runs == first ? nullptr : sums;
                        t.sums_after = t.runs + t.run_count == last ? nullptr : sums;
                        if (pair) {
                            tile_product<2>(pixels, t, result);
                        } else {
                            tile_product<1>(pixels, t, result);
                        }
                        t.runs += t.run_count;
                    } while (t.runs != last);
                }
                row += pair;
            }
        }
    }
}

}  // namespace CVFAST_ISA_NAMESPACE
}  // namespace cvfast

#if defined(CVFAST_HAS_AMX)
#include "cpu/conv_amx_kernel.h"
#endif
