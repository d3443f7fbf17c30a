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

_SPARE = 8  # directions beyond the rank, which speed up its last ones
_SMALL = 128  # sides up to here are decomposed in full
_STEPS = (6, 16)  # power iterations tried; then the whole is decomposed
# ||M^T u - s v|| / s_1 that is good enough: what LAPACK's float32 SVD leaves is some times larger.
_CONVERGED = 4 * torch.finfo(torch.float32).eps


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
    u, s, vh = _singular(dense.double(), rank, energy)
    root = s.sqrt()[:, None]
    kept, whole = s.square().sum(), dense.double().square().sum()
    lost = (whole - kept).clamp_min(0).sqrt()
    share = (kept / whole).clamp_max(1) if whole > 0 else torch.ones_like(whole)
    factors = ((root * vh)[None], (root * u.mT)[None])
    return Cut(*factors, [len(s)], whole.sqrt()[None], lost[None], share[None])


def _singular(dense: Tensor, rank: int | None, energy: float | None) -> tuple:
    """u, s and vh of the leading part of [O, I], float64."""
    if not dense.any():
        rank = rank or 1
        return dense[:, :rank], dense.new_zeros(rank), dense[:rank]
    side = min(dense.shape)
    # The share of the energy that is asked for may need any number of directions.
    few = rank is not None and side > _SMALL and 4 * (rank + _SPARE) < side
    for steps in _STEPS if few else ():
        options = {"rank": rank + _SPARE, "method": "krylov", "power_iterations": steps}
        u, s, vh = _refined(dense, stacked_svd(dense.float(), **options).vh)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
        # M^T u = s v holds by construction; the other side says how far it is.
        left = (dense @ vh.mT - u * s).norm(dim=0)
        if bool((left <= _CONVERGED * s[0]).all()):
            return u, s, vh
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    if rank is None:
        reached = s.square().cumsum(0)
        rank = int((reached < energy * reached[-1]).sum()) + 1
    return u[:, :rank], s[:rank], vh[:rank]


def _refined(dense: Tensor, vh: Tensor) -> tuple:
    """One more power step in float64, without the rounding of those before."""
    q = torch.linalg.qr(dense @ vh.double().mT).Q
    left, s, vh = torch.linalg.svd(q.mT @ dense, full_matrices=False)
    return q @ left, s, vh
