// What the bindings of all CPU operators share. Bindings see torch, and of torch only the stable
// ABI; kernels do not.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/activation.h"
#include "common/types.h"
#include "cpu/call.h"
#include "cpu/engine.h"

namespace cvfast {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Parallel torch_pool();

// The plan that the calling thread is recording, if any.
PlanBuilder* recorder();

// Runs the call at once; or, while a plan is recorded, appends it.
template <class Shape, class Operands>
void submit(const Shape& shape, const Operands& operands) {
    if (PlanBuilder* builder = recorder()) {
        builder->append(std::make_unique<CallOf<Shape, Operands>>(shape, operands));
    } else {
        run_now(shape, operands, torch_pool());
    }
}

Activation parse_activation(const std::string& name);

// Window positions along one axis.
inline int64_t positions(int64_t size, int64_t pad, int64_t dilation, int64_t kernel,
                         int64_t stride) {
    const int64_t free = size + 2 * pad - dilation * (kernel - 1) - 1;
    return free < 0 ? 0 : free / stride + 1;
}

struct Padding {
    int64_t top, left, bottom, right;
};

// `padding` holds two numbers, vertical and horizontal, or four: top, left, bottom, right.
inline Padding parse_padding(const char* op, const std::vector<int64_t>& padding) {
    const std::size_t count = padding.size();
    STD_TORCH_CHECK(count == 2 || count == 4, "cvfast::", op,
                    ": padding takes two numbers (vertical, horizontal) or four (top, left, "
                    "bottom, right), got ",
                    count);
    for (const int64_t pad : padding) {
        STD_TORCH_CHECK(pad >= 0, "cvfast::", op, ": padding must not be negative, got ", pad);
    }
    return {padding[0], padding[1], padding[count - 2], padding[count - 1]};
}

inline bool channels_adjacent(const Tensor& t) { return t.size(1) == 1 || t.stride(1) == 1; }

// An image operand of `op`, of x's dtype and of this size.
inline void check_image(const char* op, const char* name, const Tensor& t, const Tensor& x,
                        const int64_t (&sizes)[4]) {
    bool fits = t.dim() == 4;
    for (int i = 0; i < 4 && fits; ++i) fits = t.size(i) == sizes[i];
    STD_TORCH_CHECK(fits, "cvfast::", op, ": ", name, " must be [", sizes[0], ", ", sizes[1], ", ",
                    sizes[2], ", ", sizes[3], "]");
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == x.scalar_type(), "cvfast::", op, ": ", name,
                    " must have the dtype of x and be on the CPU");
    STD_TORCH_CHECK(channels_adjacent(t), "cvfast::", op, ": ", name,
                    " must be channels-last (stride 1 along C); use "
                    "contiguous(memory_format=torch.channels_last)");
}

template <class T>
const T* data_or_null(const std::optional<Tensor>& t) {
    return t ? static_cast<const T*>(t->const_data_ptr()) : nullptr;
}

// Calls `run` with the type of x's elements.
template <class Run>
void with_element_type(const char* op, const Tensor& x, const Run& run) {
    switch (x.scalar_type()) {
        case ScalarType::Float:
            run(std::type_identity<float>{});
            break;
        case ScalarType::BFloat16:
            run(std::type_identity<BFloat16>{});
            break;
        case ScalarType::Half:
            run(std::type_identity<Half>{});
            break;
        default:
            STD_TORCH_CHECK(false, "cvfast::", op, ": x must be float32, bfloat16 or float16");
    }
}

// Distances, in elements, between the pixels, rows and images of a channels-last tensor of this
// size. Where there is but one, torch's stride means nothing; it becomes the one that lets rows and
// images run into each other.
struct PixelStrides {
    int64_t image, row, pixel;

    PixelStrides(const Tensor& t, int64_t batch, int64_t height, int64_t width,
                 const std::vector<int64_t>& step = {1, 1})
        : image(t.stride(0)), row(t.stride(2) * step[0]), pixel(t.stride(3) * step[1]) {
        if (width == 1) pixel = height == 1 ? image : row;
        if (height == 1) row = pixel * width;
        if (batch == 1) image = row * height;
    }
};

}  // namespace cvfast
