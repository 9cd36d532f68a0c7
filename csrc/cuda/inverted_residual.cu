// What the inverted residual's kernels share whatever their element type: checks and sizes.
#include <algorithm>
#include <limits>

#include "cuda/inverted_residual_launch.cuh"

namespace cvfast::cuda {
namespace {

// Places in a tile are kept in bytes.
constexpr int64_t kMaxSide = std::numeric_limits<uint8_t>::max();

// Sizes that the kernels may count in 32 bits.
constexpr int64_t kSizeLimit = int64_t{1} << 24;

constexpr int64_t kMaxGridY = 65535;

int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows or columns that `outputs` of them read.
int64_t reach(int64_t outputs, int64_t kernel, int64_t stride) {
    return (outputs - 1) * stride + kernel;
}

int64_t rectangle_columns(const InvertedResidualShape& s, const InvertedResidualLaunch& l) {
    return reach(ceil_divide(l.columns, kStrip) * kStrip, s.kernel_w, s.stride_w);
}

int64_t chunk_count(const InvertedResidualShape& s) { return ceil_divide(s.hidden, kChunk); }

}  // namespace

std::string describe(const InvertedResidualLaunch& l) {
    return "a launch of " + std::to_string(l.images) + " images of " + std::to_string(l.rows) +
           "x" + std::to_string(l.columns) + " outputs, " + std::to_string(l.down) + "x" +
           std::to_string(l.across) + " warps of width " + std::to_string(l.width) + ", " +
           std::to_string(l.splits) + " splits";
}

std::string parse_launch(const std::vector<int64_t>& numbers, InvertedResidualLaunch& launch) {
    constexpr size_t kNumbers = 7;
    if (numbers.size() != kNumbers) {
        return "launch has " + std::to_string(numbers.size()) + " numbers, expected " +
               std::to_string(kNumbers);
    }
    for (const int64_t n : numbers) {
        if (n < 0 || n > kMaxGridY) return "launch holds " + std::to_string(n) + ", out of range";
    }
    int fields[kNumbers];
    for (size_t i = 0; i < kNumbers; ++i) fields[i] = static_cast<int>(numbers[i]);
    launch = {fields[0], fields[1], fields[2], fields[3], fields[4], fields[5], fields[6]};
    return {};
}

std::string check_launch(const InvertedResidualShape& s, bool expands, bool projects,
                         const InvertedResidualLaunch& l) {
    const auto wrong = [&](const std::string& reason) { return describe(l) + ": " + reason; };
    if (s.kernel_h != s.kernel_w || s.stride_h != s.stride_w) {
        return wrong("kernel and stride must be square");
    }
    const int64_t sizes[] = {s.batch,    s.height,       s.width,     s.in_channels,
                             s.hidden,   s.out_height,   s.out_width, s.pad_top,
                             s.pad_left, s.out_channels, s.kernel_h,  s.stride_h};
    if (std::any_of(std::begin(sizes), std::end(sizes), [](int64_t n) { return n > kSizeLimit; })) {
        return wrong("the image is too large for 32-bit counts");
    }
    if (!expands && s.hidden != s.in_channels) {
        return wrong("without an expansion the hidden channels are those of x");
    }
    for (const int count : {l.rows, l.columns, l.images, l.down, l.across, l.splits}) {
        if (count < 1) return wrong("every count must be at least 1");
    }
    if (std::max({reach(l.rows, s.kernel_h, s.stride_h), rectangle_columns(s, l),
                  int64_t{l.images}}) > kMaxSide) {
        return wrong("at most " + std::to_string(kMaxSide) + " input rows, columns and images");
    }
    if (l.down * l.across * 32 > kBlockThreads) {
        return wrong("at most " + std::to_string(kBlockThreads) + " threads a block");
    }
    if (l.splits > chunk_count(s)) {
        return wrong("more splits than the " + std::to_string(chunk_count(s)) +
                     " chunks of hidden channels");
    }
    if (projects != (l.width > 0)) return wrong("a width is of a projection");
    const int64_t outputs = int64_t{l.images} * l.rows * l.columns;
    // Of the projection's matrices, a warp has two rows.
    if (projects && (outputs > int64_t{l.down} * 2 * kMatrix ||
                     s.out_channels > int64_t{l.across} * l.width * kMatrix)) {
        return wrong("the warps sum " + std::to_string(l.down * 2 * kMatrix) + " outputs of " +
                     std::to_string(l.across * l.width * kMatrix) + " channels");
    }
    if (!projects && (l.columns < s.out_width || l.across != 1)) {
        return wrong("means of rows need tiles as wide as the image, and one warp across");
    }
    const int64_t tiles = ceil_divide(s.batch, l.images) * ceil_divide(s.out_height, l.rows) *
                          ceil_divide(s.out_width, l.columns);
    if (tiles > std::numeric_limits<int>::max()) return wrong("more tiles than a grid has blocks");
    return {};
}

SharedLayout shared_layout(const InvertedResidualShape& s, bool expands, bool projects,
                           const InvertedResidualLaunch& l) {
    int64_t end = 0;
    const auto take = [&end](int64_t bytes) {
        const int64_t offset = end;
        end = ceil_divide(end + bytes, 16) * 16;
        return static_cast<int>(std::min<int64_t>(offset, std::numeric_limits<int>::max()));
    };
    const auto matrix = [](int64_t rows, int64_t columns) {
        return rows * matrix_pitch(static_cast<int>(ceil_divide(columns, kMatrix)) * kMatrix) * 2;
    };
    const auto rows16 = [](int64_t rows) { return ceil_divide(rows, kMatrix) * kMatrix; };
    const int64_t rectangle_rows = reach(l.rows, s.kernel_h, s.stride_h);
    const int64_t inputs = l.images * std::min(rectangle_rows, s.height) *
                           std::min(reach(l.columns, s.kernel_w, s.stride_w), s.width);
    const int64_t outputs = int64_t{l.images} * l.rows * l.columns;
    const int64_t hidden = matrix(l.images * rectangle_rows * rectangle_columns(s, l), kChunk);
    const int64_t turned =
        projects ? int64_t{l.down} * l.across * kTurnFloats * int64_t{sizeof(float)} : 0;
    const int64_t panels = kPanels * (s.kernel_h * s.kernel_w + 1) * kDepthwisePanel * 4;

    SharedLayout layout{};
    layout.x = take(expands ? matrix(rows16(inputs), s.in_channels) : 0);
    layout.hidden_next = static_cast<int>(expands ? 0 : hidden);
    layout.hidden = take(std::max(hidden + layout.hidden_next, turned));
    layout.filtered = take(matrix(rows16(outputs), kChunk));
    layout.expand = take(expands ? matrix(rows16(s.in_channels), kChunk) : 0);
    layout.expand_bias = take(expands ? kChunk * int64_t{sizeof(float)} : 0);
    layout.project = take(projects ? matrix(kChunk, s.out_channels) : 0);
    layout.depthwise = take(2 * panels);
    layout.inputs = take(inputs * int64_t{sizeof(TilePixel)});
    layout.outputs = take(outputs * int64_t{sizeof(TilePixel)});
    layout.strips =
        take(l.images * l.rows * ceil_divide(l.columns, kStrip) * int64_t{sizeof(TilePixel)});
    layout.total = take(0);
    return layout;
}

int64_t inverted_residual_shared_bytes(const InvertedResidualShape& s, bool expands, bool projects,
                                       const InvertedResidualLaunch& launch) {
    return shared_layout(s, expands, projects, launch).total;
}

int64_t inverted_residual_partials(const InvertedResidualShape& s, bool projects,
                                   const InvertedResidualLaunch& launch) {
    if (launch.splits < 2 || !projects) return 0;
    return launch.splits * s.batch * s.out_height * s.out_width *
           ceil_divide(s.out_channels, kMatrix) * kMatrix;
}

}  // namespace cvfast::cuda
