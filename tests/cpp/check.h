// Checks kernels without torch: random calls, in every cut and at every level of the machine,
// against plain loops in double precision. A column's file gives one function that draws a call and
// what it must return, and registers it; check.cpp does the rest.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/activation.h"
#include "common/types.h"
#include "cpu/call.h"
#include "cpu/isa.h"

namespace cvfast::check {

class Random {
  public:
    explicit Random(uint64_t seed) : engine_(seed) {}

    // Uniform, both ends included.
    int64_t in(int64_t low, int64_t high) {
        return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
    }
    bool one_in(int64_t n) { return in(1, n) == 1; }
    double uniform(double low, double high) {
        return low + (high - low) * static_cast<double>(engine_() >> 11) * 0x1p-53;
    }
    // Up to `most`; half of them whole vectors of some level.
    int64_t channels(int64_t most) {
        const int64_t n = in(1, most), vector = int64_t{4} << in(0, 2);
        return one_in(2) || n < vector ? n : n / vector * vector;
    }
    Activation activation() { return static_cast<Activation>(in(0, 4)); }

    std::mt19937_64& engine() { return engine_; }

  private:
    std::mt19937_64 engine_;
};

// Memory that ends, or begins, at a page that cannot be accessed. All of it is NaN in every type at
// first. What lies between `bytes` and its page's other end must stay as it is, and is poisoned
// under AddressSanitizer.
class Memory {
  public:
    Memory(int64_t bytes, int64_t alignment, Random& random);
    Memory(const Memory&) = delete;
    ~Memory();

    char* data() const { return data_; }
    int64_t bytes() const { return bytes_; }
    // Fails the test if something was written outside.
    void check_outside() const;

  private:
    char* pages_;
    int64_t pages_bytes_;
    char* data_;
    int64_t bytes_;
};

inline constexpr unsigned char kFill = 0xff;

// Poisons memory that nobody may read or write; nothing without AddressSanitizer.
void forbid(const void* begin, int64_t bytes);

[[noreturn]] void fail(const std::string& message);

template <class... Parts>
std::string text(const Parts&... parts) {
    std::ostringstream stream;
    stream.precision(9);
    (stream << ... << parts);
    return stream.str();
}

// An element, and now and then NaN or an infinity if `special`.
template <class T>
T element(Random& random, bool special) {
    constexpr double kInfinity = std::numeric_limits<double>::infinity();
    constexpr double kSpecial[] = {std::numeric_limits<double>::quiet_NaN(), kInfinity, -kInfinity};
    if (special && random.one_in(100)) return from_float<T>(float(kSpecial[random.in(0, 2)]));
    return from_float<T>(static_cast<float>(random.uniform(-1, 1)));
}

// A weight of a kernel of T images; bfloat16 kernels may round theirs.
template <class T>
float weight_element(Random& random) {
    using Weight = std::conditional_t<std::is_same_v<T, BFloat16>, BFloat16, float>;
    return to_float(element<Weight>(random, false));
}

// Elements next to each other.
template <class T>
class Array {
  public:
    Array(int64_t size, Random& random) : memory_(size * int64_t{sizeof(T)}, alignof(T), random) {}

    T* data() const { return reinterpret_cast<T*>(memory_.data()); }
    int64_t size() const { return memory_.bytes() / int64_t{sizeof(T)}; }
    T& operator[](int64_t i) const { return data()[i]; }
    const Memory& memory() const { return memory_; }

    void fill(Random& random, bool special = false) {
        for (int64_t i = 0; i < size(); ++i) data()[i] = element<T>(random, special);
    }

  private:
    Memory memory_;
};

struct Size {
    int64_t batch, height, width, channels;
};

// A channels-last image in a wider buffer: pixels, rows and images may lie apart.
template <class T>
class Image {
  public:
    Image(Size size, Random& random)
        : size(size),
          pixel(size.channels + gap(random)),
          row(size.width * pixel + gap(random)),
          image(size.height * row + gap(random)),
          memory_(offset(size.batch - 1, size.height - 1, size.width - 1, size.channels), random) {
        for_pixels([&](int64_t n, int64_t y, int64_t x) {
            const int64_t end = offset(n, y, x, size.channels);
            forbid(data() + end, (next(n, y, x) - end) * int64_t{sizeof(T)});
        });
    }

    const Size size;
    const int64_t pixel, row, image;  // strides

    T* data() const { return memory_.data(); }
    T& at(int64_t n, int64_t y, int64_t x, int64_t c) const { return memory_[offset(n, y, x, c)]; }
    int64_t elements() const { return size.batch * size.height * size.width * size.channels; }

    // Calls f(n, y, x, c) for every element, channel by channel and pixel by pixel.
    template <class F>
    void for_elements(const F& f) const {
        for_pixels([&](int64_t n, int64_t y, int64_t x) {
            for (int64_t c = 0; c < size.channels; ++c) f(n, y, x, c);
        });
    }

    void fill(Random& random, bool special) {
        for_elements([&](auto... i) { at(i...) = element<T>(random, special); });
    }
    void clear() {
        for_elements([&](auto... i) { std::memset(&at(i...), kFill, sizeof(T)); });
    }
    std::vector<T> values() const {
        std::vector<T> all;
        for_elements([&](auto... i) { all.push_back(at(i...)); });
        return all;
    }
    // Fails the test if something was written outside the image, its gaps included.
    void check_outside() const {
        memory_.memory().check_outside();
        for_pixels([&](int64_t n, int64_t y, int64_t x) {
            for (int64_t i = offset(n, y, x, size.channels); i < next(n, y, x); ++i) check_gap(i);
        });
    }

  private:
    static int64_t gap(Random& random) { return random.one_in(2) ? 0 : random.in(1, 33); }

    int64_t offset(int64_t n, int64_t y, int64_t x, int64_t c) const {
        return n * image + y * row + x * pixel + c;
    }
    // The first element of the pixel after this one.
    int64_t next(int64_t n, int64_t y, int64_t x) const {
        if (x + 1 < size.width) return offset(n, y, x + 1, 0);
        if (y + 1 < size.height) return offset(n, y + 1, 0, 0);
        return n + 1 < size.batch ? offset(n + 1, 0, 0, 0) : offset(n, y, x, size.channels);
    }
    template <class F>
    void for_pixels(const F& f) const {
        for (int64_t n = 0; n < size.batch; ++n) {
            for (int64_t y = 0; y < size.height; ++y) {
                for (int64_t x = 0; x < size.width; ++x) f(n, y, x);
            }
        }
    }
    __attribute__((no_sanitize("address"))) void check_gap(int64_t i) const {
        const auto* bytes = reinterpret_cast<const unsigned char*>(data() + i);
        for (std::size_t b = 0; b < sizeof(T); ++b) {
            if (bytes[b] != kFill) fail("wrote between the pixels of the output");
        }
    }

    Array<T> memory_;
};

// What a result must be, within `bound`; NaN and infinities must be the same.
struct Expected {
    double value, bound;
};

template <class T>
bool same(T a, T b) {
    const bool both_nan = std::isnan(to_float(a)) && std::isnan(to_float(b));
    return both_nan || std::memcmp(&a, &b, sizeof(T)) == 0;
}

// A sum, and that of its terms' absolute values, which bounds its error.
struct Sum {
    double value = 0, magnitude = 0;

    void add(double term) { add(term, std::fabs(term)); }
    void add(double term, double absolute) {
        value += term;
        magnitude += absolute;
    }
    // `roundings`: of every term, in units of float's.
    Expected expect(double roundings, Activation activation) const;
};

class Test {
  public:
    Test(uint64_t seed, const std::vector<Isa>& levels) : random(seed), levels_(levels) {}

    Random random;

    // What is checked, for the message should it fail.
    void describe(std::string call);

    // Runs the call at every level, cut for several numbers of threads, tasks in random order;
    // `out` must become `expected`, to the bit the same for every cut; but for the signs of NaN,
    // which depend on the operand that the compiler names first.
    template <class Shape, class Operands, class T>
    void check(const Shape& shape, const Operands& operands, Image<T>& out,
               const std::vector<Expected>& expected) {
        for (const Isa level : levels_) {
            enter(level);
            std::vector<T> first;
            for (const int threads : {1, 2, 5}) {
                out.clear();
                run(shape, operands, threads);
                out.check_outside();
                const std::vector<T> values = out.values();
                if (first.empty()) {
                    first = values;
                    compare(values, out.size, expected);
                } else if (!std::equal(first.begin(), first.end(), values.begin(), same<T>)) {
                    fail(text("the result is another one when cut for ", threads, " threads"));
                }
            }
        }
    }

  private:
    static void enter(Isa level);
    static void compare(Size size, int64_t index, double value, const Expected& expected,
                        double half_ulp);

    template <class Shape, class Operands>
    void run(const Shape& shape, const Operands& operands, int threads) {
        const int64_t most_scratch =
            random.one_in(2) ? kAnyScratch : random.in(0, 1 << random.in(0, 20));
        const auto plan = plan_within(shape, operands, threads, most_scratch);
        std::vector<std::pair<int64_t, int64_t>> ranges;
        for (int64_t begin = 0; begin < plan.tasks;) {
            const int64_t end = begin + random.in(1, std::max<int64_t>(1, plan.tasks / 2));
            ranges.emplace_back(begin, std::min(end, plan.tasks));
            begin = end;
        }
        std::shuffle(ranges.begin(), ranges.end(), random.engine());
        for (const auto& [begin, end] : ranges) {
            const Memory scratch(plan.scratch_bytes, 64, random);
            run_tasks(shape, operands, plan, begin, end, scratch.data());
            scratch.check_outside();
        }
    }

    template <class T>
    static void compare(const std::vector<T>& values, Size size,
                        const std::vector<Expected>& expected) {
        constexpr double kHalfUlp = std::is_same_v<T, float>  ? 0x1p-24
                                    : std::is_same_v<T, Half> ? 0x1p-11
                                                              : 0x1p-8;
        if (values.size() != expected.size()) fail("expected another number of elements");
        for (std::size_t i = 0; i < values.size(); ++i) {
            compare(size, static_cast<int64_t>(i), to_float(values[i]), expected[i], kHalfUlp);
        }
    }

    const std::vector<Isa>& levels_;
};

// Registers a column: Checks<T>()(test) for each element type.
struct Column {
    const char* name;
    void (*check[3])(Test&);  // float, BFloat16, Half

    Column(const char* name, void (*f)(Test&), void (*b)(Test&), void (*h)(Test&));
};

// Output positions along one axis, padded by before + after.
inline int64_t positions(int64_t size, int64_t before, int64_t after, int64_t dilation,
                         int64_t kernel, int64_t stride) {
    return (size + before + after - dilation * (kernel - 1) - 1) / stride + 1;
}

}  // namespace cvfast::check
