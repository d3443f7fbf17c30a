"""Differentiation of mixture_lora's compiled implementations."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable


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


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether a result of these is differentiated, in either mode."""
    # In forward mode the Function raises; the bare operator would return a tangent of zero.
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def forward(
    x, lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture, base,
    impl: str = "native", max_rank: int = 0, plan: tuple[Tensor, ...] = (),
) -> Tensor:  # fmt: skip
    """Run an implementation's operator, through autograd only where a gradient is wanted."""
    args = (x, lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture, base)
    # Spelt out, not wants_grad(): this is a decode step's path, and any() costs a microsecond.
    wanted = torch.is_grad_enabled() and (
        x.requires_grad
        or lora_a.requires_grad
        or lora_b.requires_grad
        or weights.requires_grad
        or (scale is not None and scale.requires_grad)
        or (base is not None and base.requires_grad)
    )
    if wanted or forward_ad._current_level >= 0:
        return MixtureLoraFunction.apply(*args, impl, max_rank, *plan)
    return _forward(impl, max_rank, plan, *args)


def _forward(impl: str, max_rank: int, plan: tuple[Tensor, ...], *args: Tensor | None) -> Tensor:
    if impl == "native":
        return torch.ops.lora_fused.mixture_lora_fwd_native(*args)
    return torch.ops.lora_fused.mixture_lora_fwd_triton(*one_projection(*args), plan, max_rank)[0]


def one_projection(
    x, lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture, base
) -> tuple:
    """The arguments as Triton's operators take them, where x has a single projection."""
    row_start, ranks, scale, base = (
        [] if t is None else [t] for t in (row_start, ranks, scale, base)
    )
    return x, [lora_a], [lora_b], row_start, ranks, adapter_ids, weights, scale, row_mixture, base
