"""The definition of mixture_lora in plain torch: CPU fallback and oracle of every kernel.

    y[n] = base[n] + sum_j weights[m,j] * scale[k] * lora_b[k]^T (lora_a[k] x[n])
           with m = row_mixture[n // (N // S)], k = adapter_ids[m,j], k = -1 adding nothing

Axes in names: n rows of one group of rows that share a mixture, s groups, j adapters of a mixture,
r rank, i input, o output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    row_start: Tensor | None,
    ranks: Tensor | None,
    adapter_ids: Tensor,
    weights: Tensor,
    scale: Tensor | None,
    row_mixture: Tensor | None,
    base: Tensor | None,
    max_rank: int | None = None,
) -> Tensor:
    """Compute mixture_lora for x [N, I]; arguments as api.mixture_lora has normalised them."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if row_mixture is not None:
        adapter_ids, weights = adapter_ids[row_mixture], weights[row_mixture]
    groups, n_j = adapter_ids.shape
    x_sni = x.to(compute).reshape(groups, x.shape[0] // max(groups, 1), x.shape[1])
    update_sno = x_sni.new_zeros(*x_sni.shape[:2], lora_b.shape[-1])
    stack = Segments(lora_a, lora_b, row_start, ranks, scale, max_rank)
    for j in range(n_j):
        ids_s = stack.sentinel(adapter_ids[:, j])
        a_sri, b_sro, live_sr = stack.gather(ids_s, compute)
        # Masked before the weight is applied: a row without an adapter adds exactly nothing and has
        # a zero gradient even where x is not finite.
        h_snr = torch.where(live_sr[:, None, :], x_sni @ a_sri.mT, 0.0)
        # Without an adapter the weight is not read: it may be NaN.
        weight_s = torch.where(live_sr.any(1), weights[:, j].to(compute), 0.0)
        factor_s = weight_s * stack.scale[ids_s].to(compute)
        update_sno = update_sno + (h_snr * factor_s[:, None, None]) @ b_sro
    update = update_sno.reshape(x.shape[0], lora_b.shape[-1])
    if base is None:
        return update.to(x.dtype)
    return (base.to(compute) + update).to(base.dtype)


def embedding_update(
    tokens: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    row_start: Tensor,
    adapter_ids: Tensor,
    weights: Tensor,
    scale: Tensor,
    row_mixture: Tensor | None,
    base: Tensor,
    max_rank: int,
    padding_idx: int | None = None,
) -> Tensor:
    """As ``forward`` of a packed stack with x the unit vectors of ``tokens`` [N], none formed.

    As in nn.Embedding, tokens equal to padding_idx give lora_a no gradient.
    """
    compute = torch.float64 if base.dtype == torch.float64 else torch.float32
    if row_mixture is not None:
        adapter_ids, weights = adapter_ids[row_mixture], weights[row_mixture]
    groups, n_j = adapter_ids.shape
    tokens_sn = tokens.reshape(groups, tokens.shape[0] // max(groups, 1))
    update_sno = base.new_zeros(*tokens_sn.shape, lora_b.shape[-1], dtype=compute)
    stack = Segments(lora_a, lora_b, row_start, None, scale, max_rank)
    for j in range(n_j):
        ids_s = stack.sentinel(adapter_ids[:, j])
        (row_sr,), live_sr = stack.address(ids_s)
        h_snr = stack.lora_a[row_sr[:, None, :], tokens_sn[..., None]].to(compute)
        if padding_idx is not None:
            h_snr = torch.where((tokens_sn == padding_idx)[..., None], h_snr.detach(), h_snr)
        h_snr = torch.where(live_sr[:, None, :], h_snr, 0.0)
        b_sro = torch.where(live_sr[..., None], stack.lora_b[row_sr].to(compute), 0.0)
        # Without an adapter the weight is not read: it may be NaN.
        weight_s = torch.where(live_sr.any(1), weights[:, j].to(compute), 0.0)
        factor_s = weight_s * stack.scale[ids_s].to(compute)
        update_sno = update_sno + (h_snr * factor_s[:, None, None]) @ b_sro
    return (base.to(compute) + update_sno.reshape(base.shape)).to(base.dtype)


class Segments:
    """Both storage forms under one addressing, with an empty segment K that stands for "none"."""

    def __init__(self, lora_a, lora_b, row_start, ranks, scale, max_rank):
        self.packed = row_start is not None
        if self.packed:
            start, rank = row_start[:-1], row_start.diff()
            self.rows = max_rank if max_rank is not None else lora_a.shape[0]
        else:
            self.rows = lora_a.shape[1]
            start = rank = torch.zeros(lora_a.shape[0], dtype=torch.int32, device=lora_a.device)
            rank = rank + self.rows if ranks is None else ranks
        self.count = start.shape[0]
        if scale is None:
            scale = torch.ones(self.count, dtype=torch.float32, device=lora_a.device)
        self.start, self.rank, self.scale = (F.pad(t, (0, 1)) for t in (start, rank, scale))
        # Gathering needs something to point at, also from an empty stack.
        empty = lora_a.shape[0] == 0 or self.rows == 0
        pad = (0, 0, 0, int(empty)) if self.packed else (0, 0, 0, int(empty), 0, int(empty))
        self.lora_a, self.lora_b = (F.pad(t, pad) if empty else t for t in (lora_a, lora_b))

    def sentinel(self, ids: Tensor) -> Tensor:
        """Ids with "none" (and, on a device, anything out of range) turned into K."""
        return torch.where((ids >= 0) & (ids < self.count), ids, self.count).long()

    def address(self, ids_s: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Where the rank rows of each id lie, as an index of the factors, and which are its own."""
        offset_r = torch.arange(max(self.rows, 1), device=ids_s.device)
        live_sr = offset_r < self.rank[ids_s, None]
        if self.packed:
            index = (torch.where(live_sr, self.start[ids_s, None] + offset_r, 0),)
        else:
            index = (torch.where(ids_s < self.count, ids_s, 0)[:, None], offset_r)
        return index, live_sr

    def gather(self, ids_s: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Factors [s, r, i] and [s, r, o] of each id, zero beyond its rank, and the mask [s, r]."""
        index, live_sr = self.address(ids_s)
        a_sri, b_sro = (
            torch.where(live_sr[..., None], t[index].to(dtype), 0.0)
            for t in (self.lora_a, self.lora_b)
        )
        return a_sri, b_sro, live_sr
