// AVX2 with FMA and F16C, 8 lanes.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LF_SIMD 1
#define LF_WIDTH 8
#define LF_NS avx2
#include "stacked_svd_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
