"""The public mixture_lora: contract, checks, choice of implementation."""

from contextlib import nullcontext, suppress

import torch
from torch import Tensor

from lora_fused.backends import ERRORS, choose
from lora_fused.ops.mixture_lora import contract, reference, registration
from lora_fused.ops.mixture_lora import plan as plans


def mixture_lora(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    row_start: Tensor | None,
    adapter_ids: Tensor,
    weights: Tensor,
    *,
    scale: Tensor | None = None,
    ranks: Tensor | None = None,
    row_mixture: Tensor | None = None,
    plan: plans.MixturePlan | None = None,
    max_rank: int | None = None,
    base: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Add to each row the updates of that row's own weighted set of adapters.

    y[n] = base[n] + sum_j weights[m,j] * scale[k] * lora_b[k]^T (lora_a[k] x[n])
    with m = row_mixture[n // (N // S)] and k = adapter_ids[m,j]; k = -1 adds exactly nothing.

    Args:
        x: Inputs, ``[..., I]``, N rows in all. float32, float16 or bfloat16 (float64: reference).
        lora_a: Down projections. Packed: ``[T, I]``, one row per rank component, adapter after
            adapter. Slotted: ``[K, R, I]`` with any strides. Its dtype may differ from x's.
        lora_b: Up projections, transposed: ``[T, O]`` or ``[K, R, O]``, dtype of ``lora_a``.
        row_start: First row of each adapter in a packed stack, ``[K + 1]`` int32; rank of adapter k
            is ``row_start[k + 1] - row_start[k]`` (0: an empty segment). None: a slotted stack.
        adapter_ids: ``[M, J]`` int32 (int64 is converted), -1 = no adapter.
        weights: ``[M, J]``, read as float32, dimensionless; any sign, any sum.
        scale: alpha / rank of each adapter, ``[K]``, read as float32. Default: ones.
        ranks: Slotted form only: ranks in use, ``[K]`` int32. Default: R for all.
        row_mixture: ``[S]`` int32, S divides N: consecutive N // S rows use mixture
            ``row_mixture[s]``. Default: arange(M), so M divides N.
        plan: ``make_plan(adapter_ids, row_mixture, N)``, where several layers share one. Triton
            alone uses it; default: made inside.
        max_rank: Largest rank of a packed stack, where the caller knows it on the host; spares
            Triton and the reference a read of ``row_start``. Native ignores it.
        base: The frozen layer's output, ``[..., O]``; never written. Default: the update alone.
        impl: ``"reference"``, ``"native"``, ``"triton"`` or ``"auto"``: native for CPU tensors if
            built, Triton for CUDA, else reference. A named implementation never falls back.

    Returns:
        ``[..., O]`` in ``base.dtype``, or in ``x.dtype`` without base.

    Raises:
        ValueError: a shape, dtype, device or (CPU tensors) id disagrees; shows rule and what came.
        RuntimeError: the named ``impl`` cannot run here; says why and what to install.

    Numerics:
        Products, the rank-wide intermediate and base + update in float32 (float64 if x is), rounded
        once. Deterministic. Native: a row's result is bitwise the same alone, in any batch and at
        any thread count. A weight of 0 contributes 0 for finite x and keeps its true gradient.
        Differentiable once in x, lora_a, lora_b, weights, scale and base. Ids out of range on a
        device count as -1. NaN in x, weights or adapters reaches the rows that use it, no others.

    Cost:
        (I + O) * sum of the ranks used, multiply-adds per row. Native visits adapters one after
        another, each with all the rows (of 1024) that use it.

    Source:
        Batched per-row adapters: Punica, arXiv:2310.18547. Weighted sums: Asadi et al.,
        arXiv:2402.15414. A different weighted set in every row is ours.

    Example:
        >>> a, b = stack.factors()
        >>> y = mixture_lora(x, a, b, stack.row_start, ids, weights, scale=stack.scale)
    """
    args = (lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture, base)
    if impl in ("auto", "native") and _is_eager_cpu(x, base):
        # The kernel refuses what does not fit, and what it refuses is explained or sent to the
        # reference below. Checking first would double the time of a decode step's call.
        with suppress(RuntimeError, IndexError):
            y = registration.forward(*contract.flatten(x, *args))
            return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])
    device = x.device
    autocast = torch.amp.is_autocast_available(device.type)
    if autocast and torch.is_autocast_enabled(device.type) and x.dtype in contract.STORAGE:
        x = x.to(torch.get_autocast_dtype(device.type))
    # float64 anywhere is the reference's: auto must not pick a kernel that then refuses it.
    widest = x.dtype if base is None or base.dtype != torch.float64 else base.dtype
    widest = lora_a.dtype if lora_a.dtype == torch.float64 else widest
    name = choose(contract.OP, impl, device, widest)
    contract.check(x, *args, name)
    flat, out_shape = contract.flatten(x, *args), (*x.shape[:-1], lora_b.shape[-1])
    if name == "native":
        return registration.forward(*flat).reshape(out_shape)
    bound = plans.rank_bound(row_start, max_rank)
    if name == "triton":
        bound = plans.scratch_rank(lora_a, row_start, bound)
        plan = plans.check_plan(plan, flat[0], adapter_ids) or plans.make_plan(
            flat[5], row_mixture, flat[0].shape[0]
        )
        return registration.forward(*flat, name, bound, tuple(plan)).reshape(out_shape)
    # Autocast would round the intermediates.
    with torch.autocast(device.type, enabled=False) if autocast else nullcontext():
        y = reference.forward(*flat, max_rank=bound)
    return y.reshape(out_shape)


def _is_eager_cpu(x: Tensor, base: Tensor | None) -> bool:
    """Whether the native kernel may be asked at once; it sees rows only, so base must line up."""
    return (
        ERRORS["native"] is None
        and x.is_cpu
        and (base is None or base.shape[:-1] == x.shape[:-1])
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )
