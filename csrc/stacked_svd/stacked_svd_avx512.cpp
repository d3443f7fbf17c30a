// AVX-512, 16 lanes.
#define LF_WIDTH 16
#define LF_NS avx512
#define LF_BODY "../stacked_svd/stacked_svd_body.h"
#include "../common/for_avx512.h"
