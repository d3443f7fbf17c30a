"""One shared basis for many adapters: EigenLoRAx and what we hold to be better.

The paper (Kaushik et al., arXiv:2502.04700; Share, arXiv:2602.06043) makes each factor tall,
joins them over the adapters, centres, and keeps the top P principal directions of either side; a
task is then two small coefficient matrices. **We compute** it so ("eigenlorax"), with stacked_svd
on the bank in place. **We differ**: the mean is kept, as one more basis vector, where the released
code drops it; alpha / r counts; adapters weigh by their updates, not by how A and B share the
size. "hosvd" looks at the updates alone: the directions that the stacked D_k have, which no
(A, B) -> (M A, B M^-1) changes. "hooi" refines it by turns (JD-Full of Compress-then-Serve,
arXiv:2407.00066), "jd_diag" finds joint factors that make all cores diagonal.
"""

import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lora_fused.adapters import Adapter, AdapterBank, AdapterStack
from lora_fused.checks import invalid
from lora_fused.methods import products
from lora_fused.methods.basis import Directions, SharedBasis, principal
from lora_fused.methods.subspace import FitOptions, Subspace
from lora_fused.ops import FactoredStack, stacked_svd

METHODS = ("eigenlorax", "hosvd", "hooi", "jd_diag")
WEIGHTINGS = ("updates", "factors", "equal")
_OP = "fit_subspace"


@torch.no_grad()
def fit_subspace(
    bank: AdapterBank,
    *,
    rank: int | None = None,
    energy: float | None = None,
    method: str = "eigenlorax",
    keep_mean: bool = True,
    center: bool = True,
    weighting: str = "updates",
    augment: int = 0,
    progress: bool | Callable[[int, int], None] = True,
    seed: int = 0,
) -> Subspace:
    options = FitOptions(method, rank, energy, keep_mean, center, weighting, augment, seed)
    generator = torch.Generator().manual_seed(seed)
    bases = {}
    for module, stack in bank.stacks.items():
        bases[module] = _basis(stack, options, generator)
    empty = Subspace(bases, AdapterBank(), options)
    empty.cores.add_many([empty.project(bank.adapter(name)) for name in bank.names])
    return empty


def _basis(stack, options, generator):
    a = _directions(stack, "a", options)
    b = _directions(stack, "b", options)
    return SharedBasis(a, b, embedding=stack.embedding)


def _directions(stack, side, options):
    lora_a, lora_b = (t.detach() for t in stack.factors())
    if side == "b":
        lora_a, lora_b = lora_b, lora_a
    found = stacked_svd(
        FactoredStack(lora_a, lora_b, stack.row_start, stack.scale),
        rank=min(options.rank, *lora_a.shape),
    )
    total = float(products.norms(stack).square().sum())
    return principal(found.vh, found.s, total)
