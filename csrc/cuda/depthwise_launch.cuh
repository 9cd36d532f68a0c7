// Chooses and launches the kernels of depthwise.h for one element type; each depthwise_<type>.cu
// instantiates it, so that the types compile side by side.
#pragma once

#include <algorithm>
#include <limits>

#include "cuda/depthwise.h"
#include "cuda/depthwise_kernel.cuh"

namespace cvfast::cuda {

// Most blocks along the second axis of a grid.
inline constexpr int64_t kMaxGridY = 65535;

// Sizes that the tile kernels may count in 32 bits.
inline constexpr int64_t kTileLimit = int64_t{1} << 24;

// Pixels of one plane of a rectangle along one axis, for `outputs` outputs of the block.
int64_t plane_inputs(DepthwisePass pass, int64_t kernel, int64_t stride, int64_t outputs);

std::string sum_parts(const DepthwiseShape& shape, const float* parts, int64_t count,
                      float* packed_grad, cudaStream_t stream);

// What is wrong with a tiled launch for this shape, if anything.
std::string check_tiled(const DepthwiseShape& shape, DepthwisePass pass,
                        const DepthwiseLaunch& launch);

// The rectangles that a block of channels is cut into.
struct TileCount {
    int64_t batch, down, across;
    int64_t total() const { return batch * down * across; }
};

TileCount tile_count(const DepthwiseShape& shape, DepthwisePass pass,
                     const DepthwiseLaunch& launch);

std::string describe(const DepthwiseLaunch& launch);

// What went wrong, in words.
std::string check(cudaError_t error, const char* kernel, const DepthwiseLaunch& launch,
                  int64_t shared_bytes = 0);

// One compiled tile kernel: of a thread, rows x columns outputs.
template <int Kernel, int Stride, int Rows, int Columns>
struct Tile {
    using RowsOf = Correlation<Kernel, Stride, Rows>;
    using ColumnsOf = Correlation<Kernel, Stride, Columns>;
    static constexpr bool matches(int64_t kernel, int64_t stride, int rows, int columns) {
        return kernel == Kernel && stride == Stride && rows == Rows && columns == Columns;
    }
};

template <int Kernel, int Stride, int Rows, int Columns>
struct TransposedTile : Tile<Kernel, Stride, Rows, Columns> {
    using RowsOf = Transposed<Kernel, Stride, Rows>;
    using ColumnsOf = Transposed<Kernel, Stride, Columns>;
};

template <class... Tiles>
struct Ladder {
    // Calls f<Tile>() for the tile that matches; false if none does.
    template <class F>
    static bool run(int64_t kernel, int64_t stride, const DepthwiseLaunch& launch, F f) {
        return ((Tiles::matches(kernel, stride, launch.thread_rows, launch.thread_columns) &&
                 (f.template operator()<Tiles>(), true)) ||
                ...);
    }
};

// Seven columns divide the rows of the usual networks (112, 56, 28, 14, 7) and four those whose
// sizes are powers of two. Four rows of seven need the fewest instructions, and most registers.
using ForwardTiles = Ladder<Tile<3, 1, 2, 7>, Tile<3, 1, 4, 7>, Tile<3, 1, 4, 4>, Tile<3, 2, 2, 7>,
                            Tile<3, 2, 4, 4>, Tile<5, 1, 2, 7>, Tile<5, 1, 4, 4>, Tile<5, 2, 2, 7>,
                            Tile<5, 2, 4, 4>, Tile<7, 1, 2, 7>, Tile<7, 1, 4, 4>, Tile<7, 2, 4, 4>>;
using BackwardInputTiles = Ladder<TransposedTile<3, 2, 2, 8>, TransposedTile<5, 2, 2, 8>>;
using BackwardWeightTiles =
    Ladder<Tile<3, 1, 2, 7>, Tile<3, 2, 2, 7>, Tile<5, 1, 2, 7>, Tile<5, 2, 2, 7>>;

// 6 for ReLU6. NaN for ReLU: no comparison with it holds, so that nothing is too large.
inline float ceiling_of(Activation activation) {
    return activation == Activation::relu6 ? 6.f : std::numeric_limits<float>::quiet_NaN();
}

// Where a plane's rectangles lie along one axis.
struct PlaneAxis {
    int64_t size, first, step;
};

template <class T>
Plane<T> make_plane(const View<const T>& view, const PlaneAxis& y, const PlaneAxis& x,
                    const DepthwiseLaunch& launch, int& offset) {
    Plane<T> plane{};
    plane.view = view;
    plane.rows = static_cast<int>(y.size);
    plane.columns = Divider(static_cast<unsigned>(x.size));
    plane.pitch = static_cast<int>(x.size) | 1;
    plane.row_step =
        std::max(1, kChunkWords * launch.down * launch.across / static_cast<int>(x.size));
    plane.y = static_cast<int>(y.first), plane.x = static_cast<int>(x.first);
    plane.step_y = static_cast<int>(y.step), plane.step_x = static_cast<int>(x.step);
    plane.offset = offset;
    offset += plane.rows * plane.pitch * launch.words * 4;
    return plane;
}

inline TileGrid make_grid(const DepthwiseShape& shape, DepthwisePass pass,
                          const DepthwiseLaunch& launch, int stage_bytes) {
    const TileCount tiles = tile_count(shape, pass, launch);
    return {static_cast<unsigned>(tiles.total()), Divider(static_cast<unsigned>(tiles.down)),
            Divider(static_cast<unsigned>(tiles.across)), launch.stages, stage_bytes};
}

inline dim3 tile_block(const DepthwiseLaunch& launch) {
    return dim3(launch.words, launch.down * launch.across);
}

template <class T>
dim3 tile_grid(const DepthwiseShape& shape, const TileGrid& grid, const DepthwiseLaunch& launch) {
    const int64_t channels = int64_t{launch.words} * kLanes<T>;
    const int64_t blocks = (shape.channels + channels - 1) / channels;
    return dim3(static_cast<unsigned>(blocks),
                std::min(grid.count, static_cast<unsigned>(launch.workers)));
}

inline std::string no_tile(const DepthwiseShape& shape, const DepthwiseLaunch& launch,
                           const char* pass) {
    return "no " + std::string(pass) + " kernel is compiled for " + std::to_string(shape.kernel_h) +
           "x" + std::to_string(shape.kernel_w) + ", stride " + std::to_string(shape.stride_h) +
           " and " + describe(launch);
}

template <class Tiles, class T>
std::string launch_tiles(const DepthwiseShape& shape, DepthwisePass pass, int64_t stride,
                         const TileArguments<T>& args, const DepthwiseLaunch& launch,
                         cudaStream_t stream, const char* name) {
    std::string error;
    const bool found = Tiles::run(shape.kernel_h, stride, launch, [&]<class Tile>() {
        const int64_t shared =
            depthwise_shared_bytes(pass, shape.kernel_h, shape.stride_h, sizeof(T), launch);
        error = check(
            cvfast::cuda::launch(depthwise_tile<T, typename Tile::RowsOf, typename Tile::ColumnsOf>,
                                 tile_grid<T>(shape, args.inputs.grid, launch), tile_block(launch),
                                 static_cast<size_t>(shared), stream, args),
            name, launch, shared);
    });
    return found ? error : no_tile(shape, launch, name);
}

// The grid of a general kernel with so many jobs.
inline dim3 general_grid(int64_t jobs, const DepthwiseLaunch& launch) {
    return dim3(static_cast<unsigned>(std::min<int64_t>(jobs, launch.workers)));
}

inline const dim3 kGeneralBlock(kGeneralChannels, kGeneralLines);

template <class T>
GeneralArguments<T> general_arguments(const DepthwiseShape& shape, const DepthwiseMask<T>& mask) {
    GeneralArguments<T> args{};
    args.shape = shape;
    args.mask = mask.output;
    args.mask_image = mask.image, args.mask_row = mask.row, args.mask_pixel = mask.pixel;
    args.ceiling = ceiling_of(shape.activation);
    return args;
}

template <class T>
std::string depthwise(const DepthwiseShape& s, const T* x, const float* packed, T* out,
                      const DepthwiseLaunch& launch, cudaStream_t stream) {
    constexpr auto pass = DepthwisePass::forward;
    const char* name = "depthwise";
    const int64_t lines = s.batch * s.out_height;
    if (lines * s.out_width * s.channels * s.multiplier == 0) return {};
    if (!launch.tiled) {
        GeneralArguments<T> args = general_arguments<T>(s, {});
        args.x = x, args.packed = packed, args.out = out;
        const int64_t groups = (s.channels * s.multiplier - 1) / kGeneralChannels + 1;
        return check(
            cvfast::cuda::launch(depthwise_general<T>, general_grid(groups * lines, launch),
                                 kGeneralBlock, 0, stream, args),
            name, launch);
    }
    if (std::string wrong = check_tiled(s, pass, launch); !wrong.empty()) return wrong;
    TileArguments<T> args{};
    args.out = make_view(out, s.out_image, s.out_row, s.out_pixel, s.out_height, s.out_width);
    args.rows = launch.down * launch.thread_rows;
    args.columns = launch.across * launch.thread_columns;
    args.packed = packed;
    args.with_bias = true;
    args.whole_words = whole(args.out, s.channels, 4);
    args.activation = s.activation;
    auto& in = args.inputs;
    int stage_bytes = 0;
    in.planes[0] = make_plane<T>(
        make_view(x, s.x_image, s.x_row, s.x_pixel, s.height, s.width),
        {plane_inputs(pass, s.kernel_h, s.stride_h, args.rows), -s.pad_top, args.rows * s.stride_h},
        {plane_inputs(pass, s.kernel_w, s.stride_w, args.columns), -s.pad_left,
         args.columns * s.stride_w},
        launch, stage_bytes);
    in.aligned = whole(in.planes[0].view, s.channels, 16);
    in.channels = static_cast<int>(s.channels);
    in.strips = launch.across;
    in.grid = make_grid(s, pass, launch, stage_bytes);
    return launch_tiles<ForwardTiles>(s, pass, s.stride_h, args, launch, stream, name);
}

template <class T>
std::string depthwise_backward_input(const DepthwiseShape& s, const T* grad,
                                     const DepthwiseMask<T>& mask, const float* packed, T* grad_x,
                                     const DepthwiseLaunch& launch, cudaStream_t stream) {
    constexpr auto pass = DepthwisePass::backward_input;
    const char* name = "depthwise_backward_input";
    const int64_t lines = s.batch * s.height;
    if (lines * s.width * s.channels == 0) return {};
    if (!launch.tiled) {
        GeneralArguments<T> args = general_arguments(s, mask);
        args.grad = grad, args.packed = packed, args.out = grad_x;
        const int64_t groups = (s.channels - 1) / kGeneralChannels + 1;
        return check(cvfast::cuda::launch(depthwise_backward_input_general<T>,
                                          general_grid(groups * lines, launch), kGeneralBlock, 0,
                                          stream, args),
                     name, launch);
    }
    if (std::string wrong = check_tiled(s, pass, launch); !wrong.empty()) return wrong;
    // At stride 1 this is the forward kernel with the weights reversed. In general, output u of the
    // padded image (u = 0 is its border) takes input q through tap u - q * stride: rectangles begin
    // at the last multiple of the stride that is not beyond the image's own first pixel, and their
    // inputs (kernel - 1) / stride before that.
    const int64_t stride = s.stride_h;
    TileArguments<T> args{};
    args.out = make_view(grad_x, s.x_image, s.x_row, s.x_pixel, s.height, s.width);
    args.rows = launch.down * launch.thread_rows;
    args.columns = launch.across * launch.thread_columns;
    args.y = -static_cast<int>(s.pad_top % stride), args.x = -static_cast<int>(s.pad_left % stride);
    args.packed = packed;
    args.flip = stride == 1;
    args.whole_words = whole(args.out, s.channels, 4);
    args.activation = Activation::none;
    auto& in = args.inputs;
    int stage_bytes = 0;
    const int64_t reach = (s.kernel_h - 1) / stride;
    const PlaneAxis y{plane_inputs(pass, s.kernel_h, stride, args.rows), s.pad_top / stride - reach,
                      args.rows / stride};
    const PlaneAxis x{plane_inputs(pass, s.kernel_w, stride, args.columns),
                      s.pad_left / stride - reach, args.columns / stride};
    in.planes[0] = make_plane<T>(
        make_view(grad, s.out_image, s.out_row, s.out_pixel, s.out_height, s.out_width), y, x,
        launch, stage_bytes);
    in.planes[1] = make_plane<T>(
        make_view(mask.output, mask.image, mask.row, mask.pixel, s.out_height, s.out_width), y, x,
        launch, stage_bytes);
    in.masked = mask.output != nullptr;
    in.aligned = whole(in.planes[0].view, s.channels, 16) &&
                 (!in.masked || whole(in.planes[1].view, s.channels, 16));
    in.ceiling = ceiling_of(s.activation);
    in.channels = static_cast<int>(s.channels);
    in.strips = launch.across;
    in.grid = make_grid(s, pass, launch, stage_bytes);
    return stride == 1
               ? launch_tiles<ForwardTiles>(s, pass, stride, args, launch, stream, name)
               : launch_tiles<BackwardInputTiles>(s, pass, stride, args, launch, stream, name);
}

template <class T>
std::string depthwise_backward_weight(const DepthwiseShape& s, const T* grad,
                                      const DepthwiseMask<T>& mask, const T* x, float* parts,
                                      float* packed_grad, const DepthwiseLaunch& launch,
                                      cudaStream_t stream) {
    constexpr auto pass = DepthwisePass::backward_weight;
    const char* name = "depthwise_backward_weight";
    const int64_t count = depthwise_backward_weight_parts(s, launch);
    std::string error;
    if (count > 0 && !launch.tiled) {
        GeneralArguments<T> args = general_arguments(s, mask);
        args.grad = grad, args.x = x, args.parts = parts;
        const int64_t groups = (s.channels - 1) / kGeneralChannels + 1;
        const int64_t blocks = s.multiplier * groups * (s.taps() + 1);
        if (blocks > std::numeric_limits<int>::max()) {
            return std::string(name) + ": " + std::to_string(s.packed_size()) +
                   " weights are more than one grid covers";
        }
        const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(count));
        constexpr size_t shared = kGeneralChannels * kGeneralLines * sizeof(float);
        error = check(cvfast::cuda::launch(depthwise_backward_weight_general<T>, grid,
                                           kGeneralBlock, shared, stream, args),
                      name, launch);
    } else if (count > 0) {
        error = check_tiled(s, pass, launch);
        if (!error.empty()) return error;
        WeightGradientArguments<T> args{};
        args.rows = launch.down * launch.thread_rows;
        args.columns = launch.across * launch.thread_columns;
        args.parts = parts, args.packed_size = s.packed_size();
        auto& in = args.inputs;
        int stage_bytes = 0;
        in.planes[0] = make_plane<T>(make_view(x, s.x_image, s.x_row, s.x_pixel, s.height, s.width),
                                     {plane_inputs(pass, s.kernel_h, s.stride_h, args.rows),
                                      -s.pad_top, args.rows * s.stride_h},
                                     {plane_inputs(pass, s.kernel_w, s.stride_w, args.columns),
                                      -s.pad_left, args.columns * s.stride_w},
                                     launch, stage_bytes);
        const PlaneAxis rows{args.rows, 0, args.rows}, columns{args.columns, 0, args.columns};
        in.planes[1] = make_plane<T>(
            make_view(grad, s.out_image, s.out_row, s.out_pixel, s.out_height, s.out_width), rows,
            columns, launch, stage_bytes);
        in.planes[2] = make_plane<T>(
            make_view(mask.output, mask.image, mask.row, mask.pixel, s.out_height, s.out_width),
            rows, columns, launch, stage_bytes);
        in.masked = mask.output != nullptr;
        in.aligned = whole(in.planes[0].view, s.channels, 16) &&
                     whole(in.planes[1].view, s.channels, 16) &&
                     (!in.masked || whole(in.planes[2].view, s.channels, 16));
        in.ceiling = ceiling_of(s.activation);
        in.channels = static_cast<int>(s.channels);
        in.strips = launch.across;
        in.grid = make_grid(s, pass, launch, stage_bytes);
        const auto run = [&]<class Tile>() {
            const int64_t shared =
                depthwise_shared_bytes(pass, s.kernel_h, s.stride_h, sizeof(T), launch);
            error =
                check(cvfast::cuda::launch(depthwise_backward_weight_tile<T, typename Tile::RowsOf,
                                                                          typename Tile::ColumnsOf>,
                                           tile_grid<T>(s, in.grid, launch), tile_block(launch),
                                           static_cast<size_t>(shared), stream, args),
                      name, launch, shared);
        };
        if (!BackwardWeightTiles::run(s.kernel_h, s.stride_h, launch, run)) {
            return no_tile(s, launch, name);
        }
    }
    return error.empty() ? sum_parts(s, parts, count, packed_grad, stream) : error;
}

}  // namespace cvfast::cuda

#define CVFAST_INSTANTIATE_DEPTHWISE(T)                                                           \
    namespace cvfast::cuda {                                                                      \
    template std::string depthwise(const DepthwiseShape&, const T*, const float*, T*,             \
                                   const DepthwiseLaunch&, cudaStream_t);                         \
    template std::string depthwise_backward_input(const DepthwiseShape&, const T*,                \
                                                  const DepthwiseMask<T>&, const float*, T*,      \
                                                  const DepthwiseLaunch&, cudaStream_t);          \
    template std::string depthwise_backward_weight(const DepthwiseShape&, const T*,               \
                                                   const DepthwiseMask<T>&, const T*, float*,     \
                                                   float*, const DepthwiseLaunch&, cudaStream_t); \
    }
