// AVX-512, 16 lanes.
#define LF_WIDTH 16
#define LF_NS avx512
#define LF_BODY "../mixture_lora/mixture_lora_body.h"
#include "../common/for_avx512.h"
