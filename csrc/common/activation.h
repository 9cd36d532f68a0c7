// The activations that kernels fuse.
#pragma once

#include <string_view>

namespace cvfast {

enum class Activation : int { none, relu, relu6, hardswish };

inline constexpr std::string_view kActivationNames[] = {"none", "relu", "relu6", "hardswish"};

}  // namespace cvfast
