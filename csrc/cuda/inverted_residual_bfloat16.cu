#include "cuda/inverted_residual_launch.cuh"

CVFAST_INSTANTIATE_INVERTED_RESIDUAL(__nv_bfloat16)
