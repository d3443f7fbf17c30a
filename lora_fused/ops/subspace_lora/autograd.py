"""Differentiation of subspace_lora's compiled implementations."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable


class SubspaceLoraFunction(torch.autograd.Function):
    """y = subspace_lora(x, ...) (+ base); what is kept of x is its P coordinates, not x."""

    @staticmethod
    def forward(
        ctx, x, basis_a, basis_b, core_a, core_b, row_start, adapter_ids, weights, scale,
        row_mixture, base, impl, max_rank, *plan,
    ):  # fmt: skip
        rest = (
            basis_a,
            basis_b,
            core_a,
            core_b,
            row_start,
            adapter_ids,
            weights,
            scale,
            row_mixture,
        )
        y, z = _forward(impl, max_rank, plan, x, *rest, base)
        ctx.save_for_backward(z, *rest, *plan)
        ctx.x_dtype, ctx.base_dtype = x.dtype, None if base is None else base.dtype
        ctx.impl, ctx.max_rank = impl, max_rank
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        wanted = [ctx.needs_input_grad[i] for i in (0, 3, 4, 7, 8)]
        needs = sum(1 << i for i, want in enumerate(wanted) if want)
        grads = [None] * 5
        if needs:
            tensors = ctx.saved_tensors  # once: a checkpoint recomputes at every reading
            saved, plan = tensors[:10], tensors[10:]
            out = _backward(ctx.impl, ctx.max_rank, plan, grad, *saved, ctx.x_dtype, needs)
            grads = [g if want else None for g, want in zip(out, wanted, strict=True)]
        x, core_a, core_b, weights, scale = grads
        base = grad.to(ctx.base_dtype) if ctx.needs_input_grad[10] else None
        none = [None] * (len(ctx.needs_input_grad) - 11)
        return x, None, None, core_a, core_b, None, None, weights, scale, None, base, *none


def forward(
    *args: Tensor | None, impl: str = "native", max_rank: int = 0, plan: tuple[Tensor, ...] = ()
) -> Tensor:
    """Run an implementation's operator, through autograd only where a gradient is wanted."""
    wanted = any(t is not None and t.requires_grad for t in args)
    # In forward mode the Function raises; the bare operator would return a tangent of zero.
    if (wanted and torch.is_grad_enabled()) or forward_ad._current_level >= 0:
        return SubspaceLoraFunction.apply(*args, impl, max_rank, *plan)
    return _forward(impl, max_rank, plan, *args)[0]


def _forward(impl: str, max_rank: int, plan: tuple, *args) -> tuple[Tensor, Tensor]:
    if impl == "native":
        return torch.ops.lora_fused.subspace_lora_fwd_native(*args)
    return torch.ops.lora_fused.subspace_lora_fwd_triton(*args, plan, max_rank)


def _backward(impl: str, max_rank: int, plan: tuple, *args) -> tuple[Tensor, ...]:
    if impl == "native":
        return torch.ops.lora_fused.subspace_lora_bwd_native(*args)
    return torch.ops.lora_fused.subspace_lora_bwd_triton(*args, plan, max_rank)
