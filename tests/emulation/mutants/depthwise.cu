// The forward pass of the depthwise kernels for float, for a test that breaks them.
#include "cuda/depthwise_launch.cuh"
#include "../kernels/harness.h"

using namespace cvfast;

// x is [1, height, width, pixel], of which the first `channels` channels count; the kernel is
// 3 x 3, stride 1, padding 1.
EXPORT run_depthwise(const float* x, const float* packed, float* out, int channels, int height,
                     int width, int pixel, const int64_t* numbers, int count) {
    static std::string problem;
    const char* message = outcome([&] {
        const int64_t row = int64_t{width} * pixel, out_row = int64_t{width} * channels;
        DepthwiseShape s{};
        s.batch = 1, s.channels = channels, s.height = height, s.width = width;
        s.x_image = row * height, s.x_row = row, s.x_pixel = pixel;
        s.out_height = height, s.out_width = width;
        s.out_image = out_row * height, s.out_row = out_row, s.out_pixel = channels;
        s.multiplier = s.stride_h = s.stride_w = s.dilation_h = s.dilation_w = 1;
        s.kernel_h = s.kernel_w = 3, s.pad_top = s.pad_left = 1;
        s.activation = Activation::none;
        const cuda::Extent image{x, false, 3, 4, {height, width, channels}, {row, pixel, 1}};
        const cuda::MemoryScope scope(
            {image, span(packed, s.packed_size()), span(out, out_row * height)});
        cuda::DepthwiseLaunch launch{};
        problem = cuda::parse_launch({numbers, numbers + count}, launch);
        if (problem.empty()) problem = cuda::depthwise(s, x, packed, out, launch, nullptr);
        return cudaSuccess;
    });
    return message || problem.empty() ? message : problem.c_str();
}
