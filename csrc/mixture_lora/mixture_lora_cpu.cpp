// mixture_lora on CPU tensors: lora_fused::mixture_lora_{fwd,bwd}_native on torch's stable ABI.
// Schemas are defined in lora_fused/ops/mixture_lora/registration.py, which also checks arguments.
#include "mixture_lora_cpu.h"

#include <algorithm>

namespace lora_fused {

const MixtureKernels& kernels_in_use() {
#if defined(__x86_64__)
  switch (isa_in_use()) {
    case Isa::avx512:
      return avx512::mixture_kernels;
    case Isa::avx2_w16:
      return avx2_w16::mixture_kernels;
    case Isa::avx2:
      return avx2::mixture_kernels;
    case Isa::generic:
      break;
  }
#endif
  return generic::mixture_kernels;
}

namespace {

constexpr char kOp[] = "mixture_lora";

Side side_of(const Tensor& t, const char* name) {
  const bool packed = t.dim() == 2;
  const int64_t last = t.dim() - 1;
  return {static_cast<const char*>(t.const_data_ptr()), dtype_of(t, kOp, name), t.size(last),
          packed ? 0 : t.stride(0), t.stride(last - 1), t.stride(last)};
}

void require(bool fits, const char* what) {
  STD_TORCH_CHECK(fits, "mixture_lora: ", what, " must fit the other arguments");
}

// The arguments that forward and backward share, and what keeps their memory alive.
struct Call {
  OptionalTensor row_start, ranks, scale, row_mixture;
  Tensor ids, weights;
  Stack stack;
  Route route;

  Call(const Tensor& x, const Tensor& lora_a, const Tensor& lora_b, const OptionalTensor& start,
       const OptionalTensor& slot_ranks, const Tensor& adapter_ids, const Tensor& weights_mj,
       const OptionalTensor& scale_k, const OptionalTensor& row_mixture_s)
      : row_start(contiguous(start)), ranks(contiguous(slot_ranks)), scale(contiguous(scale_k)),
        row_mixture(contiguous(row_mixture_s)), ids(torch::stable::contiguous(adapter_ids)),
        weights(torch::stable::contiguous(weights_mj)) {
    // Everything that a wrong value of could read or write out of bounds. api.py explains what was
    // wrong, argument by argument, once one of these has failed.
    const auto sized = [](const OptionalTensor& t, ScalarType dtype, int64_t size) {
      return !t || (t->dim() == 1 && t->scalar_type() == dtype && t->size(0) == size);
    };
    const bool packed = row_start.has_value();
    const int64_t dims = packed ? 2 : 3;
    require(x.dim() == 2 && lora_a.dim() == dims && lora_b.dim() == dims, "dimensions");
    require(packed ? row_start->dim() == 1 && row_start->size(0) > 0 && !ranks : true, "row_start");
    const int64_t count = packed ? row_start->size(0) - 1 : lora_a.size(0);
    stack = {side_of(lora_a, "lora_a"), side_of(lora_b, "lora_b"),
             pointer<int32_t>(row_start), pointer<int32_t>(ranks),
             count, lora_a.size(0), packed ? 0 : lora_a.size(1)};
    require(!packed || (stack.row_start[0] == 0 && stack.row_start[count] == stack.rows),
            "row_start");
    require(stack.a.columns == x.size(1) && stack.a.dtype == stack.b.dtype &&
            lora_a.size(0) == lora_b.size(0) && (packed || lora_a.size(1) == lora_b.size(1)),
            "lora_a and lora_b");
    require(sized(row_start, ScalarType::Int, count + 1) && sized(ranks, ScalarType::Int, count),
            "row_start and ranks");
    require(sized(scale, ScalarType::Float, count), "scale");
    require(ids.dim() == 2 && ids.scalar_type() == ScalarType::Int, "adapter_ids");
    require(weights.dim() == 2 && weights.scalar_type() == ScalarType::Float &&
            weights.size(0) == ids.size(0) && weights.size(1) == ids.size(1), "weights");
    const int64_t groups = row_mixture ? row_mixture->size(0) : ids.size(0);
    require(sized(row_mixture, ScalarType::Int, groups), "row_mixture");
    require(groups ? x.size(0) % groups == 0 : x.size(0) == 0, "the number of mixtures");
    require(x.size(0) * ids.size(1) < int64_t(1) << 31, "rows * adapters per row (below 2^31)");
    route = {static_cast<const int32_t*>(ids.const_data_ptr()),
             static_cast<const float*>(weights.const_data_ptr()), pointer<float>(scale),
             pointer<int32_t>(row_mixture), ids.size(0), ids.size(1), groups, x.size(0)};
  }
};

}  // namespace

Rows as_float(const MixtureKernels& kernels, const Tensor& t, const char* op, const char* name,
              int64_t first, int64_t last, std::vector<float>& copy) {
  const Dtype dtype = dtype_of(t, op, name);
  const char* data = static_cast<const char*>(t.const_data_ptr());
  const int64_t columns = t.size(1), row = t.stride(0), column = t.stride(1);
  if (dtype == Dtype::f32 && (column == 1 || columns <= 1))
    return {reinterpret_cast<const float*>(data), row, 0};
  float* rows = scratch(copy, (last - first) * columns);
  parallel_tasks(std::vector<int64_t>(last - first, columns), [&](int64_t i) {
    kernels.widen(data + (first + i) * row * dtype_size(dtype), dtype, column, rows + i * columns,
                  columns);
  });
  return {rows, columns, first};
}

Tensor mixture_forward(const Tensor& x, const Tensor& lora_a, const Tensor& lora_b,
               const OptionalTensor& row_start, const OptionalTensor& ranks,
               const Tensor& adapter_ids, const Tensor& weights, const OptionalTensor& scale,
               const OptionalTensor& row_mixture, const OptionalTensor& base) {
  static thread_local std::vector<float> widened, h;
  static thread_local Plan plan;
  const MixtureKernels& kernels = kernels_in_use();
  const Call call(x, lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture);
  const int64_t rows = x.size(0), columns = call.stack.b.columns;
  require(!base || (base->dim() == 2 && base->size(0) == rows && base->size(1) == columns), "base");
  Tensor y = torch::stable::new_empty(base ? *base : x, {rows, columns});
  Output output = {nullptr, Dtype::f32, 0, static_cast<char*>(y.mutable_data_ptr()),
                   dtype_of(y, kOp, "base"), columns};
  OptionalTensor base_rows = base;
  if (base) {
    if (base->stride(1) != 1) base_rows = torch::stable::contiguous(*base);
    output.base = static_cast<const char*>(base_rows->const_data_ptr());
    output.base_dtype = output.dtype;
    output.base_stride = base_rows->stride(0);
  }
  for (int64_t n = 0; n < rows; n += kPlanRows) {
    const int64_t end = std::min(n + kPlanRows, rows);
    const Rows x_rows = as_float(kernels, x, kOp, "x", n, end, widened);
    make_plan(call.stack, call.route, n, end, false, plan);
    float* coef = scratch(h, plan.h_size);
    shrink_rows(kernels, call.stack, call.stack.a, plan, x_rows, true, coef);
    expand_rows(kernels, call.stack, call.stack.b, plan, coef, output);
  }
  return y;
}

namespace {

// d weights[m, j] = scale[k] * sum over rows of <h, q>, d scale[k] = sum of weights * <h, q>, with
// h = A x and q = B grad of the pair (row, k).
void weight_gradients(const Call& call, const Plan& plan, const float* h, const float* q,
                      float* weights, float* scale) {
  const Route& route = call.route;
  std::vector<double> dot(plan.row.size(), 0.0);
  for (const Group& g : plan.groups)
    for (int64_t s = g.first; s < g.last; ++s) {
      const Segment& segment = plan.segments[s];
      for (int64_t p = 0; p < g.rows; ++p)
        for (int64_t r = 0; r < segment.rank; ++r) {
          const int64_t at = g.h + p * g.depth + segment.at + r;
          dot[segment.begin + p] += double(h[at]) * q[at];
        }
    }
  std::vector<double> by_weight(route.mixtures * route.per_row, 0.0), by_scale(call.stack.count, 0.0);
  for (int64_t n = 0; n < route.rows; ++n)
    for (int64_t j = 0; j < route.per_row; ++j) {
      const int64_t pair = plan.pair_of[n * route.per_row + j];
      if (pair < 0) continue;
      const int64_t at = route.mixture(n) * route.per_row + j, k = route.adapter_ids[at];
      by_weight[at] += dot[pair] * (route.scale ? route.scale[k] : 1.0f);
      by_scale[k] += dot[pair] * route.weights[at];
    }
  if (weights) std::copy(by_weight.begin(), by_weight.end(), weights);
  if (scale) std::copy(by_scale.begin(), by_scale.end(), scale);
}

void weigh_all(const Plan& plan, std::vector<float>& h) {
  for (const Group& g : plan.groups) weigh(plan, g, 0, g.rows, 0, g.depth, h.data());
}

}  // namespace

MixtureGrads mixture_backward(
    const Tensor& grad, const Tensor& x, const Tensor& lora_a, const Tensor& lora_b,
    const OptionalTensor& row_start, const OptionalTensor& ranks, const Tensor& adapter_ids,
    const Tensor& weights, const OptionalTensor& scale, const OptionalTensor& row_mixture,
    int64_t needs) {
  const MixtureKernels& kernels = kernels_in_use();
  const Call call(x, lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture);
  const Stack& stack = call.stack;
  require(grad.dim() == 2 && grad.size(0) == x.size(0) && grad.size(1) == stack.b.columns, "grad");
  const bool need_x = needs & 1, need_a = needs & 2, need_b = needs & 4;
  const bool need_weights = needs & 8, need_scale = needs & 16;
  std::vector<float> x_copy, grad_copy, h, q;
  const Rows x_rows = as_float(kernels, x, kOp, "x", 0, x.size(0), x_copy);
  const Rows grad_rows = as_float(kernels, grad, kOp, "grad", 0, x.size(0), grad_copy);
  Plan plan;
  make_plan(stack, call.route, 0, x.size(0), true, plan);
  h.resize(plan.h_size);
  q.resize(plan.h_size);
  if (need_b || need_weights || need_scale)
    shrink_rows(kernels, stack, stack.a, plan, x_rows, false, h.data());
  if (need_x || need_a || need_weights || need_scale)
    shrink_rows(kernels, stack, stack.b, plan, grad_rows, false, q.data());

  const auto made = [&](bool needed, const Tensor& like, auto size, ScalarType dtype) {
    const std::vector<int64_t> none = {0};
    return torch::stable::new_zeros(like, needed ? std::vector<int64_t>(size.begin(), size.end()) : none,
                                    dtype);
  };
  Tensor grad_x = made(need_x, x, x.sizes(), x.scalar_type());
  Tensor grad_a = made(need_a, x, lora_a.sizes(), lora_a.scalar_type());
  Tensor grad_b = made(need_b, x, lora_b.sizes(), lora_b.scalar_type());
  Tensor grad_w = made(need_weights, x, weights.sizes(), ScalarType::Float);
  Tensor grad_s = made(need_scale, x, std::vector<int64_t>{stack.count}, ScalarType::Float);
  if (need_weights || need_scale)
    weight_gradients(call, plan, h.data(), q.data(),
                     need_weights ? static_cast<float*>(grad_w.mutable_data_ptr()) : nullptr,
                     need_scale ? static_cast<float*>(grad_s.mutable_data_ptr()) : nullptr);
  weigh_all(plan, q);
  if (need_x)
    expand_rows(kernels, stack, stack.a, plan, q.data(),
                {nullptr, Dtype::f32, 0, static_cast<char*>(grad_x.mutable_data_ptr()),
                 dtype_of(x, kOp, "x"), x.size(1)});
  if (need_a)
    outer_rows(kernels, stack, plan, q.data(), x_rows, stack.a.columns,
               static_cast<char*>(grad_a.mutable_data_ptr()), stack.a.dtype);
  if (need_b) {
    weigh_all(plan, h);
    outer_rows(kernels, stack, plan, h.data(), grad_rows, stack.b.columns,
               static_cast<char*>(grad_b.mutable_data_ptr()), stack.b.dtype);
  }
  return {grad_x, grad_a, grad_b, grad_w, grad_s};
}

STABLE_TORCH_LIBRARY_IMPL(lora_fused, CPU, m) {
  m.impl("mixture_lora_fwd_native", TORCH_BOX(&mixture_forward));
  m.impl("mixture_lora_bwd_native", TORCH_BOX(&mixture_backward));
}

}  // namespace lora_fused
