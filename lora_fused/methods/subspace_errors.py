"""How far what a subspace gives back is from the adapters, in float64 and from factors alone."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lora_fused.adapters import AdapterBank, AdapterStack
from lora_fused.checks import invalid
from lora_fused.methods import products
from lora_fused.methods.basis import SharedBasis
from lora_fused.methods.cores import pairs_of


@dataclasses.dataclass(frozen=True)
class SubspaceErrors:
    """How far reconstructions are from the adapters: relative Frobenius norms of the products.

    Attributes:
        names: the adapters, K.
        modules: the modules, L.
        gaps: ``[K, L]`` float64, ||D - reconstruction||_F.
        norms: ``[K, L]`` float64, ||D||_F; 0 where an adapter lacks a module.
    """

    names: tuple[str, ...]
    modules: tuple[str, ...]
    gaps: Tensor
    norms: Tensor

    @property
    def overall(self) -> float:
        return _relative(self.gaps, self.norms)

    @property
    def adapters(self) -> dict[str, float]:
        """Adapter name -> its error over all modules."""
        return {n: _relative(self.gaps[k], self.norms[k]) for k, n in enumerate(self.names)}

    @property
    def by_module(self) -> dict[str, float]:
        """Module name -> the error of all adapters there."""
        return {m: _relative(self.gaps[:, i], self.norms[:, i]) for i, m in enumerate(self.modules)}

    def __str__(self) -> str:
        head = f"error {self.overall:.4f} over {len(self.names)} adapters, "
        head += f"{len(self.modules)} modules; worst"
        worst = sorted(self.adapters.items(), key=lambda item: -item[1])[:5]
        return "\n".join([head, *(f"  {name}: {error:.4f}" for name, error in worst)])


def reconstruction_errors(
    bases: dict[str, SharedBasis],
    cores: AdapterBank,
    bank: AdapterBank,
    names: Sequence[str] | None,
    diagonal: bool,
) -> SubspaceErrors:
    """The errors of ``names`` (default: all adapters in both); see Subspace.errors."""
    if names is None:
        names = [name for name in bank.names if name in cores]
    if not names:
        raise invalid("Subspace.errors", "bank", "share adapters with the subspace", "none")
    ids = [bank.id(name) for name in names]
    position = {k: i for i, k in enumerate(ids)}
    own = {bank.id(name): cores.id(name) for name in names}
    gaps = torch.zeros(len(names), len(bank.modules), dtype=torch.float64)
    norms = torch.zeros_like(gaps)
    for i, (module, stack) in enumerate(bank.stacks.items()):
        norms[:, i] = products.norms(stack.selected(ids)).cpu()
        gaps[:, i] = norms[:, i]
        if module not in cores.stacks:
            continue
        basis = bases[module]
        for part, core in _pairs(stack, cores.stacks[module], own, diagonal):
            found = products.gaps(part, basis.basis_a, basis.basis_b, core).sqrt()
            gaps[[position[k] for k in part.ids], i] = found.cpu()
    return SubspaceErrors(tuple(names), bank.modules, gaps, norms)


def _pairs(
    stack: AdapterStack, cores: AdapterStack, own: dict[int, int], diagonal: bool
) -> Iterator:
    """Blocks of adapters and of their cores, where both have the module; equal ranks together."""
    wanted = [k for k in own if stack.ranks[k] and cores.ranks[own[k]]]
    for rank in sorted({cores.ranks[own[k]] for k in wanted}):
        for part in products.blocks(stack, [k for k in wanted if cores.ranks[own[k]] == rank]):
            core = products.block(cores, [own[k] for k in part.ids])
            yield part, pairs_of(core) if diagonal else core


def _relative(gaps: Tensor, norms: Tensor) -> float:
    gap, norm = float(gaps.norm()), float(norms.norm())
    if gap == 0:
        return 0.0
    return gap / norm if norm else math.inf
