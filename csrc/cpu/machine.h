// What cuts of work, and plans, need to know of the machine.
#pragma once

#include <cstdint>

namespace cvfast {

// Bytes of the L2 cache that a core uses; 1 MB where the system does not tell.
int64_t l2_bytes();

// Bytes of the L3 cache that a core uses; those of L2 where the system lists none.
int64_t l3_bytes();

}  // namespace cvfast
