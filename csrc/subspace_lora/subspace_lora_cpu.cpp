// subspace_lora on CPU tensors: lora_fused::subspace_lora_{fwd,bwd}_native on torch's stable ABI.
// Schemas are defined in lora_fused/ops/subspace_lora/registration.py, which also checks arguments.
//
// Three stages: z = x basis_a^T, t = the row's cores applied to z, y = base + t basis_b. A basis is
// an adapter that all rows share and a core is an adapter of P columns, so all loops are
// mixture_lora's, with what it promises: a row's bits depend on nothing but the row.
#include <algorithm>
#include <cstring>

#include "../mixture_lora/mixture_lora_cpu.h"
#include "subspace_lora_diagonal.h"

namespace lora_fused {
namespace {

constexpr char kOp[] = "subspace_lora";

using Sizes = std::vector<int64_t>;

void require(bool fits, const char* what) {
  STD_TORCH_CHECK(fits, "subspace_lora: ", what, " must fit the other arguments");
}

// The arguments that forward and backward share, what keeps their memory alive, and the rows that
// have an adapter: the others take no part in any stage.
struct Call {
  Tensor core_a, ids, weights;
  OptionalTensor core_b, row_start, scale, row_mixture;
  Route route;
  int64_t count;
  std::vector<int32_t> live;  // ascending

  bool pairs() const { return row_start.has_value(); }
  bool diagonal() const { return !pairs() && core_a.dim() == 2; }

  Call(int64_t rows, const Tensor& basis_a, const Tensor& basis_b, const Tensor& core,
       const OptionalTensor& other, const OptionalTensor& start, const Tensor& adapter_ids,
       const Tensor& weights_mj, const OptionalTensor& scale_k, const OptionalTensor& row_mixture_s)
      : core_a(core), ids(torch::stable::contiguous(adapter_ids)),
        weights(torch::stable::contiguous(weights_mj)), core_b(other), row_start(contiguous(start)),
        scale(contiguous(scale_k)), row_mixture(contiguous(row_mixture_s)) {
    // Everything that a wrong value of could read or write out of bounds; contract.py explains.
    const auto sized = [](const OptionalTensor& t, ScalarType dtype, int64_t size) {
      return !t || (t->dim() == 1 && t->scalar_type() == dtype && t->size(0) == size);
    };
    require(basis_a.dim() == 2 && basis_b.dim() == 2, "the bases");
    require(dtype_of(basis_a, kOp, "basis_a") == dtype_of(basis_b, kOp, "basis_b"), "the bases");
    const int64_t p = basis_a.size(0), q = basis_b.size(0);
    require(pairs() == core_b.has_value(), "cores");
    if (pairs()) {
      require(core_a.dim() == 2 && core_b->dim() == 2 && core_a.size(1) == p && core_b->size(1) == q,
              "cores");
      require(row_start->dim() == 1 && row_start->size(0) > 0 &&
              row_start->scalar_type() == ScalarType::Int, "row_start");
    } else if (diagonal()) {
      require(core_a.size(1) == p && p == q, "cores");
    } else {
      require(core_a.dim() == 3 && core_a.size(1) == q && core_a.size(2) == p, "cores");
    }
    count = pairs() ? row_start->size(0) - 1 : core_a.size(0);
    require(sized(scale, ScalarType::Float, count), "scale");
    require(ids.dim() == 2 && ids.scalar_type() == ScalarType::Int, "adapter_ids");
    require(weights.dim() == 2 && weights.scalar_type() == ScalarType::Float &&
            weights.size(0) == ids.size(0) && weights.size(1) == ids.size(1), "weights");
    const int64_t groups = row_mixture ? row_mixture->size(0) : ids.size(0);
    require(sized(row_mixture, ScalarType::Int, groups), "row_mixture");
    require(groups ? rows % groups == 0 : rows == 0, "the number of mixtures");
    route = {static_cast<const int32_t*>(ids.const_data_ptr()),
             static_cast<const float*>(weights.const_data_ptr()), pointer<float>(scale),
             pointer<int32_t>(row_mixture), ids.size(0), ids.size(1), groups, rows};
    find_live();
  }

  void find_live() {
    const int32_t* start = pointer<int32_t>(row_start);
    for (int64_t n = 0; n < route.rows; ++n) {
      const int64_t m = route.mixture(n);
      require(m >= 0 && m < route.mixtures, "row_mixture");
      bool used = false;
      for (int64_t j = 0; j < route.per_row; ++j) {
        const int64_t k = route.adapter_ids[m * route.per_row + j];
        require(k >= -1 && k < count, "adapter_ids");
        used = used || (k >= 0 && (!start || start[k + 1] > start[k]));
      }
      if (used) live.push_back(int32_t(n));
    }
  }
};

// A basis as mixture_lora's loops see it: one adapter, whose ranks are the directions.
Stack one_adapter(const Tensor& basis) {
  const Side side = {static_cast<const char*>(basis.const_data_ptr()), dtype_of(basis, kOp, "basis"),
                     basis.size(1), 0, basis.stride(0), basis.stride(1)};
  return {side, side, nullptr, nullptr, 1, basis.size(0), basis.size(0)};
}

// Rows [first, last) of a call, kPlanRows of them at most; those that are live share the adapter.
void plan_basis(const Call& call, int64_t first, int64_t last, int64_t directions, Plan& plan) {
  const auto begin = std::lower_bound(call.live.begin(), call.live.end(), int32_t(first));
  const auto end = std::lower_bound(begin, call.live.end(), int32_t(last));
  const int64_t count = end - begin;
  plan.first_row = first;
  plan.last_row = last;
  plan.row.assign(begin, end);
  for (int32_t& row : plan.row) row -= int32_t(first);
  plan.segments = {{0, directions, 0, 0, count}};
  plan.groups.clear();
  if (count > 0 && directions > 0) plan.groups.push_back({0, 1, count, directions, 0});
  plan.h_size = count * directions;
}

// z[n] = basis rows[n], float32, zero for rows without an adapter.
Tensor project(const Call& call, const Tensor& rows, const char* name, const Tensor& basis) {
  static thread_local std::vector<float> widened;
  static thread_local Plan plan;
  const MixtureKernels& kernels = kernels_in_use();
  const int64_t count = call.route.rows, directions = basis.size(0);
  require(rows.dim() == 2 && rows.size(0) == count && rows.size(1) == basis.size(1), name);
  const Stack stack = one_adapter(basis);
  Tensor z = torch::stable::new_empty(rows, Sizes{count, directions}, ScalarType::Float);
  float* const out = static_cast<float*>(z.mutable_data_ptr());
  for (int64_t n = 0; n < count; n += kPlanRows) {
    const int64_t end = std::min(n + kPlanRows, count);
    plan_basis(call, n, end, directions, plan);
    float* const at = out + n * directions;
    shrink_rows(kernels, stack, stack.a, plan, as_float(kernels, rows, kOp, name, n, end, widened),
                false, at);
    // Live rows lie side by side: move them to their places, the last first.
    int64_t from = int64_t(plan.row.size());
    for (int64_t i = end - n; from < i; --i) {
      float* const to = at + (i - 1) * directions;
      if (from > 0 && plan.row[from - 1] == i - 1)
        std::memmove(to, at + --from * directions, directions * sizeof(float));
      else
        std::memset(to, 0, directions * sizeof(float));
    }
  }
  return z;
}

// out[n] = base[n] + t[n] basis, rounded once; rows without an adapter add nothing.
Tensor lift(const Call& call, const Tensor& t, const Tensor& basis, const OptionalTensor& base,
            ScalarType dtype) {
  static thread_local std::vector<float> packed;
  static thread_local Plan plan;
  const int64_t count = call.route.rows, directions = basis.size(0), columns = basis.size(1);
  const Stack stack = one_adapter(basis);
  Tensor y = torch::stable::new_empty(t, Sizes{count, columns}, dtype);
  Output output = {nullptr, Dtype::f32, 0, static_cast<char*>(y.mutable_data_ptr()),
                   dtype_of(y, kOp, "base"), columns};
  OptionalTensor base_rows = base;
  if (base) {
    require(base->dim() == 2 && base->size(0) == count && base->size(1) == columns, "base");
    if (base->stride(1) != 1) base_rows = torch::stable::contiguous(*base);
    output.base = static_cast<const char*>(base_rows->const_data_ptr());
    output.base_dtype = output.dtype;
    output.base_stride = base_rows->stride(0);
  }
  for (int64_t n = 0; n < count; n += kPlanRows) {
    const int64_t end = std::min(n + kPlanRows, count);
    plan_basis(call, n, end, directions, plan);
    const float* coef = static_cast<const float*>(t.const_data_ptr()) + n * directions;
    if (int64_t(plan.row.size()) < end - n) {
      float* const rows = scratch(packed, plan.h_size);
      for (size_t i = 0; i < plan.row.size(); ++i)
        std::copy_n(coef + plan.row[i] * directions, directions, rows + i * directions);
      coef = rows;
    }
    expand_rows(kernels_in_use(), stack, stack.b, plan, coef, output);
  }
  return y;
}

// Full cores M_k as pairs (M_k, 1): the unit matrix is every adapter's second factor.
struct Unit {
  Tensor memory, lora_b;

  Unit(const Tensor& core, int64_t count, int64_t q)
      : memory(torch::stable::new_zeros(core, Sizes{std::max<int64_t>(q * q, 1)})),
        lora_b(memory) {
    const uint16_t half = core.scalar_type() == ScalarType::Half ? 0x3c00 : 0x3f80;
    const float one = 1.0f;
    char* const data = static_cast<char*>(memory.mutable_data_ptr());
    const int64_t size = dtype_size(dtype_of(core, kOp, "cores"));
    for (int64_t i = 0; i < q; ++i)
      std::memcpy(data + i * (q + 1) * size, size == 4 ? (const void*)&one : &half, size);
    lora_b = torch::stable::from_blob(data, Sizes{count, q, q}, Sizes{0, q, 1}, core.device(),
                                      core.scalar_type());
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& basis_a, const Tensor& basis_b,
                                   const Tensor& core_a, const OptionalTensor& core_b,
                                   const OptionalTensor& row_start, const Tensor& adapter_ids,
                                   const Tensor& weights, const OptionalTensor& scale,
                                   const OptionalTensor& row_mixture, const OptionalTensor& base) {
  require(x.dim() == 2, "x");
  const Call call(x.size(0), basis_a, basis_b, core_a, core_b, row_start, adapter_ids, weights,
                  scale, row_mixture);
  const Tensor z = project(call, x, "x", basis_a);
  const auto mixed = [&] {
    if (call.diagonal()) return diagonal_forward(kernels_in_use(), call.route, z, core_a);
    const OptionalTensor none;
    if (call.pairs())
      return mixture_forward(z, core_a, *core_b, row_start, none, adapter_ids, weights, scale,
                             row_mixture, none);
    const Unit unit(core_a, call.count, basis_b.size(0));
    return mixture_forward(z, core_a, unit.lora_b, none, none, adapter_ids, weights, scale,
                           row_mixture, none);
  };
  const ScalarType dtype = base ? base->scalar_type() : x.scalar_type();
  return {lift(call, mixed(), basis_b, base, dtype), z};
}

MixtureGrads backward(const Tensor& grad, const Tensor& z, const Tensor& basis_a,
                      const Tensor& basis_b, const Tensor& core_a, const OptionalTensor& core_b,
                      const OptionalTensor& row_start, const Tensor& adapter_ids,
                      const Tensor& weights, const OptionalTensor& scale,
                      const OptionalTensor& row_mixture, ScalarType x_dtype, int64_t needs) {
  require(z.dim() == 2 && z.scalar_type() == ScalarType::Float, "z");
  const Call call(z.size(0), basis_a, basis_b, core_a, core_b, row_start, adapter_ids, weights,
                  scale, row_mixture);
  const Tensor z_np = torch::stable::contiguous(z);
  require(z_np.size(1) == basis_a.size(0), "z");
  const Tensor grad_t = project(call, grad, "grad", basis_b);
  const auto within = [&]() -> MixtureGrads {
    if (call.diagonal())
      return diagonal_backward(kernels_in_use(), call.route, grad_t, z_np, core_a, needs);
    const OptionalTensor none;
    if (call.pairs())
      return mixture_backward(grad_t, z_np, core_a, *core_b, row_start, none, adapter_ids, weights,
                              scale, row_mixture, needs);
    const Unit unit(core_a, call.count, basis_b.size(0));
    return mixture_backward(grad_t, z_np, core_a, unit.lora_b, none, none, adapter_ids, weights,
                            scale, row_mixture, needs & ~4);
  };
  auto [grad_z, grad_a, grad_b, grad_w, grad_s] = within();
  Tensor grad_x = needs & 1 ? lift(call, grad_z, basis_a, OptionalTensor(), x_dtype)
                            : torch::stable::new_empty(z, Sizes{0}, x_dtype);
  return {grad_x, grad_a, grad_b, grad_w, grad_s};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lora_fused, CPU, m) {
  m.impl("subspace_lora_fwd_native", TORCH_BOX(&forward));
  m.impl("subspace_lora_bwd_native", TORCH_BOX(&backward));
}

}  // namespace lora_fused
