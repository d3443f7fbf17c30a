// AVX2, 8 lanes.
#define LF_WIDTH 8
#define LF_NS avx2
#define LF_BODY "../stacked_svd/stacked_svd_body.h"
#include "../common/for_avx2.h"
