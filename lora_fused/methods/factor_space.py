"""Entrywise rules on the factors A and B themselves, as PEFT's types without a suffix do it."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lora_fused.adapters import AdapterBank
from lora_fused.methods.entrywise import Entrywise
from lora_fused.methods.exact_sums import Part, Sum, Used, measured


class Layer(NamedTuple):
    """The adapters of one module that take part; one entry each."""

    module: str
    names: list[str]
    weights: list[float]
    scales: list[float]
    ranks: list[int]
    lora_a: list[Tensor]  # [R_k, I], as stored
    lora_b: list[Tensor]  # [R_k, O]

    def keys(self, tensor: str) -> list[str]:
        """What the draws for a tensor of each adapter depend on."""
        return [f"{self.module}\0{name}\0{tensor}" for name in self.names]

    def rows(self) -> list[slice]:
        """The rank rows of each adapter, one after another."""
        ends = torch.tensor([0, *self.ranks]).cumsum(0).tolist()
        return [slice(*pair) for pair in pairwise(ends)]


def layer_of(bank: AdapterBank, module: str, used: Sequence[Used]) -> Layer:
    stack = bank.stacks[module]
    held = [one for one in used if stack.ranks[one.id]]
    factors = [t.detach() for t in stack.factors()]
    scales = stack.scale.tolist()
    return Layer(
        module,
        [one.name for one in held],
        [one.weight for one in held],
        [scales[one.id] for one in held],
        [stack.ranks[one.id] for one in held],
        *([rows[stack.rows(one.id)] for one in held] for rows in factors),
    )


def merge_factors(layer: Layer, total: Sum, rule: Entrywise, dtype: torch.dtype) -> Part:
    """A and B each combined with the weights sqrt(|w s|), the sign of w s on A's.

    The product of the results has cross terms: another update than any rule on updates gives.
    """
    roots = [
        abs(w * s) ** 0.5 if w * s >= 0 else -(abs(w * s) ** 0.5)
        for w, s in zip(layer.weights, layer.scales, strict=True)
    ]
    sizes = [abs(root) for root in roots]
    lora_a = _combined(layer.lora_a, roots, layer.keys("lora_a"), rule)
    lora_b = _combined(layer.lora_b, sizes, layer.keys("lora_b"), rule)
    return measured(total, lora_a[None], lora_b[None], dtype)


def _combined(factors: list[Tensor], weights: list[float], keys: list[str], rule: Entrywise):
    def rows(k: int, span: slice) -> Tensor:
        return factors[k][span].to(torch.float64, copy=True)

    return rule.combine(rows, factors[0].shape, weights, keys)
