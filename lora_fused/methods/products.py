"""Sizes and distances of updates D_k = s_k B_k A_k, from their factors alone, in float64.

<D, E> = s t sum((A A'^T) * (B B'^T)) for D = s B^T A and E = t B'^T A': Gram matrices as small as
the ranks, so nothing of the layer's size [O, I] is ever formed.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_fused.adapters import AdapterStack

_VALUES = 2**24  # float64 values of one block of adapters


class Block(NamedTuple):
    """Some adapters of one stack that share a rank.

    Attributes:
        ids: their ids.
        lora_a: ``[n, R, I]`` float64.
        lora_b: ``[n, R, O]`` float64.
        scale: ``[n]`` float64.
    """

    ids: list[int]
    lora_a: Tensor
    lora_b: Tensor
    scale: Tensor


def blocks(stack: AdapterStack, ids: Sequence[int] | None = None) -> Iterator[Block]:
    """The adapters of a packed stack (default: all that are not empty), rank by rank."""
    size = stack.in_features + stack.out_features
    by_rank: dict[int, list[int]] = {}
    for k in range(len(stack)) if ids is None else ids:
        if stack.ranks[k]:
            by_rank.setdefault(stack.ranks[k], []).append(k)
    for rank, found in by_rank.items():
        most = max(1, _VALUES // (rank * size))
        for first in range(0, len(found), most):
            yield block(stack, found[first : first + most])


def block(stack: AdapterStack, ids: list[int]) -> Block:
    """These adapters, which share a rank."""
    rows = torch.tensor([[*range(stack.rows(k).start, stack.rows(k).stop)] for k in ids])
    lora_a, lora_b = (t.detach()[rows.to(t.device)].double() for t in stack.factors())
    return Block(ids, lora_a, lora_b, stack.scale[ids].double())


def gram(rows: Tensor) -> Tensor:
    return rows @ rows.mT


def inner(gram_a: Tensor, gram_b: Tensor) -> Tensor:
    """sum(gram_a * gram_b) of each, ``[n]``."""
    return (gram_a * gram_b).sum((-2, -1))


def norms(stack: AdapterStack) -> Tensor:
    """||D_k||_F of each adapter, ``[K]`` float64; 0 for an empty segment."""
    found = torch.zeros(len(stack), dtype=torch.float64, device=stack.lora_a.device)
    for part in blocks(stack):
        squares = inner(gram(part.lora_a), gram(part.lora_b))
        found[part.ids] = part.scale.abs() * squares.clamp_min(0).sqrt()
    return found


def root(rows: Tensor) -> Tensor:
    """L ``[n, R, R]`` with L^T L = rows rows^T: what a factor does to the other, without its size.

    From the eigenvalues, so rows that depend on one another are no trouble (a Cholesky factor would
    not exist).
    """
    power, turn = torch.linalg.eigh(gram(rows))
    return power.clamp_min(0).sqrt()[..., None] * turn.mT


def gaps(part: Block, basis_a: Tensor, basis_b: Tensor, core: Block) -> Tensor:
    """||D_k - basis_b^T core_k basis_a||_F^2 of each adapter, ``[n]``; any basis, any cores.

    Good to 1e-15 of ||D_k||^2, so relative errors down to some 1e-7 are true.
    """
    sides = ((part.lora_a, basis_a, core.lora_a), (part.lora_b, basis_b, core.lora_b))
    own, cross, other = [], [], []
    for rows, basis, coords in sides:
        basis = basis.double()
        own.append(gram(rows))
        cross.append(rows @ basis.mT @ coords.mT)
        other.append(coords @ gram(basis) @ coords.mT)
    found = part.scale.square() * inner(*own) + core.scale.square() * inner(*other)
    return (found - 2 * part.scale * core.scale * inner(*cross)).clamp_min(0)


class Updates:
    """A layer's updates, weighted for the fit.

    Attributes:
        lora_a: ``[T, I]``, as stored.
        lora_b: ``[T, O]``.
        row_start: ``[K + 1]``.
        ranks: ``[K]``.
        scale: ``[K]``: s_k, or s_k / ||D_k|| where all count the same.
        norms: ``[K]`` float64 of the weighted updates.
    """

    def __init__(self, stack: AdapterStack, equal: bool):
        self.stack = stack
        self.lora_a, self.lora_b = (t.detach() for t in stack.factors())
        self.row_start = stack.row_start
        self.ranks = torch.tensor(stack.ranks, device=self.lora_a.device)
        self.scale, self.norms = stack.scale.double(), norms(stack)
        if equal:
            self.scale = self.scale * _inverse(self.norms)
            self.norms = (self.norms > 0).double()
        self.scale = self.scale.float()

    @property
    def energy(self) -> float:
        return float(self.norms.square().sum())

    def side(self, side: str) -> tuple[Tensor, Tensor]:
        """The factor of a side, and the other."""
        return (self.lora_a, self.lora_b) if side == "a" else (self.lora_b, self.lora_a)

    def per_row(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.ranks)

    def seen_rows(self, side: str) -> Tensor:
        """``[T, I]`` float64 rows, in any order, with the Gram matrix of the stacked updates."""
        own, other = ("lora_a", "lora_b") if side == "a" else ("lora_b", "lora_a")
        scale = self.scale.double()[:, None, None]
        parts = [
            (scale[part.ids] * (root(getattr(part, other)) @ getattr(part, own))).flatten(0, 1)
            for part in blocks(self.stack)
        ]
        return torch.cat(parts)

    def row_weights(self, side: str, weighting: str) -> Tensor:
        """``[T]`` weights that make a factor's energy ||D_k||, or leave its own."""
        if weighting == "factors":
            return self.per_row(self.scale.abs().sqrt())
        rows = self.side(side)[0]
        squares = torch.zeros_like(self.norms)
        owner = self.per_row(torch.arange(len(self.ranks), device=rows.device))
        squares.index_add_(0, owner, torch.linalg.vector_norm(rows, dim=1).double().square())
        return self.per_row((self.norms * _inverse(squares)).sqrt().float())


def _inverse(values: Tensor) -> Tensor:
    return torch.where(values > 0, 1 / values.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
