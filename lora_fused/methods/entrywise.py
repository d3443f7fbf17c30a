"""Rules that combine tensors entry by entry: TIES, DARE and magnitude pruning, as in PEFT.

The papers: TIES (arXiv:2306.01708) keeps each tensor's largest entries, elects a sign per entry
and averages those that agree; DARE (arXiv:2311.03099) drops entries at random and rescales the
rest. **We compute** what PEFT's merge_utils does: signs are elected before the weights are applied,
and the average divides by how many agree. **We differ**: tensors come one at a time, twice where
signs are elected, so that thousands need the memory of a few; draws have a seed of their own.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fused.checks import invalid

RULES = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
_SAMPLED = 2**20  # entries from which on a threshold is bracketed by a sample, not sorted out
_SAMPLE, _STRIDE = 2**14, 8191  # the stride is prime: it meets all rows and columns of a matrix


@dataclass(frozen=True)
class Entrywise:
    """One rule with its options.

    Attributes:
        rule: one of RULES.
        density: share of each tensor's entries that is kept.
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
        self, term: Callable[[int], Tensor], weights: Sequence[float], keys: Sequence[str]
    ) -> Tensor:
        """The tensors term(0), term(1), ... combined.

        Args:
            term: Gives a tensor that may be overwritten, the same whenever it is asked for.
            weights: One per tensor.
            keys: What the draws of each tensor depend on, beside the seed.
        """
        pruned = _Pruned(self, term, keys)
        total = _sum(pruned, weights) if not self.elects else self._elected(pruned, weights)
        return total.div_(self.density) if self.draws else total

    def _elected(self, pruned: "_Pruned", weights: Sequence[float]) -> Tensor:
        frequency = self.majority_sign_method == "frequency"
        votes = 0
        for k in range(len(weights)):
            values = pruned(k)
            votes += values.sign_() if frequency else values
        # Zero counts as positive, as in PEFT.
        sign = torch.where(votes >= 0, 1.0, -1.0).to(votes.dtype)
        total, count = torch.zeros_like(votes), votes.zero_()
        for k, weight in enumerate(weights):
            agreeing = pruned(k).mul_(sign).clamp_min_(0)
            total.add_(agreeing, alpha=weight)
            count.add_(agreeing.sign_())
        return total.mul_(sign).div_(count.clamp_min_(1))


def _sum(pruned: "_Pruned", weights: Sequence[float]) -> Tensor:
    total = 0
    for k, weight in enumerate(weights):
        total += pruned(k).mul_(weight)
    return total


class _Pruned:
    """The tensors with the entries that are not kept set to zero; remembers thresholds only."""

    def __init__(self, rule: Entrywise, term: Callable[[int], Tensor], keys: Sequence[str]):
        self.rule, self.term, self.keys = rule, term, keys
        self.cuts: dict[int, tuple[float, Tensor | None]] = {}

    def __call__(self, k: int) -> Tensor:
        values, density = self.term(k), self.rule.density
        if density == 1:
            return values
        if self.rule.draws:
            kept = drawn(self.keys[k], self.rule.seed, values.numel(), density)
            return values.mul_(kept.view(values.shape).to(values.device))
        if k not in self.cuts:
            self.cuts[k] = cut(values, int(density * values.numel()))
        limit, extra = self.cuts[k]
        values = torch.hardshrink(values, limit)
        if extra is not None:
            values.view(-1)[extra] = 0
        return values


def drawn(key: str, seed: int, count: int, density: float) -> Tensor:
    """Which of ``count`` entries are kept, each with probability ``density``; bool, on the CPU.

    The same on every device and for every order of modules and adapters: all depends on (seed, key)
    alone.
    """
    digest = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    # Two draws of 32 bits from each of 64: three times as fast as bernoulli_.
    bits = torch.empty((count + 1) // 2, dtype=torch.int64)
    bits.random_(-(2**63), None, generator=generator)
    return bits.view(torch.int32)[:count] < round(density * 2**32) - 2**31


def cut(values: Tensor, count: int) -> tuple[float, Tensor | None]:
    """What leaves the ``count`` largest magnitudes: a limit, and positions to clear beside.

    Magnitudes up to the limit go; of equal ones at the edge the last positions go, too.
    """
    if count < 1:
        got = f"a density that keeps none of {values.numel()}"
        raise invalid("merge", "density", "keep at least one value of each tensor", got)
    sizes = values.abs().view(-1)
    least, held = _least_kept(sizes, count)
    below = torch.nextafter(least, least.new_zeros(()))
    extra = (sizes == least).nonzero()[:, 0][count - held :] if held > count else None
    return float(below), extra


def _least_kept(sizes: Tensor, count: int) -> tuple[Tensor, int]:
    """The ``count``-th largest of sizes, and how many are at least as large.

    From a sample that brackets it, then exactly among those inside: four times as fast as
    torch.kthvalue on millions.
    """
    if sizes.numel() >= _SAMPLED:
        places = torch.arange(_SAMPLE, device=sizes.device) * _STRIDE % sizes.numel()
        sample = sizes[places].sort(descending=True).values
        middle, slack = count / sizes.numel() * _SAMPLE, 3 * _SAMPLE**0.5
        high = sample[max(int(middle - slack), 0)]
        low = sample[min(int(middle + slack), _SAMPLE - 1)]
        above = int(torch.count_nonzero(sizes > high))
        inside = sizes[(sizes >= low) & (sizes <= high)]
        if above < count <= above + len(inside):
            least = inside.kthvalue(len(inside) - (count - above) + 1).values
            return least, above + int(torch.count_nonzero(inside >= least))
    least = sizes.kthvalue(sizes.numel() - count + 1).values
    return least, int(torch.count_nonzero(sizes >= least))
