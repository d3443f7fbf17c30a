// The inner loops of mixture_lora as one table of functions per instruction set.
#pragma once

#include "../common/dtype.h"
#include "../common/isa.h"

namespace lora_fused {

// Rows are given by pointers, so the same loops serve packed rows, gathered rows and scratch.
struct MixtureKernels {
  // h[i][c] = <x[i], a[c]> for i < rows, c < ranks, over n columns.
  void (*shrink)(const float* const* x, int rows, const void* const* a, Dtype dtype, int ranks,
                 int64_t n, float* const* h);
  // y[i][o] += sum_p coef[i][p] * b[p][o] for o < n, part by part: part q ends before p = ends[q]
  // and has at most kPart rows. `fresh`: y starts from zero, not from what it holds. y has room for
  // n rounded up to kPadColumns; what lies beyond n is scratch.
  void (*expand)(float* const* y, int rows, const float* const* coef, const void* const* b,
                 Dtype dtype, const int32_t* ends, int parts, int64_t n, bool fresh);
  // out[o] = base[o] + y[o] in float32, rounded once; base may be null.
  void (*store)(const float* y, const void* base, Dtype base_dtype, void* out, Dtype dtype,
                int64_t n);
  // out[o] = float(in[o * stride]).
  void (*widen)(const void* in, Dtype dtype, int64_t stride, float* out, int64_t n);
};

constexpr int64_t kPadColumns = 16;
constexpr int kPart = 16;

// One definition per mixture_lora_<isa>.cpp.
namespace generic { extern const MixtureKernels mixture_kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const MixtureKernels mixture_kernels; }
namespace avx2_w16 { extern const MixtureKernels mixture_kernels; }
namespace avx512 { extern const MixtureKernels mixture_kernels; }
#endif

}  // namespace lora_fused
