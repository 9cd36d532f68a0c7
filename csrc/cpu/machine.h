// What cuts of work need to know of the machine.
#pragma once

#include <cstdint>

namespace cvfast {

// Bytes of the L2 cache that a core uses; 1 MB where the system does not tell.
int64_t l2_bytes();

}  // namespace cvfast
