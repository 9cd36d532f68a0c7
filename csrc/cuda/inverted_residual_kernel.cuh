// The kernels of the inverted residual: the structure of attention, with a stencil in the middle.
//
// A block owns a tile of outputs and walks over the hidden channels, kChunk at a time:
//
//   x tile + halo --expand, mma--> hidden --depthwise--> filtered --project, mma--> sums
//     (all channels)             (one chunk)           (one chunk)           (registers, to the
//     end)
//
// x, hidden and filtered lie in shared memory as matrices of 16-bit elements with a pixel a row.
// The expansion is computed for pixels of the image only and scattered into the rectangle that the
// depthwise convolution reads; what lies outside was cleared once and stays zero, since it is the
// expanded tensor that is padded. Without an expansion, chunks of x are copied into that rectangle.
//
// Two barriers a chunk: project the chunk before and expand this one | convolve this one. Weights
// of the next chunk travel while this one is convolved, into the memory of those that were used up
// just before: counted for 64-384-64 at 14x14, 7 x 14 outputs a tile, the convolution is 56 % of a
// chunk's instructions, 1800 cycles where two blocks share a multiprocessor, and an L2 cache
// answers in 300. A second buffer would cost 64 (C + O) bytes and with it resident blocks.
//
// mma.sync and not wgmma on sm_90: the tensor cores are busy for 6 to 36 % of the time that the
// other instructions need to issue, down to 14x14, and wgmma's tiles of 64 rows would not fit the
// 49 pixels of the planes below.
#pragma once

#include <cstdint>

#include "common/depthwise.h"
#include "common/inverted_residual.h"
#include "cuda/element.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/tile.cuh"

namespace cvfast::cuda {

// Hidden channels that are in shared memory at a time.
inline constexpr int kChunk = 32;
inline constexpr int kChunkPitch = matrix_pitch(kChunk);
inline constexpr int kPanels = kChunk / kDepthwisePanel;

// Most threads of a block.
inline constexpr int kBlockThreads = 256;

// Neighbouring outputs of a row that a thread of the depthwise convolution computes, of two
// channels: 4.5 loads an output at 3x3, and no column wasted where four divide them.
inline constexpr int kStrip = 4;

// Floats of a row of the fragments that a warp turns into rows of channels.
inline constexpr int kTurnPitch = kMatrix + 4;
inline constexpr int kTurnFloats = kMatrix * kTurnPitch;

// What is decided at compile time. Width: 16-channel columns of the projection that a warp sums; 0
// where there is no projection, and the kernel writes what is filtered and the means of its rows.
template <int Kernel, int Stride, int Width>
struct BlockTraits {
    static constexpr int kKernel = Kernel;
    static constexpr int kStride = Stride;
    static constexpr int kWidth = Width;
    static constexpr bool kProjects = Width > 0;
    static constexpr int kHeight = 2;  // rows of 16 pixels that a warp sums
    static constexpr int kSums = kHeight * Width * 8;
    static constexpr int kTaps = Kernel * Kernel;
    static constexpr int kStripInputs = (kStrip - 1) * Stride + Kernel;
    static constexpr int kPanelFloats = (kTaps + 1) * kDepthwisePanel;
    // Blocks of kBlockThreads threads for which a multiprocessor must have registers: 255, 128 or
    // 80 a thread.
    static constexpr int kResident = kSums > 64 ? 1 : kSums > 0 ? 2 : 3;

    static_assert(Kernel % 2 == 1 && Kernel <= 7);
    static_assert(Stride == 1 || Stride == 2);
    static_assert(kSums <= 128, "sums must leave a thread registers to compute with");
    static_assert(kPanelFloats % 4 == 0, "panels are copied 16 bytes at a time");
    static_assert(kChunk % kMatrix == 0 && kChunk % kDepthwisePanel == 0);
};

// Where things lie in a block's shared memory, in bytes from its start, each aligned to 16.
struct SharedLayout {
    int x;       // [input pixels][channels]
    int hidden;  // [images][rectangle][kChunk]; twice, one chunk after the other, without expand
    int hidden_next;              // distance of the second
    int filtered;                 // [outputs][kChunk]
    int expand;                   // [channels][kChunk]
    int expand_bias;              // [kChunk] floats
    int project;                  // [kChunk][out_channels]
    int depthwise;                // panels of two chunks
    int inputs, outputs, strips;  // TilePixels
    int total;
};

// A place in a tile: of an input, in the rectangle; of an output or a strip's first, among outputs.
struct TilePixel {
    uint8_t image, y, x, unused;
};

template <class T>
struct BlockArguments {
    View<const T> x, residual;
    View<T> out, means;  // a pixel of means is a row of out
    const T* expand;     // null: none
    const T* project;
    const float *expand_bias, *depthwise, *project_bias;
    float* partials;  // null: the projection is not split
    int batch, channels, hidden, out_channels;
    int pad_top, pad_left;
    int rows, columns, images;                      // of a tile
    int tiles_down, tiles_across;                   // of an image
    int across;                                     // warps along the channels of the projection
    int chunks;                                     // of a split
    bool x_aligned, residual_aligned, out_aligned;  // 16-byte vectors
    Activation expand_activation, depthwise_activation, activation;
    SharedLayout shared;
};

__device__ __forceinline__ TilePixel pixel_of(int index, int rows, int columns) {
    const int line = index / columns;
    return {static_cast<uint8_t>(line / rows), static_cast<uint8_t>(line % rows),
            static_cast<uint8_t>(index - line * columns), 0};
}

// 8 channels of an output: activated, rounded and stored.
template <class T>
__device__ __forceinline__ void store_output(float (&value)[kVector], const BlockArguments<T>& args,
                                             int image, int y, int x, int channel) {
    const int channels = args.out_channels - channel;
    if (args.residual.data) {
        const T* residual = args.residual.at(image, y, x) + channel;
        if (args.residual_aligned) {
            const uint4 words = load_read_only(reinterpret_cast<const uint4*>(residual));
            const uint32_t word[] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int c = 0; c < kVector; c += 2) {
                float pair[2];
                load_word(reinterpret_cast<const T*>(&word[c / 2]), pair);
                value[c] += pair[0], value[c + 1] += pair[1];
            }
        } else {
#pragma unroll
            for (int c = 0; c < kVector; ++c) {
                if (c < channels) value[c] += to_float(residual[c]);
            }
        }
    }
    float sum[1][kVector / 2][2];
#pragma unroll
    for (int c = 0; c < kVector; ++c) sum[0][c / 2][c % 2] = value[c];
    typename Packed<T>::Word word[1][kVector / 2];
    activate_words<T>(sum, args.activation, word);
    uint4 vector;
    std::memcpy(&vector, word, sizeof(vector));
    store_channels(args.out.at(image, y, x) + channel, vector, channels, args.out_aligned);
}

// A block's tile, and what its threads do with it.
template <class T, class Traits>
class BlockTile {
  public:
    __device__ __forceinline__ explicit BlockTile(const BlockArguments<T>& arguments)
        : args(arguments), memory(dynamic_shared<unsigned char>()) {
        const int line = static_cast<int>(blockIdx.x) / args.tiles_across;
        first_image = line / args.tiles_down * args.images;
        images = min(args.images, args.batch - first_image);
        top = line % args.tiles_down * args.rows;
        left = (static_cast<int>(blockIdx.x) - line * args.tiles_across) * args.columns;
        rows = min(args.rows, args.out.height - top);
        columns = min(args.columns, args.out.width - left);
        // The rectangle that a full tile reads, and what of it lies in the image.
        rectangle_rows = (args.rows - 1) * Traits::kStride + Traits::kKernel;
        rectangle_columns =
            (round_up(args.columns, kStrip) - 1) * Traits::kStride + Traits::kKernel;
        in_top = top * Traits::kStride - args.pad_top;
        in_left = left * Traits::kStride - args.pad_left;
        skip_rows = max(0, -in_top), skip_columns = max(0, -in_left);
        in_rows =
            max(0, min((rows - 1) * Traits::kStride + Traits::kKernel, args.x.height - in_top) -
                       skip_rows);
        in_columns =
            max(0, min((columns - 1) * Traits::kStride + Traits::kKernel, args.x.width - in_left) -
                       skip_columns);
        inputs = images * in_rows * in_columns;
        outputs = images * rows * columns;
        first_chunk = static_cast<int>(blockIdx.y) * args.chunks;
        chunks = min(args.chunks, (args.hidden + kChunk - 1) / kChunk - first_chunk);
        down = warps() / args.across;
        first_m = warp() / args.across, first_n = warp() % args.across;
    }

    __device__ __forceinline__ void run() {
        prepare();
        __syncthreads();
        if (args.expand) {
            copy_pixels(0, args.channels, [&](int i, TilePixel) {
                return at<T>(args.shared.x) + i * matrix_pitch(round_up(args.channels, kMatrix));
            });
        }
        prefetch(0);
        cp_async_commit();
        for (int chunk = 0; chunk <= chunks; ++chunk) {
            cp_async_wait<0>();
            __syncthreads();
            if (chunk > 0) {
                if constexpr (Traits::kProjects) {
                    project(chunk - 1);
                } else {
                    emit(chunk - 1);
                }
            }
            if (chunk == chunks) break;
            if (args.expand) expand(chunk);
            __syncthreads();
            prefetch_used(chunk);
            cp_async_commit();
            convolve(chunk);
        }
        if constexpr (Traits::kProjects) finish();
    }

  private:
    const BlockArguments<T>& args;
    unsigned char* memory;
    int first_image, images, top, left, rows, columns;
    int rectangle_rows, rectangle_columns, in_top, in_left;
    int skip_rows, skip_columns, in_rows, in_columns;
    int inputs, outputs;
    int first_chunk, chunks;
    int down, first_m, first_n;  // warps along pixels, and where among the matrices this one begins
    float sums[Traits::kHeight][Traits::kProjects ? Traits::kWidth : 1][2][4] = {};

    template <class Element>
    __device__ __forceinline__ Element* at(int offset) const {
        return reinterpret_cast<Element*>(memory + offset);
    }

    __device__ __forceinline__ int warp() const { return static_cast<int>(threadIdx.x) / 32; }
    __device__ __forceinline__ int warps() const { return static_cast<int>(blockDim.x) / 32; }

    // Of the hidden channels, the first of a chunk; and how many 16-channel columns the chunk has.
    __device__ __forceinline__ int first_hidden(int chunk) const {
        return (first_chunk + chunk) * kChunk;
    }
    __device__ __forceinline__ int chunk_columns(int chunk) const {
        return min(kChunk, round_up(args.hidden - first_hidden(chunk), kMatrix)) / kMatrix;
    }

    __device__ __forceinline__ T* hidden(int chunk) const {
        return at<T>(args.shared.hidden + chunk % 2 * args.shared.hidden_next);
    }
    __device__ __forceinline__ int hidden_offset(int image, int y, int x) const {
        return ((image * rectangle_rows + y) * rectangle_columns + x) * kChunkPitch;
    }

    __device__ __forceinline__ float* panels(int chunk) const {
        return at<float>(args.shared.depthwise) + chunk % 2 * kPanels * Traits::kPanelFloats;
    }

    // Lists the tile's pixels, and clears what nothing else writes: the hidden rectangle outside
    // the image, and the rows that fill up the last 16 of a matrix.
    __device__ __forceinline__ void prepare() {
        const auto list = [&](int offset, int count, int list_rows, int list_columns, int y, int x,
                              int step) {
            for (int i = threadIdx.x; i < count; i += blockDim.x) {
                TilePixel p = pixel_of(i, list_rows, list_columns);
                p.y += y, p.x = static_cast<uint8_t>(p.x * step + x);
                at<TilePixel>(offset)[i] = p;
            }
        };
        list(args.shared.inputs, inputs, in_rows, in_columns, skip_rows, skip_columns, 1);
        list(args.shared.outputs, outputs, rows, columns, 0, 0, 1);
        list(args.shared.strips, strips(), rows, strips_across(), 0, 0, kStrip);
        const bool covered =
            images == args.images && in_rows == rectangle_rows && in_columns == rectangle_columns;
        if (!covered) {
            const int elements = hidden_offset(args.images, 0, 0);
            clear(hidden(0), elements);
            if (args.shared.hidden_next) clear(hidden(1), elements);
        }
        const auto clear_last = [&](int offset, int count, int pitch) {
            clear(at<T>(offset) + count * pitch, (round_up(count, kMatrix) - count) * pitch);
        };
        clear_last(args.shared.filtered, outputs, kChunkPitch);
        if (args.expand) {
            clear_last(args.shared.x, inputs, matrix_pitch(round_up(args.channels, kMatrix)));
        }
    }

    __device__ __forceinline__ int strips_across() const { return (columns + kStrip - 1) / kStrip; }
    __device__ __forceinline__ int strips() const { return images * rows * strips_across(); }

    // Copies `channels` channels of the tile's inputs, padded to a multiple of 16: those of input
    // i, which is p in the rectangle, to target(i, p).
    template <class Target>
    __device__ __forceinline__ void copy_pixels(int channel, int channels, Target target) {
        const TilePixel* list = at<TilePixel>(args.shared.inputs);
        for_each_vector(inputs, round_up(channels, kMatrix) / kVector, [&](int i, int v) {
            const TilePixel p = list[i];
            const T* source = args.x.at(first_image + p.image, in_top + p.y, in_left + p.x);
            copy_channels(target(i, p) + v * kVector, source + channel + v * kVector,
                          channels - v * kVector, args.x_aligned);
        });
    }

    // Starts the copy of what the expansion and the depthwise convolution of a chunk read.
    __device__ __forceinline__ void prefetch(int chunk) {
        const int first = first_hidden(chunk), count = chunk_columns(chunk) * kMatrix;
        if (args.expand) {
            const int hidden16 = round_up(args.hidden, kMatrix);
            copy_matrix(at<T>(args.shared.expand), kChunkPitch, args.expand + first, hidden16,
                        round_up(args.channels, kMatrix), args.channels, count / kVector);
            copy_floats(at<float>(args.shared.expand_bias), args.expand_bias + first, count);
        } else {
            T* target = hidden(chunk);
            copy_pixels(first, min(count, args.hidden - first), [&](int, TilePixel p) {
                return target + hidden_offset(p.image, p.y, p.x);
            });
        }
        copy_floats(
            panels(chunk),
            args.depthwise + static_cast<int64_t>(first / kDepthwisePanel) * Traits::kPanelFloats,
            count / kDepthwisePanel * Traits::kPanelFloats);
    }

    // Starts the copies into memory that was used up before the convolution of `chunk`.
    __device__ __forceinline__ void prefetch_used(int chunk) {
        if constexpr (Traits::kProjects) {
            const int first = first_hidden(chunk), width = round_up(args.out_channels, kMatrix);
            copy_matrix(at<T>(args.shared.project), matrix_pitch(width),
                        args.project + static_cast<int64_t>(first) * width, width,
                        chunk_columns(chunk) * kMatrix, args.hidden - first, width / kVector);
        }
        if (chunk + 1 < chunks) prefetch(chunk + 1);
    }

    // hidden = activation(x expand + bias): a warp takes 16 pixels at a time.
    __device__ __forceinline__ void expand(int chunk) {
        constexpr int kColumns = kChunk / kMatrix;
        const int depth = round_up(args.channels, kMatrix), pitch = matrix_pitch(depth);
        const int filled = chunk_columns(chunk);
        const int group = threadIdx.x % 32 / 4, pair = threadIdx.x % 4 * 2;
        const float* bias = at<float>(args.shared.expand_bias) + pair;
        const T* weights = at<T>(args.shared.expand) + matrix_offset(kChunkPitch);
        const TilePixel* list = at<TilePixel>(args.shared.inputs);
        for (int first = warp() * kMatrix; first < inputs; first += warps() * kMatrix) {
            float c[kColumns][2][4] = {};
            const T* pixels = at<T>(args.shared.x) + first * pitch + matrix_offset(pitch);
            for (int k = 0; k < depth; k += kMatrix) {
                uint32_t a[4];
                ldmatrix(a, pixels + k);
#pragma unroll
                for (int n = 0; n < kColumns; ++n) {
                    if (n >= filled) break;
                    uint32_t b[4];
                    ldmatrix_transposed(b, weights + k * kChunkPitch + n * kMatrix);
                    multiply<T>(c[n], a, b);
                }
            }
            // Of the 8 columns of a fragment, this lane has two of rows `group` and `group` + 8.
            float sum[kColumns * 2][2][2] = {};
#pragma unroll
            for (int n = 0; n < kColumns * 2; ++n) {
                if (n >= filled * 2) break;
                const float2 shift = *reinterpret_cast<const float2*>(bias + n * 8);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    sum[n][h][0] = c[n / 2][n % 2][2 * h] + shift.x;
                    sum[n][h][1] = c[n / 2][n % 2][2 * h + 1] + shift.y;
                }
            }
            typename Packed<T>::Word word[kColumns * 2][2];
            activate_words<T>(sum, args.expand_activation, word);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int row = first + group + 8 * h;
                if (row >= inputs) continue;
                const TilePixel p = list[row];
                T* target = hidden(0) + hidden_offset(p.image, p.y, p.x) + pair;
#pragma unroll
                for (int n = 0; n < kColumns * 2; ++n) {
                    if (n < filled * 2) store_word(target + n * 8, word[n][h]);
                }
            }
        }
    }

    // filtered = activation(depthwise (*) hidden + bias): a thread takes two channels of a strip.
    __device__ __forceinline__ void convolve(int chunk) {
        constexpr int kWords = kChunk / 2;
        const int word = static_cast<int>(threadIdx.x) % kWords;
        if (word >= chunk_columns(chunk) * (kMatrix / 2)) return;
        const float* weights = panels(chunk) + word * 2 / kDepthwisePanel * Traits::kPanelFloats +
                               word * 2 % kDepthwisePanel;
        const T* source = hidden(args.expand ? 0 : chunk) + word * 2;
        T* filtered = at<T>(args.shared.filtered) + word * 2;
        const TilePixel* list = at<TilePixel>(args.shared.strips);
        const auto weight = [&](int tap) {
            return *reinterpret_cast<const float2*>(weights + tap * kDepthwisePanel);
        };
        const float2 bias = weight(Traits::kTaps);
        const int count = strips();
        for (int s = threadIdx.x / kWords; s < count; s += blockDim.x / kWords) {
            const TilePixel p = list[s];
            float sum[kStrip][1][2];
#pragma unroll
            for (int o = 0; o < kStrip; ++o) sum[o][0][0] = bias.x, sum[o][0][1] = bias.y;
            const T* row =
                source + hidden_offset(p.image, p.y * Traits::kStride, p.x * Traits::kStride);
#pragma unroll
            for (int a = 0; a < Traits::kKernel; ++a, row += rectangle_columns * kChunkPitch) {
                float2 tap[Traits::kKernel];
#pragma unroll
                for (int b = 0; b < Traits::kKernel; ++b) tap[b] = weight(a * Traits::kKernel + b);
#pragma unroll
                for (int j = 0; j < Traits::kStripInputs; ++j) {
                    float x[2];
                    load_word(row + j * kChunkPitch, x);
#pragma unroll
                    for (int o = 0; o < kStrip; ++o) {
                        const int b = j - o * Traits::kStride;
                        if (b < 0 || b >= Traits::kKernel) continue;
                        sum[o][0][0] = fmaf(x[0], tap[b].x, sum[o][0][0]);
                        sum[o][0][1] = fmaf(x[1], tap[b].y, sum[o][0][1]);
                    }
                }
            }
            typename Packed<T>::Word result[kStrip][1];
            activate_words<T>(sum, args.depthwise_activation, result);
            T* target = filtered + ((p.image * rows + p.y) * columns + p.x) * kChunkPitch;
#pragma unroll
            for (int o = 0; o < kStrip; ++o) {
                if (p.x + o < columns) store_word(target + o * kChunkPitch, result[o][0]);
            }
        }
    }

    // sums[i][j] += filtered project, for the 16x16 matrices m = first_m + i * down of pixels and
    // n = first_n + j * args.across of channels.
    __device__ __forceinline__ void project(int chunk) {
        const int pitch = matrix_pitch(round_up(args.out_channels, kMatrix));
        const T* pixels = at<T>(args.shared.filtered) + matrix_offset(kChunkPitch);
        const T* weights = at<T>(args.shared.project) + matrix_offset(pitch);
        const int depth = chunk_columns(chunk) * kMatrix;
        for (int k = 0; k < depth; k += kMatrix) {
            uint32_t a[Traits::kHeight][4];
#pragma unroll
            for (int i = 0; i < Traits::kHeight; ++i) {
                const int first = (first_m + i * down) * kMatrix;
                if (first < outputs) ldmatrix(a[i], pixels + first * kChunkPitch + k);
            }
#pragma unroll
            for (int j = 0; j < Traits::kWidth; ++j) {
                const int first = (first_n + j * args.across) * kMatrix;
                if (first >= args.out_channels) break;
                uint32_t b[4];
                ldmatrix_transposed(b, weights + k * pitch + first);
#pragma unroll
                for (int i = 0; i < Traits::kHeight; ++i) {
                    if ((first_m + i * down) * kMatrix < outputs) multiply<T>(sums[i][j], a[i], b);
                }
            }
        }
    }

    // Writes the sums out, where hidden was: each warp turns its fragments in memory of its own, so
    // that a lane has 8 channels of a pixel.
    __device__ __forceinline__ void finish() {
        float* turn = at<float>(args.shared.hidden) + warp() * kTurnFloats;
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < Traits::kHeight; ++i) {
            const int output = (first_m + i * down) * kMatrix;
            if (output >= outputs) break;
#pragma unroll
            for (int j = 0; j < Traits::kWidth; ++j) {
                const int channel = (first_n + j * args.across) * kMatrix;
                if (channel >= args.out_channels) break;
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    float* column = turn + lane / 4 * kTurnPitch + half * 8 + lane % 4 * 2;
                    const float (&c)[4] = sums[i][j][half];
                    *reinterpret_cast<float2*>(column) = {c[0], c[1]};
                    *reinterpret_cast<float2*>(column + 8 * kTurnPitch) = {c[2], c[3]};
                }
                __syncwarp();
                store_sums(turn + lane / 2 * kTurnPitch + lane % 2 * kVector, output + lane / 2,
                           channel + lane % 2 * kVector);
                __syncwarp();
            }
        }
    }

    __device__ __forceinline__ void store_sums(const float* row, int output, int channel) {
        if (output >= outputs || channel >= args.out_channels) return;
        const TilePixel p = at<TilePixel>(args.shared.outputs)[output];
        const int image = first_image + p.image, y = top + p.y, x = left + p.x;
        const auto sum = reinterpret_cast<const float4*>(row);
        if (args.partials) {
            const int64_t pixels =
                static_cast<int64_t>(args.batch) * args.out.height * args.out.width;
            const int64_t pixel =
                (static_cast<int64_t>(image) * args.out.height + y) * args.out.width + x;
            auto* part = reinterpret_cast<float4*>(
                args.partials +
                (blockIdx.y * pixels + pixel) * round_up(args.out_channels, kMatrix) + channel);
            part[0] = sum[0], part[1] = sum[1];
            return;
        }
        const auto bias = reinterpret_cast<const float4*>(args.project_bias + channel);
        float value[kVector];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float4 s = sum[h], b = load_read_only(bias + h);
            value[4 * h] = s.x + b.x, value[4 * h + 1] = s.y + b.y;
            value[4 * h + 2] = s.z + b.z, value[4 * h + 3] = s.w + b.w;
        }
        store_output(value, args, image, y, x, channel);
    }

    // Writes a chunk of what is filtered, and the means of its rows, which the tile has whole.
    __device__ __forceinline__ void emit(int chunk) {
        const int first = first_hidden(chunk), channels = args.hidden - first;
        const int filled = chunk_columns(chunk) * kMatrix;
        const T* filtered = at<T>(args.shared.filtered);
        const TilePixel* list = at<TilePixel>(args.shared.outputs);
        for_each_vector(outputs, filled / kVector, [&](int o, int v) {
            const int channel = v * kVector;
            if (channel >= channels) return;
            const TilePixel p = list[o];
            const uint4 vector =
                *reinterpret_cast<const uint4*>(filtered + o * kChunkPitch + channel);
            store_channels(
                args.out.at(first_image + p.image, top + p.y, left + p.x) + first + channel, vector,
                channels - channel, args.out_aligned);
        });
        const float scale = 1.f / static_cast<float>(columns);
        constexpr int kWords = kChunk / 2;
        const int channel = static_cast<int>(threadIdx.x) % kWords * 2;
        if (channel >= min(filled, channels)) return;
        for (int r = threadIdx.x / kWords; r < images * rows; r += blockDim.x / kWords) {
            float sum[2] = {};
            for (int x = 0; x < columns; ++x) {
                float value[2];
                load_word(filtered + (r * columns + x) * kChunkPitch + channel, value);
                sum[0] += value[0], sum[1] += value[1];
            }
            T* mean = args.means.at(first_image + r / rows, top + r % rows, 0) + first + channel;
            mean[0] = from_float<T>(sum[0] * scale);
            if (channel + 1 < channels) mean[1] = from_float<T>(sum[1] * scale);
        }
    }
};

// Grid: (tiles, splits); block: warps along pixels x warps along channels of the projection.
template <class T, class Traits>
__global__ void __launch_bounds__(kBlockThreads, Traits::kResident)
    inverted_residual_tile(const BlockArguments<T> args) {
    BlockTile<T, Traits>(args).run();
}

// Adds up the parts of a split projection, 8 channels of a pixel a thread.
template <class T>
__global__ void __launch_bounds__(kBlockThreads)
    inverted_residual_sum(const BlockArguments<T> args, int splits) {
    const int vectors = (args.out_channels + kVector - 1) / kVector;
    const int64_t pixels = static_cast<int64_t>(args.batch) * args.out.height * args.out.width;
    const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (index >= pixels * vectors) return;
    const int64_t pixel = index / vectors;
    const int channel = static_cast<int>(index - pixel * vectors) * kVector;
    const int width = round_up(args.out_channels, kMatrix);
    float value[kVector];
#pragma unroll
    for (int c = 0; c < kVector; ++c) value[c] = args.project_bias[channel + c];
    for (int s = 0; s < splits; ++s) {
        const auto part =
            reinterpret_cast<const float4*>(args.partials + (s * pixels + pixel) * width + channel);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float4 p = part[h];
            value[4 * h] += p.x, value[4 * h + 1] += p.y;
            value[4 * h + 2] += p.z, value[4 * h + 3] += p.w;
        }
    }
    const int64_t line = pixel / args.out.width;
    store_output(value, args, static_cast<int>(line / args.out.height),
                 static_cast<int>(line % args.out.height),
                 static_cast<int>(pixel - line * args.out.width), channel);
}

}  // namespace cvfast::cuda
