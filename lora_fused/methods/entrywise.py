"""Rules that combine matrices entry by entry: TIES, DARE and magnitude pruning, as in PEFT.

The papers: TIES (arXiv:2306.01708) keeps each matrix's largest entries, elects a sign per entry
and averages those that agree; DARE (arXiv:2311.03099) drops entries at random and rescales the
rest. **We compute** what PEFT's merge_utils does: signs are elected before the weights are applied,
and the average divides by how many agree. **We differ**: a few rows are combined at a time, so that
thousands of matrices need little memory and few stay in cache; draws have a seed of their own.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fused.checks import invalid

RULES = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
# Entries that are combined at a time; draws are made for as many, so it is part of their meaning.
BLOCK = 2**17
_HELD = 16  # matrices of which a block is kept between the election and the sum
_SAMPLED = 2**20  # entries from which on a threshold is bracketed by a sample
_SAMPLE, _STRIDE = 2**14, 8191  # the stride is prime: it meets all rows and columns of a matrix

# rows(k, span): these rows of matrix k, the same whenever asked for; may be overwritten.
Rows = Callable[[int, slice], Tensor]


@dataclass(frozen=True)
class Entrywise:
    """One rule with its options.

    Attributes:
        rule: one of RULES.
        density: share of each matrix's entries that is kept.
        majority_sign_method: "total": the sign of the sum; "frequency": the more frequent sign.
        seed: of what DARE drops.
    """

    rule: str
    density: float
    majority_sign_method: str = "total"
    seed: int = 0

    @property
    def elects(self) -> bool:
        return self.rule.endswith("ties")

    @property
    def draws(self) -> bool:
        return self.rule.startswith("dare")

    def combine(
        self, rows: Rows, shape: tuple[int, int], weights: Sequence[float], keys: Sequence[str]
    ) -> Tensor:
        """The matrices 0, 1, ... of this shape combined.

        Args:
            rows: Gives rows of a matrix.
            shape: Of each.
            weights: One per matrix.
            keys: What the draws of each matrix depend on, beside the seed.
        """
        prune = self.draws or self.density == 1
        cuts = [None if prune else _cut(rows, k, shape, self.density) for k in range(len(keys))]
        found = []
        for span in spans(shape):

            def pruned(k: int, span: slice = span) -> Tensor:
                return self._pruned(rows(k, span), span, keys[k], cuts[k])

            held = [pruned(k) for k in range(len(keys))] if len(keys) <= _HELD else None
            values = pruned if held is None else held.__getitem__
            found.append(self._elected(values, weights) if self.elects else _sum(values, weights))
        total = torch.cat(found)
        return total.div_(self.density) if self.draws else total

    def _pruned(self, values: Tensor, span: slice, key: str, cut: "Cut | None") -> Tensor:
        """A block with the entries that are not kept set to zero."""
        if cut is not None:
            values = torch.nn.functional.hardshrink(values.contiguous(), cut.limit)
            return cut.clear(values, span)
        if self.density == 1:
            return values
        kept = _drawn(key, self.seed, span.start, values.numel(), self.density)
        return values.mul_(kept.view(values.shape).to(values.device))

    def _elected(self, values: Callable[[int], Tensor], weights: Sequence[float]) -> Tensor:
        frequency = self.majority_sign_method == "frequency"
        votes = torch.zeros_like(values(0))
        for k in range(len(weights)):
            votes += values(k).sign() if frequency else values(k)
        # Zero counts as positive, as in PEFT.
        sign = torch.where(votes >= 0, 1.0, -1.0).to(votes.dtype)
        total, count = torch.zeros_like(votes), votes.zero_()
        for k, weight in enumerate(weights):
            agreeing = values(k).mul_(sign).clamp_min_(0)
            total.add_(agreeing, alpha=weight)
            count += agreeing.sign_()
        return total.mul_(sign).div_(count.clamp_min_(1))


def _sum(values: Callable[[int], Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(values(0))
    for k, weight in enumerate(weights):
        total.add_(values(k), alpha=weight)
    return total


def spans(shape: tuple[int, int]) -> Iterator[slice]:
    """The blocks of rows that a matrix is treated in."""
    count = max(BLOCK // shape[1], 1)
    for start in range(0, shape[0], count):
        yield slice(start, min(start + count, shape[0]))


def drawn(key: str, seed: int, shape: tuple[int, int], density: float) -> Tensor:
    """Which entries of a matrix DARE keeps, each with probability ``density``; bool, on the CPU.

    The same on every device and for every order of modules and adapters: all depends on (seed, key)
    alone.
    """
    parts = [
        _drawn(key, seed, span.start, (span.stop - span.start) * shape[1], density)
        for span in spans(shape)
    ]
    return torch.cat(parts).view(shape)


def _drawn(key: str, seed: int, start: int, count: int, density: float) -> Tensor:
    digest = hashlib.blake2b(f"{seed}\0{key}\0{start}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    # Two draws of 32 bits from each of 64: several times as fast as bernoulli_.
    bits = torch.empty((count + 1) // 2, dtype=torch.int64)
    bits.random_(-(2**63), None, generator=generator)
    # Kept below this; 1 - 2^-33 and more would round to a number that int32 does not have.
    kept = min(round(density * 2**32), 2**32 - 1) - 2**31
    return bits.view(torch.int32)[:count] < kept


@dataclass(frozen=True)
class Cut:
    """What leaves the largest magnitudes of a matrix.

    Attributes:
        limit: magnitudes up to here go.
        extra: flat positions that go, too: of equal magnitudes at the edge, the last.
        width: of the matrix.
    """

    limit: float
    extra: Tensor | None
    width: int

    def clear(self, values: Tensor, span: slice) -> Tensor:
        """These rows without the extra positions."""
        if self.extra is not None:
            inside = self.extra - span.start * self.width
            values.view(-1)[inside[(inside >= 0) & (inside < values.numel())]] = 0
        return values


def _cut(rows: Rows, k: int, shape: tuple[int, int], density: float) -> Cut:
    total = shape[0] * shape[1]
    count = int(density * total)
    if count < 1:
        got = f"{density} of {total} values"
        raise invalid("merge", "density", "keep at least one value of each matrix", got)
    sizes = torch.cat([rows(k, span).abs_().reshape(-1) for span in spans(shape)])
    least, held = _least_kept(sizes, count)
    extra = (sizes == least).nonzero()[:, 0][count - held :] if held > count else None
    return Cut(float(torch.nextafter(least, least.new_zeros(()))), extra, shape[1])


def _least_kept(sizes: Tensor, count: int) -> tuple[Tensor, int]:
    """The ``count``-th largest of sizes, and how many are at least as large.

    From a sample that brackets it, then exactly among those inside: several times as fast as
    kthvalue on millions.
    """
    if sizes.numel() >= _SAMPLED:
        places = torch.arange(_SAMPLE, device=sizes.device) * _STRIDE % sizes.numel()
        sample = sizes[places].sort(descending=True).values
        middle, slack = count / sizes.numel() * _SAMPLE, 3 * _SAMPLE**0.5
        high = float(sample[max(int(middle - slack), 0)])
        low = float(sample[min(int(middle + slack), _SAMPLE - 1)])
        above, inside = 0, []
        for part in sizes.split(BLOCK):
            above += torch.count_nonzero(part > high)
            inside.append(part[(part >= low) & (part <= high)])
        above, inside = int(above), torch.cat(inside)
        if above < count <= above + len(inside):
            least = inside.kthvalue(len(inside) - (count - above) + 1).values
            return least, above + int(torch.count_nonzero(inside >= least))
    least = sizes.kthvalue(sizes.numel() - count + 1).values
    return least, int(torch.count_nonzero(sizes >= least))
