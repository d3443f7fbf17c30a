// Compiles LF_BODY for AVX2 with FMA and F16C; LF_WIDTH lanes at a time, in namespace LF_NS.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LF_SIMD 1
#include LF_BODY
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
