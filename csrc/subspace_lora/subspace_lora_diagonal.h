// The middle stage for diagonal cores: t[n] = (sum_j weight * scale * d_k) z[n], entry by entry.
#pragma once

#include "../mixture_lora/mixture_lora_cpu.h"

namespace lora_fused {

// z [N, P] float32, cores [K, P]; routing already checked. Returns t [N, P] float32.
Tensor diagonal_forward(const MixtureKernels& kernels, const Route& route, const Tensor& z,
                        const Tensor& cores);

// Gradients for (z, cores, none, weights, scale), those asked for; the others are empty.
MixtureGrads diagonal_backward(const MixtureKernels& kernels, const Route& route,
                               const Tensor& grad_t, const Tensor& z, const Tensor& cores,
                               int64_t needs);

}  // namespace lora_fused
