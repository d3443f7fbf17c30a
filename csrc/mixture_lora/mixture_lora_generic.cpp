// Plain C++: any CPU.
#define LF_SIMD 0
#define LF_WIDTH 8
#define LF_NS generic
#include "mixture_lora_body.h"
