// AVX-512's 16 lanes computed on AVX2: the same bits, for tests without AVX-512.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LF_SIMD 1
#define LF_WIDTH 16
#define LF_NS avx2_w16
#include "mixture_lora_body.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
