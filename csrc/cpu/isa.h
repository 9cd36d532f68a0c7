// Instruction-set levels: which this machine has, and which one kernels run on.
#pragma once

#include <iterator>
#include <string_view>

namespace cvfast {

// The levels of this architecture, lowest first.
#if defined(__x86_64__)
enum class Isa : int { portable, avx2, avx512, avx512_bf16, avx512_amx };
inline constexpr std::string_view kIsaNames[] = {"portable", "avx2", "avx512", "avx512_bf16",
                                                 "avx512_amx"};
#elif defined(__aarch64__)
enum class Isa : int { portable, neon };
inline constexpr std::string_view kIsaNames[] = {"portable", "neon"};
#else
enum class Isa : int { portable };
inline constexpr std::string_view kIsaNames[] = {"portable"};
#endif
inline constexpr int kIsaCount = std::size(kIsaNames);

// The highest level that the CPU implements and the operating system saves the registers of;
// every lower level is available too.
Isa best_isa();

// The level in use: best_isa() until select_isa() says otherwise.
Isa current_isa();

// Whether the level in use has AMX.
bool has_amx();

// Returns false, and changes nothing, where `level` is not available.
bool select_isa(Isa level);

}  // namespace cvfast
