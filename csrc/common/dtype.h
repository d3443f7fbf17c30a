// Storage types of the CPU kernels and their conversion to and from float32.
#pragma once

#include <cstdint>

namespace lora_fused {

enum class Dtype { f32, bf16, f16 };

// Strong types, so that kernels are templates on storage; the bits are IEEE's.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline int64_t dtype_size(Dtype t) { return t == Dtype::f32 ? 4 : 2; }

}  // namespace lora_fused
