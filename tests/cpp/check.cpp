// Runs the checks of every registered column.
//
//   check [CASES [COLUMN [LEVEL]]]
//
// CASES random calls per column and element type (default 100), at LEVEL or at every level of this
// machine. A case is drawn from its number: one that fails does so alone, too.

#include "check.h"

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string_view>

#include <sys/mman.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>

// An error aborts, so that on_signal() can name the case.
extern "C" const char* __asan_default_options() { return "abort_on_error=1:detect_leaks=0"; }
extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1:abort_on_error=1"; }
#endif

namespace cvfast::check {
namespace {

// The case under way, written where a signal handler may read it.
char current[512];
std::string case_name, call_name, level_name;

void name_current() {
    std::snprintf(current, sizeof current, "%s, level %s: %s\n", case_name.c_str(),
                  level_name.c_str(), call_name.c_str());
}

void on_signal(int signal) {
    constexpr std::string_view kCrashed = "crashed in ";
    if (write(STDERR_FILENO, kCrashed.data(), kCrashed.size()) < 0 ||
        write(STDERR_FILENO, current, std::strlen(current)) < 0) {
        _exit(2);
    }
    std::signal(signal, SIG_DFL);
    std::raise(signal);
}

std::vector<Column>& columns() {
    static std::vector<Column> all;
    return all;
}

int64_t round_up(int64_t bytes, int64_t to) { return (bytes + to - 1) / to * to; }

double activate(double x, Activation activation) {
    const auto clamp = [](double v, double low, double high) {
        return v < low ? low : v > high ? high : v;  // keeps NaN
    };
    switch (activation) {
        case Activation::none:
            return x;
        case Activation::relu:
            return x < 0 ? 0 : x;
        case Activation::relu6:
            return clamp(x, 0, 6);
        case Activation::hardswish:
            return x * clamp(x + 3, 0, 6) / 6;
        case Activation::hardsigmoid:
            return clamp(x + 3, 0, 6) / 6;
    }
    std::abort();
}

}  // namespace

void fail(const std::string& message) {
    std::fprintf(stderr, "%s\nin %s", message.c_str(), current);
    std::exit(1);
}

void forbid([[maybe_unused]] const void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(begin, static_cast<std::size_t>(bytes));
#endif
}

Memory::Memory(int64_t bytes, int64_t alignment, Random& random) : bytes_(bytes) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t inner = std::max(page, round_up(bytes, page));
    pages_bytes_ = inner + 2 * page;
    void* pages = mmap(nullptr, static_cast<std::size_t>(pages_bytes_), PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) fail("out of memory");
    pages_ = static_cast<char*>(pages);
    char* first = pages_ + page;
    mprotect(first, static_cast<std::size_t>(inner), PROT_READ | PROT_WRITE);
    std::memset(first, kFill, static_cast<std::size_t>(inner));
    data_ = random.one_in(4) ? first : first + inner - round_up(bytes, alignment);
    forbid(first, data_ - first);
    forbid(data_ + bytes, first + inner - (data_ + bytes));
}

Memory::~Memory() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(pages_, static_cast<std::size_t>(pages_bytes_));
#endif
    munmap(pages_, static_cast<std::size_t>(pages_bytes_));
}

__attribute__((no_sanitize("address"))) void Memory::check_outside() const {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const char* begin = pages_ + page;
    const char* end = pages_ + pages_bytes_ - page;
    for (const char* p = begin; p < end; ++p) {
        if (p == data_) p += bytes_;
        if (p < end && static_cast<unsigned char>(*p) != kFill) fail("wrote outside a buffer");
    }
}

Expected Sum::expect(double roundings, Activation activation) const {
    // No activation makes a difference more than 1.5 times as large.
    return {activate(value, activation), 1.5 * roundings * 0x1p-24 * magnitude};
}

void Test::describe(std::string call) { call_name = std::move(call); }

void Test::enter(Isa level) {
    select_isa(level);
    level_name = kIsaNames[static_cast<int>(level)];
    name_current();
}

void Test::compare(Size size, int64_t index, double got, const Expected& expected, double ulp) {
    const double want = expected.value;
    const double bound = expected.bound + ulp * std::fabs(want) + 0x1p-24;  // half's smallest step
    const bool right = std::isnan(want)   ? std::isnan(got)
                       : std::isinf(want) ? got == want
                                          : std::fabs(got - want) <= bound;
    if (right) return;
    const int64_t c = index % size.channels, pixel = index / size.channels;
    const int64_t x = pixel % size.width, y = pixel / size.width % size.height;
    fail(text("image ", pixel / size.width / size.height, ", row ", y, ", column ", x, ", channel ",
              c, " is ", got, ", expected ", want, " within ", bound));
}

Column::Column(const char* name, void (*f)(Test&), void (*b)(Test&), void (*h)(Test&))
    : name(name), check{f, b, h} {
    columns().push_back(*this);
}

int run_all(int64_t cases, std::string_view column_name, std::string_view only_level) {
    std::vector<Isa> levels;
    std::string names;
    for (int i = 0; i <= static_cast<int>(best_isa()); ++i) {
        if (!only_level.empty() && only_level != kIsaNames[i]) continue;
        levels.push_back(static_cast<Isa>(i));
        names += names.empty() ? "" : ", ";
        names += kIsaNames[i];
    }
    if (levels.empty()) {
        std::fprintf(stderr, "no level %s here\n", std::string(only_level).c_str());
        return 2;
    }
    int64_t passed = 0;
    for (const Column& column : columns()) {
        if (!column_name.empty() && column_name != column.name) continue;
        constexpr const char* kTypes[] = {"float32", "bfloat16", "float16"};
        for (int type = 0; type < 3; ++type) {
            for (int64_t i = 0; i < cases; ++i) {
                case_name = text(column.name, ' ', kTypes[type], " case ", i);
                call_name = "drawing it";
                name_current();
                Test test(static_cast<uint64_t>(3 * i + type), levels);
                column.check[type](test);
                ++passed;
            }
        }
    }
    std::printf("%lld passed at %s\n", static_cast<long long>(passed), names.c_str());
    return passed ? 0 : 2;
}

}  // namespace cvfast::check

int main(int count, char** values) {
    using namespace cvfast::check;
    for (const int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT}) {
#if defined(__SANITIZE_ADDRESS__)
        if (signal != SIGABRT) continue;  // the sanitizer reports the others, and aborts
#endif
        std::signal(signal, on_signal);
    }
    const char* end[] = {"100", "", ""};
    for (int i = 1; i < std::min(count, 4); ++i) end[i - 1] = values[i];
    return run_all(std::atoll(end[0]), end[1], end[2]);
}
