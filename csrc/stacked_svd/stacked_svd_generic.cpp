// Plain C++: any CPU.
#define LF_SIMD 0
#define LF_WIDTH 8
#define LF_NS generic
#include "stacked_svd_body.h"
