// The kernels of depthwise convolution.
//
// The tile kernels are to be bound by memory. A block owns rectangles of outputs and some channels:
// it copies the inputs of a rectangle to shared memory, 16 bytes at a time and past the registers,
// so that bytes in flight cost nothing but space; with two stages it copies the next rectangle
// meanwhile. A thread owns 4 bytes of channels (two halves or one float) of a small tile: it reads
// each input from shared memory once, converts it once, and keeps weights and sums in registers.
//
// Counted in the code for sm_90, half precision, 3x3, stride 1, ReLU6, 4 x 7 outputs of two
// channels a thread: 1150 instructions, 20.5 per output (9 multiply-adds, 3 to read and
// convert, 3.7 to copy 16 x 14 outputs' inputs, 3.3 to round, activate and store, the rest once per
// tile). An H200 that copies 4.3 TB/s at 1.98 GHz feeds 4.1 outputs to a multiprocessor in a cycle:
// 84 of its 128 lanes. Float32 and stride 2 move more bytes per output and need fewer; 5x5 and 7x7
// at stride 1 are bound by arithmetic there (the 25 x 4.1 multiply-adds alone are 80 % of the
// lanes).
//
// To keep that memory busy for its 0.9 us takes 30 kB in flight a multiprocessor, half of it reads:
// two blocks of one such stage (18 x 17 pixels of 128 bytes) hold 78 kB.
#pragma once

#include <cstdint>

#include "common/depthwise.h"
#include "cuda/element.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/tile.cuh"

namespace cvfast::cuda {

// Elements of T in the 16 bytes that are copied at once.
template <class T>
inline constexpr int kChunk = 16 / sizeof(T);

inline constexpr int kChunkWords = 4;

// Most threads of a block.
inline constexpr int kTileThreads = 256;

// Whether the gradient passes through an activation that gave y; it does for NaN.
__device__ __forceinline__ bool passes(float y, float ceiling) { return !(y <= 0 || y >= ceiling); }

// The weights of one channel: its taps lie kDepthwisePanel floats apart.
__device__ __forceinline__ const float* weights_of(const float* packed, int64_t channel, int taps) {
    return packed + channel / kDepthwisePanel * (taps + 1) * kDepthwisePanel +
           channel % kDepthwisePanel;
}

// Along one axis, a thread's kOutputs outputs draw on kInputs inputs, and the next thread's inputs
// begin kStep further. tap(i, o) is the tap through which output o takes input i, if it does.
// Everything is unrolled over these, so that what a tile computes is decided at compile time.
template <int Taps, int Stride, int Outputs>
struct Correlation {
    static constexpr int kTaps = Taps;
    static constexpr int kStride = Stride;
    static constexpr int kOutputs = Outputs;
    static constexpr int kInputs = (Outputs - 1) * Stride + Taps;
    static constexpr int kStep = Outputs * Stride;
    __host__ __device__ static constexpr int tap(int i, int o) { return i - o * Stride; }
};

// The gradient of a correlation by its input: a thread's outputs begin at a multiple of the stride
// counted from the padded border, and its inputs kReach before the one that lies there.
template <int Taps, int Stride, int Outputs>
struct Transposed {
    static_assert(Outputs % Stride == 0);
    static constexpr int kTaps = Taps;
    static constexpr int kReach = (Taps - 1) / Stride;
    static constexpr int kOutputs = Outputs;
    static constexpr int kInputs = Outputs / Stride + kReach;
    static constexpr int kStep = Outputs / Stride;
    __host__ __device__ static constexpr int tap(int i, int o) { return o - (i - kReach) * Stride; }
};

template <class Axis>
__host__ __device__ constexpr bool is_tap(int tap) {
    return tap >= 0 && tap < Axis::kTaps;
}

// Divides what is below 2^31 by a number that is known on the host.
struct Divider {
    unsigned divisor, multiplier, shift;

    Divider() = default;
    explicit Divider(unsigned d) : divisor(d), shift(31) {
        while ((uint64_t{1} << (shift - 31)) < d) ++shift;
        multiplier = static_cast<unsigned>(((uint64_t{1} << shift) + d - 1) / d);
    }
    __device__ unsigned quotient(unsigned n) const {
        return static_cast<unsigned>((uint64_t{n} * multiplier) >> shift);
    }
};

// Rectangles of an image that go through shared memory, one at a time: [rows][chunks of 16 bytes]
// [pitch pixels][16 bytes], so that the columns a thread reads lie at constant distances. The pitch
// is odd, so that the chunks of a pixel lie in different banks.
template <class T>
struct Plane {
    View<const T> view;
    int rows, pitch;
    Divider columns;
    int row_step;        // rows that the block copies at once
    int y, x;            // first pixel of the first rectangle; may lie outside the image
    int step_y, step_x;  // from one rectangle to the next
    int offset;          // in a stage

    __device__ int row_bytes() const { return static_cast<int>(blockDim.x) * 4 * pitch; }
    // Of channel word `word` of a pixel.
    __device__ int offset_of(int row, int column, int word) const {
        return offset + row * row_bytes() + (word / kChunkWords * pitch + column) * 16 +
               word % kChunkWords * 4;
    }
};

// The rectangles that the outputs are cut into; gridDim.y workers run over them.
struct TileGrid {
    unsigned count;        // batch * down * across
    Divider down, across;  // of one image
    int stages, stage_bytes;
};

struct TilePosition {
    int image, y, x;  // y and x in rectangles

    __device__ TilePosition(const TileGrid& grid, unsigned index) {
        const unsigned line = grid.across.quotient(index);
        x = static_cast<int>(index - line * grid.across.divisor);
        image = static_cast<int>(grid.down.quotient(line));
        y = static_cast<int>(line - image * grid.down.divisor);
    }
};

// Calls f(row, column) for the columns of chunks that this thread copies, from `row` on every
// row_step-th. Four neighbouring threads copy the same chunk of four neighbouring pixels.
template <class T, class F>
__device__ __forceinline__ void for_each_run(const Plane<T>& plane, F f) {
    const int slot = threadIdx.x % kChunkWords + kChunkWords * threadIdx.y;
    const int columns = static_cast<int>(plane.columns.divisor);
    const int row = static_cast<int>(plane.columns.quotient(slot));
    if (row >= plane.row_step) return;
    const int slots = kChunkWords * blockDim.y;
    for (int column = slot - row * columns; column < columns; column += slots) f(row, column);
}

// Copies one rectangle to shared memory, with zeros outside the image and beyond its channels.
// `aligned`: a chunk of channels is either whole and aligned, or beyond the last.
template <class T>
__device__ __forceinline__ void copy_plane(const Plane<T>& plane, const TilePosition& tile,
                                           int channels, bool aligned, unsigned char* stage) {
    const View<const T>& in = plane.view;
    const int word = static_cast<int>(threadIdx.x) & ~(kChunkWords - 1);
    const int channel = (static_cast<int>(blockIdx.x * blockDim.x) + word) * kLanes<T>;
    const int step = plane.row_step;
    const int64_t source_step = step * in.row;
    const int target_step = step * plane.row_bytes();
    const int top = plane.y + tile.y * plane.step_y, left = plane.x + tile.x * plane.step_x;
    for_each_run(plane, [&](int row, int column) {
        const T* source = in.data + tile.image * in.image + (top + row) * in.row +
                          (left + column) * in.pixel + channel;
        unsigned char* target = stage + plane.offset_of(row, column, word);
        const auto clear_until = [&](int end) {
            for (; row < end; row += step, source += source_step, target += target_step) {
                *reinterpret_cast<uint4*>(target) = uint4{};
            }
        };
        const bool inside =
            static_cast<unsigned>(left + column) < static_cast<unsigned>(in.width) &&
            channel < channels;
        const int end = inside ? min(plane.rows, in.height - top) : 0;
        clear_until(min(plane.rows, -top));
        if (aligned) {
#pragma unroll 4
            for (; row < end; row += step, source += source_step, target += target_step) {
                cp_async_16(target, source);
            }
        } else {
#pragma unroll 1
            for (; row < end; row += step, source += source_step, target += target_step) {
#pragma unroll
                for (int c = 0; c < kChunk<T>; ++c) {
                    reinterpret_cast<T*>(target)[c] =
                        channel + c < channels ? source[c] : from_float<T>(0.f);
                }
            }
        }
        clear_until(plane.rows);
    });
}

// Clears the gradient where the activation was flat, in the chunks that this thread copied.
template <class T>
__device__ __forceinline__ void mask_plane(const Plane<T>& gradient, const Plane<T>& output,
                                           float ceiling, unsigned char* stage) {
    const int distance = output.offset - gradient.offset;
    const int step = gradient.row_step * gradient.row_bytes();
    const int word = static_cast<int>(threadIdx.x) & ~(kChunkWords - 1);
    for_each_run(gradient, [&](int first, int column) {
        unsigned char* chunk = stage + gradient.offset_of(first, column, word);
        for (int row = first; row < gradient.rows; row += gradient.row_step, chunk += step) {
#pragma unroll
            for (int byte = 0; byte < 16; byte += 4) {
                T* target = reinterpret_cast<T*>(chunk + byte);
                float g[kLanes<T>], y[kLanes<T>];
                load_word(target, g);
                load_word(reinterpret_cast<const T*>(chunk + byte + distance), y);
#pragma unroll
                for (int l = 0; l < kLanes<T>; ++l) {
                    if (!passes(y[l], ceiling)) g[l] = 0;
                }
                store_word(target, Packed<T>::pack(g));
            }
        }
    });
}

// What every tile kernel is given: the planes that go through shared memory together.
template <class T, int Planes>
struct TileInputs {
    Plane<T> planes[Planes];
    bool masked;    // the last plane is the forward output, and masks the gradient before it
    bool aligned;   // 16-byte copies
    float ceiling;  // of the activation that the mask undoes
    int channels;
    int strips;  // threads of a block along a row
    TileGrid grid;
};

// Runs over the rectangles of this block: use(tile, stage) computes with what was copied. With two
// stages the next rectangle is copied meanwhile.
template <class T, int Planes, class Use>
__device__ __forceinline__ void for_each_tile(const TileInputs<T, Planes>& in, Use use) {
    unsigned char* shared = dynamic_shared<unsigned char>();
    const unsigned lag = in.grid.stages - 1;
    const unsigned behind = lag * gridDim.y;
    unsigned copied = 0;  // the stage that is copied to, 0 or lag
    for (unsigned next = blockIdx.y; next < in.grid.count + behind; next += gridDim.y) {
        unsigned char* stage = shared + copied * in.grid.stage_bytes;
        copied ^= lag;
        if (next < in.grid.count) {
            const TilePosition tile(in.grid, next);
#pragma unroll
            for (int p = 0; p < Planes; ++p) {
                if (p < Planes - 1 || in.masked) {
                    copy_plane(in.planes[p], tile, in.channels, in.aligned, stage);
                }
            }
        }
        cp_async_commit();
        if (next < blockIdx.y + behind) continue;
        if (lag) {
            cp_async_wait<1>();
            stage = shared + copied * in.grid.stage_bytes;
        } else {
            cp_async_wait<0>();
        }
        if (in.masked) {
            mask_plane(in.planes[Planes - 2], in.planes[Planes - 1], in.ceiling, stage);
        }
        __syncthreads();
        use(TilePosition(in.grid, next - behind), stage);
        __syncthreads();
    }
}

// The weights or, in a row of their own, the bias of one thread's channels.
template <class T>
struct alignas(sizeof(float) * kLanes<T>) Floats {
    float lane[kLanes<T>];
};

// Blocks of kTileThreads threads for which a multiprocessor must have registers: a thread's weights
// and sums, and about 35 more, fit into 80, 128 or 255.
template <class Rows, class Columns>
inline constexpr int kResident = [] {
    constexpr int values = Rows::kTaps * Columns::kTaps + Rows::kOutputs * Columns::kOutputs;
    return values <= 25 ? 3 : values <= 41 ? 2 : 1;
}();

template <class T>
struct TileArguments {
    TileInputs<T, 2> inputs;
    View<T> out;
    int rows, columns;  // outputs of a rectangle
    int y, x;           // first output of the first rectangle; may lie outside the image
    const float* packed;
    bool flip;  // weights in reverse: the gradient at stride 1
    bool with_bias;
    bool whole_words;  // 4-byte stores
    Activation activation;
};

// The forward pass and the gradient by the input. Rows, Columns: Correlation or Transposed. Grid:
// (blocks of channels, workers); block: (words of channels, rows x columns of threads).
template <class T, class Rows, class Columns>
__global__ void __launch_bounds__(kTileThreads, kResident<Rows, Columns>)
    depthwise_tile(const TileArguments<T> args) {
    constexpr int kTaps = Rows::kTaps * Columns::kTaps;
    constexpr int L = kLanes<T>;
    const TileInputs<T, 2>& in = args.inputs;
    const int channel = (blockIdx.x * blockDim.x + threadIdx.x) * L;
    const int strip_y = threadIdx.y / in.strips, strip_x = threadIdx.y % in.strips;

    Floats<T> weight[kTaps] = {}, bias = {};
    if (channel < in.channels) {
        const float* w = weights_of(args.packed, channel, kTaps);
        const float* tap = w + (args.flip ? (kTaps - 1) * kDepthwisePanel : 0);
        const int step = args.flip ? -kDepthwisePanel : kDepthwisePanel;
#pragma unroll
        for (int t = 0; t < kTaps; ++t, tap += step) {
            weight[t] = load_read_only(reinterpret_cast<const Floats<T>*>(tap));
        }
        if (args.with_bias) {
            bias = load_read_only(reinterpret_cast<const Floats<T>*>(w + kTaps * kDepthwisePanel));
        }
    }

    const int first =
        in.planes[0].offset_of(strip_y * Rows::kStep, strip_x * Columns::kStep, threadIdx.x);
    const int row_bytes = in.planes[0].row_bytes();
    for_each_tile(in, [&](const TilePosition& tile, const unsigned char* stage) {
        float sum[Rows::kOutputs][Columns::kOutputs][L];
#pragma unroll
        for (int o = 0; o < Rows::kOutputs; ++o) {
#pragma unroll
            for (int p = 0; p < Columns::kOutputs; ++p) {
#pragma unroll
                for (int l = 0; l < L; ++l) sum[o][p][l] = bias.lane[l];
            }
        }
        const unsigned char* row = stage + first;
#pragma unroll
        for (int i = 0; i < Rows::kInputs; ++i, row += row_bytes) {
#pragma unroll
            for (int j = 0; j < Columns::kInputs; ++j) {
                float x[L];
                load_word(reinterpret_cast<const T*>(row + j * 16), x);
#pragma unroll
                for (int o = 0; o < Rows::kOutputs; ++o) {
                    const int a = Rows::tap(i, o);
#pragma unroll
                    for (int p = 0; p < Columns::kOutputs; ++p) {
                        const int b = Columns::tap(j, p);
                        if (!is_tap<Rows>(a) || !is_tap<Columns>(b)) continue;
#pragma unroll
                        for (int l = 0; l < L; ++l) {
                            sum[o][p][l] =
                                fmaf(x[l], weight[a * Columns::kTaps + b].lane[l], sum[o][p][l]);
                        }
                    }
                }
            }
        }
        if (channel >= in.channels) return;
        typename Packed<T>::Word word[Rows::kOutputs][Columns::kOutputs];
        activate_words<T>(sum, args.activation, word);

        const int y = args.y + tile.y * args.rows + strip_y * Rows::kOutputs;
        const int x = args.x + tile.x * args.columns + strip_x * Columns::kOutputs;
        T* out = args.out.data + tile.image * args.out.image + y * args.out.row +
                 x * args.out.pixel + channel;
        const int height = args.out.height, width = args.out.width;
        const auto store = [&](auto within, auto put) {
#pragma unroll
            for (int o = 0; o < Rows::kOutputs; ++o, out += args.out.row) {
                T* pixel = out;
#pragma unroll
                for (int p = 0; p < Columns::kOutputs; ++p, pixel += args.out.pixel) {
                    if (within(y + o, height) && within(x + p, width)) put(pixel, word[o][p]);
                }
            }
        };
        const auto always = [](int, int) { return true; };
        const auto checked = [](int position, int size) {
            return static_cast<unsigned>(position) < static_cast<unsigned>(size);
        };
        const auto put_word = [](T* p, typename Packed<T>::Word values) { store_word(p, values); };
        if (!args.whole_words) {
            store(checked, [&](T* p, typename Packed<T>::Word values) {
                float value[L];
                load_word(reinterpret_cast<const T*>(&values), value);
#pragma unroll
                for (int l = 0; l < L; ++l) {
                    if (channel + l < in.channels) p[l] = from_float<T>(value[l]);
                }
            });
        } else if (y >= 0 && x >= 0 && y + Rows::kOutputs <= height &&
                   x + Columns::kOutputs <= width) {
            store(always, put_word);
        } else {
            store(checked, put_word);
        }
    });
}

template <class T>
struct WeightGradientArguments {
    TileInputs<T, 3> inputs;  // x, the gradient, and perhaps the output
    int rows, columns;        // of the gradient's rectangles
    float* parts;             // [workers][size of packed weights]
    int64_t packed_size;
};

// Sums of x times gradient over this worker's rectangles, and of the gradient for the bias. Rows,
// Columns: the Correlation of the forward pass; the loops are the same, but weights are what is
// summed and a thread's tile of the gradient is what is kept in registers. Grid and block as above.
template <class T, class Rows, class Columns>
__global__ void __launch_bounds__(kTileThreads, kResident<Rows, Columns>)
    depthwise_backward_weight_tile(const WeightGradientArguments<T> args) {
    constexpr int kTaps = Rows::kTaps * Columns::kTaps;
    constexpr int L = kLanes<T>;
    const TileInputs<T, 3>& in = args.inputs;
    const int channel = (blockIdx.x * blockDim.x + threadIdx.x) * L;
    const int strip_y = threadIdx.y / in.strips, strip_x = threadIdx.y % in.strips;
    const Plane<T>& x_plane = in.planes[0];
    const Plane<T>& g_plane = in.planes[1];
    const int x_first =
        x_plane.offset_of(strip_y * Rows::kStep, strip_x * Columns::kStep, threadIdx.x);
    const int g_first =
        g_plane.offset_of(strip_y * Rows::kOutputs, strip_x * Columns::kOutputs, threadIdx.x);
    const int x_row = x_plane.row_bytes(), g_row = g_plane.row_bytes();

    Floats<T> sum[kTaps + 1] = {};
    for_each_tile(in, [&](const TilePosition& tile, const unsigned char* stage) {
        const int rows = g_plane.view.height - tile.y * args.rows - strip_y * Rows::kOutputs;
        const int columns =
            g_plane.view.width - tile.x * args.columns - strip_x * Columns::kOutputs;
        if (rows < Rows::kOutputs || columns < Columns::kOutputs) {
            // Outside, the gradient counts as absent and not as zero: x may be infinite.
#pragma unroll 1
            for (int o = 0; o < min(rows, Rows::kOutputs); ++o) {
#pragma unroll 1
                for (int p = 0; p < min(columns, Columns::kOutputs); ++p) {
                    float g[L];
                    load_word(reinterpret_cast<const T*>(stage + g_first + o * g_row + p * 16), g);
                    const unsigned char* corner =
                        stage + x_first + o * Rows::kStride * x_row + p * Columns::kStride * 16;
#pragma unroll
                    for (int t = 0; t < kTaps; ++t) {
                        float x[L];
                        load_word(reinterpret_cast<const T*>(corner + t / Columns::kTaps * x_row +
                                                             t % Columns::kTaps * 16),
                                  x);
#pragma unroll
                        for (int l = 0; l < L; ++l) {
                            sum[t].lane[l] = fmaf(x[l], g[l], sum[t].lane[l]);
                        }
                    }
#pragma unroll
                    for (int l = 0; l < L; ++l) sum[kTaps].lane[l] += g[l];
                }
            }
            return;
        }
        float g[Rows::kOutputs][Columns::kOutputs][L];
#pragma unroll
        for (int o = 0; o < Rows::kOutputs; ++o) {
#pragma unroll
            for (int p = 0; p < Columns::kOutputs; ++p) {
                load_word(reinterpret_cast<const T*>(stage + g_first + o * g_row + p * 16),
                          g[o][p]);
#pragma unroll
                for (int l = 0; l < L; ++l) sum[kTaps].lane[l] += g[o][p][l];
            }
        }
        const unsigned char* row = stage + x_first;
#pragma unroll
        for (int i = 0; i < Rows::kInputs; ++i, row += x_row) {
#pragma unroll
            for (int j = 0; j < Columns::kInputs; ++j) {
                float x[L];
                load_word(reinterpret_cast<const T*>(row + j * 16), x);
#pragma unroll
                for (int o = 0; o < Rows::kOutputs; ++o) {
                    const int a = Rows::tap(i, o);
#pragma unroll
                    for (int p = 0; p < Columns::kOutputs; ++p) {
                        const int b = Columns::tap(j, p);
                        if (!is_tap<Rows>(a) || !is_tap<Columns>(b)) continue;
                        const int t = a * Columns::kTaps + b;
#pragma unroll
                        for (int l = 0; l < L; ++l) {
                            sum[t].lane[l] = fmaf(x[l], g[o][p][l], sum[t].lane[l]);
                        }
                    }
                }
            }
        }
    });

    // Threads of the same channels add up, in order.
    auto* shared = dynamic_shared<Floats<T>>();
    const int line = (kTaps + 1) * blockDim.x;
#pragma unroll
    for (int t = 0; t <= kTaps; ++t) {
        shared[threadIdx.y * line + t * blockDim.x + threadIdx.x] = sum[t];
    }
    __syncthreads();
    if (channel >= in.channels) return;
    float* part = args.parts + blockIdx.y * args.packed_size +
                  channel / kDepthwisePanel * (kTaps + 1) * kDepthwisePanel +
                  channel % kDepthwisePanel;
    for (int t = threadIdx.y; t <= kTaps; t += blockDim.y) {
        const Floats<T>* term = shared + t * blockDim.x + threadIdx.x;
        Floats<T> total{};
        for (int y = 0; y < static_cast<int>(blockDim.y); ++y, term += line) {
#pragma unroll
            for (int l = 0; l < L; ++l) total.lane[l] += term->lane[l];
        }
        *reinterpret_cast<Floats<T>*>(part + t * kDepthwisePanel) = total;
    }
}

// The general kernels take any kernel size, stride, padding, dilation, multiplier and layout, and
// count in 64 bits. Block: (kGeneralChannels, kGeneralLines); blocks and, within them, the second
// index of threads run over what there is to do.
inline constexpr int kGeneralChannels = 32, kGeneralLines = 8;

template <class T>
struct GeneralArguments {
    DepthwiseShape shape;
    const T* x;     // of the forward pass, and of the gradient of the weights
    const T* grad;  // of the gradients; strides out_*
    const T* mask;  // null: none
    int64_t mask_image, mask_row, mask_pixel;
    float ceiling;
    const float* packed;
    T* out;  // strides out_* in the forward pass, x_* in the gradient by the input
    float* parts;
};

// Window positions o at which tap `t` reads a given input lie at o * stride == position: quotient,
// or -1.
__device__ __forceinline__ int64_t window(int64_t position, int64_t stride, int64_t count) {
    return position >= 0 && position % stride == 0 && position / stride < count ? position / stride
                                                                                : -1;
}

// The gradient before the activation, at output channel `channel` of a pixel.
template <class T>
__device__ __forceinline__ float gradient_at(const GeneralArguments<T>& args, int64_t image,
                                             int64_t y, int64_t x, int64_t channel) {
    const DepthwiseShape& s = args.shape;
    const float g =
        to_float(args.grad[image * s.out_image + y * s.out_row + x * s.out_pixel + channel]);
    if (!args.mask) return g;
    const float value = to_float(
        args.mask[image * args.mask_image + y * args.mask_row + x * args.mask_pixel + channel]);
    return passes(value, args.ceiling) ? g : 0.f;
}

template <class T>
__global__ void __launch_bounds__(kGeneralChannels* kGeneralLines)
    depthwise_general(const GeneralArguments<T> args) {
    const DepthwiseShape& s = args.shape;
    const int64_t out_channels = s.channels * s.multiplier;
    const int64_t groups = (out_channels + kGeneralChannels - 1) / kGeneralChannels;
    const int64_t lines = s.batch * s.out_height;
    const int taps = static_cast<int>(s.taps());
    for (int64_t job = blockIdx.x; job < groups * lines; job += gridDim.x) {
        const int64_t channel = job % groups * kGeneralChannels + threadIdx.x;
        const int64_t image = job / groups / s.out_height, y = job / groups % s.out_height;
        if (channel >= out_channels) continue;
        const int64_t c = channel / s.multiplier, j = channel % s.multiplier;
        const float* w =
            weights_of(args.packed + j * s.panels() * (taps + 1) * kDepthwisePanel, c, taps);
        for (int64_t x = threadIdx.y; x < s.out_width; x += kGeneralLines) {
            float sum = w[taps * kDepthwisePanel];
            for (int64_t a = 0; a < s.kernel_h; ++a) {
                const int64_t in_y = y * s.stride_h - s.pad_top + a * s.dilation_h;
                if (in_y < 0 || in_y >= s.height) continue;
                for (int64_t b = 0; b < s.kernel_w; ++b) {
                    const int64_t in_x = x * s.stride_w - s.pad_left + b * s.dilation_w;
                    if (in_x < 0 || in_x >= s.width) continue;
                    const T value =
                        args.x[image * s.x_image + in_y * s.x_row + in_x * s.x_pixel + c];
                    sum = fmaf(to_float(value), w[(a * s.kernel_w + b) * kDepthwisePanel], sum);
                }
            }
            args.out[image * s.out_image + y * s.out_row + x * s.out_pixel + channel] =
                from_float<T>(activate(sum, s.activation));
        }
    }
}

template <class T>
__global__ void __launch_bounds__(kGeneralChannels* kGeneralLines)
    depthwise_backward_input_general(const GeneralArguments<T> args) {
    const DepthwiseShape& s = args.shape;
    const int64_t groups = (s.channels + kGeneralChannels - 1) / kGeneralChannels;
    const int64_t lines = s.batch * s.height;
    const int taps = static_cast<int>(s.taps());
    for (int64_t job = blockIdx.x; job < groups * lines; job += gridDim.x) {
        const int64_t c = job % groups * kGeneralChannels + threadIdx.x;
        const int64_t image = job / groups / s.height, y = job / groups % s.height;
        if (c >= s.channels) continue;
        const float* w = weights_of(args.packed, c, taps);
        const int64_t step_size = s.panels() * (taps + 1) * kDepthwisePanel;
        for (int64_t x = threadIdx.y; x < s.width; x += kGeneralLines) {
            float sum = 0;
            for (int64_t a = 0; a < s.kernel_h; ++a) {
                const int64_t out_y =
                    window(y + s.pad_top - a * s.dilation_h, s.stride_h, s.out_height);
                if (out_y < 0) continue;
                for (int64_t b = 0; b < s.kernel_w; ++b) {
                    const int64_t out_x =
                        window(x + s.pad_left - b * s.dilation_w, s.stride_w, s.out_width);
                    if (out_x < 0) continue;
                    const float* tap = w + (a * s.kernel_w + b) * kDepthwisePanel;
                    for (int64_t j = 0; j < s.multiplier; ++j) {
                        const float g =
                            gradient_at(args, image, out_y, out_x, c * s.multiplier + j);
                        sum = fmaf(g, tap[j * step_size], sum);
                    }
                }
            }
            args.out[image * s.x_image + y * s.x_row + x * s.x_pixel + c] = from_float<T>(sum);
        }
    }
}

// Grid: (multiplier * groups of channels * (taps + 1), parts).
template <class T>
__global__ void __launch_bounds__(kGeneralChannels* kGeneralLines)
    depthwise_backward_weight_general(const GeneralArguments<T> args) {
    const DepthwiseShape& s = args.shape;
    const int taps = static_cast<int>(s.taps());
    const int64_t groups = (s.channels + kGeneralChannels - 1) / kGeneralChannels;
    const int tap = static_cast<int>(blockIdx.x % (taps + 1));
    const int64_t group = blockIdx.x / (taps + 1) % groups;
    const int64_t j = blockIdx.x / (taps + 1) / groups;
    const int64_t c = group * kGeneralChannels + threadIdx.x;
    const bool bias = tap == taps;
    const int64_t a = bias ? 0 : tap / s.kernel_w, b = bias ? 0 : tap % s.kernel_w;
    float sum = 0;
    if (c < s.channels) {
        const int64_t lines = s.batch * s.out_height;
        const int64_t stride = static_cast<int64_t>(gridDim.y) * kGeneralLines;
        for (int64_t line = blockIdx.y * kGeneralLines + threadIdx.y; line < lines;
             line += stride) {
            const int64_t image = line / s.out_height, y = line % s.out_height;
            const int64_t in_y = y * s.stride_h - s.pad_top + a * s.dilation_h;
            if (!bias && (in_y < 0 || in_y >= s.height)) continue;
            for (int64_t x = 0; x < s.out_width; ++x) {
                const int64_t in_x = x * s.stride_w - s.pad_left + b * s.dilation_w;
                if (!bias && (in_x < 0 || in_x >= s.width)) continue;
                const float g = gradient_at(args, image, y, x, c * s.multiplier + j);
                const float value =
                    bias ? 1.f
                         : to_float(
                               args.x[image * s.x_image + in_y * s.x_row + in_x * s.x_pixel + c]);
                sum = fmaf(g, value, sum);
            }
        }
    }
    float* shared = dynamic_shared<float>();
    shared[threadIdx.y * kGeneralChannels + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < s.channels) {
        float total = 0;
        for (int l = 0; l < kGeneralLines; ++l) total += shared[l * kGeneralChannels + threadIdx.x];
        args.parts[blockIdx.y * s.packed_size() +
                   ((j * s.panels() + c / kDepthwisePanel) * (taps + 1) + tap) * kDepthwisePanel +
                   c % kDepthwisePanel] = total;
    }
}

}  // namespace cvfast::cuda
