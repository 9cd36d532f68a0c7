// Compiles CVFAST_KERNEL_SOURCE once per instruction-set level, each in its own namespace
// (cvfast::portable; on x86 cvfast::avx2, cvfast::avx512, cvfast::avx512_bf16 where
// CVFAST_KERNEL_BF16_DOT says that the kernel uses its bfloat16 dot product, and cvfast::avx512_amx
// where CVFAST_KERNEL_AMX says so of AMX; on ARM cvfast::neon).
//
// Code compiled for a high level must not leak into the baseline: an inline function of the
// standard library instantiated under a target pragma could be the copy that the linker keeps. So
// every standard header is included here, before the first pragma, and kernels include none.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/activation.h"
#include "common/types.h"
#include "cpu/isa.h"

#if defined(__clang__)
#define CVFAST_PRAGMA(text) _Pragma(#text)
#define CVFAST_TARGET_BEGIN(features) \
    CVFAST_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define CVFAST_TARGET_END _Pragma("clang attribute pop")
#define CVFAST_UNROLL _Pragma("clang loop unroll(full)")
#else
#define CVFAST_PRAGMA(text) _Pragma(#text)
#define CVFAST_TARGET_BEGIN(features) \
    _Pragma("GCC push_options") CVFAST_PRAGMA(GCC target(features))
#define CVFAST_TARGET_END _Pragma("GCC pop_options")
#define CVFAST_UNROLL _Pragma("GCC unroll 64")
#endif
#if defined(__x86_64__)
#define CVFAST_VECTOR_REGISTER "v"
#else
#define CVFAST_VECTOR_REGISTER "w"
#endif
#define CVFAST_INLINE inline __attribute__((always_inline))

#define CVFAST_ISA_NAMESPACE portable
#include "cpu/simd_portable.h"
#include "cpu/opaque.h"
#include "cpu/activation.h"
#include CVFAST_KERNEL_SOURCE
#undef CVFAST_ISA_NAMESPACE

#if defined(__x86_64__)

CVFAST_TARGET_BEGIN("avx2,fma,f16c")
#define CVFAST_ISA_NAMESPACE avx2
#include "cpu/simd_avx2.h"
#include "cpu/opaque.h"
#include "cpu/activation.h"
#include CVFAST_KERNEL_SOURCE
#undef CVFAST_ISA_NAMESPACE
CVFAST_TARGET_END

CVFAST_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#define CVFAST_ISA_NAMESPACE avx512
#include "cpu/simd_avx512.h"
#include "cpu/opaque.h"
#include "cpu/activation.h"
#include CVFAST_KERNEL_SOURCE
#undef CVFAST_ISA_NAMESPACE
CVFAST_TARGET_END

#if defined(CVFAST_KERNEL_BF16_DOT)
CVFAST_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#define CVFAST_ISA_NAMESPACE avx512_bf16
#define CVFAST_BF16_DOT
#include "cpu/simd_avx512.h"
#include "cpu/opaque.h"
#include "cpu/activation.h"
#include CVFAST_KERNEL_SOURCE
#undef CVFAST_BF16_DOT
#undef CVFAST_ISA_NAMESPACE
CVFAST_TARGET_END
#else
namespace cvfast {
namespace avx512_bf16 = avx512;
}
#endif

#if defined(CVFAST_KERNEL_AMX)
CVFAST_TARGET_BEGIN("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#define CVFAST_ISA_NAMESPACE avx512_amx
#define CVFAST_BF16_DOT
#define CVFAST_HAS_AMX
#include "cpu/simd_avx512.h"
#include "cpu/opaque.h"
#include "cpu/activation.h"
#include CVFAST_KERNEL_SOURCE
#undef CVFAST_HAS_AMX
#undef CVFAST_BF16_DOT
#undef CVFAST_ISA_NAMESPACE
CVFAST_TARGET_END
#else
// VDPBF16PS takes four times as long as a multiply-add on processors with AMX, so other kernels
// compute as at avx512.
namespace cvfast {
namespace avx512_amx = avx512;
}
#endif

// One entry per level, in the order of Isa.
#define CVFAST_ISA_TABLE(function)                                                \
    {portable::function, avx2::function, avx512::function, avx512_bf16::function, \
     avx512_amx::function}

#elif defined(__aarch64__)

#define CVFAST_ISA_NAMESPACE neon
#include "cpu/simd_neon.h"
#include "cpu/opaque.h"
#include "cpu/activation.h"
#include CVFAST_KERNEL_SOURCE
#undef CVFAST_ISA_NAMESPACE

#define CVFAST_ISA_TABLE(function) {portable::function, neon::function}

#else

#define CVFAST_ISA_TABLE(function) {portable::function}

#endif
