"""The public stacked_svd: contract, checks, choice of method and implementation."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lora_fused.ops.stacked_svd import contract
from lora_fused.ops.stacked_svd.factored import FactoredStack
from lora_fused.ops.stacked_svd.group import Group
from lora_fused.ops.stacked_svd.solve import solve


class StackedSvd(NamedTuple):
    """Leading components of a matrix M: M is about u @ diag(s) @ vh.

    Attributes:
        u: ``[T, P]``, orthonormal columns (under a group: the rows of this rank).
        s: ``[P]``, descending.
        vh: ``[P, I]``, orthonormal rows, the largest entry of each positive.
        energy: ``[P]``, each component's share of ``||M||_F^2``; the sum is what is explained.
        residual: ``[]``, at least ``||M - u diag(s) vh||_F``.
        method: what computed it.

    A batch has a leading ``[L]`` throughout. float32 (float64 where the stack is).
    """

    u: Tensor
    s: Tensor
    vh: Tensor
    energy: Tensor
    residual: Tensor
    method: str


def stacked_svd(
    stack: Tensor | Iterable[Tensor] | FactoredStack,
    *,
    rank: int | None = None,
    energy: float | None = None,
    oversampling: int = 10,
    power_iterations: int = 2,
    weights: Tensor | None = None,
    center: bool = False,
    method: str = "auto",
    generator: torch.Generator | None = None,
    group: object | None = None,
    impl: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> StackedSvd:
    """Find the leading singular vectors of stacked adapters, and how much they leave out.

    M = diag(weights) (stack - mean), and M is about u diag(s) vh. Nothing dense of M's size is
    formed.

    Args:
        stack: ``[T, I]``; or ``[L, T, I]``, a batch of L; or an iterable of chunks ``[t, I]`` that
            can be iterated again (each pass reads it once; one that cannot, only with
            ``power_iterations=0``); or a FactoredStack. float32, float16 or bfloat16 (float64:
            reference).
        rank: How many components, at most the smaller side. Either this or ``energy``.
        energy: The fraction of ``||M||_F^2`` in (0, 1] that the components must hold; they grow
            until it is certain. In a batch, the most that any member needs.
        oversampling: Sketch columns beyond the rank.
        power_iterations: q. randomized makes q + 1 passes, krylov q + 3 of half the width; gram
            makes 2 q + 3 steps on its matrix. Each more lowers the error.
        weights: Of the rows, ``[T]`` or ``[L, T]``; of the adapters, ``[K]``, for a FactoredStack.
        center: Subtract the mean row, weighted by ``weights**2`` (the one that leaves least).
        method: ``"krylov"``: block Krylov. ``"randomized"``: subspace iteration, least memory.
            ``"gram"``: eigenvectors of the smaller side's Gram matrix. ``"exact"``: torch's SVD of
            the whole, in memory. ``"auto"``: the cheapest (see plan.py); the result says which.
        generator: Draws the seed of the test matrix. Default: seed 0, so a call repeats itself.
        group: A torch.distributed process group. Each rank gives its own rows and the same other
            arguments; only sketches and small Gram matrices are reduced. Not with ``"exact"``.
        impl: ``"reference"``, ``"native"``, ``"triton"`` or ``"auto"``, as in mixture_lora: what
            multiplies the rows. A named implementation never falls back.
        progress: Called with (layers done, layers in all) while a tensor is worked on: on a CPU
            every few layers of a batch, else once. Not for chunks, whose reading the caller sees.

    Returns:
        StackedSvd(u, s, vh, energy, residual, method).

    Raises:
        ValueError: an argument, a chunk or an adapter does not fit, is empty or is not finite.
        RuntimeError: the named ``impl`` cannot run here; says why and what to install.

    Numerics:
        Rows are read as stored; products accumulate in float32, Gram matrices of sketches in
        float64. M is scaled by a power of two, so entries of 1e+-25 are fine. ``residual`` is from
        ``||M||^2 - ||s||^2``, or measured entry by entry in float64 where it is below 1e-2
        ``||M||``; the true error is at most ``residual`` and at least 0.95 of it. (A one-shot
        iterator cannot be measured: there ``residual`` is at least 0.02 ``||M||``.)
        Deterministic; chunks change nothing but rounding.

    Source:
        Halko, Martinsson and Tropp, arXiv:0909.4061 (sketch, power iterations, a-posteriori error);
        Musco and Musco, arXiv:1504.05477 (block Krylov). The isometry of a FactoredStack is ours.

    Example:
        >>> found = stacked_svd(stack.lora_a, energy=0.95)
        >>> basis_a = found.vh
    """
    contract.check_options(rank, energy, oversampling, power_iterations, method)
    if method == "exact" and group is not None:
        raise contract.invalid(contract.OP, "method", "not be 'exact' under a group", "a group")
    ranks = Group(group)
    seed = 0
    if generator is not None:
        drawn = torch.randint(1 << 62, (), generator=generator, device=generator.device)
        seed = int(ranks.same(drawn.to(ranks.device())))
    options = (rank, energy, oversampling, power_iterations, weights, center, method)
    with torch.no_grad(), torch.autocast(_device_type(stack), enabled=False):
        return StackedSvd(*solve(stack, *options, seed, ranks, impl, progress))


def _device_type(stack: object) -> str:
    stack = stack.lora_a if isinstance(stack, FactoredStack) else stack
    return stack.device.type if isinstance(stack, Tensor) else "cpu"
