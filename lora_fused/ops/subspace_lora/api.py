"""The public subspace_lora."""

from torch import Tensor

from lora_fused.ops.mixture_lora.plan import MixturePlan
from lora_fused.ops.subspace_lora import dispatch
from lora_fused.ops.subspace_lora.cores import PairCores, split


def subspace_lora(
    x: Tensor,
    basis_a: Tensor,
    basis_b: Tensor,
    cores: PairCores | Tensor,
    adapter_ids: Tensor,
    weights: Tensor,
    *,
    scale: Tensor | None = None,
    row_mixture: Tensor | None = None,
    plan: MixturePlan | None = None,
    max_rank: int | None = None,
    base: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Add to each row the updates of its own weighted set of adapters, all in one shared basis.

    y[n] = base[n] + basis_b^T (sum_j weights[m,j] * scale[k] * M_k) (basis_a x[n])
    with m = row_mixture[n // (N // S)] and k = adapter_ids[m,j]; k = -1 adds exactly nothing.

    Args:
        x: Inputs, ``[..., I]``, N rows in all. float32, float16 or bfloat16 (float64: reference).
        basis_a: Directions of the input, ``[P, I]``; a mean is one of them. Frozen: no gradient.
        basis_b: Directions of the output, ``[P, O]``, dtype of ``basis_a``; its P may differ.
        cores: M_k, the adapters in these coordinates. ``PairCores(lora_a, lora_b, row_start)``: a
            packed stack ``[T, P]`` and ``[T, P]`` of ranks that may differ. A tensor ``[K, P]``:
            diagonal. A tensor ``[K, P of basis_b, P of basis_a]``: full. Any storage dtype.
        adapter_ids: ``[M, J]`` int32 (int64 is converted), -1 = no adapter.
        weights: ``[M, J]``, read as float32, dimensionless; any sign, any sum.
        scale: Of each adapter, ``[K]``, read as float32. Default: ones (folded into the cores).
        row_mixture: ``[S]`` int32, S divides N: consecutive N // S rows use mixture
            ``row_mixture[s]``. Default: arange(M), so M divides N.
        plan: ``make_plan(adapter_ids, row_mixture, N)``, for Triton alone. Default: made inside,
            where pairs or full cores need one; a batch of few pairs and diagonal cores need none.
        max_rank: Largest rank of pairs, where the caller knows it on the host; spares Triton and
            the reference a read of ``row_start``. Native ignores it.
        base: The frozen layer's output, ``[..., O]``; never written. Default: the update alone.
        impl: ``"reference"``, ``"native"``, ``"triton"`` or ``"auto"``, as in mixture_lora. A named
            implementation never falls back.

    Returns:
        ``[..., O]`` in ``base.dtype``, or in ``x.dtype`` without base.

    Raises:
        ValueError: a shape, dtype, device or (CPU tensors) id disagrees, or a basis asks for a
            gradient; shows rule and what came.
        RuntimeError: the named ``impl`` cannot run here; says why and what to install.

    Numerics:
        As mixture_lora: float32 throughout (float64 if x is), base + update rounded once; native
        rows are bitwise the same alone, in any batch and at any thread count, Triton's with
        ``LORA_FUSED_BATCH_INVARIANT=1``; a weight of 0 keeps its gradient; NaN reaches the rows
        that use it, no others. Differentiable once in x, cores, weights, scale and base. Backward
        keeps the P coordinates of x, not x.

    Cost:
        P * (I + O) multiply-adds per row and one read of the bases, whatever the number of
        adapters; between them, in P coordinates, J cores per row. The reference forms the core of
        a mixture that more than J rows share; native and Triton do not, for a row's bits may not
        depend on how many there are.

    Source:
        Shared bases: EigenLoRAx, arXiv:2502.04700; joint diagonalisation: Compress then Serve,
        arXiv:2407.00066. Running a weighted set per row inside the basis is ours.

    Example:
        >>> cores = PairCores(stack.lora_a, stack.lora_b, stack.row_start)
        >>> y = subspace_lora(x, basis_a, basis_b, cores, ids, weights, scale=stack.scale)
    """
    args = (*split(cores), adapter_ids, weights, scale, row_mixture, base)
    return dispatch.run(x, (basis_a, basis_b, *args), plan, max_rank, impl)
