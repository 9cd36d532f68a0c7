// The activations that kernels fuse.
#pragma once

#include <string_view>

namespace cvfast {

enum class Activation : int { none, relu, relu6, hardswish, hardsigmoid };

inline constexpr std::string_view kActivationNames[] = {"none", "relu", "relu6", "hardswish",
                                                        "hardsigmoid"};

}  // namespace cvfast
