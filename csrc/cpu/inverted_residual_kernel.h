// The inverted residual's loop over strips and chunks, around the tiles of the pointwise and the
// depthwise kernel. Compiled once per instruction-set level by foreach_isa.h.

#include "cpu/depthwise_kernel.h"
#include "cpu/pointwise_kernel.h"

namespace cvfast {

#ifndef CVFAST_INVERTED_RESIDUAL_BAND
#define CVFAST_INVERTED_RESIDUAL_BAND
// What one task computes: output rows of one image.
template <class T>
struct InvertedResidualBand {
    const InvertedResidualShape& shape;
    const InvertedResidualPlan& plan;
    InvertedResidualOperands<T> operands;  // from the image's first pixel on
    int64_t row_begin, row_end;
    char* scratch;
};

// Rows of the depthwise convolution's source that the output rows [begin, end) read.
struct SourceRows {
    int64_t begin, end;

    SourceRows(const InvertedResidualShape& s, int64_t row_begin, int64_t row_end)
        : begin(std::clamp<int64_t>(row_begin * s.stride_h - s.pad_top, 0, s.height)),
          end(std::clamp<int64_t>((row_end - 1) * s.stride_h - s.pad_top + s.kernel_h, begin,
                                  s.height)) {}
};
#endif

namespace CVFAST_ISA_NAMESPACE {

// Zeros where the depthwise convolution pads: it then meets no edge but the image's first and last
// row.
template <class T>
void clear_padding(const InvertedResidualBand<T>& band, T* ring, int64_t rows) {
    const InvertedResidualPlan& p = band.plan;
    const int64_t left = band.shape.pad_left;
    const int64_t right = p.ring_width - left - band.shape.width;
    for (int64_t r = 0; r < rows; ++r, ring += p.ring_width * p.ring_pixel) {
        std::fill_n(ring, left * p.ring_pixel, T{});
        std::fill_n(ring + (p.ring_width - right) * p.ring_pixel, right * p.ring_pixel, T{});
    }
}

// Expands rows of x into channels [c, c + n) of the hidden tensor.
template <class T>
void expand_rows(const InvertedResidualBand<T>& band, SourceRows rows, int64_t c, int64_t n,
                 T* ring, MatrixUnit& unit) {
    const InvertedResidualShape& s = band.shape;
    const InvertedResidualPlan& p = band.plan;
    PointwiseBlock<T> block{};
    block.operands.packed = band.operands.expand + c * (pointwise_words<T>(s.in_channels) + 1);
    block.rows = s.width;
    block.in_channels = block.chunk = s.in_channels;
    block.out_channels = n;
    block.x_pixel = s.x_pixel;
    block.out_pixel = p.ring_pixel;
    block.activation = s.expand_activation;
    block.segment = pointwise_segment(s.width * s.height);
    block.pack = p.pack_x;
    block.amx = p.amx;
    block.scratch = band.scratch + p.pack_offset;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
        block.operands.x = band.operands.x + row * s.x_row;
        block.operands.out = ring + (row % p.ring_rows * p.ring_width + s.pad_left) * p.ring_pixel;
        pointwise_block(block, unit);
    }
}

// The depthwise convolution of channels [c, c + n), for output rows [begin, end).
template <class T>
void convolve_rows(const InvertedResidualBand<T>& band, int64_t begin, int64_t end, int64_t c,
                   int64_t n, const T* ring, T* d, int64_t d_row, int64_t d_pixel) {
    const InvertedResidualShape& s = band.shape;
    const InvertedResidualPlan& p = band.plan;
    DepthwiseShape conv{};
    conv.channels = n;
    conv.height = s.height;
    conv.out_width = s.out_width;
    conv.out_row = d_row;
    conv.out_pixel = d_pixel;
    conv.multiplier = 1;
    conv.kernel_h = s.kernel_h, conv.kernel_w = s.kernel_w;
    conv.stride_h = s.stride_h, conv.stride_w = s.stride_w;
    conv.pad_top = s.pad_top - begin * s.stride_h;  // the first row written is `begin`
    conv.dilation_h = conv.dilation_w = 1;
    conv.activation = s.depthwise_activation;
    DepthwiseRange range{};
    range.channel_end = n;
    range.row_end = end - begin;
    const T* source;
    if (band.operands.expand) {
        source = ring;
        conv.width = p.ring_width;
        conv.x_row = p.ring_width * p.ring_pixel;
        conv.x_pixel = p.ring_pixel;
        range.ring_rows = p.ring_rows;
    } else {
        source = band.operands.x + c;
        conv.width = s.width;
        conv.pad_left = s.pad_left;
        conv.x_row = s.x_row;
        conv.x_pixel = s.x_pixel;
        range.ring_rows = s.height;
    }
    depthwise_rows(conv, source, band.operands.depthwise + c * (s.kernel_h * s.kernel_w + 1), d,
                   range);
}

// Adds the part of hidden channels [c, c + n) to the output rows [begin, end), or completes them.
template <class T>
void project_rows(const InvertedResidualBand<T>& band, int64_t begin, int64_t end, int64_t c,
                  int64_t n, const T* d, MatrixUnit& unit) {
    const InvertedResidualShape& s = band.shape;
    const InvertedResidualPlan& p = band.plan;
    PointwiseBlock<T> block{};
    block.operands.x = d;
    block.operands.packed = band.operands.project;
    block.in_channels = s.hidden;
    block.chunk_begin = c;
    block.chunk = n;
    block.out_channels = s.out_channels;
    block.x_pixel = p.d_pixel;
    block.residual_pixel = s.residual_pixel;
    block.out_pixel = s.out_pixel;
    block.activation = s.activation;
    block.segment = pointwise_segment(s.out_width * s.out_height);
    block.pack = p.pack_d;
    block.amx = p.amx;
    block.scratch = band.scratch + p.pack_offset;
    float* sums = n < s.hidden ? reinterpret_cast<float*>(band.scratch + p.sums_offset) : nullptr;
    const bool even = s.out_row == s.out_width * s.out_pixel &&
                      (!band.operands.residual || s.residual_row == s.out_width * s.residual_pixel);
    const int64_t rows = even ? end - begin : 1;  // that make one block
    block.rows = rows * s.out_width;
    for (int64_t row = begin; row < end; row += rows) {
        block.operands.out = band.operands.out + row * s.out_row;
        if (band.operands.residual) {
            block.operands.residual = band.operands.residual + row * s.residual_row;
        }
        block.sums = sums;
        pointwise_block(block, unit);
        block.operands.x += block.rows * p.d_pixel;
        if (sums) sums += block.rows * pointwise_panels(s.out_channels) * kPointwisePanel;
    }
}

// The means over `pixels` pixels of V vectors of channels, or of the first `n` channels.
template <int V, bool kPartial, class T>
CVFAST_INLINE void mean_of_vectors(const T* d, int64_t d_pixel, int64_t pixels, int n, T* means) {
    Vec sums[V];
    CVFAST_UNROLL for (int v = 0; v < V; ++v) sums[v] = set1(0.f);
    for (int64_t i = 0; i < pixels; ++i, d += d_pixel) {
        CVFAST_UNROLL for (int v = 0; v < V; ++v) {
            sums[v] = add(sums[v], load_channels<T, kPartial>(d + v * kLanes, n));
        }
    }
    const Vec share = set1(1.f / static_cast<float>(pixels));
    CVFAST_UNROLL for (int v = 0; v < V; ++v) {
        const Vec mean = mul(sums[v], share);
        if constexpr (kPartial) {
            store_n(means, mean, n);
        } else {
            store(means + v * kLanes, mean);
        }
    }
}

template <class T>
void mean_of_row(const T* d, int64_t d_pixel, int64_t pixels, int64_t n, T* means) {
    constexpr int kSums = 4;  // as many as hide the latency of an addition
    int64_t c = 0;
    for (; c + kSums * kLanes <= n; c += kSums * kLanes) {
        mean_of_vectors<kSums, false>(d + c, d_pixel, pixels, kLanes, means + c);
    }
    for (; c + kLanes <= n; c += kLanes) {
        mean_of_vectors<1, false>(d + c, d_pixel, pixels, kLanes, means + c);
    }
    if (c < n) {
        mean_of_vectors<1, true>(d + c, d_pixel, pixels, static_cast<int>(n - c), means + c);
    }
}

template <class T>
void inverted_residual_band(const InvertedResidualBand<T>& band) {
    const InvertedResidualShape& s = band.shape;
    const InvertedResidualPlan& p = band.plan;
    const InvertedResidualOperands<T>& o = band.operands;
    MatrixUnit unit;
    T* const rings = reinterpret_cast<T*>(band.scratch);
    const int64_t chunks = (s.hidden + p.chunk - 1) / p.chunk;
    if (o.expand) clear_padding(band, rings, (p.one_strip ? 1 : chunks) * p.ring_rows);
    int64_t expanded = 0;  // rows before this one are
    for (int64_t row = band.row_begin; row < band.row_end; row += p.strip) {
        const int64_t row_end = std::min(row + p.strip, band.row_end);
        SourceRows rows(s, row, row_end);
        rows.begin = std::max(rows.begin, expanded);
        expanded = rows.end;
        for (int64_t c = 0; c < s.hidden; c += p.chunk) {
            const int64_t n = std::min(p.chunk, s.hidden - c);
            T* ring = rings;
            if (!p.one_strip) ring += c / p.chunk * p.ring_rows * p.ring_width * p.ring_pixel;
            if (o.expand) expand_rows(band, rows, c, n, ring, unit);
            if (o.project) {
                T* d = reinterpret_cast<T*>(band.scratch + p.d_offset);
                convolve_rows(band, row, row_end, c, n, ring, d, s.out_width * p.d_pixel,
                              p.d_pixel);
                project_rows(band, row, row_end, c, n, d, unit);
            } else {
                T* d = o.out + row * s.out_row + c;
                convolve_rows(band, row, row_end, c, n, ring, d, s.out_row, s.out_pixel);
                for (int64_t r = row; o.means && r < row_end; ++r, d += s.out_row) {
                    mean_of_row(d, s.out_pixel, s.out_width, n, o.means + r * s.means_row + c);
                }
            }
        }
    }
}

}  // namespace CVFAST_ISA_NAMESPACE
}  // namespace cvfast
