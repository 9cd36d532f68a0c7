// Chooses and launches the kernels of inverted_residual.h for one element type; each
// inverted_residual_<type>.cu instantiates it, so that the types compile side by side.
#pragma once

#include "cuda/inverted_residual.h"
#include "cuda/inverted_residual_kernel.cuh"

namespace cvfast::cuda {

std::string describe(const InvertedResidualLaunch& launch);

// Of a launch that check_launch finds nothing wrong with.
SharedLayout shared_layout(const InvertedResidualShape& shape, bool expands, bool projects,
                           const InvertedResidualLaunch& launch);

// Runs f<Traits>() for the kernel that matches; false if none is compiled.
template <class... Traits>
struct BlockLadder {
    template <class F>
    static bool run(int64_t kernel, int64_t stride, int width, F f) {
        return ((kernel == Traits::kKernel && stride == Traits::kStride &&
                 width == Traits::kWidth && (f.template operator()<Traits>(), true)) ||
                ...);
    }
};

// A warp's 32 pixels times 32 or 80 channels of the projection. 80 serve the 160 and 320 channels
// of the small planes, at a register in three; 32 leave those to a second block of a
// multiprocessor.
using BlockKernels = BlockLadder<BlockTraits<3, 1, 0>, BlockTraits<3, 1, 2>, BlockTraits<3, 1, 5>,
                                 BlockTraits<3, 2, 0>, BlockTraits<3, 2, 2>, BlockTraits<3, 2, 5>,
                                 BlockTraits<5, 1, 0>, BlockTraits<5, 1, 2>, BlockTraits<5, 1, 5>,
                                 BlockTraits<5, 2, 0>, BlockTraits<5, 2, 2>, BlockTraits<5, 2, 5>>;

template <class T>
BlockArguments<T> block_arguments(const InvertedResidualShape& s,
                                  const InvertedResidualTensors<T>& t,
                                  const InvertedResidualLaunch& launch) {
    const bool projects = t.project != nullptr;
    BlockArguments<T> args{};
    args.x = make_view(t.x, s.x_image, s.x_row, s.x_pixel, s.height, s.width);
    args.residual = make_view(t.residual, s.residual_image, s.residual_row, s.residual_pixel,
                              s.out_height, s.out_width);
    args.out = make_view(t.out, s.out_image, s.out_row, s.out_pixel, s.out_height, s.out_width);
    args.means = make_view(t.means, s.means_image, s.means_row, 0, s.out_height, 1);
    args.expand = t.expand, args.expand_bias = t.expand_bias;
    args.depthwise = t.depthwise;
    args.project = t.project, args.project_bias = t.project_bias;
    args.partials = launch.splits > 1 ? t.partials : nullptr;
    args.batch = static_cast<int>(s.batch);
    args.channels = static_cast<int>(s.in_channels);
    args.hidden = static_cast<int>(s.hidden);
    args.out_channels = static_cast<int>(projects ? s.out_channels : s.hidden);
    args.pad_top = static_cast<int>(s.pad_top), args.pad_left = static_cast<int>(s.pad_left);
    args.rows = launch.rows, args.columns = launch.columns, args.images = launch.images;
    args.tiles_down = (args.out.height + launch.rows - 1) / launch.rows;
    args.tiles_across = (args.out.width + launch.columns - 1) / launch.columns;
    args.across = launch.across;
    const int chunks = (args.hidden + kChunk - 1) / kChunk;
    args.chunks = (chunks + launch.splits - 1) / launch.splits;
    args.x_aligned = whole(args.x, args.channels, 16);
    args.residual_aligned = whole(args.residual, args.out_channels, 16);
    args.out_aligned = whole(args.out, args.out_channels, 16);
    args.expand_activation = s.expand_activation;
    args.depthwise_activation = s.depthwise_activation;
    args.activation = s.activation;
    args.shared = shared_layout(s, t.expand != nullptr, projects, launch);
    return args;
}

template <class T>
std::string inverted_residual(const InvertedResidualShape& s, const InvertedResidualTensors<T>& t,
                              const InvertedResidualLaunch& launch, cudaStream_t stream) {
    if (s.batch * s.out_height * s.out_width == 0) return {};
    const bool expands = t.expand != nullptr, projects = t.project != nullptr;
    std::string error = check_launch(s, expands, projects, launch);
    if (!error.empty()) return error;
    const BlockArguments<T> args = block_arguments(s, t, launch);
    const auto checked = [&](cudaError_t status) {
        if (status != cudaSuccess) {
            error = std::string("inverted_residual: ") + cudaGetErrorString(status) + ", from " +
                    describe(launch) + " and " + std::to_string(args.shared.total) +
                    " bytes of shared memory";
        }
    };
    const int groups = (args.batch + launch.images - 1) / launch.images;
    const dim3 grid(static_cast<unsigned>(groups * args.tiles_down * args.tiles_across),
                    static_cast<unsigned>(launch.splits));
    const dim3 block(static_cast<unsigned>(launch.down * launch.across * 32));
    const bool found = BlockKernels::run(s.kernel_h, s.stride_h, launch.width, [&]<class Traits>() {
        checked(cvfast::cuda::launch(inverted_residual_tile<T, Traits>, grid, block,
                                     static_cast<size_t>(args.shared.total), stream, args));
    });
    if (!found) {
        return "no inverted_residual kernel is compiled for " + std::to_string(s.kernel_h) + "x" +
               std::to_string(s.kernel_w) + ", stride " + std::to_string(s.stride_h) + " and " +
               describe(launch);
    }
    if (error.empty() && args.partials) {
        const int64_t threads =
            s.batch * s.out_height * s.out_width * ((args.out_channels + kVector - 1) / kVector);
        const dim3 sums(static_cast<unsigned>((threads + kBlockThreads - 1) / kBlockThreads));
        checked(cvfast::cuda::launch(inverted_residual_sum<T>, sums, dim3(kBlockThreads), 0, stream,
                                     args, launch.splits));
    }
    return error;
}

}  // namespace cvfast::cuda

#define CVFAST_INSTANTIATE_INVERTED_RESIDUAL(T)                                          \
    namespace cvfast::cuda {                                                             \
    template std::string inverted_residual(const InvertedResidualShape&,                 \
                                           const InvertedResidualTensors<T>&,            \
                                           const InvertedResidualLaunch&, cudaStream_t); \
    }
