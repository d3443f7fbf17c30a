// Compiles LF_BODY for AVX-512; LF_WIDTH lanes at a time, in namespace LF_NS.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")
#endif
#define LF_SIMD 2
#include LF_BODY
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
