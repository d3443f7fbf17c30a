"""Entrywise rules on the dense updates, as PEFT's *_svd types, and the leading part of the result.

PEFT holds every adapter's [O, I] update of a module at once and decomposes their combination in
full. **We compute** the same, one update at a time, and only the singular vectors that are kept, by
block Krylov iteration until they are as good as a full decomposition in float32.
"""

import torch
from torch import Tensor

from lora_fused.methods.entrywise import Entrywise
from lora_fused.methods.exact_sums import Cut, Part, Sum, measured
from lora_fused.methods.factor_space import Layer
from lora_fused.ops import stacked_svd

# What LAPACK's float32 SVD leaves of ||M^T u - s v|| is some tens of eps * s: no better is asked.
_CONVERGED = 16
_STEPS = (8, 24)  # power iterations tried; then the whole is decomposed


def merge_updates(
    layer: Layer,
    total: Sum,
    rule: Entrywise,
    rank: int | None,
    energy: float | None,
    dtype: torch.dtype,
) -> Part:
    """The updates scale * B A combined entry by entry, then cut to a rank."""
    dense = combined(layer, rule)
    cut = leading(dense, rank, energy)
    return measured(total, cut.lora_a, cut.lora_b, dtype, cut)


def combined(layer: Layer, rule: Entrywise) -> Tensor:
    """``[O, I]`` float32; few matrices of its size are in memory, however many adapters."""

    def rows(k: int, span: slice) -> Tensor:
        # Products are formed as PEFT forms them, so that equal entries are kept.
        part = layer.lora_b[k][:, span].float().mT @ layer.lora_a[k].float()
        return part.mul_(layer.scales[k])

    shape = (layer.lora_b[0].shape[1], layer.lora_a[0].shape[1])
    return rule.combine(rows, shape, layer.weights, layer.keys("update"))


def leading(dense: Tensor, rank: int | None, energy: float | None) -> Cut:
    """The best approximation of a rank, or of the rank that keeps a share of the energy."""
    u, s, vh = _singular(dense, rank, energy)
    root = s.double().sqrt()[:, None]
    kept, whole = s.double().square().sum(), dense.double().square().sum()
    lost = (whole - kept).clamp_min(0).sqrt()
    share = (kept / whole).clamp_max(1) if whole > 0 else torch.ones_like(whole)
    lora_a, lora_b = root * vh.double(), root * u.mT.double()
    return Cut(lora_a[None], lora_b[None], [len(s)], whole.sqrt()[None], lost[None], share[None])


def _singular(dense: Tensor, rank: int | None, energy: float | None) -> tuple:
    if rank is not None:
        rank = min(rank, *dense.shape)
    if not dense.any():
        rank = rank or 1
        return dense[:, :rank], dense.new_zeros(rank), dense[:rank]
    for steps in _STEPS:
        options = {"rank": rank, "energy": energy, "power_iterations": steps}
        u, s, vh, *_ = stacked_svd(dense, method="krylov", **options)
        # M v = s u holds by construction; what is left of the other side says how far it is.
        left = (dense.mT @ u - vh.mT * s).norm(dim=0)
        if bool((left <= _CONVERGED * torch.finfo(s.dtype).eps * s[0] * len(s) ** 0.5).all()):
            return u, s, vh
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    if rank is None:
        reached = s.double().square().cumsum(0)
        rank = int((reached < energy * reached[-1]).sum()) + 1
    return u[:, :rank], s[:rank], vh[:rank]
