// AVX-512, 16 lanes.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#endif
#define LF_SIMD 2
#define LF_WIDTH 16
#define LF_NS avx512
#include "stacked_svd_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
