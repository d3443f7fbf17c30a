#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace lora_fused {

const char* isa_name(Isa isa) {
  static const char* const names[kIsaCount] = {"generic", "avx2", "avx2_w16", "avx512"};
  return names[static_cast<int>(isa)];
}

bool isa_usable(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  switch (isa) {
    case Isa::generic:
      return true;
    case Isa::avx2:
    case Isa::avx2_w16:
      return avx2;
    case Isa::avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  return false;
#else
  return isa == Isa::generic;
#endif
}

static Isa choose() {
  const char* asked = std::getenv("LORA_FUSED_ISA");
  if (asked == nullptr || *asked == '\0') {
    if (isa_usable(Isa::avx512)) return Isa::avx512;
    return isa_usable(Isa::avx2) ? Isa::avx2 : Isa::generic;
  }
  std::string usable;
  for (int i = 0; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!isa_usable(isa)) continue;
    if (asked == std::string(isa_name(isa))) return isa;
    usable += std::string(usable.empty() ? "" : ", ") + isa_name(isa);
  }
  throw std::runtime_error("lora_fused: LORA_FUSED_ISA must be one of " + usable + " here, got '" + asked + "'");
}

Isa isa_in_use() {
  static const Isa isa = choose();
  return isa;
}

}  // namespace lora_fused
