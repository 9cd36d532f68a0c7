// The register tile that direct convolution and Winograd's products share: a few pixels times one
// or two panels of output channels, summed over taps and channels in registers. Included once per
// ISA.
//
// Per word of input channels, 14 pixels times 32 outputs take 16 loads for 28 multiply-adds, so
// arithmetic is the limit.

namespace cvfast {

#ifndef CVFAST_TILE_PRODUCT
#define CVFAST_TILE_PRODUCT
// Channels that stand side by side in scratch memory, of one pixel; as float, a cache line.
inline constexpr int kBlock = 16;

// Neighbouring words of a pixel and the rows of weights that they are multiplied by: where they
// begin, in words from the tile's first pixel and panel, and their number.
struct TileRun {
    int64_t a, b, rows;
};

// What is summed. The runs are a flat list: with one loop more around the innermost, GCC 12 keeps
// the sums in memory. W: BFloat16, whose words are pairs, or another type, whose words are floats.
template <class W>
struct TileProduct {
    const float* a[2];  // the first pixel of each group
    int64_t pixel;      // words from pixel to pixel
    const TileRun* runs;
    int64_t run_count;
    const float* b;
    int64_t b_row;  // words from row to row
    int64_t panel;  // words from panel to panel
    // Sums of earlier runs that are added, and that are left to later ones instead of a result.
    const float* sums_before;
    float* sums_after;
    // Weights of later tiles that are brought into L2 meanwhile: where they begin, moved on by
    // every tile, and bytes per row. They come while those of this tile are multiplied again and
    // again.
    const char* ahead;
    int64_t ahead_step;

    // A row from `next` on for each row of `b`, within `tiles` tiles; null: nothing.
    void fetch_ahead(const float* next, int64_t tiles) {
        ahead = reinterpret_cast<const char*>(next ? next : b);
        ahead_step = next ? (kConvPanel * int64_t{sizeof(float)} + tiles - 1) / tiles : 0;
    }
};

// What becomes of the sums: activation(sum + bias + residual).
template <class T>
struct TileResult {
    const float* bias;     // of the first panel, or null
    const T* residual[2];  // of each group, or null
    int64_t residual_pixel;
    T* out[2];
    int64_t out_pixel;
    int64_t channels;
    Activation activation;
};
#endif

namespace CVFAST_ISA_NAMESPACE {

// A tile has at least two vectors of channels. With the weights of one row and a
// broadcast, a full tile fills the registers: 14 pixels at avx512, 6 at avx2 and neon, 2 at
// portable.
inline constexpr int kPanelVectors = kConvPanel / kLanes;
inline constexpr int kTilePanels = kPanelVectors == 1 ? 2 : 1;
inline constexpr int kTileVectors = kTilePanels * kPanelVectors;
inline constexpr int kTilePixels = (kVectors - kTileVectors - 1) / kTileVectors;

// Rows of weights between the one that is multiplied and the one that is asked for: the hardware
// stops at every page of 64 rows. From memory, two threads: layers at 14x14 run 1.08 to 1.4 times
// as fast, 24 and 128 rows less so.
inline constexpr int kAhead = 64;
inline constexpr int kIntoL2 = 2;  // of __builtin_prefetch: the locality

// W: as of TileProduct.
template <class W, int V>
CVFAST_INLINE void accumulate(Vec (&sums)[V], Vec x, const Vec (&weights)[V]) {
    if constexpr (V > 1) opaque(x);
    CVFAST_UNROLL for (int v = 0; v < V; ++v) {
        if constexpr (std::is_same_v<W, BFloat16>) {
            sums[v] = dot_pairs(x, weights[v], sums[v]);
        } else {
            sums[v] = fma(x, weights[v], sums[v]);
        }
        opaque(sums[v]);  // pins the sum to its register
    }
}

CVFAST_INLINE Vec broadcast_word(const char* p) {
    float word;
    std::memcpy(&word, p, sizeof word);
    return set1(word);
}

// Bias, residual and activation; stores the result.
template <int kGroups, int kPixels, int V, class T>
CVFAST_INLINE void finish_tile(Vec (&sums)[kGroups * kPixels][V], int64_t panel,
                               const TileResult<T>& t) {
    // Only the last vector may be partial; with std::clamp here, GCC 12 keeps the sums in memory.
    const auto lanes = [&t](int v) {
        return v == V - 1 ? static_cast<int>(t.channels) - v * kLanes : kLanes;
    };
    if (t.bias != nullptr) {
        Vec bias[V];
        CVFAST_UNROLL for (int v = 0; v < V; ++v) {
            bias[v] = load(t.bias + v / kPanelVectors * panel + v % kPanelVectors * kLanes);
        }
        CVFAST_UNROLL for (int r = 0; r < kGroups * kPixels; ++r) {
            CVFAST_UNROLL for (int v = 0; v < V; ++v) sums[r][v] = add(sums[r][v], bias[v]);
        }
    }
    if (t.residual[0] != nullptr) {
        CVFAST_UNROLL for (int r = 0; r < kGroups * kPixels; ++r) {
            const T* residual = t.residual[r / kPixels] + r % kPixels * t.residual_pixel;
            CVFAST_UNROLL for (int v = 0; v < V; ++v) {
                const T* p = residual + v * kLanes;
                const int n = lanes(v);
                sums[r][v] = add(sums[r][v], n == kLanes ? load(p) : load_n(p, n));
            }
        }
    }
    activate_all(sums, t.activation);
    CVFAST_UNROLL for (int r = 0; r < kGroups * kPixels; ++r) {
        T* out = t.out[r / kPixels] + r % kPixels * t.out_pixel;
        CVFAST_UNROLL for (int v = 0; v < V; ++v) {
            if (const int n = lanes(v); n == kLanes) {
                store(out + v * kLanes, sums[r][v]);
            } else {
                store_n(out + v * kLanes, sums[r][v], n);
            }
        }
    }
}

// kGroups times kPixels neighbouring pixels, times V vectors of channels.
template <int kGroups, int kPixels, int V, class W, class T>
void tile_product(TileProduct<W>& t, const TileResult<T>& result) {
    constexpr int kPointers = (kPixels + 4) / 5;
    Vec sums[kGroups * kPixels][V];
    CVFAST_UNROLL for (int r = 0; r < kGroups * kPixels; ++r) {
        CVFAST_UNROLL for (int v = 0; v < V; ++v) sums[r][v] = set1(0.f);
    }
    constexpr int64_t kWord = sizeof(float);
    const int64_t pixel = t.pixel * kWord, panel = t.panel, b_row = t.b_row;
    const int64_t ahead_step = t.ahead_step;
    const char* ahead = t.ahead;
    for (const TileRun *run = t.runs, *end = run + t.run_count; run != end; ++run) {
        const char* a[kGroups * kPointers];
        CVFAST_UNROLL for (int i = 0; i < kGroups * kPointers; ++i) {
            a[i] = reinterpret_cast<const char*>(t.a[i / kPointers] + run->a) +
                   i % kPointers * 5 * pixel;
        }
        const float* b = t.b + run->b;
        for (int64_t rows = run->rows; rows > 0; --rows, b += b_row) {
            Vec weights[V];
            CVFAST_UNROLL for (int v = 0; v < V; ++v) {
                weights[v] = load(b + v / kPanelVectors * panel + v % kPanelVectors * kLanes);
                opaque(weights[v]);
                __builtin_prefetch(b + v / kPanelVectors * panel + kAhead * kConvPanel);
            }
            CVFAST_UNROLL for (int v = 0; v < V; v += kPanelVectors) {
                __builtin_prefetch(ahead + v / kPanelVectors * panel * kWord, 0, kIntoL2);
            }
            ahead += ahead_step;
            opaque(ahead);
            // One pointer serves five pixels: x86 adds 1, 2 or 4 times an index for free.
            CVFAST_UNROLL for (int r = 0; r < kGroups * kPixels; ++r) {
                const int p = r % kPixels;
                const char* word = a[r / kPixels * kPointers + p / 5] + p % 5 * pixel;
                accumulate<W>(sums[r], broadcast_word(word), weights);
            }
            CVFAST_UNROLL for (int i = 0; i < kGroups * kPointers; ++i) {
                a[i] += kWord;
                opaque(a[i]);
            }
        }
    }
    t.ahead = ahead;
    if (t.sums_before != nullptr) {
        CVFAST_UNROLL for (int r = 0; r < kGroups * kPixels; ++r) {
            CVFAST_UNROLL for (int v = 0; v < V; ++v) {
                sums[r][v] = add(sums[r][v], load(t.sums_before + (r * V + v) * kLanes));
            }
        }
    }
    if (t.sums_after != nullptr) {
        CVFAST_UNROLL for (int r = 0; r < kGroups * kPixels; ++r) {
            CVFAST_UNROLL for (int v = 0; v < V; ++v) {
                store(t.sums_after + (r * V + v) * kLanes, sums[r][v]);
            }
        }
        return;
    }
    finish_tile<kGroups, kPixels>(sums, panel, result);
}

// The tile of `pixels` pixels per group, one of kPixels, kPixels - 1, ... 1.
template <int kGroups, int kPixels, int V, class W, class T>
CVFAST_INLINE void tile_product_of(int64_t pixels, TileProduct<W>& t, const TileResult<T>& result) {
    if constexpr (kPixels == 1) {
        tile_product<kGroups, 1, V>(t, result);
    } else if (pixels == kPixels) {
        tile_product<kGroups, kPixels, V>(t, result);
    } else {
        tile_product_of<kGroups, kPixels - 1, V>(pixels, t, result);
    }
}

// The tile of as many vectors as the channels fill, at most V.
template <int kGroups, int V = kTileVectors, class W, class T>
void tile_product(int64_t pixels, TileProduct<W>& t, const TileResult<T>& result) {
    if constexpr (V > 1) {
        if (result.channels <= (V - 1) * kLanes) {
            return tile_product<kGroups, V - 1>(pixels, t, result);
        }
    }
    tile_product_of<kGroups, kTilePixels / kGroups, V>(pixels, t, result);
}

}  // namespace CVFAST_ISA_NAMESPACE
}  // namespace cvfast
