"""Schemas and shape functions of mixture_lora's compiled implementations.

The schema lives here and not in C++, so the package imports and traces whether or not the extension
was built. Each operator is a raw kernel; differentiation goes through autograd.py alone.
"""

import torch
from torch import Tensor

STACK = "Tensor lora_a, Tensor lora_b, Tensor? row_start, Tensor? ranks"
ROUTE = "Tensor adapter_ids, Tensor weights, Tensor? scale, Tensor? row_mixture"
# The same by projection of x, empty where no projection has one.
STACKS = "Tensor[] lora_a, Tensor[] lora_b, Tensor[] row_start, Tensor[] ranks"
ROUTES = "Tensor adapter_ids, Tensor weights, Tensor[] scale, Tensor? row_mixture, Tensor[] base"
PLAN = "Tensor[] plan, int max_rank"  # a MixturePlan's fields or none; the rank of the scratch
GRADS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"

# `needs` has bit i set where the i-th of (x, lora_a, lora_b, weights, scale) wants a gradient; the
# others come back as empty tensors, so the arity is fixed.
torch.library.define(
    "lora_fused::mixture_lora_fwd_native", f"(Tensor x, {STACK}, {ROUTE}, Tensor? base) -> Tensor"
)
torch.library.define(
    "lora_fused::mixture_lora_bwd_native",
    f"(Tensor grad, Tensor x, {STACK}, {ROUTE}, int needs) -> {GRADS}",
)
torch.library.define(
    "lora_fused::mixture_lora_fwd_triton", f"(Tensor x, {STACKS}, {ROUTES}, {PLAN}) -> Tensor[]"
)
torch.library.define(
    "lora_fused::mixture_lora_out_triton",
    f"(Tensor x, {STACKS}, {ROUTES}, {PLAN}, Tensor(a!)[] out) -> ()",
)
torch.library.define(
    "lora_fused::mixture_lora_bwd_triton",
    f"(Tensor grad, Tensor x, {STACK}, {ROUTE}, int needs, {PLAN}) -> {GRADS}",
)


@torch.library.register_fake("lora_fused::mixture_lora_fwd_native")
def _fwd_fake(
    x, lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture, base
) -> Tensor:
    tensors = (lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture, base)
    _check_devices(x, *tensors)
    return x.new_empty(x.shape[0], lora_b.shape[-1], dtype=x.dtype if base is None else base.dtype)


@torch.library.register_fake("lora_fused::mixture_lora_fwd_triton")
def _fwd_triton_fake(
    x, lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture, base, *plan
) -> list[Tensor]:
    lists = (lora_a, lora_b, row_start, ranks, scale, base)
    _check_devices(x, adapter_ids, weights, row_mixture, *(t for ts in lists for t in ts))
    kinds = [t.dtype for t in base] or [x.dtype] * len(lora_b)
    return [
        x.new_empty(x.shape[0], b.shape[-1], dtype=kind)
        for b, kind in zip(lora_b, kinds, strict=True)
    ]


@torch.library.register_fake("lora_fused::mixture_lora_out_triton")
def _out_triton_fake(*args) -> None:
    return None


@torch.library.register_fake("lora_fused::mixture_lora_bwd_native")
@torch.library.register_fake("lora_fused::mixture_lora_bwd_triton")
def _bwd_fake(
    grad, x, lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture, needs,
    *plan,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    count = lora_a.shape[0] if row_start is None else row_start.shape[0] - 1
    full = [
        (x.shape, x.dtype),
        (lora_a.shape, lora_a.dtype),
        (lora_b.shape, lora_b.dtype),
        (weights.shape, torch.float32),
        ((count,), torch.float32),
    ]
    return tuple(
        x.new_empty(shape if needs >> i & 1 else (0,), dtype=dtype)
        for i, (shape, dtype) in enumerate(full)
    )


def _check_devices(x: Tensor, *tensors: Tensor | None) -> None:
    if any(t is not None and t.device != x.device for t in tensors):
        # One meta tensor sends a call of CPU tensors here, past the kernel and its checks.
        raise RuntimeError("mixture_lora: all tensors must be on the device of x")


# Launchers are imported on first use. On the CPU they run in Triton's interpreter, for tests.
# Triton launches on the current device, which need not be that of the tensors.
@torch.library.impl("lora_fused::mixture_lora_fwd_triton", ("cpu", "cuda"))
def _fwd_triton(x, *args):
    from lora_fused.ops.mixture_lora import triton_impl

    with torch.cuda.device_of(x):
        return triton_impl.forward(x, *args)


@torch.library.impl("lora_fused::mixture_lora_out_triton", ("cpu", "cuda"))
def _out_triton(x, *args):
    from lora_fused.ops.mixture_lora import triton_impl

    with torch.cuda.device_of(x):
        triton_impl.forward(x, *args)


@torch.library.impl("lora_fused::mixture_lora_bwd_triton", ("cpu", "cuda"))
def _bwd_triton(grad, *args):
    from lora_fused.ops.mixture_lora import triton_impl

    with torch.cuda.device_of(grad):
        return triton_impl.backward(grad, *args)
