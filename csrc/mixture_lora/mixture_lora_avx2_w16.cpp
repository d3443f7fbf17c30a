// AVX-512's 16 lanes computed on AVX2: the same bits, for tests without AVX-512.
#define LF_WIDTH 16
#define LF_NS avx2_w16
#define LF_BODY "../mixture_lora/mixture_lora_body.h"
#include "../common/for_avx2.h"
