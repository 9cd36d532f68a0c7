#include "cuda/depthwise_launch.cuh"

CVFAST_INSTANTIATE_DEPTHWISE(float)
