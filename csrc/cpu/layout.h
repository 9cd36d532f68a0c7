// Copies images from one memory layout to another.
#pragma once

#include <cstdint>

#include "cpu/call.h"

namespace cvfast {

// Strides count elements, and may be any: of images, channels, rows, columns.
struct CopyLayoutShape {
    int64_t size[4], x_stride[4], out_stride[4];
};

// T: uint32_t or uint16_t, the bits of an element.
template <class T>
struct CopyLayoutOperands {
    const T* x;
    T* out;
};

struct CopyAxis {
    int64_t size, x_stride, out_stride;
};

// A batch of matrices. Where the layouts differ, a matrix is transposed: the numbers of a row are
// adjacent in x, those of a column in out. A task is a block of one matrix.
struct CopyLayoutPlan : Cut {
    CopyAxis outer[2], rows, columns;
    int64_t block_rows, block_columns;
};

template <class T>
CopyLayoutPlan make_plan(const CopyLayoutShape& shape, const CopyLayoutOperands<T>& operands,
                         int threads);

template <class T>
void run_tasks(const CopyLayoutShape& shape, const CopyLayoutOperands<T>& operands,
               const CopyLayoutPlan& plan, int64_t begin, int64_t end, void* scratch);

}  // namespace cvfast
