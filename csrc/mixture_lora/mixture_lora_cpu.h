// mixture_lora on CPU tensors, for its operators and for subspace_lora, whose cores are adapters too.
#pragma once

#include <tuple>
#include <vector>

#include "../common/tensors.h"
#include "mixture_lora_engine.h"

namespace lora_fused {

using MixtureGrads = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kPlanRows = 1024;  // rows handled at a time: bounds scratch in long prefills

const MixtureKernels& kernels_in_use();

// Rows [first, last) as float32: in place where they are, else widened into `copy`.
Rows as_float(const MixtureKernels& kernels, const Tensor& t, const char* op, const char* name,
              int64_t first, int64_t last, std::vector<float>& copy);

// The operators of registration.py.
Tensor mixture_forward(const Tensor& x, const Tensor& lora_a, const Tensor& lora_b,
                       const OptionalTensor& row_start, const OptionalTensor& ranks,
                       const Tensor& adapter_ids, const Tensor& weights,
                       const OptionalTensor& scale, const OptionalTensor& row_mixture,
                       const OptionalTensor& base);
MixtureGrads mixture_backward(const Tensor& grad, const Tensor& x, const Tensor& lora_a,
                              const Tensor& lora_b, const OptionalTensor& row_start,
                              const OptionalTensor& ranks, const Tensor& adapter_ids,
                              const Tensor& weights, const OptionalTensor& scale,
                              const OptionalTensor& row_mixture, int64_t needs);

}  // namespace lora_fused
