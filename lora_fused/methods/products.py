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
_CACHED = 2**18  # of one that is read once


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


def by_rank(stack: AdapterStack, ids: Sequence[int] | None = None) -> Iterator[list[int]]:
    """Ids of adapters (default: all that are not empty) in lists of one rank each."""
    found: dict[int, list[int]] = {}
    for k in range(len(stack)) if ids is None else ids:
        if stack.ranks[k]:
            found.setdefault(stack.ranks[k], []).append(k)
    yield from found.values()


def rows_of(stack: AdapterStack, rows: Tensor, ids: Sequence[int]) -> Tensor:
    """``[n, R, I]`` of a tensor ``[T, I]`` by rank rows; a view where the adapters lie together."""
    first, rank = stack.rows(ids[0]).start, stack.ranks[ids[0]]
    if all(stack.rows(k).start == first + i * rank for i, k in enumerate(ids)):
        return rows[first : first + len(ids) * rank].unflatten(0, (len(ids), rank))
    return rows[_index(stack, ids).to(rows.device)]


def _index(stack: AdapterStack, ids: Sequence[int]) -> Tensor:
    return torch.tensor([[*range(stack.rows(k).start, stack.rows(k).stop)] for k in ids])


def block(stack: AdapterStack, ids: list[int]) -> Block:
    """These adapters, which share a rank."""
    lora_a, lora_b = (rows_of(stack, t.detach(), ids).double() for t in stack.factors())
    return Block(ids, lora_a, lora_b, stack.scale[ids].double())


def blocks(stack: AdapterStack, ids: Sequence[int] | None = None) -> Iterator[Block]:
    """The adapters of a packed stack (default: all that are not empty), a few at a time."""
    size = stack.in_features + stack.out_features
    for found in by_rank(stack, ids):
        most = max(1, _VALUES // (stack.ranks[found[0]] * size))
        for first in range(0, len(found), most):
            yield block(stack, found[first : first + most])


def gram(rows: Tensor) -> Tensor:
    return rows @ rows.mT


def inner(gram_a: Tensor, gram_b: Tensor) -> Tensor:
    """sum(gram_a * gram_b) of each, ``[n]``."""
    return (gram_a * gram_b).sum((-2, -1))


def norms(stack: AdapterStack) -> Tensor:
    """||D_k||_F of each adapter, ``[K]`` float64; 0 for an empty segment."""
    return Updates(stack).norms


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
    """A layer's updates, weighted for a fit.

    Attributes:
        lora_a: ``[T, I]``, as stored.
        lora_b: ``[T, O]``.
        scale: ``[K]``: s_k, or s_k / ||D_k|| where all count the same.
        norms: ``[K]`` float64 of the weighted updates.
        finite: of each adapter, whether all its numbers are.
    """

    def __init__(self, stack: AdapterStack, *, equal: bool = False):
        self.stack = stack
        self.lora_a, self.lora_b = (t.detach() for t in stack.factors())
        self.ranks = torch.tensor(stack.ranks, device=self.lora_a.device)
        self.scale = stack.scale.double()
        self.norms = torch.zeros_like(self.scale)
        self._groups = list(by_rank(stack))
        self._grams = {side: self._gram(self.side(side)[0]) for side in "ab"}
        for ids, gram_a, gram_b in zip(self._groups, *self._grams.values(), strict=True):
            self.norms[ids] = self.scale[ids].abs() * inner(gram_a, gram_b).clamp_min(0).sqrt()
        self.finite = self.norms.isfinite().tolist()
        if equal:
            self.scale = self.scale * _inverse(self.norms)
            self.norms = (self.norms > 0).double()

    @property
    def energy(self) -> float:
        return float(self.norms.square().sum())

    def side(self, side: str) -> tuple[Tensor, Tensor]:
        """The factor of a side, and the other."""
        return (self.lora_a, self.lora_b) if side == "a" else (self.lora_b, self.lora_a)

    def per_row(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(self.ranks)

    def sums(self, rows: Tensor) -> Tensor:
        """``[T, ...]`` summed over each adapter's rows, ``[K, ...]`` float64."""
        owner = self.per_row(torch.arange(len(self.ranks), device=rows.device))
        found = rows.new_zeros(len(self.ranks), *rows.shape[1:], dtype=torch.float64)
        return found.index_add_(0, owner, rows.double())

    def seen_rows(self, side: str, other: Tensor | None = None) -> Tensor:
        """``[T, I]`` float32 with the Gram matrix of the stacked updates: s_k L_k A_k.

        L_k^T L_k = B_k^T B_k, from eigenvalues, so that dependent columns of B_k are no trouble (a
        Cholesky factor would not exist). ``other``: what to take for B, as ``[T, P]``.
        """
        rows = self.side(side)[0]
        found = rows.new_empty(rows.shape, dtype=torch.float32)
        grams = self._grams["b" if side == "a" else "a"] if other is None else self._gram(other)
        for ids, gram_other in zip(self._groups, grams, strict=True):
            power, turn = torch.linalg.eigh(gram_other)
            root = power.clamp_min(0).sqrt()[..., None] * turn.mT
            root = (root * self.scale[ids, None, None]).float()
            mixed = root @ rows_of(self.stack, rows, ids).float()
            if len(self._groups) == 1:
                return mixed.flatten(0, 1)
            found[_index(self.stack, ids).flatten().to(found.device)] = mixed.flatten(0, 1)
        return found

    def weighted_rows(self, side: str, weighting: str) -> Tensor:
        """``[T, I]`` float32: a factor so scaled that A_k has the energy ||D_k||, as B_k has.

        "factors": scaled by sqrt(s_k) alone.
        """
        rows = self.side(side)[0].float()
        if weighting == "factors":
            return rows * self.per_row(self.scale.abs().sqrt()).float()[:, None]
        squares = torch.zeros_like(self.norms)
        for ids, own in zip(self._groups, self._grams[side], strict=True):
            squares[ids] = own.diagonal(dim1=-2, dim2=-1).sum(-1)
        return rows * self.per_row((self.norms * _inverse(squares)).sqrt()).float()[:, None]

    def _gram(self, rows: Tensor) -> list[Tensor]:
        """Per group ``[n, R, R]`` float64; few adapters at a time, which stay in cache."""
        found = []
        for ids in self._groups:
            own = rows_of(self.stack, rows, ids)
            few = max(1, _CACHED // own[0].numel())
            found.append(torch.cat([gram(part.double()) for part in own.split(few)]))
        return found


def _inverse(values: Tensor) -> Tensor:
    return torch.where(values > 0, 1 / values.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
