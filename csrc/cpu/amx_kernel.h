// Products of AMX; see amx.h. Included by kernels at the level avx512_amx, whose vectors are
// AVX-512's.

#include "cpu/amx.h"

namespace cvfast::CVFAST_ISA_NAMESPACE {

// GCC 12's intrinsics for tiles leave out what they read from memory.
template <int kTile>
CVFAST_INLINE void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
CVFAST_INLINE void tile_load(const char* p, int64_t row) {
    __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(p), "r"(row) : "memory");
}
// Without a copy in L1, where what is loaded again lies.
template <int kTile>
CVFAST_INLINE void tile_load_once(const char* p, int64_t row) {
    __asm__ volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(p), "r"(row) : "memory");
}
template <int kTile>
CVFAST_INLINE void tile_store(float* p, int64_t row) {
    __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(p), "r"(row) : "memory");
}
template <int kSum, int kA, int kB>
CVFAST_INLINE void tile_dot() {
    __asm__ volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(kB), "i"(kA), "i"(kSum));
}

// The tiles' shapes, which are state of the thread, for as long as one computes. Tiles 0 to 3 hold
// sums. Where all steps of a run have as many words, 4 and 5 hold positions and 6 and 7 weights;
// else 4 and 6 do, and 5 and 7 hold the last step's.
class MatrixUnit {
  public:
    MatrixUnit() = default;
    MatrixUnit(const MatrixUnit&) = delete;
    ~MatrixUnit() {
        if (rows_ != 0) __asm__ volatile("tilerelease" ::: "memory");
    }

    void shape(int rows, int words, int last_words) {
        if (rows == rows_ && words == words_ && last_words == last_words_) return;
        rows_ = rows, words_ = words, last_words_ = last_words;
        struct alignas(64) {
            uint8_t palette, start_row, reserved[14];
            uint16_t row_bytes[16];
            uint8_t rows[16];
        } shapes{};
        shapes.palette = 1;
        const auto tile = [&](int i, int words, int height) {
            shapes.row_bytes[i] = static_cast<uint16_t>(words * 4);
            shapes.rows[i] = static_cast<uint8_t>(height);
        };
        for (int i = 0; i < 4; ++i) tile(i, kAmxWords, rows);
        tile(4, words, rows);
        tile(5, last_words, rows);
        tile(6, kAmxWords, words);
        tile(7, kAmxWords, last_words);
        __asm__ volatile("ldtilecfg %0" ::"m"(shapes) : "memory");
    }

  private:
    int rows_ = 0, words_ = 0, last_words_ = 0;
};

// How a step uses tiles 4 to 7.
enum class StepTiles {
    both,   // two of positions, two of weights: each is loaded once
    whole,  // 4 and 6
    last,   // 5 and 7
};

// What comes before the first product that is added to a tile of sums.
struct GoOn {
    template <int kTile>
    CVFAST_INLINE void begin() const {}
};
struct FromZero {
    template <int kTile>
    CVFAST_INLINE void begin() const {
        tile_zero<kTile>();
    }
};
// Stores the sums that are there, m * N + n as [m][row][n][16]. Tile by tile between products, that
// takes half the time of four stores in a row.
template <int N>
struct StoreFirst {
    float* sums;

    template <int kTile>
    CVFAST_INLINE void begin() const {
        constexpr int m = kTile / N, n = kTile % N;
        tile_store<kTile>(sums + m * kAmxRows * N * kLanes + n * kLanes, N * kLanes * 4);
        tile_zero<kTile>();
    }
};

template <int kTile, bool kKeep>
CVFAST_INLINE void tile_load_weights(const char* p) {
    if constexpr (kKeep) {
        tile_load<kTile>(p, 64);
    } else {
        tile_load_once<kTile>(p, 64);
    }
}

// Adds to sums m * N + n the product of positions m and weights n. kLoadA, kLoadB: with `both`,
// whether positions and weights are others than at the call before. kKeep: the weights stay in L1;
// where they come from L2, loaded without a copy they leave L1 to the positions.
template <int M, int N, StepTiles kTiles, bool kKeep, bool kLoadA, bool kLoadB, class Sums,
          int kStep = 0>
CVFAST_INLINE void multiply_tiles(const char* const (&a)[M], int64_t a_row,
                                  const char* const (&b)[N], const Sums& sums) {
    static_assert((M <= 2 && N <= 2) || M == 1 || N == 1);
    constexpr bool kBoth = kTiles == StepTiles::both;
    constexpr bool kPaired = kBoth && M <= 2 && N <= 2;
    constexpr int n = kPaired ? kStep % N : kStep / M, i = kPaired ? 0 : kStep % M;
    constexpr int m = kPaired ? kStep / N : n % 2 ? M - 1 - i : i;
    constexpr int kA = kBoth ? 4 + m % 2 : kTiles == StepTiles::whole ? 4 : 5;
    constexpr int kB = kBoth ? 6 + n % 2 : kTiles == StepTiles::whole ? 6 : 7;
    if constexpr (kPaired) {
        if constexpr (kStep == 0 && kLoadB) {
            tile_load_weights<6, kKeep>(b[0]);
            if constexpr (N == 2) tile_load_weights<7, kKeep>(b[1]);
        }
        if constexpr (kStep == 0 && kLoadA) {
            tile_load<4>(a[0], a_row);
            if constexpr (M == 2) tile_load<5>(a[1], a_row);
        }
    } else {
        if constexpr (i == 0 && (kLoadB || N > 2)) tile_load_weights<kB, kKeep>(b[n]);
        if constexpr ((n == 0 && (kLoadA || M > 2)) || (!kBoth && i > 0)) {
            tile_load<kA>(a[m], a_row);
        }
    }
    sums.template begin<m * N + n>();
    tile_dot<m * N + n, kA, kB>();
    if constexpr (kStep + 1 < M * N) {
        multiply_tiles<M, N, kTiles, kKeep, kLoadA, kLoadB, Sums, kStep + 1>(a, a_row, b, sums);
    }
}

// The pieces of positions and weights whose products are added, in the order of fewest loads.
struct PiecePair {
    int a, b;
};
inline constexpr PiecePair kPiecePairs[] = {{2, 0}, {1, 0}, {0, 0}, {0, 2}, {0, 1}, {1, 1}};

template <int M, int N, StepTiles kTiles, bool kKeep, class T, class Sums, int kPair = 0>
CVFAST_INLINE void multiply_pieces(const AmxProduct<T>& t, const char* const (&a)[M],
                                   const char* const (&b)[N], const Sums& sums) {
    if constexpr (kAmxPieces<T> == 1) {
        multiply_tiles<M, N, kTiles, kKeep, true, true>(a, t.a_pixel, b, sums);
    } else if constexpr (kPair < static_cast<int>(std::size(kPiecePairs))) {
        constexpr PiecePair pair = kPiecePairs[kPair];
        constexpr bool kBoth = kTiles == StepTiles::both;
        constexpr PiecePair before = kPair > 0 ? kPiecePairs[kPair - 1] : PiecePair{-1, -1};
        const char* pa[M];
        const char* pb[N];
        CVFAST_UNROLL for (int m = 0; m < M; ++m) pa[m] = a[m] + pair.a * t.a_piece;
        CVFAST_UNROLL for (int n = 0; n < N; ++n) pb[n] = b[n] + pair.b * kAmxTileBytes;
        multiply_tiles<M, N, kTiles, kKeep, !kBoth || pair.a != before.a,
                       !kBoth || pair.b != before.b>(pa, t.a_pixel, pb, sums);
        multiply_pieces<M, N, kTiles, kKeep, T, GoOn, kPair + 1>(t, a, b, GoOn{});
    }
}

template <int M, int N, int kTile = 0>
CVFAST_INLINE void store_tiles(float* sums) {
    if constexpr (kTile < M * N) {
        StoreFirst<N>{sums}.template begin<kTile>();
        store_tiles<M, N, kTile + 1>(sums);
    }
}

// Row `row` of a panel's weights, a word of each of its channels.
CVFAST_INLINE Vec weight_row(const float* weights, int64_t row, bool half) {
    if (!half) return load(weights + row * kAmxPanel);
    const Vec two = load(weights + row / 2 * kAmxPanel);
    return row % 2 ? _mm512_maskz_compress_ps(0xaaaa, two) : _mm512_maskz_compress_ps(0x5555, two);
}

// The two highest of the bfloat16 numbers whose sum is x. The first is cut off, not rounded: it
// then is finite where x is. Where x is infinite the others are zero, where it is NaN one of them
// is.
struct Pieces {
    Vec high, middle, low;
};
CVFAST_INLINE Vec upper_half(Vec x) {
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000));
    return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), mask));
}
template <bool kKeepsInfinities = true>
CVFAST_INLINE Pieces pieces_of(Vec x) {
    constexpr int kInfinities = 0x18;
    Pieces p;
    p.high = upper_half(x);
    Vec rest;
    if constexpr (kKeepsInfinities) {
        const auto finite = static_cast<__mmask16>(~_mm512_fpclass_ps_mask(x, kInfinities));
        rest = _mm512_maskz_sub_ps(finite, x, p.high);
    } else {
        rest = sub(x, p.high);
    }
    const __m512i rounded = _mm512_add_epi32(_mm512_castps_si512(rest), _mm512_set1_epi32(0x8000));
    p.middle = upper_half(_mm512_castsi512_ps(rounded));
    p.low = sub(rest, p.middle);
    return p;
}

// The upper halves of two vectors, lane by lane: those of `even` in the low halves.
CVFAST_INLINE Vec pair_upper_halves(Vec even, Vec odd) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_castps_si512(upper_half(odd))));
}

// Weights of a panel in pieces, as tiles [step][piece].
inline void split_weights(const AmxProduct<float>& t, const float* weights, bool half, char* to) {
    for (int64_t run = 0; run < t.run_count; ++run) {
        const int64_t begin = t.first_row + run * t.run_values, end = begin + t.run_values;
        for (int64_t row = begin; row < end; row += 2 * kAmxWords, to += kPieces * kAmxTileBytes) {
            for (int64_t j = 0; j < kAmxRows; ++j) {
                const int64_t even = row + 2 * j;
                Pieces p{}, q{};
                if (even < end) p = pieces_of<false>(weight_row(weights, even, half));
                if (even + 1 < end) q = pieces_of<false>(weight_row(weights, even + 1, half));
                float* word = reinterpret_cast<float*>(to + j * 64);
                store(word, pair_upper_halves(p.high, q.high));
                store(word + kAmxTileBytes / 4, pair_upper_halves(p.middle, q.middle));
                store(word + 2 * kAmxTileBytes / 4, pair_upper_halves(p.low, q.low));
            }
        }
    }
}

CVFAST_INLINE void store_upper_halves(char* to, Vec v, __mmask16 lanes) {
    const __m512i upper = _mm512_srli_epi32(_mm512_castps_si512(v), 16);
    _mm256_mask_storeu_epi16(to, lanes, _mm512_cvtepi32_epi16(upper));
}

// Floats as neighbouring bfloat16 numbers, in pieces that lie `piece` bytes apart.
CVFAST_INLINE void store_pieces(char* to, int64_t piece, Vec x, __mmask16 lanes = 0xffff) {
    const Pieces p = pieces_of(x);
    store_upper_halves(to, p.high, lanes);
    store_upper_halves(to + piece, p.middle, lanes);
    store_upper_halves(to + 2 * piece, p.low, lanes);
}

// A group of panels as tiles: bfloat16 as they are, but for a half panel, floats in pieces.
template <class T>
class AmxWeights {
  public:
    AmxWeights(const AmxProduct<T>& t, int64_t first, int64_t panels, bool half) {
        const float* weights = t.weights + first * t.panel;
        if constexpr (kAmxPieces<T> > 1) {
            begin_ = t.scratch;
            panel_ = t.run_count * amx_steps(t.run_values) * kPieces * kAmxTileBytes;
            for (int64_t i = 0; i < panels; ++i) {
                split_weights(t, weights + i * t.panel, half && i == panels - 1,
                              t.scratch + i * panel_);
            }
        } else {
            begin_ = reinterpret_cast<const char*>(weights + t.first_row * kAmxPanel);
            panel_ = t.panel * int64_t{sizeof(float)};
            if (!half) return;
            half_ = panels - 1;
            scratch_ = t.scratch;
            const int64_t words = t.run_count * ((t.run_values + 1) / 2);
            float* row = reinterpret_cast<float*>(t.scratch);
            for (int64_t i = 0; i < words; ++i, row += kAmxPanel) {
                store(row, weight_row(weights + half_ * t.panel, t.first_row + i, true));
            }
        }
    }

    const char* panel(int64_t i) const { return i == half_ ? scratch_ : begin_ + i * panel_; }

    AmxWeights from(int64_t i) const {
        AmxWeights rest = *this;
        rest.begin_ += i * panel_;
        rest.half_ -= i;
        return rest;
    }

  private:
    const char* begin_;
    int64_t panel_;
    int64_t half_ = -1;
    const char* scratch_ = nullptr;
};

// A panel's sums of one position, from the numbers themselves: where a product of pieces is not
// finite, the sum of them may be NaN where that of the numbers is not.
__attribute__((noinline)) inline Vec whole_sums(const AmxProduct<float>& t, const char* position,
                                                const float* weights, bool half) {
    Vec sum = set1(0.f);
    int64_t row = t.first_row;
    for (int64_t run = 0; run < t.run_count; ++run) {
        const char* p = position + t.runs[run];
        for (int64_t i = 0; i < t.run_values; ++i, ++row, p += sizeof(BFloat16)) {
            float x = 0;
            for (int piece = kPieces - 1; piece >= 0; --piece) {
                BFloat16 part;
                std::memcpy(&part, p + piece * t.a_piece, sizeof part);
                x += to_float(part);
            }
            sum = fma(set1(x), weight_row(weights, row, half), sum);
        }
    }
    return sum;
}

// The positions of all lines as tiles of `rows`: the last of a line begins earlier and leaves out
// those that the one before has, so that all have one shape.
struct AmxTiling {
    int64_t per_line, tiles;
    int rows;

    template <class T>
    explicit AmxTiling(const AmxProduct<T>& t)
        : per_line(amx_tiles(t.positions)),
          tiles(per_line * t.lines),
          rows(static_cast<int>((t.positions + per_line - 1) / per_line)) {}
};

// Where a tile lies; positions count along its line. Divisions take as long as products of few
// channels: where there is one line, there are none.
struct TilePositions {
    int64_t image = 0, line = 0, begin, first_wanted;

    template <class T>
    TilePositions(const AmxProduct<T>& t, const AmxTiling& tiling, int64_t tile) {
        if (tiling.tiles != tiling.per_line) {
            const int64_t of_line = tile / tiling.per_line;
            tile -= of_line * tiling.per_line;
            image = of_line / t.lines_per_image;
            line = of_line - image * t.lines_per_image;
        }
        first_wanted = tile * tiling.rows;
        begin = std::min(first_wanted, t.positions - tiling.rows);
    }

    template <class T>
    const char* a(const AmxProduct<T>& t) const {
        return t.a + image * t.a_image + line * t.a_line + begin * t.a_pixel;
    }
};

inline constexpr int kNanOrInfinity = 0x99;  // as of fpclass: quiet, signalling, both signs

// 0, step, 2 step and so on.
struct Multiples {
    __m512i low, high;

    explicit Multiples(int64_t step) {
        const __m512i counts = _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0);
        low = _mm512_mullo_epi64(counts, _mm512_set1_epi64(step));
        high = _mm512_add_epi64(low, _mm512_set1_epi64(8 * step));
    }
    // Writes 16, from `first` on.
    CVFAST_INLINE void write(int64_t* to, int64_t first) const {
        _mm512_storeu_si512(to, _mm512_add_epi64(low, _mm512_set1_epi64(first)));
        _mm512_storeu_si512(to + 8, _mm512_add_epi64(high, _mm512_set1_epi64(first)));
    }
};

// Where the results of a group of tiles go: an entry per position that is wanted. Entries are
// written 16 at a time, so there is room for what is written beyond the last.
struct AmxPlaces {
    static constexpr int kMost = 5 * kAmxRows;

    int count = 0;
    int64_t sums[kMost];      // elements from the first of the group
    int64_t out[kMost];       // elements from the tensor's first
    int64_t residual[kMost];  // likewise, if there is one
    int64_t begin[4];         // per tile, which position of its line its first row is
    const char* a[4];         // per tile, where that position lies
};

// Works out the places of groups of a product. In a group, positions are stored `step` elements
// apart.
template <class T>
class AmxPlacing {
  public:
    AmxPlacing(const AmxProduct<T>& t, const AmxTiling& tiling, int64_t step)
        : t_(t),
          tiling_(tiling),
          step_(step),
          sums_(step),
          out_(t.out_pixel),
          residual_(t.residual_pixel) {}

    void place(int64_t first, int tiles, AmxPlaces& places) const {
        int count = 0;
        for (int m = 0; m < tiles; ++m) {
            const TilePositions tile(t_, tiling_, first + m);
            places.begin[m] = tile.begin;
            places.a[m] = tile.a(t_);
            int64_t row = tile.line, pixel = tile.first_wanted;
            if (pixel >= t_.period) row += pixel / t_.period, pixel %= t_.period;
            const int64_t end = tile.begin + tiling_.rows;
            for (int64_t p = tile.first_wanted; p < end; p += t_.period - pixel, pixel = 0, ++row) {
                const int64_t wanted = std::min(end - p, t_.valid - pixel);
                if (wanted <= 0) continue;
                sums_.write(places.sums + count, (m * kAmxRows + p - tile.begin) * step_);
                out_.write(places.out + count,
                           tile.image * t_.out_image + row * t_.out_row + pixel * t_.out_pixel);
                if (t_.residual) {
                    residual_.write(places.residual + count, tile.image * t_.residual_image +
                                                                 row * t_.residual_row +
                                                                 pixel * t_.residual_pixel);
                }
                count += static_cast<int>(wanted);
            }
        }
        places.count = count;
    }

  private:
    const AmxProduct<T>& t_;
    const AmxTiling& tiling_;
    const int64_t step_;
    const Multiples sums_, out_, residual_;
};

// Sums of groups of tiles times N panels, [tile][row][panel][16], and what becomes of them. While
// one group is summed in the tiles, that before it lies stored, and of the one before that results
// are made, a few positions at a time: what was just stored from tiles can't be loaded for a while,
// and whatever waits for it keeps the next products waiting too.
template <int N, class T>
class AmxResults {
  public:
    AmxResults(const AmxProduct<T>& t, const AmxTiling& tiling)
        : t_(t), tiling_(tiling), placing_(t, tiling, N * kLanes) {}
    AmxResults(const AmxResults&) = delete;
    ~AmxResults() {
        add_segment();
        take();
        make(left());
    }

    // The tiles hold a segment of the sums of `tiles` tiles from `tile` on times panels from
    // channel c on.
    void sum(int64_t tile, int tiles, int64_t c, bool first_segment, bool last_segment) {
        if (tile != placed_) {
            placed_ = tile;
            at_place_ = (at_place_ + 1) % 3;
            placing_.place(tile, tiles, places_[at_place_]);
        }
        summed_ = {tiles, c, at_place_, first_segment, last_segment};
        in_tiles_ = true;
    }
    bool in_tiles() const { return in_tiles_; }
    // Where the tiles are to be stored before they sum something else, and what then follows.
    float* place() {
        add_segment();
        if (!summed_.first_segment) return segment_;
        take();
        return sums_[1 - current_];
    }
    void stored() {
        in_tiles_ = false;
        adds_segment_ = !summed_.first_segment;
        if (summed_.last_segment) stored_ = summed_;
    }

    int left() const { return made_->count - next_; }

    // Makes results of at most `positions`.
    void make(int positions) {
        const int begin = next_;
        next_ = std::min(made_->count, next_ + positions);
        if (begin < next_) (this->*make_)(begin, next_);
    }

  private:
    using Make = void (AmxResults::*)(int begin, int end);

    struct Group {
        int tiles = 0;  // none: there is no group
        int64_t channel;
        int places;
        bool first_segment, last_segment;
    };

    // To the sums of the segments before.
    void add_segment() {
        if (!adds_segment_) return;
        adds_segment_ = false;
        float* sums = sums_[1 - current_];
        for (int m = 0; m < summed_.tiles; ++m) {
            for (int i = 0; i < tiling_.rows * N; ++i) {
                const int at = (m * kAmxRows * N + i) * kLanes;
                store(sums + at, add(load(sums + at), load(segment_ + at)));
            }
        }
    }

    // Turns to the results of the sums that are stored, if any.
    void take() {
        make(left());
        if (!stored_.tiles) return;
        current_ = 1 - current_;
        made_ = &places_[stored_.places];
        next_ = 0;
        const int64_t c = channel_ = stored_.channel;
        stored_.tiles = 0;
        last_ = static_cast<int>(std::min<int64_t>(kLanes, t_.channels - c - (N - 1) * kLanes));
        for (int n = 0; n < N; ++n) {
            const float* bias = t_.bias + (c / kAmxPanel + n) * t_.panel;
            store(bias_[n], weight_row(bias, 0, is_half(n)));
        }
        make_ = how_to_make();
    }

    bool is_half(int n) const { return t_.half && channel_ + (n + 1) * kAmxPanel > t_.channels; }

    float* sums_at(int i) { return sums_[current_] + made_->sums[i]; }

    Make how_to_make() const {
        switch (t_.activation) {
            case Activation::none:
                return how_to_make_as<Activation::none>();
            case Activation::relu:
                return how_to_make_as<Activation::relu>();
            case Activation::relu6:
                return how_to_make_as<Activation::relu6>();
            case Activation::hardswish:
                return how_to_make_as<Activation::hardswish>();
            case Activation::hardsigmoid:
                return how_to_make_as<Activation::hardsigmoid>();
        }
        __builtin_unreachable();
    }

    template <Activation kActivation>
    Make how_to_make_as() const {
        const bool whole = last_ == kLanes;
        if (t_.sums_before || t_.sums_after) {
            return whole ? &AmxResults::add_sums<kActivation, true>
                         : &AmxResults::add_sums<kActivation, false>;
        }
        if (t_.residual) {
            return whole ? &AmxResults::make_results<kActivation, true, true>
                         : &AmxResults::make_results<kActivation, true, false>;
        }
        return whole ? &AmxResults::make_results<kActivation, false, true>
                     : &AmxResults::make_results<kActivation, false, false>;
    }

    // Sums of pieces that are not finite.
    CVFAST_INLINE void mend(int begin, int end) {
        __mmask16 strange = 0;
        for (int i = begin; i < end; ++i) {
            CVFAST_UNROLL for (int n = 0; n < N; ++n) {
                strange |= _mm512_fpclass_ps_mask(load(sums_at(i) + n * kLanes), kNanOrInfinity);
            }
        }
        if (strange == 0) [[likely]]
            return;
        const AmxPlaces& places = *made_;
        for (int i = begin; i < end; ++i) {
            const int64_t at = places.sums[i] / (N * kLanes);
            const char* position = places.a[at / kAmxRows] + at % kAmxRows * t_.a_pixel;
            for (int n = 0; n < N; ++n) {
                float* sums = sums_at(i) + n * kLanes;
                if (all_finite(load(sums))) continue;
                const float* weights = t_.weights + (channel_ / kAmxPanel + n) * t_.panel;
                store(sums, whole_sums(t_, position, weights, is_half(n)));
            }
        }
    }

    // Of a product in parts: adds the sums of the parts before, and leaves sums for the next or
    // makes results.
    template <Activation kActivation, bool kWhole>
    void add_sums(int begin, int end) {
        if constexpr (kAmxPieces<T> > 1) mend(begin, end);
        const AmxPlaces& places = *made_;
        for (int i = begin; i < end; ++i) {
            const int64_t at = places.sums[i] / (N * kLanes);
            const int64_t position = places.begin[at / kAmxRows] + at % kAmxRows;
            for (int n = 0; n < N; ++n) {
                float* sums = sums_at(i) + n * kLanes;
                const int64_t part =
                    (channel_ + n * kAmxPanel) * t_.positions + position * kAmxPanel;
                if (t_.sums_before) store(sums, add(load(sums), load(t_.sums_before + part)));
                if (t_.sums_after) store(t_.sums_after + part, load(sums));
            }
        }
        if (t_.sums_after) return;
        if (t_.residual) {
            finish<kActivation, true, kWhole>(begin, end);
        } else {
            finish<kActivation, false, kWhole>(begin, end);
        }
    }

    template <Activation kActivation, bool kResidual, bool kWhole>
    void make_results(int begin, int end) {
        if constexpr (kAmxPieces<T> > 1) mend(begin, end);
        finish<kActivation, kResidual, kWhole>(begin, end);
    }

    // kWhole: all panels have 16 channels.
    template <Activation kActivation, bool kResidual, bool kWhole>
    CVFAST_INLINE void finish(int begin, int end) {
        Vec bias[N];
        CVFAST_UNROLL for (int n = 0; n < N; ++n) bias[n] = load(bias_[n]);
        // Read once: what is stored might be these numbers, as far as the compiler knows.
        const AmxPlaces& places = *made_;
        const float* const sums = sums_[current_];
        const T* const residual = kResidual ? t_.residual + channel_ : nullptr;
        T* const out = t_.out + channel_;
        const int last = last_;
        for (int i = begin; i < end; ++i) {
            const float* from = sums + places.sums[i];
            T* const to = out + places.out[i];
            Vec y[1][N];
            CVFAST_UNROLL for (int n = 0; n < N; ++n) {
                y[0][n] = add(load(from + n * kLanes), bias[n]);
                if constexpr (kResidual) {
                    const T* p = residual + places.residual[i] + n * kLanes;
                    const bool whole = kWhole || n < N - 1;
                    y[0][n] = add(y[0][n], whole ? load(p) : load_n(p, last));
                }
            }
            activate_all_as<kActivation>(y);
            if constexpr (kWhole && N % 2 == 0 && std::is_same_v<T, BFloat16>) {
                CVFAST_UNROLL for (int n = 0; n < N; n += 2) {
                    store_two(to + n * kLanes, y[0][n], y[0][n + 1]);
                }
            } else {
                CVFAST_UNROLL for (int n = 0; n < N; ++n) {
                    if (kWhole || n < N - 1) {
                        store(to + n * kLanes, y[0][n]);
                    } else {
                        store_n(to + n * kLanes, y[0][n], last);
                    }
                }
            }
        }
    }

    const AmxProduct<T>& t_;
    const AmxTiling& tiling_;
    const AmxPlacing<T> placing_;
    Group summed_, stored_;
    bool in_tiles_ = false, adds_segment_ = false;
    AmxPlaces places_[3];
    int64_t placed_ = -1;  // first tile of places_[at_place_]
    int at_place_ = 0;
    const AmxPlaces* made_ = places_;
    int next_ = 0;  // place that has no result yet
    int current_ = 0;
    int64_t channel_ = 0;
    int last_ = 0;
    Make make_ = nullptr;
    alignas(64) float bias_[N][kLanes];
    alignas(64) float sums_[2][4 * kAmxRows * kLanes];
    alignas(64) float segment_[kAmxPieces<T> > 1 ? 4 * kAmxRows * kLanes : kLanes];
};

// Positions whose results are made at once are a multiple of this.
inline constexpr int kAtOnce = 4;

// Of a float product, steps that are summed one after another: the sums of such segments are added
// to each other. See pointwise_segment().
inline constexpr int64_t kSegmentSteps = 8;

// Words of the last step of a run.
constexpr int64_t amx_last_words(int64_t run_values) {
    return (run_values + 1) / 2 - (amx_steps(run_values) - 1) * kAmxWords;
}

// Bytes of a panel's weights for that step: those in pieces are whole tiles.
template <class T>
int64_t amx_last_bytes(const AmxProduct<T>& t) {
    constexpr int64_t kWhole = int64_t{kAmxTileBytes} * kAmxPieces<T>;
    return kAmxPieces<T> == 1 ? amx_last_words(t.run_values) * 64 : kWhole;
}

// Whether all steps of a run have as many words.
constexpr bool amx_even(int64_t run_values) {
    return amx_steps(run_values) == 1 || run_values % (2 * kAmxWords) == 0;
}

// How far the sums of a group are.
template <int M, int N>
struct AmxWalk {
    const char* positions[M];
    const char* weights[N];  // of the step that is next
    int64_t last_bytes;      // of a run's last step
    int64_t run = 0, step = 0;
};

// Weights of all panels, up to which they stay in L1 beside positions and results.
inline constexpr int64_t kWeightsInL1 = 16 * 1024;

// kEven: every step has as many words. kKeep: as of multiply_tiles().
template <int M, int N, bool kEven, bool kKeep, class T, class Sums>
CVFAST_INLINE void amx_step(const AmxProduct<T>& t, int64_t steps, AmxWalk<M, N>& walk,
                            const Sums& sums) {
    const char* a[M];
    CVFAST_UNROLL for (int m = 0; m < M; ++m) {
        a[m] = walk.positions[m] + t.runs[walk.run] + walk.step * 64;
    }
    const bool last = walk.step + 1 == steps;
    if (kEven || !last) {
        constexpr StepTiles kTiles = kEven ? StepTiles::both : StepTiles::whole;
        multiply_pieces<M, N, kTiles, kKeep>(t, a, walk.weights, sums);
    } else {
        multiply_pieces<M, N, StepTiles::last, kKeep>(t, a, walk.weights, sums);
    }
    const int64_t bytes = last ? walk.last_bytes : int64_t{kAmxTileBytes} * kAmxPieces<T>;
    CVFAST_UNROLL for (int n = 0; n < N; ++n) walk.weights[n] += bytes;
    if (last) {
        walk.step = 0, ++walk.run;
    } else {
        ++walk.step;
    }
}

// The sums of the N panels from channel c on for M tiles of positions from `tile` on.
template <int M, int N, bool kEven, bool kKeep, class T>
void amx_sums(const AmxProduct<T>& t, const AmxTiling& tiling, int64_t tile, int64_t c,
              const char* const (&weights)[N], AmxResults<N, T>& results) {
    const int64_t steps = amx_steps(t.run_values), all = t.run_count * steps;
    const int64_t most = kAmxPieces<T> > 1 ? kSegmentSteps : all;
    AmxWalk<M, N> walk;
    for (int m = 0; m < M; ++m) walk.positions[m] = TilePositions(t, tiling, tile + m).a(t);
    CVFAST_UNROLL for (int n = 0; n < N; ++n) walk.weights[n] = weights[n];
    walk.last_bytes = amx_last_bytes(t);
    int due = 0, per_step = 0;
    for (int64_t begin = 0, end; begin < all; begin = end) {
        if (results.in_tiles()) {
            amx_step<M, N, kEven, kKeep>(t, steps, walk, StoreFirst<N>{results.place()});
            results.stored();
        } else {
            amx_step<M, N, kEven, kKeep>(t, steps, walk, FromZero{});
        }
        if (begin == 0) {
            // Done before the group is, so that few are left when the next begins.
            const int share = results.left() / static_cast<int>(std::max<int64_t>(1, all - 1));
            due = per_step = share < kAtOnce ? share + 1 : (share / kAtOnce + 1) * kAtOnce;
        }
        end = std::min(begin + most, all);
        for (int64_t i = begin + 1; i < end; ++i) {
            results.make(due / kAtOnce * kAtOnce);
            due %= kAtOnce;
            amx_step<M, N, kEven, kKeep>(t, steps, walk, GoOn{});
            due += per_step;
        }
        results.sum(tile, M, c, begin == 0, end == all);
    }
}

template <class T>
void amx_last_tile(const AmxProduct<T>& t, const AmxTiling& tiling, int64_t c, int64_t panels,
                   const AmxWeights<T>& weights, int64_t tile);

// The tiles from `tile` on by groups of at most M, each times `panels` panels by groups of N, from
// channel c on.
template <int M, int N, class T>
void amx_panels(const AmxProduct<T>& t, const AmxTiling& tiling, int64_t c, int64_t panels,
                const AmxWeights<T>& weights, int64_t tile = 0) {
    AmxResults<N, T> results(t, tiling);
    constexpr bool kMayKeep = kAmxPieces<T> == 1;
    const bool even = amx_even(t.run_values);
    const int64_t weights_bytes = panels * t.run_count * amx_steps(t.run_values) * kAmxTileBytes;
    const bool keep = kMayKeep && weights_bytes <= kWeightsInL1;
    for (; tiling.tiles - tile >= M; tile += M) {
        for (int64_t i = 0; i + N <= panels; i += N) {
            const char* b[N];
            CVFAST_UNROLL for (int n = 0; n < N; ++n) b[n] = weights.panel(i + n);
            const int64_t channel = c + i * kAmxPanel;
            if (!even) {
                amx_sums<M, N, false, false>(t, tiling, tile, channel, b, results);
            } else if (keep) {
                amx_sums<M, N, true, kMayKeep>(t, tiling, tile, channel, b, results);
            } else {
                amx_sums<M, N, true, false>(t, tiling, tile, channel, b, results);
            }
        }
    }
    if (results.in_tiles()) {
        store_tiles<M, N>(results.place());
        results.stored();
    }
    if (tile == tiling.tiles) return;
    if constexpr (M == 2 && N == 2) {
        amx_last_tile(t, tiling, c, panels, weights, tile);
    } else if constexpr (M > 1) {
        amx_panels<M - 1, N>(t, tiling, c, panels, weights, tile);
    }
}

// A tile that is left alone: four sums at once hide the latency of each.
template <class T>
void amx_last_tile(const AmxProduct<T>& t, const AmxTiling& tiling, int64_t c, int64_t panels,
                   const AmxWeights<T>& weights, int64_t tile) {
    const int64_t fours = panels / 4 * 4;
    amx_panels<1, 4>(t, tiling, c, fours, weights, tile);
    amx_panels<1, 2>(t, tiling, c + fours * kAmxPanel, panels - fours, weights.from(fours), tile);
}

// Groups of panels, whose weights stay in L2 while all positions pass over them.
template <class T>
void amx_product(const AmxProduct<T>& t, MatrixUnit& unit) {
    const AmxTiling tiling(t);
    const int last_words = static_cast<int>(amx_last_words(t.run_values));
    unit.shape(tiling.rows, amx_even(t.run_values) ? last_words : kAmxWords, last_words);
    const int64_t all = (t.channels + kAmxPanel - 1) / kAmxPanel;
    const int64_t most = amx_panels_at_once<T>(t.run_count, t.run_values);
    for (int64_t first = 0; first < all; first += most) {
        const int64_t panels = std::min(most, all - first);
        const AmxWeights<T> weights(t, first, panels, t.half && first + panels == all);
        const int64_t c = first * kAmxPanel;
        amx_panels<2, 2>(t, tiling, c, panels, weights);
        if (panels % 2) {
            amx_panels<4, 1>(t, tiling, c + (panels - 1) * kAmxPanel, 1, weights.from(panels - 1));
        }
    }
}

}  // namespace cvfast::CVFAST_ISA_NAMESPACE
