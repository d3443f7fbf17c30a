"""Schemas, shape functions and autograd of mixture_lora's compiled implementations.

The schema lives here and not in C++, so the package imports and traces whether or not the extension
was built. Each operator is a raw kernel; differentiation goes through MixtureLoraFunction alone.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

STACK = "Tensor lora_a, Tensor lora_b, Tensor? row_start, Tensor? ranks"
ROUTE = "Tensor adapter_ids, Tensor weights, Tensor? scale, Tensor? row_mixture"
PLAN = "Tensor[] plan, int max_rank"  # a MixturePlan's fields, and the rank that sizes scratch
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
    "lora_fused::mixture_lora_fwd_triton",
    f"(Tensor x, {STACK}, {ROUTE}, Tensor? base, {PLAN}) -> Tensor",
)
torch.library.define(
    "lora_fused::mixture_lora_bwd_triton",
    f"(Tensor grad, Tensor x, {STACK}, {ROUTE}, int needs, {PLAN}) -> {GRADS}",
)


@torch.library.register_fake("lora_fused::mixture_lora_fwd_native")
@torch.library.register_fake("lora_fused::mixture_lora_fwd_triton")
def _fwd_fake(
    x, lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture, base, *plan
) -> Tensor:
    tensors = (lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture, base)
    if any(t is not None and t.device != x.device for t in tensors):
        # One meta tensor sends a call of CPU tensors here, past the kernel and its checks.
        raise RuntimeError("mixture_lora: all tensors must be on the device of x")
    dtype = x.dtype if base is None else base.dtype
    return x.new_empty(x.shape[0], lora_b.shape[-1], dtype=dtype)


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


# Launchers are imported on first use. On the CPU they run in Triton's interpreter, for tests.
@torch.library.impl("lora_fused::mixture_lora_fwd_triton", ("cpu", "cuda"))
def _fwd_triton(*args):
    from lora_fused.ops.mixture_lora import triton_impl

    return triton_impl.forward(*args)


@torch.library.impl("lora_fused::mixture_lora_bwd_triton", ("cpu", "cuda"))
def _bwd_triton(*args):
    from lora_fused.ops.mixture_lora import triton_impl

    return triton_impl.backward(*args)


class MixtureLoraFunction(torch.autograd.Function):
    """y = mixture_lora(x, ...) (+ base), with one operator forward and one backward."""

    @staticmethod
    def forward(
        ctx, x, lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture, base,
        impl, max_rank, *plan,
    ):  # fmt: skip
        saved = (x, lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture)
        ctx.save_for_backward(*saved, *plan)
        ctx.base_dtype = None if base is None else base.dtype
        ctx.impl, ctx.max_rank = impl, max_rank
        return _forward(impl, max_rank, plan, *saved, base)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        wanted = [ctx.needs_input_grad[i] for i in (0, 1, 2, 6, 7)]
        needs = sum(1 << i for i, want in enumerate(wanted) if want)
        grads = [None] * 5
        if needs:
            tensors = ctx.saved_tensors  # once: a checkpoint recomputes at every reading
            saved, plan = tensors[:9], tensors[9:]
            if ctx.impl == "native":
                out = torch.ops.lora_fused.mixture_lora_bwd_native(grad, *saved, needs)
            else:
                out = torch.ops.lora_fused.mixture_lora_bwd_triton(
                    grad, *saved, needs, plan, ctx.max_rank
                )
            grads = [g if want else None for g, want in zip(out, wanted, strict=True)]
        x, lora_a, lora_b, weights, scale = grads
        base = grad.to(ctx.base_dtype) if ctx.needs_input_grad[9] else None
        none = [None] * (len(ctx.needs_input_grad) - 10)
        return x, lora_a, lora_b, None, None, None, weights, scale, None, base, *none


def forward(
    x, lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture, base,
    impl: str = "native", max_rank: int = 0, plan: tuple[Tensor, ...] = (),
) -> Tensor:  # fmt: skip
    """Run an implementation's operator, through autograd only where a gradient is wanted."""
    args = (x, lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture, base)
    wanted = torch.is_grad_enabled() and (
        x.requires_grad
        or lora_a.requires_grad
        or lora_b.requires_grad
        or weights.requires_grad
        or (scale is not None and scale.requires_grad)
        or (base is not None and base.requires_grad)
    )
    # In forward mode the Function raises; the bare operator would return a tangent of zero.
    if wanted or forward_ad._current_level >= 0:
        return MixtureLoraFunction.apply(*args, impl, max_rank, *plan)
    return _forward(impl, max_rank, plan, *args)


def _forward(impl: str, max_rank: int, plan: tuple[Tensor, ...], *args: Tensor | None) -> Tensor:
    if impl == "native":
        return torch.ops.lora_fused.mixture_lora_fwd_native(*args)
    return torch.ops.lora_fused.mixture_lora_fwd_triton(*args, plan, max_rank)
