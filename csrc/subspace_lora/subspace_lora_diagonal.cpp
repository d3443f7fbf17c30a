#include "subspace_lora_diagonal.h"

#include <algorithm>

namespace lora_fused {
namespace {

using Sizes = std::vector<int64_t>;

// Diagonals [K, P] as float32, one at a time.
struct Diagonals {
  const MixtureKernels& kernels;
  const char* data;
  Dtype dtype;
  int64_t directions, stride_row, stride_col;

  Diagonals(const MixtureKernels& table, const Tensor& cores)
      : kernels(table), data(static_cast<const char*>(cores.const_data_ptr())),
        dtype(dtype_of(cores, "subspace_lora", "cores")), directions(cores.size(1)), stride_row(cores.stride(0)),
        stride_col(cores.stride(1)) {}

  const float* at(int64_t k, std::vector<float>& copy) const {
    const char* row = data + k * stride_row * dtype_size(dtype);
    if (dtype == Dtype::f32 && stride_col == 1) return reinterpret_cast<const float*>(row);
    kernels.widen(row, dtype, stride_col, scratch(copy, directions), directions);
    return copy.data();
  }
};

float scale_of(const Route& route, int64_t k) { return route.scale ? route.scale[k] : 1.0f; }

// out[n] = (sum_j factor * d_k) * in[n], for rows that have an adapter; zero for the others.
void mix(const Route& route, const Diagonals& cores, const float* in, float* out) {
  const int64_t width = cores.directions;
  parallel_tasks(Sizes(route.rows, (route.per_row + 1) * width), [&](int64_t n) {
    static thread_local std::vector<float> copy, sum;
    float* const c = scratch(sum, width);
    std::fill_n(c, width, 0.0f);
    bool used = false;
    const int64_t at = route.mixture(n) * route.per_row;
    for (int64_t j = 0; j < route.per_row; ++j) {
      const int64_t k = route.adapter_ids[at + j];
      if (k < 0) continue;
      used = true;
      const float* const d = cores.at(k, copy);
      const float factor = route.weights[at + j] * scale_of(route, k);
      for (int64_t p = 0; p < width; ++p) c[p] += factor * d[p];
    }
    for (int64_t p = 0; p < width; ++p) out[n * width + p] = used ? c[p] * in[n * width + p] : 0.0f;
  });
}

Tensor made(bool needed, const Tensor& like, Sizes size, ScalarType dtype) {
  return torch::stable::new_zeros(like, needed ? size : Sizes{0}, dtype);
}

}  // namespace

Tensor diagonal_forward(const MixtureKernels& kernels, const Route& route, const Tensor& z,
                        const Tensor& cores) {
  Tensor t = torch::stable::empty_like(z);
  mix(route, {kernels, cores}, static_cast<const float*>(z.const_data_ptr()),
      static_cast<float*>(t.mutable_data_ptr()));
  return t;
}

MixtureGrads diagonal_backward(const MixtureKernels& kernels, const Route& route,
                               const Tensor& grad_t, const Tensor& z, const Tensor& cores,
                               int64_t needs) {
  const Diagonals diagonals(kernels, cores);
  const int64_t width = diagonals.directions, count = cores.size(0);
  const bool need_core = needs & 2, need_weights = needs & 8, need_scale = needs & 16;
  const float* const dt = static_cast<const float*>(grad_t.const_data_ptr());
  const float* const zs = static_cast<const float*>(z.const_data_ptr());
  Tensor grad_z = made(needs & 1, z, {route.rows, width}, ScalarType::Float);
  Tensor grad_core = made(need_core, z, {count, width}, cores.scalar_type());
  Tensor grad_w = made(need_weights, z, {route.mixtures, route.per_row}, ScalarType::Float);
  Tensor grad_s = made(need_scale, z, {count}, ScalarType::Float);
  if (needs & 1) mix(route, diagonals, dt, static_cast<float*>(grad_z.mutable_data_ptr()));

  // One row after the other: an adapter's sum does not depend on threads.
  std::vector<float> copy, by_core(need_core ? count * width : 0);
  std::vector<double> product(width), by_weight(route.mixtures * route.per_row), by_scale(count);
  for (int64_t n = 0; n < route.rows && (needs & ~1); ++n) {
    const int64_t at = route.mixture(n) * route.per_row;
    for (int64_t p = 0; p < width; ++p) product[p] = double(dt[n * width + p]) * zs[n * width + p];
    for (int64_t j = 0; j < route.per_row; ++j) {
      const int64_t k = route.adapter_ids[at + j];
      if (k < 0) continue;
      const float weight = route.weights[at + j], scale = scale_of(route, k);
      for (int64_t p = 0; need_core && p < width; ++p)
        by_core[k * width + p] += float(double(weight) * scale * product[p]);
      if (!need_weights && !need_scale) continue;
      const float* const d = diagonals.at(k, copy);
      double dot = 0.0;
      for (int64_t p = 0; p < width; ++p) dot += d[p] * product[p];
      by_weight[at + j] += dot * scale;
      by_scale[k] += dot * weight;
    }
  }
  const auto write = [](const auto& from, bool needed, Tensor& to) {
    if (needed) std::copy(from.begin(), from.end(), static_cast<float*>(to.mutable_data_ptr()));
  };
  write(by_weight, need_weights, grad_w);
  write(by_scale, need_scale, grad_s);
  if (need_core)
    kernels.store(by_core.data(), nullptr, Dtype::f32,
                  static_cast<char*>(grad_core.mutable_data_ptr()), diagonals.dtype, count * width);
  return {grad_z, grad_core, made(false, z, {}, cores.scalar_type()), grad_w, grad_s};
}

}  // namespace lora_fused
