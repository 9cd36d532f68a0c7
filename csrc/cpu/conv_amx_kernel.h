// Direct convolution by AMX, included by conv_kernel.h at the level that has it.
//
// The input rows of a block are brought into scratch memory as [row][column][channel] of bfloat16
// (float in three pieces), with the padding's zeros. There the products of a kernel row are a run
// of neighbouring words. Rows of one phase of the stride lie together, so that all outputs of an
// image can be one line of positions, of which those between the rows are computed and left out.

#include "cpu/amx_kernel.h"

namespace cvfast::CVFAST_ISA_NAMESPACE {

// Copies `count` neighbouring bfloat16 numbers.
CVFAST_INLINE void copy_values(const BFloat16* from, int64_t count, BFloat16* to) {
    constexpr int kWide = 2 * kLanes;
    int64_t i = 0;
    for (; i + kWide <= count; i += kWide) {
        _mm512_storeu_si512(to + i, _mm512_loadu_si512(from + i));
    }
    if (i < count) {
        const auto mask = static_cast<__mmask32>((uint64_t{1} << (count - i)) - 1);
        _mm512_mask_storeu_epi16(to + i, mask, _mm512_maskz_loadu_epi16(mask, from + i));
    }
}

// Columns of which each has two words, 16 columns at a time. A plane that is null is zero.
inline void interleave_words(const BFloat16* const (&planes)[4], int64_t columns, BFloat16* to) {
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    for (int64_t i = 0; i < columns; i += kLanes) {
        const auto mask = static_cast<__mmask16>((1u << std::min<int64_t>(16, columns - i)) - 1);
        __m512i words[2];
        for (int w = 0; w < 2; ++w) {
            __m512i low = _mm512_setzero_si512(), high = low;
            if (planes[2 * w]) {
                low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, planes[2 * w] + i));
            }
            if (planes[2 * w + 1]) {
                high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, planes[2 * w + 1] + i));
            }
            words[w] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        }
        const int64_t left = 2 * (columns - i);
        const auto of_first = static_cast<__mmask16>((1u << std::min<int64_t>(16, left)) - 1);
        const auto of_second =
            static_cast<__mmask16>((1u << std::clamp<int64_t>(left - 16, 0, 16)) - 1);
        BFloat16* at = to + 4 * i;
        _mm512_mask_storeu_epi32(at, of_first,
                                 _mm512_permutex2var_epi32(words[0], first, words[1]));
        _mm512_mask_storeu_epi32(at + 32, of_second,
                                 _mm512_permutex2var_epi32(words[0], second, words[1]));
    }
}

// Columns of a source whose channels lie apart.
inline void pack_planes(const BFloat16* x, int64_t pixel, int64_t channel, int64_t channels,
                        int64_t columns, int64_t packed_channels, BFloat16* to) {
    if (pixel == 1 && packed_channels == 4) {
        const BFloat16* planes[4] = {};
        for (int64_t c = 0; c < channels; ++c) planes[c] = x + c * channel;
        return interleave_words(planes, columns, to);
    }
    for (int64_t q = 0; q < columns; ++q, to += packed_channels) {
        for (int64_t c = 0; c < channels; ++c) to[c] = x[q * pixel + c * channel];
        if (channels < packed_channels) to[channels] = BFloat16{};
    }
}

// Columns of a source whose channels are adjacent.
CVFAST_INLINE void pack_pixels(const BFloat16* x, int64_t pixel, int64_t channels, int64_t columns,
                               int64_t packed_channels, int64_t, BFloat16* to) {
    if (pixel == channels && channels == packed_channels) {
        return copy_values(x, columns * channels, to);
    }
    for (int64_t q = 0; q < columns; ++q, x += pixel, to += packed_channels) {
        copy_values(x, channels, to);
        if (channels % 2) to[channels] = BFloat16{};
    }
}
inline void pack_pixels(const float* x, int64_t pixel, int64_t channels, int64_t columns,
                        int64_t packed_channels, int64_t piece, BFloat16* to) {
    for (int64_t q = 0; q < columns; ++q, x += pixel, to += packed_channels) {
        int64_t c = 0;
        for (; c + kLanes <= channels; c += kLanes) {
            store_pieces(reinterpret_cast<char*>(to + c), piece, load(x + c));
        }
        if (c < channels) {
            const int n = static_cast<int>(channels - c);
            store_pieces(reinterpret_cast<char*>(to + c), piece, load_n(x + c, n), first(n));
        }
    }
}

// One row of a block; null sources: a row of padding. `left` is the block's first column.
template <class T>
void pack_amx_row(const ConvShape& s, const AmxRows& p, const T* x, const T* x2, int64_t left,
                  BFloat16* row) {
    const int64_t channels = p.pixel / int64_t{sizeof(BFloat16)};
    int64_t begin = std::clamp(-left, int64_t{0}, p.columns);
    int64_t end = std::clamp(s.width - left, begin, p.columns);
    if (!x) begin = end = p.columns;
    for (int i = 0; i < kAmxPieces<T>; ++i) {
        char* piece = reinterpret_cast<char*>(row) + i * p.piece;
        std::memset(piece, 0, static_cast<size_t>(begin * p.pixel));
        std::memset(piece + end * p.pixel, 0, static_cast<size_t>((p.columns - end) * p.pixel));
    }
    if (begin == end) return;
    BFloat16* to = row + begin * channels;
    x += (left + begin) * s.x.pixel;
    if constexpr (std::is_same_v<T, BFloat16>) {
        if (s.x_channel != 1) {
            return pack_planes(x, s.x.pixel, s.x_channel, s.in_channels, end - begin, channels, to);
        }
    }
    const int64_t more = s.in_channels - s.x_channels;
    if (more == 0) {
        return pack_pixels(x, s.x.pixel, s.in_channels, end - begin, channels, p.piece, to);
    }
    // Where two sources meet, x has an even number of channels.
    x2 += (left + begin) * s.x2.pixel;
    for (int64_t q = begin; q < end; ++q, to += channels, x += s.x.pixel, x2 += s.x2.pixel) {
        pack_pixels(x, s.x.pixel, s.x_channels, 1, s.x_channels, p.piece, to);
        pack_pixels(x2, s.x2.pixel, more, 1, more, p.piece, to + s.x_channels);
    }
}

// Where row i of a block lies.
CVFAST_INLINE int64_t amx_row(const ConvShape& s, const AmxRows& p, int64_t i) {
    return (i % s.stride_h * (p.rows / s.stride_h) + i / s.stride_h) * p.row;
}

template <class T>
void conv_amx_block(const ConvShape& s, const ConvOperands<T>& o, const ConvBlock& b,
                    void* scratch) {
    const int64_t out_rows = b.row_end - b.row_begin, out_columns = b.column_end - b.column_begin;
    const int64_t images = b.image_end - b.image_begin;
    const AmxRows p = amx_rows<T>(s, images, out_rows, out_columns);
    auto* runs = static_cast<int64_t*>(scratch);
    char* packed = static_cast<char*>(scratch) + p.run_bytes();
    const int64_t top = b.row_begin * s.stride_h - s.pad_top;
    const int64_t left = b.column_begin * s.stride_w - s.pad_left;
    for (int64_t image = 0; image < images; ++image) {
        for (int64_t i = 0; i < p.rows; ++i) {
            const int64_t y = top + i, n = b.image_begin + image;
            const bool inside = y >= 0 && y < s.height;
            const T* x = inside ? o.x + n * s.x.image + y * s.x.row : nullptr;
            const T* x2 = inside && o.x2 ? o.x2 + n * s.x2.image + y * s.x2.row : nullptr;
            char* row = packed + image * p.image + amx_row(s, p, i);
            pack_amx_row(s, p, x, x2, left, reinterpret_cast<BFloat16*>(row));
        }
    }
    // A run of an odd number of values reads one more.
    for (int i = 0; i < kAmxPieces<T>; ++i) {
        std::memset(packed + i * p.piece + images * p.image, 0, sizeof(BFloat16));
    }

    for (int64_t run = 0; run < p.run_count; ++run) {
        const int64_t r = run / p.runs_per_row * s.dilation_h, k = run % p.runs_per_row;
        runs[run] = amx_row(s, p, r) + k * s.dilation_w * p.pixel;
    }
    AmxProduct<T> t{};
    t.a = packed;
    t.a_image = p.image;
    t.a_pixel = s.stride_w * p.pixel;
    t.a_piece = p.piece;
    t.runs = runs;
    t.run_count = p.run_count;
    t.run_values = p.run_values;
    // One line, or one for each row of outputs: whatever takes fewer tiles.
    t.period = p.columns / s.stride_w;
    t.positions = (out_rows - 1) * t.period + out_columns;
    t.lines_per_image = 1;
    if (out_rows * amx_tiles(out_columns) < amx_tiles(t.positions)) {
        t.lines_per_image = out_rows;
        t.a_line = p.row;
        t.positions = t.period = out_columns;
    }
    t.lines = images * t.lines_per_image;
    t.valid = out_columns;
    const int64_t rows = s.kernel_h * s.kernel_w * conv_words<T>(s.in_channels);
    const int64_t channel = b.panel_begin * kConvPanel;
    t.panel = (rows + 1) * kConvPanel;
    t.weights = o.packed + b.panel_begin * t.panel;
    t.bias = t.weights + rows * kConvPanel;
    t.channels = std::min(b.panel_end * kConvPanel, s.out_channels) - channel;
    t.scratch = packed + p.bytes();
    const auto first = [&](const ImageStrides& strides) {
        return b.image_begin * strides.image + b.row_begin * strides.row +
               b.column_begin * strides.pixel + channel;
    };
    if (o.residual) t.residual = o.residual + first(s.residual);
    t.residual_image = s.residual.image;
    t.residual_row = s.residual.row;
    t.residual_pixel = s.residual.pixel;
    t.out = o.out + first(s.out);
    t.out_image = s.out.image;
    t.out_row = s.out.row;
    t.out_pixel = s.out.pixel;
    t.activation = s.activation;
    MatrixUnit unit;
    amx_product(t, unit);
}

}  // namespace cvfast::CVFAST_ISA_NAMESPACE
