// One kernel of the inverted residual, for a test that breaks it.
#include "cuda/inverted_residual_launch.cuh"
#include "../kernels/harness.h"

using namespace cvfast;

// x is [1, height, width, pixel], of which the first `channels` channels count; the kernel is 3 x
// 3, stride 1, padding 1, all activations relu6 but the last.
EXPORT run_inverted_residual(const __half* x, const __half* expand, const float* expand_bias,
                             const float* depthwise, const __half* project,
                             const float* project_bias, __half* out, int channels, int hidden,
                             int out_channels, int height, int width, int pixel,
                             const int64_t* numbers, int count) {
    static std::string problem;
    const char* message = outcome([&] {
        const int64_t row = int64_t{width} * pixel, out_row = int64_t{width} * out_channels;
        InvertedResidualShape s{};
        s.batch = 1, s.height = height, s.width = width;
        s.in_channels = channels, s.hidden = hidden, s.out_channels = out_channels;
        s.kernel_h = s.kernel_w = 3, s.stride_h = s.stride_w = 1, s.pad_top = s.pad_left = 1;
        s.out_height = height, s.out_width = width;
        s.x_image = row * height, s.x_row = row, s.x_pixel = pixel;
        s.out_image = out_row * height, s.out_row = out_row, s.out_pixel = out_channels;
        s.expand_activation = s.depthwise_activation = Activation::relu6;
        s.activation = Activation::none;
        const int hidden16 = cuda::round_up(hidden, 16), out16 = cuda::round_up(out_channels, 16);
        const cuda::Extent image{x, false, 3, 2, {height, width, channels}, {row, pixel, 1}};
        const cuda::MemoryScope scope(
            {image, cuda::Extent{expand, false, 1, 2, {int64_t{channels} * hidden16}, {1}},
             span(expand_bias, hidden16), span(depthwise, hidden16 * 10),
             cuda::Extent{project, false, 1, 2, {int64_t{hidden} * out16}, {1}},
             span(project_bias, out16), cuda::Extent{out, true, 1, 2, {out_row * height}, {1}}});
        cuda::InvertedResidualTensors<__half> t{};
        t.x = x, t.expand = expand, t.expand_bias = expand_bias, t.depthwise = depthwise;
        t.project = project, t.project_bias = project_bias, t.out = out;
        cuda::InvertedResidualLaunch launch{};
        problem = cuda::parse_launch({numbers, numbers + count}, launch);
        if (problem.empty()) problem = cuda::check_launch(s, true, true, launch);
        if (!problem.empty()) return cudaSuccess;
        const auto args = cuda::block_arguments(s, t, launch);
        return cuda::launch(cuda::inverted_residual_tile<__half, cuda::BlockTraits<3, 1, 2>>,
                            dim3(args.tiles_down * args.tiles_across),
                            dim3(launch.down * launch.across * 32), args.shared.total, nullptr,
                            args);
    });
    return message || problem.empty() ? message : problem.c_str();
}
