// Errors: what, where in the source, in which thread of which launch.
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <utility>

#include <dlfcn.h>
#include <link.h>

#include "state.h"

namespace cvfast::emulation {

Emulator emulator;

namespace {

// Present in every thread, so that the module's thread-local block, which holds the static shared
// arrays, exists.
thread_local volatile char tls_anchor;

// Lines of `addr2line` for a code address: function, then file:line, inlined frames first.
std::vector<std::string> symbolize(uintptr_t address) {
    std::vector<std::string> lines;
    Dl_info info;
    if (!dladdr(reinterpret_cast<void*>(&this_module), &info)) return lines;
    const std::string command =
        format("addr2line -f -C -i -e '%s' 0x%zx 2>/dev/null", info.dli_fname,
               static_cast<size_t>(address - this_module().load));
    if (FILE* pipe = popen(command.c_str(), "r")) {
        char line[4096];
        while (std::fgets(line, sizeof line, pipe)) {
            lines.emplace_back(line);
            while (!lines.back().empty() && lines.back().back() == '\n') lines.back().pop_back();
        }
        pclose(pipe);
    }
    return lines;
}

}  // namespace

Module this_module() {
    Module module;
    tls_anchor = 0;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            auto& m = *static_cast<Module*>(data);
            const auto here = reinterpret_cast<uintptr_t>(&this_module);
            uintptr_t begin = UINTPTR_MAX, end = 0, tls_bytes = 0;
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                const auto& segment = info->dlpi_phdr[i];
                if (segment.p_type == PT_LOAD) {
                    begin = std::min<uintptr_t>(begin, info->dlpi_addr + segment.p_vaddr);
                    end = std::max<uintptr_t>(end,
                                              info->dlpi_addr + segment.p_vaddr + segment.p_memsz);
                } else if (segment.p_type == PT_TLS) {
                    tls_bytes = segment.p_memsz;
                }
            }
            if (here < begin || here >= end) return 0;
            const auto tls = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
            m = {info->dlpi_addr, begin, end, tls, tls ? tls + tls_bytes : 0};
            return 1;
        },
        &module);
    return module;
}

std::string format(const char* pattern, ...) {
    va_list args, again;
    va_start(args, pattern);
    va_copy(again, args);
    std::string text(static_cast<size_t>(std::vsnprintf(nullptr, 0, pattern, args)), '\0');
    std::vsnprintf(text.data(), text.size() + 1, pattern, again);
    va_end(args);
    va_end(again);
    return text;
}

std::string source_line(const void* return_address) {
    const auto lines = symbolize(reinterpret_cast<uintptr_t>(return_address) - 1);
    for (size_t i = 1; i < lines.size(); i += 2) {
        // Of inlined frames, the innermost outside the emulation's headers.
        if (lines[i].find("/emulation/include/") == std::string::npos) {
            const std::string line = lines[i].substr(lines[i].rfind('/') + 1);
            return line.substr(0, line.find(' '));  // without "(discriminator 2)"
        }
    }
    return "unknown place";
}

std::string file_line(const char* file, unsigned line) {
    const std::string path(file);
    return path.substr(path.rfind('/') + 1) + format(":%u", line);
}

std::string site_of(const Thread& thread) {
    return file_line(thread.site.file_name(), thread.site.line());
}

std::string position(unsigned index) {
    const dim3& b = emulator.launch.block;
    return format("(%u, %u, %u)", index % b.x, index / b.x % b.y, index / b.x / b.y);
}

std::string where() {
    const auto kernel = symbolize(reinterpret_cast<uintptr_t>(emulator.launch.kernel));
    const dim3 &g = emulator.launch.grid, &b = emulator.launch.block;
    return format(
        "\n  kernel %s<<<(%u, %u, %u), (%u, %u, %u), %zu bytes>>>, emulated %s, seed %llu",
        kernel.empty() ? "??" : kernel[0].c_str(), g.x, g.y, g.z, b.x, b.y, b.z,
        emulator.launch.shared_bytes, emulator.architecture.c_str(),
        static_cast<unsigned long long>(emulator.seed));
}

void fail(std::string message, const std::string& place) {
    Thread& self = *emulator.current;
    emulator.failure = "cvfast emulation: " + std::move(message) +
                       format("\n  at %s, in block (%u, %u, %u), thread %s", place.c_str(),
                              blockIdx.x, blockIdx.y, blockIdx.z, position(self.index).c_str()) +
                       where();
    emulator.current = nullptr;
    Context::change(self.context, emulator.scheduler);
    __builtin_unreachable();
}

}  // namespace cvfast::emulation
