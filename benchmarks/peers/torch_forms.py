"""mixture_lora in plain torch, in the forms that people write, each as fast as we could make it.

A form is a function of a ``Call`` that prepares what it can and returns ``run(x) -> update``; only
``run`` is timed. So a form gets for nothing whatever depends on the routing and the adapters alone:
sort orders, segment bounds, row indices, weight times scale, per-adapter views, and scratch memory.
A model could share most of that among the layers of one forward; our operator is given none of it.
No form copies the adapters beforehand, and all count on every adapter having the same rank.

Forms that record gradients are built from a ``Call`` whose tensors require them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Run = Callable[[Tensor], Tensor]


class Call(NamedTuple):
    """What a form computes: ``rows`` rows, one mixture for each or (M == 1) one for all.

    Attributes:
        lora_a: ``[K, R, I]``.
        lora_b: ``[K, R, O]``.
        ids: ``[M, J]`` int64, none of them -1.
        factor: ``[M, J]`` float32 (float64 for the truth): weight times scale.
        rows: N.
    """

    lora_a: Tensor
    lora_b: Tensor
    ids: Tensor
    factor: Tensor
    rows: int

    @property
    def shared(self) -> bool:
        """All rows use the one mixture."""
        return self.ids.shape[0] == 1

    @property
    def sum_dtype(self) -> torch.dtype:
        """Sums over adapters are formed in float32 at least."""
        return torch.promote_types(self.lora_a.dtype, torch.float32)


class Pairs(NamedTuple):
    """The N * J uses of an adapter by a row, sorted by adapter."""

    active: list[int]
    counts: list[int]
    order_p: Tensor
    row_p: Tensor
    factor_p1: Tensor


def sorted_pairs(call: Call) -> Pairs:
    flat = call.ids.flatten()
    order_p = flat.argsort(stable=True)
    active, counts = flat.unique(return_counts=True)
    factor_p1 = call.factor.flatten()[order_p][:, None]
    row_p = order_p // call.ids.shape[1]
    return Pairs(active.tolist(), counts.tolist(), order_p, row_p, factor_p1)


def masked_loop(call: Call) -> Run:
    """PEFT's mixed batch: for each active adapter pick its rows, two products, add the result."""
    parts = _parts(call)
    sum_dtype = call.sum_dtype
    size = (call.rows, call.lora_b.shape[-1])

    def run(x: Tensor) -> Tensor:
        y = torch.zeros(size, dtype=sum_dtype)
        for rows, a_ir, b_ro, factor in parts:
            h = ((x if rows is None else x.index_select(0, rows)) @ a_ir) * factor
            if rows is not None:
                y.index_add_(0, rows, (h.to(x.dtype) @ b_ro).to(sum_dtype))
            elif x.dtype == sum_dtype:
                y.addmm_(h, b_ro)
            else:
                y += h.to(x.dtype) @ b_ro
        return y.to(x.dtype)

    return run


def upcast_loop(call: Call, compute: torch.dtype = torch.float32) -> Run:
    """The masked loop that converts each active adapter when it comes to it.

    In low precision it needs no second copy of the adapters; in float64 it is the truth.
    """
    parts = _parts(call)
    size = (call.rows, call.lora_b.shape[-1])

    def run(x: Tensor) -> Tensor:
        y, wide = torch.zeros(size, dtype=compute), x.to(compute)
        for rows, a_ir, b_ro, factor in parts:
            x_ni = wide if rows is None else wide.index_select(0, rows)
            h = (x_ni @ a_ir.to(compute)) * factor.to(compute)
            update = h @ b_ro.to(compute)
            y = y + update if rows is None else y.index_add_(0, rows, update)
        return y

    return run


def gather_bmm(call: Call) -> Run:
    """Copy the factors of each mixture side by side, then two batched products."""
    count, rank, _ = call.lora_a.shape
    mixtures, per_row = call.ids.shape
    flat = call.ids.flatten()
    a_kw, b_kw = call.lora_a.reshape(count, -1), call.lora_b.reshape(count, -1)
    factor_m1r = call.factor.repeat_interleave(rank, dim=1)[:, None]

    def run(x: Tensor) -> Tensor:
        a_mri = a_kw.index_select(0, flat).view(mixtures, per_row * rank, -1)
        b_mro = b_kw.index_select(0, flat).view(mixtures, per_row * rank, -1)
        h = torch.bmm(x.view(mixtures, -1, x.shape[1]), a_mri.mT) * factor_m1r
        return torch.bmm(h.to(x.dtype), b_mro).view(x.shape[0], -1)

    return run


def segments(call: Call) -> Run:
    """Sort the pairs by adapter: one product per side and adapter, rows gathered and added once."""
    if call.factor.requires_grad:
        return _segments_recorded(call)
    pairs, sum_dtype = sorted_pairs(call), call.sum_dtype
    size = (call.rows, call.lora_b.shape[-1])
    x_pi, h_pr, shrink = _shrink_scratch(call, pairs)
    y_po = call.lora_b.new_empty(len(pairs.row_p), size[1])
    h_scaled = torch.empty_like(h_pr)
    lora_b = call.lora_b.unbind(0)
    expand = [
        (h, lora_b[k], y)
        for k, h, y in zip(
            pairs.active, h_scaled.split(pairs.counts), y_po.split(pairs.counts), strict=True
        )
    ]

    def run(x: Tensor) -> Tensor:
        torch.index_select(x, 0, pairs.row_p, out=x_pi)
        for x_seg, a_ir, h_seg in shrink:
            torch.mm(x_seg, a_ir, out=h_seg)
        torch.mul(h_pr, pairs.factor_p1, out=h_scaled)
        for h_seg, b_ro, y_seg in expand:
            torch.mm(h_seg, b_ro, out=y_seg)
        y = torch.zeros(size, dtype=sum_dtype)
        return y.index_add_(0, pairs.row_p, y_po.to(sum_dtype)).to(x.dtype)

    return run


def segments_bag(call: Call) -> Run:
    """Shrink by segments; expand as an embedding bag, which reads lora_b's rows where they are."""
    pairs, (mixtures, per_row), rank = sorted_pairs(call), call.ids.shape, call.lora_a.shape[1]
    x_pi, h_pr, shrink = _shrink_scratch(call, pairs)
    inverse_p = pairs.order_p.argsort()
    lora_b = call.lora_b.reshape(-1, call.lora_b.shape[-1])
    bag_nr = (call.ids[:, :, None] * rank + torch.arange(rank)).view(mixtures, per_row * rank)

    def run(x: Tensor) -> Tensor:
        torch.index_select(x, 0, pairs.row_p, out=x_pi)
        for x_seg, a_ir, h_seg in shrink:
            torch.mm(x_seg, a_ir, out=h_seg)
        h = (h_pr * pairs.factor_p1).to(x.dtype).index_select(0, inverse_p).view(mixtures, -1)
        return F.embedding_bag(bag_nr, lora_b, per_sample_weights=h, mode="sum")

    return run


def dense_active(call: Call) -> Run:
    """One product over all active adapters side by side, masked on the rank axis, and one back.

    Where all rows share one mixture this is the concatenated product that nothing beats. Active
    adapters that lie side by side (all of them, for one) are used in place, others are copied.
    """
    active, position = call.ids.unique(return_inverse=True)
    rank = call.lora_a.shape[1]
    factor_ma = call.factor.new_zeros(call.ids.shape[0], len(active))
    factor_ma1 = factor_ma.scatter_add(1, position, call.factor)[:, :, None]
    first, last = int(active[0]), int(active[-1])
    adjacent = last - first + 1 == len(active)

    def pick(t: Tensor) -> Tensor:
        return (t[first : last + 1] if adjacent else t.index_select(0, active)).flatten(0, 1)

    def run(x: Tensor) -> Tensor:
        h = (x @ pick(call.lora_a).mT).view(x.shape[0], -1, rank) * factor_ma1
        return h.flatten(1).to(x.dtype) @ pick(call.lora_b)

    return run


def row_mv(call: Call) -> Run:
    """Two matrix-vector products per row and adapter; gradients of the weights are not recorded."""
    lora_a = call.lora_a.unbind(0)
    lora_b = call.lora_b.mT.unbind(0)
    per_row = call.rows // call.ids.shape[0]
    ids, factor = (t.repeat_interleave(per_row, 0).tolist() for t in (call.ids, call.factor))
    uses = [
        [(lora_a[k], lora_b[k], f) for k, f in zip(*row, strict=True)]
        for row in zip(ids, factor, strict=True)
    ]
    size = (call.rows, call.lora_b.shape[-1])

    def run(x: Tensor) -> Tensor:
        y = x.new_zeros(size)
        for x_i, y_o, row in zip(x.unbind(0), y.unbind(0), uses, strict=True):
            for a_ri, b_or, f in row:
                y_o.addmv_(b_or, torch.mv(a_ri, x_i), alpha=f)
        return y

    return run


FORMS: dict[str, Callable[[Call], Run]] = {
    f.__name__: f for f in (masked_loop, gather_bmm, segments, segments_bag, dense_active, row_mv)
}
RECORDABLE = ("masked_loop", "gather_bmm", "segments", "dense_active")
# Where all rows share one mixture these are the masked loop again, with needless copies.
PER_ROW_ONLY = ("segments", "segments_bag")


def _parts(call: Call) -> list[tuple[Tensor | None, Tensor, Tensor, Tensor]]:
    # (rows or None for all, A^T [I, R], B^T [R, O], factors) of each active adapter; unbind, not a
    # slice for each adapter, whose gradient would be a zero-filled stack for each.
    lora_a, lora_b = call.lora_a.mT.unbind(0), call.lora_b.unbind(0)
    if call.shared:
        uses = zip(call.ids[0].tolist(), call.factor[0].unbind(0), strict=True)
        return [(None, lora_a[k], lora_b[k], factor) for k, factor in uses]
    pairs = sorted_pairs(call)
    split = (t.split(pairs.counts) for t in (pairs.row_p, pairs.factor_p1))
    return [
        (rows, lora_a[k], lora_b[k], factor)
        for k, rows, factor in zip(pairs.active, *split, strict=True)
    ]


def _shrink_scratch(call: Call, pairs: Pairs) -> tuple[Tensor, Tensor, list]:
    count = len(pairs.row_p)
    x_pi = call.lora_a.new_empty(count, call.lora_a.shape[2])
    h_pr = call.lora_a.new_empty(count, call.lora_a.shape[1])
    lora_a = call.lora_a.mT.unbind(0)
    split = zip(pairs.active, x_pi.split(pairs.counts), h_pr.split(pairs.counts), strict=True)
    return x_pi, h_pr, [(x, lora_a[k], h) for k, x, h in split]


def _segments_recorded(call: Call) -> Run:
    # Autograd takes no out=; the segments' results are concatenated instead.
    pairs, sum_dtype = sorted_pairs(call), call.sum_dtype
    size = (call.rows, call.lora_b.shape[-1])
    lora_a, lora_b = call.lora_a.mT.unbind(0), call.lora_b.unbind(0)
    factors = [(lora_a[k], lora_b[k]) for k in pairs.active]
    factor_segments = pairs.factor_p1.split(pairs.counts)

    def run(x: Tensor) -> Tensor:
        x_segments = x.index_select(0, pairs.row_p).split(pairs.counts)
        parts = zip(x_segments, factors, factor_segments, strict=True)
        y_po = torch.cat(
            [((x @ a_ir) * factor).to(x.dtype) @ b_ro for x, (a_ir, b_ro), factor in parts]
        )
        y = torch.zeros(size, dtype=sum_dtype)
        return y.index_add(0, pairs.row_p, y_po.to(sum_dtype)).to(x.dtype)

    return run
