"""The update of a layer whose adapters are cores in a shared basis. No maths here."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fused.adapters import AdapterStack
from lora_fused.methods.basis import SharedBasis
from lora_fused.mixture import Route
from lora_fused.ops import PairCores, subspace_lora
from lora_fused.ops.mixture_lora.plan import MixturePlan


def add_in_basis(
    x: Tensor,
    base: Tensor,
    basis_a: Tensor,
    basis_b: Tensor,
    stack: AdapterStack,
    route: Route,
    diagonal: bool,
    plan: MixturePlan | None,
    impl: str,
) -> Tensor:
    """base plus the update of x by the route's cores."""
    return subspace_lora(
        x,
        basis_a,
        basis_b,
        diagonals(stack) if diagonal else PairCores(*stack.factors(), stack.row_start),
        route.adapter_ids,
        route.weights,
        scale=stack.scale,
        row_mixture=route.row_mixture,
        plan=plan,
        max_rank=None if diagonal else stack.max_rank,
        base=base,
        impl=impl,
    )


def add_of_tokens(tokens: Tensor, base: Tensor, basis: SharedBasis, *args) -> Tensor:
    """base plus the update of an embedding, whose coordinates are columns of basis_a."""
    z = F.embedding(tokens, basis.basis_a.mT)
    if base.dtype == torch.float64:  # it decides what is computed in, as x does elsewhere
        z = z.double()
    unit = torch.eye(z.shape[-1], dtype=basis.basis_a.dtype, device=z.device)
    with torch.autocast(z.device.type, enabled=False):  # it would round the intermediates
        return add_in_basis(z, base, unit, basis.basis_b, *args)


def diagonals(stack: AdapterStack) -> Tensor:
    """Diagonal cores ``[K, P]`` without their scale: the sum of core_a * core_b over the ranks.

    Sizes depend on shapes alone, so compiled code can trace it.
    """
    lora_a, lora_b = stack.factors()
    rows = lora_a.float() * lora_b.float()
    if all(rank == 1 for rank in stack.ranks):
        return rows
    at = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    owner = torch.searchsorted(stack.row_start, at, right=True) - 1
    return rows.new_zeros(len(stack), rows.shape[1]).index_add(0, owner, rows)
