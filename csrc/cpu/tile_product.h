// The register tile that direct convolution and Winograd's products share: a few pixels times one
// or two panels of output channels, summed over taps and channels in registers. Included once per
// ISA.
//
// Pixels lie 16 floats apart, in blocks of 16 channels: one pointer and constant offsets reach all
// of a tile. Per channel, 14 pixels times 32 outputs take 16 loads for 28 multiply-adds, so
// arithmetic is the limit.

namespace cvfast {

#ifndef CVFAST_TILE_PRODUCT
#define CVFAST_TILE_PRODUCT
inline constexpr int kBlock = 16;  // channels of a block, and floats from pixel to pixel

// out[p][n] = sum over t, c of a[p + taps[t]][c] * b[t * channels + c][n]
struct TileProduct {
    const float* a[2];    // the first pixel of each group
    const int64_t* taps;  // floats from there
    int64_t tap_count;
    int64_t channels;
    int64_t block;  // floats from one block of 16 channels to the next
    const float* b;
    int64_t panel;  // floats from panel to panel
    float* out;
    int64_t out_pixel;
};
#endif

namespace CVFAST_ISA_NAMESPACE {

// A tile has at least two vectors of channels. With the weights of one input channel and a
// broadcast, a full tile fills the registers: 14 pixels at avx512, 6 at avx2 and neon, 2 at
// portable.
inline constexpr int kPanelVectors = kConvPanel / kLanes;
inline constexpr int kTilePanels = kPanelVectors == 1 ? 2 : 1;
inline constexpr int kTileVectors = kTilePanels * kPanelVectors;
inline constexpr int kTilePixels = (kVectors - kTileVectors - 1) / kTileVectors;

// Adds the products of one channel: one element of each pixel times one row of each panel.
template <int kGroups, int kPixels, int V>
CVFAST_INLINE void add_channel(Vec (&acc)[kGroups * kPixels][V], const float* const (&a)[kGroups],
                               const float* b, int64_t panel) {
    Vec weights[V];
    CVFAST_UNROLL for (int v = 0; v < V; ++v) {
        weights[v] = load(b + v / kPanelVectors * panel + v % kPanelVectors * kLanes);
        opaque(weights[v]);
    }
    CVFAST_UNROLL for (int r = 0; r < kGroups * kPixels; ++r) {
        Vec x = set1(a[r / kPixels][r % kPixels * kBlock]);
        if constexpr (V > 1) opaque(x);
        CVFAST_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = fma(x, weights[v], acc[r][v]);
    }
}

// kGroups runs of kPixels pixels, times kPanels panels.
template <int kGroups, int kPixels, int kPanels>
void tile_product(const TileProduct& t) {
    constexpr int kRows = kGroups * kPixels;
    constexpr int V = kPanels * kPanelVectors;
    Vec acc[kRows][V];
    CVFAST_UNROLL for (int r = 0; r < kRows; ++r) {
        CVFAST_UNROLL for (int v = 0; v < V; ++v) acc[r][v] = set1(0.f);
    }
    const float* b = t.b;
    const int64_t panel = t.panel;
    for (int64_t tap = 0; tap < t.tap_count; ++tap) {
        const float* a[kGroups];
        CVFAST_UNROLL for (int g = 0; g < kGroups; ++g) a[g] = t.a[g] + t.taps[tap];
        for (int64_t c = 0; c < t.channels;) {
            add_channel<kGroups, kPixels>(acc, a, b, panel);
            b += kConvPanel;
            // At the end of a block on to the next one.
            const int64_t step = (++c & (kBlock - 1)) ? 1 : t.block - (kBlock - 1);
            CVFAST_UNROLL for (int g = 0; g < kGroups; ++g) {
                a[g] += step;
                opaque(a[g]);
            }
        }
    }
    float* out = t.out;
    CVFAST_UNROLL for (int r = 0; r < kRows; ++r, out += t.out_pixel) {
        CVFAST_UNROLL for (int v = 0; v < V; ++v) store(out + v * kLanes, acc[r][v]);
    }
}

// The product of `pixels` pixels per group, one of kPixels, kPixels - 1, ... 1.
template <int kGroups, int kPixels, int kPanels>
CVFAST_INLINE void tile_product_of(int64_t pixels, const TileProduct& t) {
    if constexpr (kPixels == 1) {
        tile_product<kGroups, 1, kPanels>(t);
    } else if (pixels == kPixels) {
        tile_product<kGroups, kPixels, kPanels>(t);
    } else {
        tile_product_of<kGroups, kPixels - 1, kPanels>(pixels, t);
    }
}

template <int kGroups>
void tile_product(int64_t pixels, int64_t panels, const TileProduct& t) {
    if (panels == kTilePanels) {
        tile_product_of<kGroups, kTilePixels / kGroups, kTilePanels>(pixels, t);
    } else {
        tile_product_of<kGroups, kTilePixels / kGroups, 1>(pixels, t);
    }
}

// The source of one channel block: which tensor, and from which channel.
template <class T>
struct BlockSource {
    const T* x;  // channel 0 of the block, at pixel 0 of row 0 of image 0
    ImageStrides strides;
    int channels;
};

template <class T>
CVFAST_INLINE BlockSource<T> block_source(const ConvShape& s, const ConvOperands<T>& o,
                                          int64_t block) {
    const int64_t c = block * kBlock;
    const int channels = static_cast<int>(std::min<int64_t>(kBlock, s.in_channels - c));
    if (c < s.x_channels) return {o.x + c, s.x, channels};
    return {o.x2 + (c - s.x_channels), s.x2, channels};
}

// Adds bias and residual to sums of one pixel, activates and stores: `n` channels of one vector.
template <class T>
CVFAST_INLINE void finish(Vec sum, Vec bias, const T* residual, T* out, int n,
                          Activation activation) {
    sum = add(sum, bias);
    if (n == kLanes) {
        if (residual) sum = add(sum, load(residual));
        store(out, activate(sum, activation));
    } else {
        if (residual) sum = add(sum, load_n(residual, n));
        store_n(out, activate(sum, activation), n);
    }
}

}  // namespace CVFAST_ISA_NAMESPACE
}  // namespace cvfast
