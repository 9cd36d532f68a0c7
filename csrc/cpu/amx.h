// Matrix products by AMX, whose tiles of 16 rows of 64 bytes multiply pairs of bfloat16: one
// instruction adds to 16 x 16 sums the products of 32 channels. amx_kernel.h runs them, at the
// level avx512_amx.
//
// float32 is multiplied as the sum of three bfloat16 numbers, which hold its 24 bits: of the nine
// products the six that matter to a float32 result are added (Henry, Tang and Heinecke, 2019). That
// takes 0.4 of the time of VFMADD231PS on Granite Rapids.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/activation.h"
#include "common/types.h"

namespace cvfast {

inline constexpr int kAmxRows = 16;   // positions of a tile of sums, rows of one of weights
inline constexpr int kAmxWords = 16;  // of a row
inline constexpr int kAmxTileBytes = 1024;
inline constexpr int kAmxPanel = 16;  // output channels of a panel of weights
inline constexpr int kPieces = 3;     // bfloat16 numbers of a float

// Positions times panels of weights, summed over runs of neighbouring words, each two bfloat16
// numbers of a position. T: BFloat16, or float in three pieces.
//
// Positions lie in lines, `a_pixel` bytes apart. Position p of an image's line is pixel p % period
// of the row line + p / period, and is left out where that pixel is not below `valid`.
template <class T>
struct AmxProduct {
    const char* a;
    int64_t a_image, a_line, a_pixel, a_piece;  // bytes
    const int64_t* runs;                        // bytes from a position to each
    int64_t run_count, run_values;              // of each run
    int64_t lines, lines_per_image, positions, period, valid;

    // Rows of 16 words, run after run: pairs of BFloat16, or floats. Of the last panel, if `half`,
    // rows hold two words of eight channels; see pointwise.h.
    const float* weights;
    int64_t first_row;  // of the weights
    const float* bias;
    int64_t panel;     // floats from panel to panel, of both
    int64_t channels;  // of the result
    bool half;
    char* scratch;  // amx_weights_bytes()

    const T* residual;
    int64_t residual_image, residual_row, residual_pixel;
    T* out;
    int64_t out_image, out_row, out_pixel;
    Activation activation;

    // Sums [panel][position][16] that are added, and that are left instead of a result; of one
    // line.
    const float* sums_before;
    float* sums_after;
};

template <class T>
inline constexpr int kAmxPieces = std::is_same_v<T, BFloat16> ? 1 : kPieces;

constexpr int64_t amx_steps(int64_t run_values) {
    return (run_values + 2 * kAmxWords - 1) / (2 * kAmxWords);
}

// Tiles that cover a line of positions.
constexpr int64_t amx_tiles(int64_t positions) { return (positions + kAmxRows - 1) / kAmxRows; }

// Panels of weights that pass over all positions before the next do.
template <class T>
constexpr int64_t amx_panels_at_once(int64_t run_count, int64_t run_values) {
    // Those of floats are split into scratch memory.
    constexpr int64_t kBytes = (std::is_same_v<T, BFloat16> ? 384 : 96) * 1024;
    const int64_t panel = run_count * amx_steps(run_values) * kAmxTileBytes * kAmxPieces<T>;
    const int64_t least = std::is_same_v<T, BFloat16> ? 4 : 2;
    return kBytes / panel < 4 ? least : kBytes / panel / 4 * 4;
}

// Scratch memory of a product for weights: those of float in pieces, or a half panel.
template <class T>
constexpr int64_t amx_weights_bytes(int64_t run_count, int64_t run_values, int64_t channels) {
    const int64_t panel = run_count * amx_steps(run_values) * kAmxTileBytes * kAmxPieces<T>;
    if (std::is_same_v<T, BFloat16>) return panel;
    const int64_t panels = (channels + kAmxPanel - 1) / kAmxPanel;
    const int64_t most = amx_panels_at_once<T>(run_count, run_values);
    return panel * (panels < most ? panels : most);
}

}  // namespace cvfast
