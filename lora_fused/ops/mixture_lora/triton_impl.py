"""mixture_lora in Triton: two launches forward, from the same kernels and one more backward.

Shrink: one program takes up to 16 pairs (row, j) of one adapter and a slice of the columns; the
slices' partial products stay apart and are added in order by whoever reads them.
Expand: one program takes a tile of rows and of columns, walks the distinct adapters of the tile in
ascending order, weights the rank-wide float32 intermediate, and writes each element once. What a
row does not use is never added to it, so no adapter, NaN or not, reaches another row.
Outer: one program takes ranks of one adapter and a tile of columns and sums over its pairs.
No atomics, no reads by the host; tiles and slices depend on shapes, never on values.
"""

import dataclasses
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fused.backends import INTERPRETING
from lora_fused.ops.mixture_lora.plan import BLOCK_PAIRS, MixturePlan

NONE = tl.constexpr(2**31 - 1)  # past every adapter id
SLICE = 1024  # columns of one shrink program: 4 slices at 4096 make up for few adapters


@triton.jit
def _segment(k, start_ptr, rank_ptr, slot_rank, PACKED: tl.constexpr, HAS_RANKS: tl.constexpr):
    # Where adapter k begins, in units of the stack's first stride, and its rank.
    if PACKED:
        first = tl.load(start_ptr + k)
        return first.to(tl.int64), tl.load(start_ptr + k + 1) - first
    if HAS_RANKS:
        return k.to(tl.int64), tl.load(rank_ptr + k)
    return k.to(tl.int64), slot_rank


@triton.jit
def _mixture_lora_shrink_kernel(
    x_ptr, a_ptr, start_ptr, rank_ptr, order_ptr, adapter_ptr, block_ptr, h_ptr,
    I, J, K, pairs, max_rank, slice_columns,
    stride_xn, stride_xi, stride_first, stride_row, stride_col,
    PACKED: tl.constexpr, HAS_RANKS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    begin = tl.load(block_ptr + tl.program_id(0))
    if begin < pairs:
        k = tl.load(adapter_ptr + begin)
        if k < K:  # out of range on a device counts as none
            start, rank = _segment(k, start_ptr, rank_ptr, max_rank, PACKED, HAS_RANKS)
            if tl.program_id(1) * BLOCK_R < rank:
                offset = begin + tl.arange(0, BLOCK_P)  # [P]
                mine = tl.load(adapter_ptr + offset, mask=offset < pairs, other=-1) == k
                pair = tl.load(order_ptr + offset, mask=mine, other=0).to(tl.int64)
                r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)  # [R]
                first = tl.program_id(2) * slice_columns
                last = tl.minimum(first + slice_columns, I)
                x_row = x_ptr + (pair // J) * stride_xn
                a_row = a_ptr + start * stride_first + r.to(tl.int64) * stride_row
                acc = tl.zeros((BLOCK_P, BLOCK_R), dtype=tl.float32)
                for i0 in range(first, last, BLOCK_I):
                    i = i0 + tl.arange(0, BLOCK_I).to(tl.int64)  # [I]
                    x = tl.load(
                        x_row[:, None] + i[None, :] * stride_xi,
                        mask=mine[:, None] & (i[None, :] < last),
                        other=0.0,
                    )  # [P, I]
                    a = tl.load(
                        a_row[None, :] + i[:, None] * stride_col,
                        mask=(r[None, :] < rank) & (i[:, None] < last),
                        other=0.0,
                    )  # [I, R]
                    if x.dtype != a.dtype:
                        x, a = x.to(tl.float32), a.to(tl.float32)
                    acc = tl.dot(x, a, acc, input_precision=PRECISION)
                slot = tl.program_id(2).to(tl.int64) * pairs + pair
                tl.store(
                    h_ptr + slot[:, None] * max_rank + r[None, :], acc,
                    mask=mine[:, None] & (r[None, :] < rank),
                )  # fmt: skip


@triton.jit
def _load_h(h_ptr, pair, mine, r, rank, pairs, max_rank, SLICES: tl.constexpr):
    # The slices of h[pair, r] added in order, zero where a row has no such pair: [N, R].
    h = tl.zeros((pair.shape[0], r.shape[0]), dtype=tl.float32)
    for part in tl.static_range(SLICES):
        slot = pair + pairs.to(tl.int64) * part
        at = slot[:, None] * max_rank + r[None, :]
        h += tl.load(h_ptr + at, mask=mine[:, None] & (r[None, :] < rank), other=0.0)
    return h


@triton.jit
def _mixture_lora_expand_kernel(
    h_ptr, b_ptr, start_ptr, rank_ptr, ids_ptr, weight_ptr, scale_ptr, group_ptr, order_ptr,
    base_ptr, y_ptr,
    N, O, J, K, pairs, max_rank, rows_per_group,
    stride_first, stride_row, stride_col, stride_base_n, stride_base_o,
    PACKED: tl.constexpr, HAS_RANKS: tl.constexpr, HAS_GROUPS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BASE: tl.constexpr, SLICES: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    offset = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    live = offset < N
    row = tl.load(order_ptr + offset, mask=live, other=0).to(tl.int64)
    group = row // rows_per_group
    if HAS_GROUPS:
        group = tl.load(group_ptr + group).to(tl.int64)
    j = tl.arange(0, BLOCK_J)  # [J]
    at = group[:, None] * J + j[None, :]
    named = live[:, None] & (j[None, :] < J)
    ids = tl.load(ids_ptr + at, mask=named, other=-1)  # [N, J]
    weight = tl.load(weight_ptr + at, mask=named, other=0.0)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O).to(tl.int64)  # [O]
    acc = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
    k = tl.min(tl.min(tl.where(ids >= 0, ids, NONE), 1), 0)
    while k < K:
        match = ids == k
        mine = tl.max(match.to(tl.int32), 1) > 0  # [N]
        factor = tl.sum(tl.where(match, weight, 0.0), 1)  # [N]: an adapter named twice adds up
        if HAS_SCALE:
            factor *= tl.load(scale_ptr + k)
        pair = row * J + tl.min(tl.where(match, j[None, :], BLOCK_J), 1)  # [N]
        start, rank = _segment(k, start_ptr, rank_ptr, max_rank, PACKED, HAS_RANKS)
        part = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
        for r0 in range(0, rank, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)  # [R]
            h = _load_h(h_ptr, pair, mine, r, rank, pairs, max_rank, SLICES)
            b = tl.load(
                b_ptr
                + start * stride_first
                + r[:, None].to(tl.int64) * stride_row
                + o[None, :] * stride_col,
                mask=(r[:, None] < rank) & (o[None, :] < O),
                other=0.0,
            )  # [R, O]
            factored = h * factor[:, None]
            part = tl.dot(factored, b.to(tl.float32), part, input_precision=PRECISION)
        acc = tl.where(mine[:, None], acc + part, acc)
        k = tl.min(tl.min(tl.where(ids > k, ids, NONE), 1), 0)
    inside = live[:, None] & (o[None, :] < O)
    if HAS_BASE:
        at_base = base_ptr + row[:, None] * stride_base_n + o[None, :] * stride_base_o
        acc += tl.load(at_base, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row[:, None] * O + o[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _mixture_lora_outer_kernel(
    h_ptr, x_ptr, start_ptr, rank_ptr, factor_ptr, order_ptr, run_ptr, out_ptr,
    C, J, pairs, max_rank, stride_xn, stride_xc,
    PACKED: tl.constexpr, HAS_RANKS: tl.constexpr, SLICES: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0)
    start, rank = _segment(k, start_ptr, rank_ptr, max_rank, PACKED, HAS_RANKS)
    if tl.program_id(1) * BLOCK_R < rank:
        r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)  # [R]
        c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)  # [C]
        acc = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
        end = tl.load(run_ptr + k + 1)
        for p0 in range(tl.load(run_ptr + k), end, BLOCK_P):
            offset = p0 + tl.arange(0, BLOCK_P)  # [P]
            mine = offset < end
            pair = tl.load(order_ptr + offset, mask=mine, other=0).to(tl.int64)
            factor = tl.load(factor_ptr + pair, mask=mine, other=0.0)
            h = _load_h(h_ptr, pair, mine, r, rank, pairs, max_rank, SLICES) * factor[:, None]
            at = x_ptr + (pair // J)[:, None] * stride_xn + c[None, :] * stride_xc
            x = tl.load(at, mask=mine[:, None] & (c[None, :] < C), other=0.0)  # [P, C]
            acc = tl.dot(tl.trans(h), x.to(tl.float32), acc, input_precision=PRECISION)
        first = start if PACKED else start * max_rank
        to = out_ptr + (first + r[:, None]) * C + c[None, :]
        inside = (r[:, None] < rank) & (c[None, :] < C)
        tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _mixture_lora_sum_kernel(value_ptr, order_ptr, run_ptr, out_ptr, BLOCK_P: tl.constexpr):
    k = tl.program_id(0)
    end = tl.load(run_ptr + k + 1)
    acc = tl.zeros((BLOCK_P,), dtype=tl.float64)
    for p0 in range(tl.load(run_ptr + k), end, BLOCK_P):
        offset = p0 + tl.arange(0, BLOCK_P)  # [P]
        pair = tl.load(order_ptr + offset, mask=offset < end, other=0)
        acc += tl.load(value_ptr + pair, mask=offset < end, other=0.0)
    tl.store(out_ptr + k, tl.sum(acc, 0).to(tl.float32))


def _precision() -> str:
    """How float32 operands are multiplied: on NVIDIA, three TF32 products keep the digits."""
    if INTERPRETING or triton.runtime.driver.active.get_current_target().backend != "cuda":
        return "ieee"
    return "tf32x3"


@dataclasses.dataclass
class _Call:
    """What the three launches share."""

    row_start: Tensor | None
    ranks: Tensor | None
    adapter_ids: Tensor
    weights: Tensor
    scale: Tensor | None
    row_mixture: Tensor | None
    plan: MixturePlan
    max_rank: int
    rows: int
    count: int

    @property
    def pairs(self) -> int:
        return self.rows * self.adapter_ids.shape[1]

    @property
    def groups(self) -> int:
        return (self.adapter_ids if self.row_mixture is None else self.row_mixture).shape[0]

    @property
    def empty(self) -> bool:
        return 0 in (self.pairs, self.count, self.max_rank)

    @property
    def rank_block(self) -> int:
        return min(64, max(16, triton.next_power_of_2(self.max_rank)))

    @property
    def form(self) -> dict:
        return {"PACKED": self.row_start is not None, "HAS_RANKS": self.ranks is not None}

    def shrink(self, x: Tensor, side: Tensor) -> Tensor:
        """h [slices, pairs, max_rank] of x [N, C] and one side of the stack."""
        columns = x.shape[1]
        slices = max(1, triton.cdiv(columns, SLICE))
        # Zero where a pair has no such rank: backward sums over what lies there.
        h = torch.zeros(slices, self.pairs, self.max_rank, dtype=torch.float32, device=x.device)
        if self.empty:
            return h
        blocks = min(self.pairs, triton.cdiv(self.pairs, BLOCK_PAIRS) + min(self.count, self.pairs))
        grid = (blocks, triton.cdiv(self.max_rank, self.rank_block), slices)
        _mixture_lora_shrink_kernel[grid](
            x, side, self.row_start, self.ranks,
            self.plan.pair_order, self.plan.pair_adapter, self.plan.block_start, h,
            columns, self.adapter_ids.shape[1], self.count, self.pairs, self.max_rank,
            SLICE, *x.stride(), side.stride(0), *side.stride()[-2:],
            **self.form, PRECISION=_precision(),
            BLOCK_P=BLOCK_PAIRS, BLOCK_R=self.rank_block,
            BLOCK_I=256 // max(x.element_size(), side.element_size()),
        )  # fmt: skip
        return h

    def expand(self, h: Tensor, side: Tensor, y: Tensor, base: Tensor | None) -> Tensor:
        """Write base + sum of factor * h * side into y [N, C]."""
        rows, columns = y.shape
        if 0 in (rows, columns):
            return y
        per_row = self.adapter_ids.shape[1]
        tile = 16 if rows <= 256 else 64
        _mixture_lora_expand_kernel[(triton.cdiv(rows, tile), triton.cdiv(columns, 64))](
            h, side, self.row_start, self.ranks, self.adapter_ids, self.weights, self.scale,
            self.row_mixture, self.plan.row_order, base, y,
            rows, columns, per_row, 0 if self.empty else self.count, self.pairs, self.max_rank,
            rows // self.groups, side.stride(0), *side.stride()[-2:],
            *((0, 0) if base is None else base.stride()),
            **self.form, HAS_GROUPS=self.row_mixture is not None,
            HAS_SCALE=self.scale is not None, HAS_BASE=base is not None, SLICES=h.shape[0],
            PRECISION=_precision(), BLOCK_N=tile, BLOCK_J=triton.next_power_of_2(max(per_row, 1)),
            BLOCK_R=min(32, self.rank_block), BLOCK_O=64,
        )  # fmt: skip
        return y

    def outer(self, h: Tensor, x: Tensor, factor: Tensor, runs: Tensor, like: Tensor) -> Tensor:
        """Gradient of one side: per adapter, sum over its pairs of factor * h (x) x."""
        out = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        columns = x.shape[1]
        if self.empty or columns == 0:
            return out
        ranks = triton.cdiv(self.max_rank, self.rank_block)
        _mixture_lora_outer_kernel[(self.count, ranks, triton.cdiv(columns, 64))](
            h, x, self.row_start, self.ranks, factor, self.plan.pair_order, runs, out,
            columns, self.adapter_ids.shape[1], self.pairs, self.max_rank, *x.stride(),
            **self.form, SLICES=h.shape[0], PRECISION=_precision(),
            BLOCK_P=BLOCK_PAIRS, BLOCK_R=self.rank_block, BLOCK_C=64,
        )  # fmt: skip
        return out

    def sum_runs(self, values: Tensor, runs: Tensor) -> Tensor:
        """Sum of the pairs' values [N * J] per adapter, in the plan's order: [K]."""
        out = torch.zeros(self.count, dtype=torch.float32, device=values.device)
        if not self.empty:
            _mixture_lora_sum_kernel[(self.count,)](
                values, self.plan.pair_order, runs, out, BLOCK_P=128
            )
        return out


def _call(x, lora_a, row_start, ranks, adapter_ids, weights, scale, row_mixture, plan, max_rank):
    count = row_start.shape[0] - 1 if row_start is not None else lora_a.shape[0]
    tensors = (row_start, ranks, adapter_ids, weights, scale, row_mixture)
    tensors = (None if t is None else t.contiguous() for t in tensors)
    plan = MixturePlan(*plan)
    return _Call(*tensors, plan=plan, max_rank=max_rank, rows=x.shape[0], count=count)


def forward(
    x, lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture, base,
    plan: Sequence[Tensor], max_rank: int,
) -> Tensor:  # fmt: skip
    """base + update for x [N, I]; arguments as api.mixture_lora has normalised them."""
    call = _call(
        x, lora_a, row_start, ranks, adapter_ids, weights, scale, row_mixture, plan, max_rank
    )
    y = x.new_empty(x.shape[0], lora_b.shape[-1], dtype=x.dtype if base is None else base.dtype)
    return call.expand(call.shrink(x, lora_a), lora_b, y, base)


def backward(
    grad, x, lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture,
    needs: int, plan: Sequence[Tensor], max_rank: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, lora_a, lora_b, weights, scale where ``needs`` has their bit, else empty."""
    call = _call(
        x, lora_a, row_start, ranks, adapter_ids, weights, scale, row_mixture, plan, max_rank
    )
    need_x, need_a, need_b, need_weights, need_scale = (needs >> i & 1 for i in range(5))
    h, q = call.shrink(x, lora_a), call.shrink(grad, lora_b)
    mixture = torch.arange(call.groups, device=x.device) if row_mixture is None else row_mixture
    ids_sj, weights_sj = call.adapter_ids[mixture], call.weights[mixture]
    in_range = (ids_sj >= 0) & (ids_sj < call.count)
    known = torch.where(in_range, ids_sj, 0).long()
    scale_sj = in_range.float() if scale is None else torch.where(in_range, scale[known], 0.0)
    of_rows = (call.groups, x.shape[0] // max(call.groups, 1), adapter_ids.shape[1])
    ids_k = torch.arange(call.count + 1, device=x.device, dtype=torch.int32)
    runs = torch.searchsorted(call.plan.pair_adapter, ids_k).int()
    out = [t.new_empty(0) for t in (x, lora_a, lora_b, weights, weights)]
    if need_x:  # the update's transpose is the same op with the factors exchanged
        out[0] = call.expand(q, lora_a, x.new_empty(x.shape), None)
    if need_a or need_b:
        factor = (weights_sj * scale_sj)[:, None].expand(of_rows).reshape(-1)
    if need_a:
        out[1] = call.outer(q, x, factor, runs, lora_a)
    if need_b:
        out[2] = call.outer(h, grad, factor, runs, lora_b)
    if need_weights or need_scale:
        # <A x, B grad> of each pair; few sums over many terms, so in float64.
        dot = (h.sum(0).double() * q.sum(0).double()).sum(-1).reshape(of_rows)
    if need_weights:
        one_hot = torch.arange(adapter_ids.shape[0], device=x.device)[:, None] == mixture
        out[3] = (one_hot.double() @ (dot.sum(1) * scale_sj)).float()
    if need_scale:
        out[4] = call.sum_runs((dot * weights_sj[:, None]).reshape(-1), runs)
    return tuple(out)
