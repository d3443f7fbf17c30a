"""Schemas and shape functions of subspace_lora's compiled implementations.

The schema lives here and not in C++, so the package imports and traces whether or not the extension
was built. Each operator is a raw kernel; differentiation goes through autograd.py alone.
"""

import torch
from torch import Tensor

BASES = "Tensor basis_a, Tensor basis_b"
# Pairs have core_b and row_start; full [K, P, P] and diagonal [K, P] cores are core_a alone.
CORES = "Tensor core_a, Tensor? core_b, Tensor? row_start"
ROUTE = "Tensor adapter_ids, Tensor weights, Tensor? scale, Tensor? row_mixture"
PLAN = "Tensor[] plan, int max_rank"  # a MixturePlan's fields or none; the rank of the scratch
# Forward also returns z = x basis_a^T, float32 [N, P]: all that backward needs of x. `needs` has
# bit i set where the i-th of (x, core_a, core_b, weights, scale) wants a gradient; the others come
# back as empty tensors, so the arity is fixed. x_dtype is that of the gradient for x.
FORWARD = f"Tensor x, {BASES}, {CORES}, {ROUTE}, Tensor? base"
BACKWARD = f"Tensor grad, Tensor z, {BASES}, {CORES}, {ROUTE}, ScalarType x_dtype, int needs"
GRADS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"

torch.library.define("lora_fused::subspace_lora_fwd_native", f"({FORWARD}) -> (Tensor, Tensor)")
torch.library.define("lora_fused::subspace_lora_bwd_native", f"({BACKWARD}) -> {GRADS}")
torch.library.define(
    "lora_fused::subspace_lora_fwd_triton", f"({FORWARD}, {PLAN}) -> (Tensor, Tensor)"
)
torch.library.define("lora_fused::subspace_lora_bwd_triton", f"({BACKWARD}, {PLAN}) -> {GRADS}")


@torch.library.register_fake("lora_fused::subspace_lora_fwd_native")
@torch.library.register_fake("lora_fused::subspace_lora_fwd_triton")
def _fwd_fake(
    x, basis_a, basis_b, core_a, core_b, row_start, adapter_ids, weights, scale, row_mixture, base,
    *plan,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    cores = (core_a, core_b, row_start)
    for t in (basis_a, basis_b, *cores, adapter_ids, weights, scale, row_mixture, base):
        if t is not None and t.device != x.device:
            # One meta tensor sends a call of CPU tensors here, past the kernel and its checks.
            raise RuntimeError("subspace_lora: all tensors must be on the device of x")
    dtype = x.dtype if base is None else base.dtype
    y = x.new_empty(x.shape[0], basis_b.shape[1], dtype=dtype)
    return y, x.new_empty(x.shape[0], basis_a.shape[0], dtype=torch.float32)


@torch.library.register_fake("lora_fused::subspace_lora_bwd_native")
@torch.library.register_fake("lora_fused::subspace_lora_bwd_triton")
def _bwd_fake(
    grad, z, basis_a, basis_b, core_a, core_b, row_start, adapter_ids, weights, scale, row_mixture,
    x_dtype, needs, *plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    count = core_a.shape[0] if row_start is None else row_start.shape[0] - 1
    full = [
        ((grad.shape[0], basis_a.shape[1]), x_dtype),
        (core_a.shape, core_a.dtype),
        ((0,), core_a.dtype) if core_b is None else (core_b.shape, core_b.dtype),
        (weights.shape, torch.float32),
        ((count,), torch.float32),
    ]
    return tuple(
        grad.new_empty(shape if needs >> i & 1 else (0,), dtype=dtype)
        for i, (shape, dtype) in enumerate(full)
    )


# Launchers are imported on first use. On the CPU they run in Triton's interpreter, for tests.
# Triton launches on the current device, which need not be that of the tensors.
@torch.library.impl("lora_fused::subspace_lora_fwd_triton", ("cpu", "cuda"))
def _fwd_triton(x, *args):
    from lora_fused.ops.subspace_lora import triton_impl

    with torch.cuda.device_of(x):
        return triton_impl.forward(x, *args)


@torch.library.impl("lora_fused::subspace_lora_bwd_triton", ("cpu", "cuda"))
def _bwd_triton(grad, *args):
    from lora_fused.ops.subspace_lora import triton_impl

    with torch.cuda.device_of(grad):
        return triton_impl.backward(grad, *args)
