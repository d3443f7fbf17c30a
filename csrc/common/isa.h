// Which instruction set the CPU kernels use, chosen once per process.
#pragma once

namespace lora_fused {

enum class Isa { generic, avx2, avx2_w16, avx512 };
constexpr int kIsaCount = 4;

const char* isa_name(Isa isa);
bool isa_usable(Isa isa);  // compiled in, and this CPU has it

// LORA_FUSED_ISA if set (an unknown or unusable name throws std::runtime_error), else the widest
// usable one. avx2_w16 computes avx512's bits on AVX2 and is for tests: never chosen by default.
Isa isa_in_use();

}  // namespace lora_fused
