"""The public mixture_lora, for one projection of x and for several."""

from collections.abc import Sequence

from torch import Tensor

from lora_fused.ops.mixture_lora import dispatch
from lora_fused.ops.mixture_lora.plan import MixturePlan


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
    plan: MixturePlan | None = None,
    max_rank: int | None = None,
    base: Tensor | None = None,
    out: Tensor | None = None,
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
            alone uses it; default: made inside. A plan holds for the values it was made from.
        max_rank: Largest rank of a packed stack, where the caller knows it on the host; spares
            Triton and the reference a read of ``row_start``. Native ignores it.
        base: The frozen layer's output, ``[..., O]``; never written. Default: the update alone.
        out: Where to write the result, without gradients; may be ``base``, must not overlap it
            otherwise, nor x. Triton writes it in place, others copy. Default: a new tensor.
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
        Differentiable once in x, lora_a, lora_b, weights, scale and base. Ids and mixtures out of
        range on a device count as none. NaN in x, weights or adapters reaches the rows that use it,
        no others.

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
    if out is not None:
        return dispatch.run_into(out, x, args, plan, max_rank, impl)
    return dispatch.run(x, args, plan, max_rank, impl)


def mixture_lora_group(
    x: Tensor,
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    row_start: Sequence[Tensor] | None,
    adapter_ids: Tensor,
    weights: Tensor,
    *,
    scale: Sequence[Tensor | None] | None = None,
    ranks: Sequence[Tensor] | None = None,
    row_mixture: Tensor | None = None,
    plan: MixturePlan | None = None,
    max_rank: int | None = None,
    base: Sequence[Tensor] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """mixture_lora for several projections of one input: q, k and v; gate and up.

    Args:
        x, adapter_ids, weights, row_mixture, plan, impl: As in mixture_lora, shared by all.
        lora_a, lora_b, row_start, scale, ranks, base: As there, one entry for each projection.
            Their O and ranks may differ; dtype, storage form and K may not.
        max_rank: Largest rank of all.

    Returns:
        One ``[..., O]`` for each projection; each as mixture_lora gives it.

    Raises:
        ValueError: as mixture_lora; or the sequences differ in length, or the stacks in kind.

    Cost:
        Triton without gradients: the launches of one call, whatever the number of projections. Else
        one call for each.
    """
    columns = {
        "lora_a": lora_a,
        "lora_b": lora_b,
        "row_start": row_start,
        "ranks": ranks,
        "scale": scale,
        "base": base,
    }
    route = (adapter_ids, weights, row_mixture)
    return dispatch.run_group(x, columns, route, plan, max_rank, impl)
