// What cuts of work, and plans, need to know of the machine.
#pragma once

#include <cstdint>

namespace cvfast {

// Bytes of the L2 cache that a core uses; 1 MB where the system does not tell.
int64_t l2_bytes();

// Bytes of the L3 cache that a core uses; those of L2 where the system lists none.
int64_t l3_bytes();

// Bytes that a core reads in a nanosecond, as measured on Granite Rapids: of what it wrote itself
// and has in L2, of what another core wrote, and of weights, which lie in L3.
inline constexpr double kOwnBytes = 100, kOthersBytes = 15, kWeightBytes = 30;

// Nanoseconds to read what `parts` threads wrote in equal parts, of which the reader is one.
constexpr double reading_time(double bytes, int64_t parts) {
    const double own = bytes / double(parts);
    return own / kOwnBytes + (bytes - own) / kOthersBytes;
}

}  // namespace cvfast
