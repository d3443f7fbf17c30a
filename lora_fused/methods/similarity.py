"""How alike adapters are, by their updates: no change of gauge (A, B) -> (M A, B M^-1) shows.

Three measures of D_k = s_k B_k A_k: the cosine <D_j, D_k> / (||D_j|| ||D_k||) over all layers; and
in each layer the principal angles between the row spaces (what of the input the updates read) and
between the column spaces (where in the output they write).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_fused.adapters import AdapterBank, AdapterStack
from lora_fused.checks import invalid
from lora_fused.methods import clusters
from lora_fused.methods.initialisations import shared_initialisations
from lora_fused.methods.products import blocks

# Of float32 factors, directions weaker than this share of the strongest are rounding.
_NONE = 1e-6
_BLOCK_ROWS = 2048


@dataclass(frozen=True)
class Similarity:
    """How alike the adapters of a bank are, every matrix ``[K, K]`` float64 in this order.

    Attributes:
        names: the adapters.
        cosine: of the updates, over all layers.
        inputs: mean squared cosine of the principal angles of the row spaces, averaged over the
            layers that both change: 1 where the smaller space lies in the larger; NaN: none.
        outputs: the same of the column spaces.
        chance_inputs: what ``inputs`` is on average for random spaces of these sizes.
        chance_outputs: the same of ``outputs``.
        shared_a: groups whose A's descend from one random A (see ``shared_initialisations``): their
            row spaces were alike before any training.
    """

    names: list[str]
    cosine: Tensor
    inputs: Tensor
    outputs: Tensor
    chance_inputs: float
    chance_outputs: float
    shared_a: list[dict]

    def pairs(self, count: int | None = None) -> list[tuple[str, str, float, float, float]]:
        """(name, name, cosine, inputs, outputs), the largest |cosine| first."""
        rows, columns = torch.triu_indices(len(self.names), len(self.names), 1)
        order = self.cosine[rows, columns].abs().argsort(descending=True, stable=True)[:count]
        return [
            (
                self.names[j],
                self.names[k],
                *(float(m[j, k]) for m in (self.cosine, self.inputs, self.outputs)),
            )
            for j, k in zip(rows[order].tolist(), columns[order].tolist(), strict=True)
        ]

    def notes(self) -> list[str]:
        """What the row spaces of adapters of one random A say, where there are such."""
        return [
            f"One random A (median |cosine| {group['median_cosine']:.2f}): "
            f"{', '.join(group['adapters'])}. Their row spaces were alike before any training."
            for group in self.shared_a
        ]

    def save_html(self, path: str | os.PathLike) -> Path:
        """Write one page with a heat map of each measure and a dendrogram."""
        from lora_fused.methods.similarity_page import html
        from lora_fused.report import save

        return save(html(self), path)


@torch.no_grad()
def compare_adapters(bank: AdapterBank) -> Similarity:
    """How alike the adapters of a bank are; costs T^2 (I + O) a layer, T the sum of the ranks.

    Raises:
        ValueError: fewer than two adapters.
    """
    if not isinstance(bank, AdapterBank):
        raise invalid("similarity", "bank", "be an AdapterBank", type(bank).__name__)
    if len(bank) < 2:
        raise invalid("similarity", "bank", "hold at least two adapters", len(bank))
    live = torch.tensor([bank.id(name) for name in bank.names])
    found, chances = [], []
    for side in ("a", "b"):
        total, layers, by_chance = (torch.zeros(bank.count, bank.count).double() for _ in range(3))
        for stack in bank.stacks.values():
            overlap, shared, expected = _overlaps(stack, side, bank.count)
            total, layers, by_chance = total + overlap, layers + shared, by_chance + expected
        mean = (total / layers)[live][:, live]
        found.append(mean)
        off = layers[live][:, live].triu(1)
        chances.append(float(by_chance[live][:, live].triu(1).sum() / off.sum()))
    groups = shared_initialisations([bank.adapter(name) for name in bank.names])
    return Similarity(bank.names, clusters.similarity(bank).cpu(), *found, *chances, groups)


@torch.no_grad()
def principal_angles(bank: AdapterBank, first: str, second: str) -> dict[str, dict[str, Tensor]]:
    """Module -> {"inputs", "outputs"}: the angles in radians, ascending; both adapt the module."""
    ids, found = [bank.id(first), bank.id(second)], {}
    for module, stack in bank.stacks.items():
        spaces = {side: dict(_spaces(stack, side, ids)) for side in "ab"}
        if all(len(spaces[side]) == len(set(ids)) for side in "ab"):
            found[module] = {
                label: _angles(*(spaces[side][k] for k in ids))
                for label, side in (("inputs", "a"), ("outputs", "b"))
            }
    return found


def _angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles between row spaces; small ones from sines, which cosines would round away."""
    if len(first) > len(second):
        first, second = second, first
    cosines = first @ second.mT
    sines = torch.linalg.svdvals(first - cosines @ second).flip(0)
    near = torch.linalg.svdvals(cosines)
    return torch.where(near > 0.7, sines.clamp(0, 1).asin(), near.clamp(0, 1).acos()).cpu()


def _overlaps(stack: AdapterStack, side: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean squared cosines, where both adapters change the layer, and what chance gives there."""
    spaces = dict(_spaces(stack, side))
    zero = torch.zeros(count, count).double()
    if not spaces:
        return zero, zero, zero
    rows = torch.cat([rows.float() for rows in spaces.values()])
    sizes = torch.tensor([len(rows) for rows in spaces.values()])
    owner = torch.tensor(list(spaces)).repeat_interleave(sizes).to(rows.device)
    total = zero.to(rows.device)
    for start in range(0, len(rows), _BLOCK_ROWS):
        at = slice(start, start + _BLOCK_ROWS)
        squares = (rows[at] @ rows.mT).square()
        columns = squares.new_zeros(len(squares), count).index_add_(1, owner, squares)
        total.index_add_(0, owner[at], columns.double())
    ranks = torch.zeros(count).double()
    ranks[list(spaces)] = sizes.double()
    shared = ((ranks[:, None] > 0) & (ranks > 0)).double()
    smaller, larger = (pick(ranks[:, None], ranks) for pick in (torch.minimum, torch.maximum))
    overlap = total.cpu() / smaller.clamp_min(1)
    return overlap * shared, shared, shared * larger / rows.shape[1]


def _spaces(stack: AdapterStack, side: str, ids=None) -> Iterator[tuple[int, Tensor]]:
    """Adapter id -> orthonormal rows that span the row (side "a") or column space of its update."""
    for part in blocks(stack, None if ids is None else [k for k in set(ids) if stack.ranks[k]]):
        (q, r_own), (_, r_other) = (
            torch.linalg.qr(rows.mT)
            for rows in ((part.lora_a, part.lora_b) if side == "a" else (part.lora_b, part.lora_a))
        )
        _, s, turn = torch.linalg.svd(r_other @ r_own.mT, full_matrices=False)
        spans = turn @ q.mT
        kept = (s > _NONE * s[:, :1]).sum(-1).tolist()
        for i, k in enumerate(part.ids):
            if kept[i]:
                yield k, spans[i, : kept[i]]
