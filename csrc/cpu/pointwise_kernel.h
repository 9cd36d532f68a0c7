// The pointwise kernel, compiled once per instruction-set level by foreach_isa.h.
//
// A tile is a few pixels times one or more vectors of output channels, its sums held in registers.
// Per word of input channels it loads its vectors of weights once, and broadcasts one word of each
// pixel: 14 pixels times 2 vectors take 16 loads for 28 multiply-adds, so arithmetic is the limit.

#if defined(CVFAST_HAS_AMX)
#include "cpu/amx_kernel.h"
#endif

namespace cvfast {

#ifndef CVFAST_POINTWISE_BLOCK
#define CVFAST_POINTWISE_BLOCK
// What one task computes: pixels that lie evenly apart, times neighbouring weight panels.
template <class T>
struct PointwiseBlock {
    PointwiseOperands<T> operands;  // from the first pixel and panel on
    int64_t rows, in_channels, out_channels;
    int64_t x_pixel, residual_pixel, out_pixel;
    Activation activation;
    int64_t segment;  // words that are summed one after another, an even number
    // The input channels that this call adds, `chunk` from a multiple of 16 on; operands.x begins
    // at the first. Chunks before the last leave their sums, 16 per pixel and panel, to the next.
    int64_t chunk_begin, chunk;
    float* sums;  // not needed where one chunk is all
    bool pack;    // bring the pixels into scratch, by pointwise_pack, before they are read
    bool amx;     // multiply by AMX; scratch then holds weights too, amx_weights_bytes()
    void* scratch;
    // Packed: where line > 0, pixels of the source lie evenly apart in lines of this many, x_line
    // from line to line; the first is its line's pixel `column`.
    int64_t line, column, x_line;
};

// Bytes between packed pixels: whole cache lines, an odd number of them. At a multiple of 4096 all
// pixels of a tile would fall into one set of the L1 cache.
inline int64_t pointwise_packed_pixel(int64_t in_channels, int64_t element_size) {
    return ((in_channels * element_size + 63) / 64 | 1) * 64;
}

// Output channels in whole panels; eight or fewer beyond the last multiple of 16 share a half
// panel.
inline int64_t pointwise_whole_channels(int64_t out_channels) {
    const int64_t rest = out_channels % kPointwisePanel;
    return rest <= kPointwisePanel / 2 ? out_channels - rest : out_channels;
}
#endif

namespace CVFAST_ISA_NAMESPACE {

// Pixels per tile at most: with two vectors each, and those of the weights, they fill the
// registers.
inline constexpr int kPointwiseRows = kVectors >= 32 ? 14 : 6;

CVFAST_INLINE Vec multiply_add(const float*, Vec a, Vec b, Vec c) { return fma(a, b, c); }
CVFAST_INLINE Vec multiply_add(const BFloat16*, Vec a, Vec b, Vec c) { return dot_pairs(a, b, c); }

// kWords neighbouring 32-bit words, in every kWords lanes.
template <int kWords>
CVFAST_INLINE Vec broadcast_words(const char* p) {
    std::conditional_t<kWords == 1, float, double> words;
    std::memcpy(&words, p, sizeof words);
    if constexpr (kWords == 1) {
        return set1(words);
    } else {
        return set1_pair(words);
    }
}

// A is what is multiplied: float or BFloat16 pixels; T the type of the result.
template <class A, class T>
struct PointwiseTile {
    const char* a;        // the first pixel
    int64_t a_pixel;      // bytes
    int64_t words;        // of each pixel, to be multiplied
    const float* bias;    // lane 0 of the first vector's
    const float* panels;  // the same of the row before the segment's
    int64_t panel;        // floats from panel to panel
    const char* ahead;    // the tile's share of the weights to be read next, which it fetches
    int64_t ahead_step;   // bytes of each panel, per word
    float* segment_sums;  // what earlier segments leave to later ones
    bool first_segment, last_segment;
    const T* residual;
    int64_t residual_pixel;
    T* out;
    int64_t out_pixel;
    int last;  // channels of the last vector
    Activation activation;
};

inline constexpr int kPerPanel = kPointwisePanel / kLanes;  // vectors

template <int V>
CVFAST_INLINE void load_weights(Vec (&weights)[V], const float* panels, int64_t panel) {
    CVFAST_UNROLL for (int v = 0; v < V; ++v) {
        weights[v] = load(panels + v / kPerPanel * panel + v % kPerPanel * kLanes);
        opaque(weights[v]);
    }
}

template <class A, int V>
CVFAST_INLINE void accumulate(Vec (&sums)[V], Vec x, const Vec (&weights)[V]) {
    opaque(x);
    CVFAST_UNROLL for (int v = 0; v < V; ++v) {
        sums[v] = multiply_add(static_cast<const A*>(nullptr), x, weights[v], sums[v]);
        opaque(sums[v]);  // pins the sum to its register
    }
}

// simd_avx512.h overloads it for bfloat16.
template <class T>
CVFAST_INLINE void store_two(T* p, Vec low, Vec high) {
    store(p, low);
    store(p + kLanes, high);
}

// kRows pixels times V vectors of channels. kWords is 1, or 2 in the half panel, whose vectors hold
// two words of half as many channels.
template <class A, class T, int kRows, int V, int kWords>
void pointwise_tile(const PointwiseTile<A, T>& t) {
    const float* panels = t.panels;
    const int64_t panel = t.panel;
    Vec weights[V], sums[kRows][V];
    CVFAST_UNROLL for (int r = 0; r < kRows; ++r) {
        CVFAST_UNROLL for (int v = 0; v < V; ++v) sums[r][v] = set1(0.f);
    }
    // Short pieces of far rows, which no hardware prefetcher foresees.
    if (t.residual != nullptr && t.last_segment) {
        const T* residual = t.residual;
        CVFAST_UNROLL for (int r = 0; r < kRows; ++r, residual += t.residual_pixel) {
            CVFAST_UNROLL for (int v = 0; v < V; ++v) {
                __builtin_prefetch(residual + v * (kLanes / kWords));
            }
        }
    }
    // One pointer serves five pixels: x86 adds 1, 2 or 4 times an index for free.
    constexpr int kPointers = (kRows + 4) / 5;
    const int64_t pixel = t.a_pixel;
    const char* a[kPointers];
    CVFAST_UNROLL for (int i = 0; i < kPointers; ++i) a[i] = t.a + 5 * i * pixel;
    const char* ahead = t.ahead;
    for (int64_t words = t.words; words >= kWords; words -= kWords) {
        panels += kPointwisePanel;
        CVFAST_UNROLL for (int v = 0; v < V; v += kPerPanel) {
            __builtin_prefetch(ahead + v / kPerPanel * panel * int64_t{sizeof(float)});
        }
        ahead += t.ahead_step;
        load_weights(weights, panels, panel);
        CVFAST_UNROLL for (int r = 0; r < kRows; ++r) {
            accumulate<A>(sums[r], broadcast_words<kWords>(a[r / 5] + r % 5 * pixel), weights);
        }
        CVFAST_UNROLL for (int i = 0; i < kPointers; ++i) {
            a[i] += kWords * 4;
            opaque(a[i]);
        }
    }
    if constexpr (kWords == 2) {
        if (t.words % 2) {
            load_weights(weights, panels + kPointwisePanel, panel);
            CVFAST_UNROLL for (int r = 0; r < kRows; ++r) {
                char two[8] = {};
                std::memcpy(two, a[r / 5] + r % 5 * pixel, 4);
                accumulate<A>(sums[r], broadcast_words<2>(two), weights);
            }
        }
    }
    if (!t.first_segment) {
        CVFAST_UNROLL for (int r = 0; r < kRows; ++r) {
            CVFAST_UNROLL for (int v = 0; v < V; ++v) {
                sums[r][v] = add(sums[r][v], load(t.segment_sums + (r * V + v) * kLanes));
            }
        }
    }
    if (!t.last_segment) {
        CVFAST_UNROLL for (int r = 0; r < kRows; ++r) {
            CVFAST_UNROLL for (int v = 0; v < V; ++v) {
                store(t.segment_sums + (r * V + v) * kLanes, sums[r][v]);
            }
        }
        return;
    }
    // Last: a sum that began at a large bias would lose the digits of small products.
    load_weights(weights, t.bias, panel);
    CVFAST_UNROLL for (int r = 0; r < kRows; ++r) {
        CVFAST_UNROLL for (int v = 0; v < V; ++v) sums[r][v] = add(sums[r][v], weights[v]);
    }
    if constexpr (kWords == 2) {
        CVFAST_UNROLL for (int r = 0; r < kRows; ++r) {
            CVFAST_UNROLL for (int v = 0; v < V; ++v) sums[r][v] = add_neighbours(sums[r][v]);
        }
    }

    constexpr int kChannels = kLanes / kWords;
    const auto channels = [&t](int v) { return v == V - 1 ? t.last : kChannels; };
    if (t.residual != nullptr) {
        const T* residual = t.residual;
        CVFAST_UNROLL for (int r = 0; r < kRows; ++r, residual += t.residual_pixel) {
            CVFAST_UNROLL for (int v = 0; v < V; ++v) {
                const T* p = residual + v * kChannels;
                const int n = channels(v);
                sums[r][v] = add(sums[r][v], n == kLanes ? load(p) : load_n(p, n));
            }
        }
    }
    activate_all(sums, t.activation);
    T* out = t.out;
    if constexpr (V % 2 == 0 && kWords == 1) {
        if (t.last == kLanes) {
            CVFAST_UNROLL for (int r = 0; r < kRows; ++r, out += t.out_pixel) {
                CVFAST_UNROLL for (int v = 0; v < V; v += 2) {
                    store_two(out + v * kLanes, sums[r][v], sums[r][v + 1]);
                }
            }
            return;
        }
    }
    CVFAST_UNROLL for (int r = 0; r < kRows; ++r, out += t.out_pixel) {
        CVFAST_UNROLL for (int v = 0; v < V; ++v) {
            T* p = out + v * kChannels;
            const int n = channels(v);
            if (n == kLanes) {
                store(p, sums[r][v]);
            } else {
                store_n(p, sums[r][v], n);
            }
        }
    }
}

// The tile of `rows` pixels, one of kRows, kRows - 1, ... 1.
template <class A, class T, int kRows, int V, int kWords>
CVFAST_INLINE void pointwise_tile_of(int64_t rows, const PointwiseTile<A, T>& t) {
    if constexpr (kRows == 1) {
        pointwise_tile<A, T, 1, V, kWords>(t);
    } else if (rows == kRows) {
        pointwise_tile<A, T, kRows, V, kWords>(t);
    } else {
        pointwise_tile_of<A, T, kRows - 1, V, kWords>(rows, t);
    }
}

// Few pixels need more vectors for eight independent sums: a multiply-add takes four cycles, and
// two start in each.
inline constexpr int kFewRows = 3;
inline constexpr int kFewRowsVectors = 4;

// Weights of more than this many bytes come from memory. So they are fetched ahead, evenly while
// the tiles before are computed, and read from there once: the tiles of a block take turns at a
// segment of the weights, if they are few enough to keep their sums meanwhile.
inline constexpr int64_t kFarWeights = 128 * 1024;
inline constexpr int kTurnTiles = 7;
// Others are fetched from L2 this many rows ahead.
inline constexpr int64_t kNearRows = 16;

// V vectors of channels from channel c on, for all pixels of a block; a's last vector holds `last`.
// `next` is the first panel of the column after this one.
template <class A, class T, int kMaxRows, int V, int kWords>
void pointwise_column(const PointwiseBlock<T>& block, PointwiseTile<A, T> t, int64_t c,
                      const float* next) {
    const int64_t before = block.chunk_begin * int64_t{sizeof(A)} / 4, words = t.words;
    const int64_t segment = block.segment;
    const bool last_chunk = block.chunk_begin + block.chunk == block.in_channels;
    const int64_t left = block.out_channels - c;
    constexpr int kChannels = kLanes / kWords;
    t.last = static_cast<int>(std::min<int64_t>(kChannels, left - (V - 1) * kChannels));
    t.residual = block.operands.residual ? block.operands.residual + c : nullptr;
    t.out = block.operands.out + c;
    // Tiles of almost equal height: a rest of one pixel would run at an eighth of the rate.
    const int64_t tiles = (block.rows + kMaxRows - 1) / kMaxRows;
    const int64_t height = block.rows / tiles, higher = block.rows % tiles;
    const bool far = tiles > 1 && block.out_channels * words * 4 > kFarWeights;
    const bool turns = far && words > segment && tiles <= kTurnTiles;
    const int64_t group = turns || words <= segment ? tiles : 1;
    alignas(64) float segment_sums[kTurnTiles * kMaxRows * V * kLanes];
    t.segment_sums = segment_sums;
    if (block.sums) {  // the columns before have 1 sum per channel, in the half panel 2
        t.segment_sums = block.sums + (c + (kWords - 1) * (c % kPointwisePanel)) * block.rows;
    }
    const int64_t sums_of_pixel = turns || block.sums ? V * kLanes : 0;
    const float* panels = t.panels;
    t.bias = panels;
    const auto row_of = [=](int64_t word) { return (before + word) / kWords * kPointwisePanel; };
    for (int64_t tile = 0; tile < tiles;) {
        const int64_t begin = tile, end = begin + group;
        for (int64_t word = 0; word < words; word += segment) {
            t.panels = panels + row_of(word);
            t.words = std::min(segment, words - word);
            t.first_segment = before + word == 0;
            t.last_segment = last_chunk && word + t.words == words;
            const int64_t rest = words - word - t.words;
            t.ahead = reinterpret_cast<const char*>(t.panels + (1 + kNearRows) * kPointwisePanel);
            t.ahead_step = kPointwisePanel * int64_t{sizeof(float)};
            if (far) {
                const float* ahead = rest          ? panels + row_of(word + t.words)
                                     : end < tiles ? panels
                                                   : next;
                t.ahead = reinterpret_cast<const char*>(ahead + kPointwisePanel);
                t.ahead_step *= std::min(segment, rest ? rest : words);
                t.ahead_step /= group * t.words;
            }
            int64_t pixels = 0;
            for (tile = begin; tile < end; ++tile) {
                const int64_t rows = height + (tile < higher);
                pointwise_tile_of<A, T, kMaxRows, V, kWords>(rows, t);
                t.a += rows * t.a_pixel;
                t.segment_sums += rows * sums_of_pixel;
                if (t.residual) t.residual += rows * t.residual_pixel;
                t.out += rows * t.out_pixel;
                if (far) t.ahead += t.words * t.ahead_step;
                pixels += rows;
            }
            if (rest == 0) {
                t.a -= word * 4;
                break;
            }
            // Back to the first pixel, on to the next segment.
            t.a += t.words * 4 - pixels * t.a_pixel;
            t.segment_sums -= pixels * sums_of_pixel;
            if (t.residual) t.residual -= pixels * t.residual_pixel;
            t.out -= pixels * t.out_pixel;
        }
    }
}

// A block, whose pixels lie `a_pixel` bytes apart from `a` on.
template <class A, class T>
void pointwise_columns(const PointwiseBlock<T>& block, const char* a, int64_t a_pixel) {
    PointwiseTile<A, T> t{};
    t.a = a;
    t.a_pixel = a_pixel;
    const auto words = [](int64_t channels) { return (channels * int64_t{sizeof(A)} + 3) / 4; };
    t.words = words(block.chunk);
    t.panel = (words(block.in_channels) + 1) * kPointwisePanel;
    t.residual_pixel = block.residual_pixel;
    t.out_pixel = block.out_pixel;
    t.activation = block.activation;
    const float* packed = block.operands.packed;
    const auto panels_at = [=](int64_t c) {
        return packed + c / kPointwisePanel * t.panel + c % kPointwisePanel;
    };
    const int64_t whole = pointwise_whole_channels(block.out_channels);
    for (int64_t c = 0; c < whole;) {
        t.panels = panels_at(c);
        const int64_t left = whole - c;
        if (block.rows <= kFewRows && left > (kFewRowsVectors - 1) * kLanes) {
            c += kFewRowsVectors * kLanes;
            pointwise_column<A, T, kFewRows, kFewRowsVectors, 1>(
                block, t, c - kFewRowsVectors * kLanes, panels_at(c));
        } else if (left > kLanes) {
            c += 2 * kLanes;
            pointwise_column<A, T, kPointwiseRows, 2, 1>(block, t, c - 2 * kLanes, panels_at(c));
        } else {
            c += kLanes;
            pointwise_column<A, T, kPointwiseRows, 1, 1>(block, t, c - kLanes, panels_at(c));
        }
    }
    t.panels = packed + whole / kPointwisePanel * t.panel;
    for (int64_t c = whole; c < block.out_channels;) {
        constexpr int kMost = kLanes < kPointwisePanel ? 2 : 1;  // the half panel's at most
        if (block.out_channels - c > (kMost - 1) * (kLanes / 2)) {
            pointwise_column<A, T, kPointwiseRows, kMost, 2>(block, t, c, packed);
            c += kMost * kLanes / 2;
            t.panels += kMost * kLanes;
        } else {
            pointwise_column<A, T, kPointwiseRows, 1, 2>(block, t, c, packed);
            c += kLanes / 2;
            t.panels += kLanes;
        }
    }
}

// The source of the product, gate * relu(scale * x + shift), of the `n` channels from c on.
template <class T, bool kPartial>
CVFAST_INLINE Vec pointwise_source(const PointwiseOperands<T>& o, const T* x, int64_t c, int n) {
    const auto channels = [&](const auto* p) {
        if constexpr (kPartial) return load_n(p, n);
        return load(p);
    };
    Vec v = channels(x + c);
    if (o.scale) v = max_keep_nan(fma(v, channels(o.scale + c), channels(o.shift + c)), 0.f);
    if (o.gate) v = mul(v, channels(o.gate + c));
    return v;
}

// Hands the sources of a block's pixels to store(pixel, channel, vector, channels of the vector);
// no lambda, which GCC 12 compiles for the baseline.
template <class T, class Store>
CVFAST_INLINE void for_sources(const PointwiseBlock<T>& block, const Store& store) {
    const PointwiseOperands<T>& o = block.operands;
    const int64_t channels = block.chunk;
    const T* x = o.x;
    int64_t column = block.column;
    for (int64_t r = 0; r < block.rows; ++r, x += block.x_pixel, ++column) {
        if (column == block.line && column > 0) {
            x += block.x_line - column * block.x_pixel;
            column = 0;
        }
        int64_t c = 0;
        for (; c + kLanes <= channels; c += kLanes) {
            store(r, c, pointwise_source<T, false>(o, x, c, kLanes), kLanes);
        }
        if (c < channels) {
            const int n = static_cast<int>(channels - c);
            store(r, c, pointwise_source<T, true>(o, x, c, n), n);
        }
    }
}

template <class A>
struct StorePacked {
    A* packed;
    int64_t pixel;

    CVFAST_INLINE void operator()(int64_t r, int64_t c, Vec v, int n) const {
        A* to = packed + r * pixel + c;
        if (n == kLanes) {
            store(to, v);
        } else {
            store_n(to, v, n);
            if (sizeof(A) == 2 && n % 2) to[n] = A{};
        }
    }
};

// Brings the pixels of a block into its scratch memory, as A, zero in the last word's unused half.
template <class A, class T>
void pointwise_pack(const PointwiseBlock<T>& block) {
    const int64_t pixel = pointwise_packed_pixel(block.chunk, sizeof(A)) / int64_t{sizeof(A)};
    for_sources(block, StorePacked<A>{static_cast<A*>(block.scratch), pixel});
}

template <class T>
struct PointwiseMultiplied {
    using Type = float;
};
template <>
struct PointwiseMultiplied<BFloat16> {
    using Type = BFloat16;
};

#if defined(CVFAST_HAS_AMX)
struct StorePieces {
    char* packed;
    int64_t pixel, piece;

    CVFAST_INLINE void operator()(int64_t r, int64_t c, Vec v, int) const {
        store_pieces(packed + r * pixel + c * int64_t{sizeof(BFloat16)}, piece, v);
    }
};

// A block by AMX.
template <class T>
void pointwise_amx(const PointwiseBlock<T>& block, MatrixUnit& unit) {
    static constexpr int64_t kOneRun[] = {0};
    const PointwiseOperands<T>& o = block.operands;
    const int64_t pixel = pointwise_packed_pixel(block.chunk, sizeof(BFloat16));
    AmxProduct<T> t{};
    t.scratch = static_cast<char*>(block.scratch);
    if (std::is_same_v<T, float> || block.pack) {
        t.a = t.scratch;
        t.a_pixel = pixel;
        t.a_piece = block.rows * pixel;
        t.scratch += block.rows * pixel * kAmxPieces<T>;
        if constexpr (std::is_same_v<T, float>) {
            for_sources(block, StorePieces{static_cast<char*>(block.scratch), pixel, t.a_piece});
        } else {
            pointwise_pack<BFloat16>(block);
        }
    } else {
        t.a = reinterpret_cast<const char*>(o.x);
        t.a_pixel = block.x_pixel * int64_t{sizeof(T)};
    }
    t.runs = kOneRun;
    t.run_count = 1;
    t.run_values = block.chunk;
    t.lines = t.lines_per_image = 1;
    t.positions = t.period = t.valid = block.rows;
    t.weights = o.packed + kPointwisePanel;
    t.first_row = block.chunk_begin * kPointwiseSize<T> / 4;
    t.bias = o.packed;
    t.panel = (pointwise_words<T>(block.in_channels) + 1) * kPointwisePanel;
    t.channels = block.out_channels;
    t.half = pointwise_whole_channels(block.out_channels) < block.out_channels;
    t.residual = o.residual;
    t.residual_pixel = block.residual_pixel;
    t.out = o.out;
    t.out_pixel = block.out_pixel;
    t.activation = block.activation;
    if (block.chunk_begin > 0) t.sums_before = block.sums;
    if (block.chunk_begin + block.chunk < block.in_channels) t.sums_after = block.sums;
    amx_product(t, unit);
}
#else
class MatrixUnit {};
#endif

template <class T>
void pointwise_block(const PointwiseBlock<T>& block, [[maybe_unused]] MatrixUnit& unit) {
#if defined(CVFAST_HAS_AMX)
    if constexpr (!std::is_same_v<T, Half>) {
        if (block.amx) return pointwise_amx(block, unit);
    }
#endif
    using A = typename PointwiseMultiplied<T>::Type;
    if (block.pack) {
        pointwise_pack<A>(block);
        pointwise_columns<A>(block, static_cast<const char*>(block.scratch),
                             pointwise_packed_pixel(block.chunk, sizeof(A)));
    } else {
        pointwise_columns<A>(block, reinterpret_cast<const char*>(block.operands.x),
                             block.x_pixel * int64_t{sizeof(A)});
    }
}

template <class T>
void pointwise_task(const PointwiseBlock<T>& block) {
    MatrixUnit unit;
    pointwise_block(block, unit);
}

}  // namespace CVFAST_ISA_NAMESPACE
}  // namespace cvfast
