// Memory: which accesses are legal, and in which order.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "state.h"

namespace cvfast::emulation {
namespace {

constexpr const char* kAccessNames[] = {"reads", "writes", "atomically updates"};

bool ordered(uint32_t time, unsigned other, unsigned self) {
    return time < emulator.block_time || other == self ||
           (other / kWarp == self / kWarp && time < emulator.warp_time[self / kWarp]);
}

// What is wrong with an access to one byte, or null; then the shadow notes the access.
const char* touch(Shadow& s, Access access, unsigned self, unsigned& other) {
    const bool written = s.written >= emulator.block_start;
    if (written && s.pending) {
        other = s.writer;
        return "cp.async data not waited for: a copy to these bytes is under way, issued";
    }
    if (access != Access::write && !written)
        return "uninitialised shared memory: nothing has written these bytes yet";
    if (written && !ordered(s.written, s.writer, self) && !(s.atomic && access == Access::atomic)) {
        other = s.writer;
        return "shared-memory race: no barrier since these bytes were written";
    }
    const unsigned warp = self / kWarp;
    if (access != Access::read) {
        const bool read = s.read >= emulator.block_time;
        const bool same_warp = s.reader / kWarp == warp && !s.many_warps;
        if (read && !(same_warp &&
                      (s.read < emulator.warp_time[warp] || (s.reader == self && !s.many_lanes)))) {
            other = s.reader;
            return "shared-memory race: no barrier since these bytes were read";
        }
        s.written = emulator.now;
        s.writer = static_cast<uint16_t>(self);
        s.atomic = access == Access::atomic;
        s.pending = false;
    } else {
        const unsigned last_warp = s.reader / kWarp;
        if (s.read < emulator.block_time) {
            s.many_lanes = s.many_warps = false;
        } else if (last_warp != warp) {
            s.many_warps = true;
        } else if (s.read < emulator.warp_time[warp]) {
            s.many_lanes = false;
        } else if (s.reader != self) {
            s.many_lanes = true;
        }
        s.read = emulator.now;
        s.reader = static_cast<uint16_t>(self);
    }
    return nullptr;
}

[[noreturn]] void fail_shared(const SharedRegion& region, const char* problem, uintptr_t address,
                              size_t bytes, Access access, unsigned other, const void* pc) {
    std::string text = problem;
    if (other != UINT32_MAX) text += " by thread " + position(other);
    fail(text + format("; %s %zu bytes at offset %zu of %s shared memory",
                       kAccessNames[static_cast<int>(access)], bytes,
                       static_cast<size_t>(address - region.begin), region.name),
         source_line(pc));
}

void land(const CopyAsync& copy, const void* pc) {
    SharedRegion& region = *shared_region(reinterpret_cast<uintptr_t>(copy.shared), copy.bytes);
    Shadow* shadow = &region.shadow[reinterpret_cast<uintptr_t>(copy.shared) - region.begin];
    for (size_t i = 0; i < copy.bytes; ++i) shadow[i].pending = false;
    check(reinterpret_cast<uintptr_t>(copy.shared), copy.bytes, Access::write, pc);
    if (copy.valid) {
        std::memcpy(copy.shared, copy.global, copy.bytes);
    } else {
        std::memset(copy.shared, 0, copy.bytes);
    }
}

Range make_range(const cuda::Extent& extent) {
    Range range{reinterpret_cast<uintptr_t>(extent.data), 0, extent.writable, 0, {}};
    if (extent.dims > cuda::Extent::kMaxDims) {
        throw std::runtime_error("cvfast emulation: a tensor of more than 5 dimensions");
    }
    const auto element = static_cast<size_t>(extent.element_bytes);
    size_t bytes = element;
    for (int i = 0; i < extent.dims; ++i) {
        const auto size = static_cast<size_t>(extent.size[i]);
        const size_t stride = static_cast<size_t>(extent.stride[i]) * element;
        if (size == 0) return range;
        bytes += (size - 1) * stride;
        if (size > 1 && stride) range.dims.push_back({size, stride});
    }
    range.end = range.begin + bytes;
    std::sort(range.dims.begin(), range.dims.end(),
              [](const auto& a, const auto& b) { return a.stride > b.stride; });
    range.run = element;
    while (!range.dims.empty() && range.dims.back().stride <= range.run) {
        range.run = (range.dims.back().size - 1) * range.dims.back().stride + range.run;
        range.dims.pop_back();
    }
    return range;
}

void poison(const Range& range, uintptr_t begin, size_t dim) {
    if (dim == range.dims.size()) {
        std::memset(reinterpret_cast<void*>(begin), kPoison, range.run);
        return;
    }
    for (size_t i = 0; i < range.dims[dim].size; ++i) {
        poison(range, begin + i * range.dims[dim].stride, dim + 1);
    }
}

[[noreturn]] void fail_other(uintptr_t address, size_t bytes, Access access, const void* pc) {
    const std::string action =
        format("%s %zu bytes at 0x%zx", kAccessNames[static_cast<int>(access)], bytes, address);
    const std::string place = source_line(pc);
    if (inside(address, 1, emulator.shared_arena, kMaxShared + 2 * kSharedGuard)) {
        fail(format("out of bounds of shared memory: %s %zu bytes at offset %td of the %zu bytes "
                    "that the launch asked for",
                    kAccessNames[static_cast<int>(access)], bytes,
                    static_cast<ptrdiff_t>(address - emulator.dynamic.begin),
                    emulator.dynamic.bytes),
             place);
    }
    if (inside(address, 1, emulator.stacks, kMaxThreads * kStackBytes)) {
        fail("another thread's local memory: " + action, place);
    }
    if (address < 4096) fail("null pointer: " + action, place);
    const Range* nearest = nullptr;
    size_t distance = SIZE_MAX;
    for (const Range& range : emulator.ranges) {
        if (range.contains(address, bytes)) {
            fail("write to a tensor that is read-only here: " + action, place);
        }
        if (address < range.end && address + bytes > range.begin) {
            nearest = &range, distance = 0;
        }
        const size_t gap = address >= range.end ? address - range.end + 1
                                                : range.begin - std::min(address, range.begin);
        if (gap < distance) nearest = &range, distance = gap;
    }
    std::string text = "out of bounds of every tensor: " + action;
    if (nearest) {
        text += format(", offset %td of the %zu bytes that the nearest spans%s",
                       static_cast<ptrdiff_t>(address - nearest->begin),
                       static_cast<size_t>(nearest->end - nearest->begin),
                       distance ? "" : ", in or across a gap between its elements");
    } else {
        text += "; no MemoryScope names any";
    }
    fail(std::move(text), place);
}

}  // namespace

void check_shared(SharedRegion& region, uintptr_t address, size_t bytes, Access access,
                  const void* pc) {
    Shadow* shadow = &region.shadow[address - region.begin];
    const unsigned self = emulator.current->index;
    for (size_t i = 0; i < bytes; ++i) {
        unsigned other = UINT32_MAX;
        if (const char* problem = touch(shadow[i], access, self, other)) {
            fail_shared(region, problem, address, bytes, access, other, pc);
        }
    }
}

void check_other(uintptr_t address, size_t bytes, Access access, const void* pc) {
    const auto allows = [&](const Range& range) {
        return range.contains(address, bytes) && (access == Access::read || range.writable);
    };
    if (emulator.recent < emulator.ranges.size() && allows(emulator.ranges[emulator.recent]))
        return;
    for (size_t i = 0; i < emulator.ranges.size(); ++i) {
        if (allows(emulator.ranges[i])) {
            emulator.recent = i;
            return;
        }
    }
    if (inside(address, bytes, emulator.module.begin,
               emulator.module.end - emulator.module.begin)) {
        return;
    }
    const auto arguments = reinterpret_cast<uintptr_t>(emulator.launch.arguments);
    if (access == Access::read &&
        inside(address, bytes, arguments, emulator.launch.argument_bytes)) {
        return;
    }
    fail_other(address, bytes, access, pc);
}

void check_alignment(const void* address, size_t alignment, Access access, const void* pc) {
    const auto value = reinterpret_cast<uintptr_t>(address);
    if (value % alignment == 0) return;
    fail(format("misaligned access: %s %zu bytes at 0x%zx, which is not a multiple of %zu",
                kAccessNames[static_cast<int>(access)], alignment, value, alignment),
         source_line(pc));
}

void read_access(const void* address, size_t bytes) {
    const void* pc = __builtin_return_address(0);
    check_alignment(address, bytes, Access::read, pc);
    check(reinterpret_cast<uintptr_t>(address), bytes, Access::read, pc);
}

void write_access(const void* address, size_t bytes) {
    const void* pc = __builtin_return_address(0);
    check_alignment(address, bytes, Access::write, pc);
    check(reinterpret_cast<uintptr_t>(address), bytes, Access::write, pc);
}

void atomic_access(const void* address, size_t bytes) {
    const void* pc = __builtin_return_address(0);
    check_alignment(address, bytes, Access::atomic, pc);
    check(reinterpret_cast<uintptr_t>(address), bytes, Access::atomic, pc);
}

void copy_async(void* shared, const void* global, size_t bytes, bool valid) {
    const void* pc = __builtin_return_address(0);
    const auto target = reinterpret_cast<uintptr_t>(shared);
    check_alignment(shared, bytes, Access::write, pc);
    check_alignment(global, bytes, Access::read, pc);
    if (valid) check(reinterpret_cast<uintptr_t>(global), bytes, Access::read, pc);
    SharedRegion* region = shared_region(target, bytes);
    if (!region) {
        check_other(target, bytes, Access::write, pc);
        fail("cp.async to memory that is not shared", source_line(pc));
    }
    check_shared(*region, target, bytes, Access::write, pc);
    std::memset(shared, kPoison, bytes);
    for (size_t i = 0; i < bytes; ++i) region->shadow[target - region->begin + i].pending = true;
    emulator.current->copies.push_back({shared, global, bytes, valid});
}

void copy_async_commit() {
    Thread& self = *emulator.current;
    self.groups.push_back(self.copies.size());
}

void copy_async_wait(int pending) {
    Thread& self = *emulator.current;
    if (self.groups.size() <= static_cast<size_t>(pending)) return;
    const size_t groups = self.groups.size() - static_cast<size_t>(pending);
    const size_t landed = self.groups[groups - 1];
    for (size_t i = 0; i < landed; ++i) land(self.copies[i], __builtin_return_address(0));
    self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<ptrdiff_t>(landed));
    self.groups.erase(self.groups.begin(), self.groups.begin() + static_cast<ptrdiff_t>(groups));
    for (size_t& bound : self.groups) bound -= landed;
}

void* dynamic_shared_base() { return reinterpret_cast<void*>(emulator.dynamic.begin); }

}  // namespace cvfast::emulation

namespace cvfast::cuda {

using emulation::emulator;

MemoryScope::MemoryScope(std::initializer_list<Extent> extents)
    : lock_(emulator.mutex), outer_(emulator.ranges.size()) {
    for (const Extent& extent : extents) {
        emulation::Range range = emulation::make_range(extent);
        if (range.writable && range.run) emulation::poison(range, range.begin, 0);
        emulator.ranges.push_back(std::move(range));
    }
}

MemoryScope::~MemoryScope() { emulator.ranges.resize(outer_); }

}  // namespace cvfast::cuda
