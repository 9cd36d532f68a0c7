// Instruction-set levels: which this machine has, and which one kernels run on.
#pragma once

#include <string_view>

namespace cvfast {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512_bf16 = 3 };
inline constexpr int kIsaCount = 4;
inline constexpr std::string_view kIsaNames[kIsaCount] = {"portable", "avx2", "avx512",
                                                          "avx512_bf16"};

// The highest level that the CPU implements and the operating system saves the registers of;
// every lower level is available too.
Isa best_isa();

// The level in use: best_isa() until select_isa() says otherwise.
Isa current_isa();

// Returns false, and changes nothing, where `level` is not available.
bool select_isa(Isa level);

}  // namespace cvfast
