// CUDA's cuda_fp16.h for the emulation.
#pragma once

#include "emulation/float16.h"

using __half = cvfast::emulation::Float16<cvfast::Half>;
using __half2 = cvfast::emulation::Float16x2<cvfast::Half>;
using half = __half;
using half2 = __half2;

inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half2 __halves2half2(__half low, __half high) { return {low, high}; }
inline __half2 __float2half2_rn(float x) { return {x, x}; }
inline __half2 __floats2half2_rn(float low, float high) { return {low, high}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) { return std::bit_cast<__half>(bits); }
