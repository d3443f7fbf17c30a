"""One adapter's core: from its factors by projection, and back to a pair of any rank.

A diagonal core diag(d) is kept as the pair (d, 1): the diagonal of core_b^T core_a is meant.
"""

import torch
from torch import Tensor

from lora_fused.adapters import Adapter, AdapterBank, AdapterStack, LoraFactors
from lora_fused.checks import invalid
from lora_fused.methods.basis import SharedBasis
from lora_fused.methods.products import Block, Updates, gram


def core_of(part: LoraFactors, basis: SharedBasis, diagonal: bool) -> LoraFactors:
    """The core that is nearest to an adapter's part, scale kept."""
    rows = basis.a.coordinates(part.lora_a), basis.b.coordinates(part.lora_b)
    if not diagonal:
        return LoraFactors(*rows, part.scale)
    values = solve_diagonal((rows[0] * rows[1]).sum(0, dtype=torch.float64)[None], basis)
    values = values.to(basis.basis_a)
    return LoraFactors(values, torch.ones_like(values), part.scale)


def cores_of_bank(bank: AdapterBank, bases: dict[str, SharedBasis], diagonal: bool) -> AdapterBank:
    """The cores of all adapters, under their names; a module's rows in one product."""
    parts: dict[str, dict[str, LoraFactors]] = {name: {} for name in bank.names}
    for module, basis in bases.items():
        stack = bank.stacks[module]
        lora_a, lora_b = (t.detach() for t in stack.factors())
        rows_a, rows_b = basis.a.coordinates(lora_a), basis.b.coordinates(lora_b)
        if diagonal:
            rows_a = solve_diagonal(Updates(stack).sums(rows_a * rows_b), basis).to(rows_a)
            rows_b = torch.ones_like(rows_a)
        for name, found in parts.items():
            k = bank.id(name)
            at = slice(k, k + 1) if diagonal else stack.rows(k)
            if stack.ranks[k]:
                scale = float(stack.scale[k])
                found[module] = LoraFactors(rows_a[at], rows_b[at], scale)
    cores = AdapterBank(device=bank.device)
    saved, metadata = bank.saved, bank.metadata
    cores.add_many(
        [Adapter(name, p, saved.get(name, {}), metadata[name]) for name, p in parts.items()]
    )
    return cores


def solve_diagonal(moments: Tensor, basis: SharedBasis) -> Tensor:
    """The d ``[K, P]`` of least squares, from diag(basis_b D_k basis_a^T) ``[K, P]``."""
    both = gram(basis.basis_a.double()) * gram(basis.basis_b.double())
    return moments.double() @ torch.linalg.pinv(both, hermitian=True)


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


def pair_of(part: LoraFactors, basis: SharedBasis) -> tuple[LoraFactors, tuple[Tensor, Tensor]]:
    """A diagonal core as an ordinary pair of rank P, in orthonormal bases of the same spans."""
    values = (part.lora_a * part.lora_b).sum(0).double()
    q_a, r_a = torch.linalg.qr(basis.basis_a.double().mT)
    q_b, r_b = torch.linalg.qr(basis.basis_b.double().mT)
    sides = q_a.mT.to(basis.basis_a), q_b.mT.to(basis.basis_b)
    return LoraFactors((r_a * values).mT, r_b.mT, part.scale), sides


def pairs_of(core: Block) -> Block:
    """Diagonal cores as ordinary pairs of rank P."""
    values = (core.lora_a * core.lora_b).sum(1)
    unit = torch.eye(values.shape[1], dtype=values.dtype, device=values.device)
    return Block(core.ids, values.diag_embed(), unit.expand(len(values), -1, -1), core.scale)


def resized(core: LoraFactors, rank: int, *, rslora: bool) -> LoraFactors:
    """A core of another rank and the same alpha: the best approximation, or with room to spare."""
    old, most = core.lora_a.shape[0], min(core.lora_a.shape[1], core.lora_b.shape[1])
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= most:
        rule = f"be an integer from 1 to {most}, the directions of the basis"
        raise invalid("Subspace.reconstruct", "rank", rule, repr(rank))
    scale = core.scale * ((old / rank) ** 0.5 if rslora else old / rank)
    matrix = core.scale * (core.lora_b.double().mT @ core.lora_a.double())
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    # Rounding alone beyond the core's own rank: B is zero there, A a direction to train in.
    s, held = s[:rank].clone(), min(old, rank)
    s[held:] = 0
    size = (s / abs(scale)).sqrt()
    lora_b = (u[:, :rank] * size).mT * (1 if scale > 0 else -1)
    size[held:] = size[:held].mean()
    lora_a = size[:, None] * vh[:rank]
    return LoraFactors(lora_a.to(core.lora_a), lora_b.to(core.lora_b), scale)
