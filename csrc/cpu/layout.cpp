#include "cpu/layout.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace cvfast {
namespace {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Threads pay when each has at least this many bytes to copy: waking one costs about 3 us.
constexpr int64_t kBytesPerThread = 80 * 1024;

// Of a block: 16 KB of float, read and written within L1.
constexpr int64_t kBlockElements = 4096;
constexpr int64_t kBlockSide = 64;

// Every processor has vectors of 16 bytes. Transposing needs no more: memory is the limit.
template <class T>
inline constexpr int kSide = 16 / sizeof(T);
template <class T>
struct Vector {
    typedef T Type __attribute__((vector_size(16)));
};

// The first halves of a and b, element by element in turn; or the second halves.
template <class V>
V interleave_low(V a, V b) {
    if constexpr (sizeof(a[0]) == 4) {
        return __builtin_shufflevector(a, b, 0, 4, 1, 5);
    } else {
        return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    }
}
template <class V>
V interleave_high(V a, V b) {
    if constexpr (sizeof(a[0]) == 4) {
        return __builtin_shufflevector(a, b, 2, 6, 3, 7);
    } else {
        return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    }
}

// kSide x kSide elements. Each round interleaves row i with row i + kSide / 2; log2(kSide) of them
// transpose.
template <class T>
void transpose_tile(const T* x, int64_t x_row, T* out, int64_t out_column) {
    constexpr int kRows = kSide<T>;
    using V = typename Vector<T>::Type;
    V rows[kRows], mixed[kRows];
    for (int i = 0; i < kRows; ++i) std::memcpy(&rows[i], x + i * x_row, sizeof(V));
    for (int round = 1; round < kRows; round *= 2) {
        for (int i = 0; i < kRows / 2; ++i) {
            mixed[2 * i] = interleave_low(rows[i], rows[i + kRows / 2]);
            mixed[2 * i + 1] = interleave_high(rows[i], rows[i + kRows / 2]);
        }
        std::copy(mixed, mixed + kRows, rows);
    }
    for (int i = 0; i < kRows; ++i) std::memcpy(out + i * out_column, &rows[i], sizeof(V));
}

// Element by element.
template <class T>
void copy_elements(const T* x, T* out, const CopyAxis& rows, const CopyAxis& columns) {
    for (int64_t c = 0; c < columns.size; ++c) {
        const T* from = x + c * columns.x_stride;
        T* to = out + c * columns.out_stride;
        for (int64_t r = 0; r < rows.size; ++r) to[r * rows.out_stride] = from[r * rows.x_stride];
    }
}

// Planes of an RGB image to pixels.
template <class T>
void interleave_three(const T* x, int64_t x_row, T* __restrict out, int64_t columns) {
    for (int64_t c = 0; c < columns; ++c) {
        out[3 * c] = x[c];
        out[3 * c + 1] = x[c + x_row];
        out[3 * c + 2] = x[c + 2 * x_row];
    }
}

// A matrix whose rows are adjacent in x, and its columns in out. Tiles go over a cache line of rows
// before they go to the next columns, so that whole lines of out are written.
template <class T>
void transpose(const T* x, T* out, const CopyAxis& rows, const CopyAxis& columns) {
    if (rows.size == 3 && columns.out_stride == 3) {
        interleave_three(x, rows.x_stride, out, columns.size);
        return;
    }
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t whole_rows = rows.size / kSide<T> * kSide<T>;
    const int64_t whole_columns = columns.size / kSide<T> * kSide<T>;
    for (int64_t line = 0; line < whole_rows; line += kLine) {
        for (int64_t c = 0; c < whole_columns; c += kSide<T>) {
            for (int64_t r = line; r < std::min(line + kLine, whole_rows); r += kSide<T>) {
                transpose_tile(x + r * rows.x_stride + c, rows.x_stride,
                               out + c * columns.out_stride + r, columns.out_stride);
            }
        }
    }
    CopyAxis rest_rows = rows, rest_columns = columns;
    rest_rows.size -= whole_rows;
    rest_columns.size -= whole_columns;
    copy_elements(x + whole_rows * rows.x_stride, out + whole_rows, rest_rows, columns);
    rest_rows.size = whole_rows;
    copy_elements(x + whole_columns, out + whole_columns * columns.out_stride, rest_rows,
                  rest_columns);
}

template <class T>
void copy_matrix(const T* x, T* out, const CopyAxis& rows, const CopyAxis& columns) {
    if (columns.x_stride == 1 && columns.out_stride == 1) {
        for (int64_t r = 0; r < rows.size; ++r) {
            std::memcpy(out + r * rows.out_stride, x + r * rows.x_stride, columns.size * sizeof(T));
        }
    } else if (columns.x_stride == 1 && rows.out_stride == 1) {
        transpose(x, out, rows, columns);
    } else {
        copy_elements(x, out, rows, columns);
    }
}

// Whether a step of `outer` is a walk over `inner` in both layouts.
bool follows(const CopyAxis& outer, const CopyAxis& inner) {
    return outer.x_stride == inner.size * inner.x_stride &&
           outer.out_stride == inner.size * inner.out_stride;
}

}  // namespace

template <class T>
CopyLayoutPlan make_plan(const CopyLayoutShape& s, const CopyLayoutOperands<T>&, int threads) {
    // Axes of one element go, and axes that follow each other in both layouts become one.
    CopyAxis axes[4];
    int count = 0;
    int64_t elements = 1;
    for (int i = 0; i < 4; ++i) {
        elements *= s.size[i];
        CopyAxis axis{s.size[i], s.x_stride[i], s.out_stride[i]};
        if (axis.size == 1) continue;
        for (int j = 0; j < count;) {
            if (follows(axes[j], axis)) {
                axis.size *= axes[j].size;
            } else if (follows(axis, axes[j])) {
                axis = {axis.size * axes[j].size, axes[j].x_stride, axes[j].out_stride};
            } else {
                ++j;
                continue;
            }
            axes[j] = axes[--count];
            j = 0;
        }
        axes[count++] = axis;
    }
    std::fill(axes + count, axes + 4, CopyAxis{1, 0, 0});
    // The columns' axis is that of the shortest steps in x; the rows', of those left, in out.
    const auto bring_last = [&](int last, auto step) {
        int best = last;
        for (int i = 0; i <= last; ++i) {
            const bool shorter = axes[best].size == 1 || step(axes[i]) < step(axes[best]);
            if (axes[i].size > 1 && shorter) best = i;
        }
        std::swap(axes[best], axes[last]);
    };
    bring_last(3, [](const CopyAxis& axis) { return axis.x_stride; });
    bring_last(2, [](const CopyAxis& axis) { return axis.out_stride; });

    CopyLayoutPlan p{};
    p.outer[0] = axes[0], p.outer[1] = axes[1], p.rows = axes[2], p.columns = axes[3];
    if (elements == 0) return p;
    const int64_t rows = p.rows.size, columns = p.columns.size;
    if (p.columns.out_stride == 1) {
        p.block_columns = std::min(columns, kBlockElements);
        p.block_rows = std::min(rows, kBlockElements / p.block_columns);
    } else {
        p.block_rows = std::min(rows, kBlockElements / std::min(columns, kBlockSide));
        p.block_columns = std::min(columns, std::max(kBlockSide, kBlockElements / p.block_rows));
    }
    p.tasks = p.outer[0].size * p.outer[1].size * ceil_div(rows, p.block_rows) *
              ceil_div(columns, p.block_columns);
    p.threads = static_cast<int>(
        std::clamp<int64_t>(elements * int64_t{sizeof(T)} / kBytesPerThread, 1, threads));
    return p;
}

template <class T>
void run_tasks(const CopyLayoutShape&, const CopyLayoutOperands<T>& o, const CopyLayoutPlan& p,
               int64_t begin, int64_t end, void*) {
    if (begin == end) return;
    const int64_t row_blocks = ceil_div(p.rows.size, p.block_rows);
    const int64_t column_blocks = ceil_div(p.columns.size, p.block_columns);
    for (int64_t task = begin; task < end; ++task) {
        const int64_t column = task % column_blocks * p.block_columns;
        const int64_t row = task / column_blocks % row_blocks * p.block_rows;
        const int64_t matrix = task / column_blocks / row_blocks;
        const int64_t position[] = {matrix / p.outer[1].size, matrix % p.outer[1].size, row,
                                    column};
        const CopyAxis* axes[] = {&p.outer[0], &p.outer[1], &p.rows, &p.columns};
        const T* x = o.x;
        T* out = o.out;
        for (int i = 0; i < 4; ++i) {
            x += position[i] * axes[i]->x_stride;
            out += position[i] * axes[i]->out_stride;
        }
        CopyAxis rows = p.rows, columns = p.columns;
        rows.size = std::min(p.block_rows, rows.size - row);
        columns.size = std::min(p.block_columns, columns.size - column);
        copy_matrix(x, out, rows, columns);
    }
}

#define CVFAST_INSTANTIATE(T)                                                                     \
    template CopyLayoutPlan make_plan(const CopyLayoutShape&, const CopyLayoutOperands<T>&, int); \
    template void run_tasks(const CopyLayoutShape&, const CopyLayoutOperands<T>&,                 \
                            const CopyLayoutPlan&, int64_t, int64_t, void*);
CVFAST_INSTANTIATE(uint16_t)
CVFAST_INSTANTIATE(uint32_t)

}  // namespace cvfast
