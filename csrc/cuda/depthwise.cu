// What the depthwise kernels share whatever their element type: checks, sizes, and the sum of
// partial gradients.
#include "cuda/depthwise_launch.cuh"

namespace cvfast::cuda {
namespace {

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Beyond this, sizes computed from a launch could overflow before a ladder refuses it.
constexpr int kMaxThreadTile = 16;

constexpr int kSumElements = 32, kSumSlices = 32;

// packed_grad = the sum of `count` parts, in an order that depends on `count` alone. Block:
// (kSumElements, kSumSlices).
__global__ void __launch_bounds__(kSumElements* kSumSlices)
    depthwise_sum_parts(const float* parts, int64_t count, int64_t packed_size, int64_t channels,
                        int64_t panels, int64_t taps, float* packed_grad) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumElements + threadIdx.x;
    const int64_t panel = i / (kDepthwisePanel * (taps + 1)) % panels;
    const bool within = i < packed_size && panel * kDepthwisePanel + i % kDepthwisePanel < channels;
    float sum = 0;
    if (within) {
        for (int64_t p = threadIdx.y; p < count; p += kSumSlices) sum += parts[p * packed_size + i];
    }
    float* shared = dynamic_shared<float>();
    shared[threadIdx.y * kSumElements + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && i < packed_size) {
        float total = 0;
        for (int s = 0; s < kSumSlices; ++s) total += shared[s * kSumElements + threadIdx.x];
        packed_grad[i] = total;
    }
}

}  // namespace

std::string describe(const DepthwiseLaunch& l) {
    if (!l.tiled) return "a general launch of " + std::to_string(l.workers) + " workers";
    return "a tiled launch of " + std::to_string(l.thread_rows) + "x" +
           std::to_string(l.thread_columns) + " outputs a thread, " + std::to_string(l.down) + "x" +
           std::to_string(l.across) + " threads, " + std::to_string(l.words) +
           " words of channels, " + std::to_string(l.stages) + " stages, " +
           std::to_string(l.workers) + " workers";
}

std::string check(cudaError_t error, const char* kernel, const DepthwiseLaunch& launch,
                  int64_t shared_bytes) {
    if (error == cudaSuccess) return {};
    return std::string(kernel) + ": " + cudaGetErrorString(error) + ", from " + describe(launch) +
           " and " + std::to_string(shared_bytes) + " bytes of shared memory";
}

std::string parse_launch(const std::vector<int64_t>& numbers, DepthwiseLaunch& launch) {
    constexpr size_t kNumbers = 8;
    if (numbers.size() != kNumbers) {
        return "launch has " + std::to_string(numbers.size()) + " numbers, expected " +
               std::to_string(kNumbers);
    }
    for (const int64_t n : numbers) {
        if (n < 0 || n > std::numeric_limits<int>::max()) {
            return "launch holds " + std::to_string(n) + ", which is no count";
        }
    }
    int fields[kNumbers];
    for (size_t i = 0; i < kNumbers; ++i) fields[i] = static_cast<int>(numbers[i]);
    launch = {fields[0] != 0, fields[1], fields[2], fields[3],
              fields[4],      fields[5], fields[6], fields[7]};
    if (launch.workers < 1) return "a launch needs at least one worker";
    return {};
}

int64_t plane_inputs(DepthwisePass pass, int64_t kernel, int64_t stride, int64_t outputs) {
    if (pass == DepthwisePass::backward_input) return outputs / stride + (kernel - 1) / stride;
    return (outputs - 1) * stride + kernel;
}

int64_t depthwise_shared_bytes(DepthwisePass pass, int64_t kernel, int64_t stride,
                               int64_t element_size, const DepthwiseLaunch& launch) {
    const int64_t rows = int64_t{launch.down} * launch.thread_rows;
    const int64_t columns = int64_t{launch.across} * launch.thread_columns;
    const int64_t pixel = int64_t{launch.words} * 4;
    const auto plane = [pixel](int64_t height, int64_t width) {
        return height * (width | 1) * pixel;
    };
    const int64_t inputs = plane(plane_inputs(pass, kernel, stride, rows),
                                 plane_inputs(pass, kernel, stride, columns));
    switch (pass) {
        case DepthwisePass::forward:
            return launch.stages * inputs;
        case DepthwisePass::backward_input:
            return launch.stages * 2 * inputs;
        case DepthwisePass::backward_weight:
            return std::max<int64_t>(launch.stages * (inputs + 2 * plane(rows, columns)),
                                     int64_t{launch.down} * launch.across * (kernel * kernel + 1) *
                                         launch.words * (4 / element_size) *
                                         int64_t{sizeof(float)});
    }
    return 0;
}

TileCount tile_count(const DepthwiseShape& s, DepthwisePass pass, const DepthwiseLaunch& launch) {
    const int64_t rows = int64_t{launch.down} * launch.thread_rows;
    const int64_t columns = int64_t{launch.across} * launch.thread_columns;
    if (pass == DepthwisePass::backward_input) {
        return {s.batch, ceil_divide(s.height + s.pad_top % s.stride_h, rows),
                ceil_divide(s.width + s.pad_left % s.stride_w, columns)};
    }
    return {s.batch, ceil_divide(s.out_height, rows), ceil_divide(s.out_width, columns)};
}

std::string check_tiled(const DepthwiseShape& s, DepthwisePass pass, const DepthwiseLaunch& l) {
    const auto wrong = [&](const std::string& reason) { return describe(l) + ": " + reason; };
    if (s.multiplier != 1 || s.dilation_h != 1 || s.dilation_w != 1 || s.kernel_h != s.kernel_w ||
        s.stride_h != s.stride_w) {
        return wrong(
            "the tile kernels take square kernels and strides, dilation 1 and multiplier 1; use a "
            "general launch");
    }
    for (const int count :
         {l.thread_rows, l.thread_columns, l.down, l.across, l.words / kChunkWords}) {
        if (count < 1 || count > kTileThreads) {
            return wrong("every count must lie between 1 and " + std::to_string(kTileThreads));
        }
    }
    if (std::max(l.thread_rows, l.thread_columns) > kMaxThreadTile) {
        return wrong("at most " + std::to_string(kMaxThreadTile) + " outputs a thread each way");
    }
    if (l.words % kChunkWords) {
        return wrong("words must be a multiple of " + std::to_string(kChunkWords));
    }
    if (int64_t{l.words} * l.down * l.across > kTileThreads) {
        return wrong("at most " + std::to_string(kTileThreads) + " threads a block");
    }
    if (l.stages != 1 && l.stages != 2) return wrong("stages must be 1 or 2");
    if (l.workers > kMaxGridY) return wrong("at most " + std::to_string(kMaxGridY) + " workers");
    const int64_t sizes[] = {s.channels, s.height,   s.width,    s.out_height, s.out_width,
                             s.pad_top,  s.pad_left, s.kernel_h, s.stride_h};
    if (std::any_of(std::begin(sizes), std::end(sizes), [](int64_t n) { return n > kTileLimit; }) ||
        tile_count(s, pass, l).total() > std::numeric_limits<int>::max()) {
        return wrong("the image is too large for 32-bit counts; use a general launch");
    }
    return {};
}

int64_t depthwise_backward_weight_parts(const DepthwiseShape& s, const DepthwiseLaunch& launch) {
    const int64_t jobs = launch.tiled
                             ? tile_count(s, DepthwisePass::backward_weight, launch).total()
                             : ceil_divide(s.batch * s.out_height, kGeneralLines);
    return s.channels == 0 ? 0 : std::min({jobs, int64_t{launch.workers}, kMaxGridY});
}

std::string sum_parts(const DepthwiseShape& s, const float* parts, int64_t count,
                      float* packed_grad, cudaStream_t stream) {
    const int64_t blocks = ceil_divide(s.packed_size(), kSumElements);
    if (blocks == 0) return {};
    constexpr size_t shared = kSumElements * kSumSlices * sizeof(float);
    const cudaError_t error =
        launch(depthwise_sum_parts, dim3(static_cast<unsigned>(blocks)),
               dim3(kSumElements, kSumSlices), shared, stream, parts, count, s.packed_size(),
               s.channels, s.panels(), s.taps(), packed_grad);
    if (error == cudaSuccess) return {};
    return std::string("depthwise_sum_parts: ") + cudaGetErrorString(error);
}

}  // namespace cvfast::cuda
