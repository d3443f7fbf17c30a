"""Both products in one launch, for few rows and few ranks: h never leaves the program."""

import triton
import triton.language as tl

from lora_fused.ops.mixture_lora.triton_impl.common import (
    _column_tile,
    _factor,
    _pick,
    _rank_columns,
    _segment,
)


@triton.jit
def _mixture_lora_decode_kernel(
    x_ptr, a_ptr, b_ptr, start_ptr, rank_ptr, ids_ptr, weight_ptr, scale_ptr, group_ptr,
    base_ptr, y_ptr,
    I, O, M, J, K, max_rank, rows_per_group, slot_rank, stride_xn, stride_xi,
    stride_a_first, stride_a_row, stride_a_col, stride_b_first, stride_b_row, stride_b_col,
    stride_base_n, stride_base_o,
    PACKED: tl.constexpr, HAS_RANKS: tl.constexpr, HAS_GROUPS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BASE: tl.constexpr, RANK: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One row times SPAN columns. Each span of a row computes its h anew: A is read from L2."""
    row = tl.program_id(0).to(tl.int64)
    m = row // rows_per_group
    if HAS_GROUPS:
        m = tl.load(group_ptr + m).to(tl.int64)
    g, span = _column_tile(tl.program_id(1), O, SPAN)
    columns = _pick(O, g)
    c = tl.arange(0, BLOCK_C)  # [C]
    j, k, r, known = _rank_columns(c, m, ids_ptr, M, J, K, RANK)
    start, rank = _segment(k, known, g, start_ptr, rank_ptr, slot_rank, max_rank, PACKED, HAS_RANKS)
    live = known & (r < rank)
    r = r.to(tl.int64)
    a_row = _pick(a_ptr, g) + start * _pick(stride_a_first, g) + r * _pick(stride_a_row, g)
    acc = tl.zeros((BLOCK_C, BLOCK_I), dtype=tl.float32)
    for i0 in range(0, I, BLOCK_I):
        i = i0 + tl.arange(0, BLOCK_I).to(tl.int64)  # [I]
        x = tl.load(x_ptr + row * stride_xn + i * stride_xi, mask=i < I, other=0.0)
        inside = live[:, None] & (i[None, :] < I)
        a = tl.load(a_row[:, None] + i[None, :] * _pick(stride_a_col, g), mask=inside, other=0.0)
        # Selected, not masked by zeros: what a row does not use must not meet its infinities.
        acc += tl.where(inside, a.to(tl.float32) * x.to(tl.float32)[None, :], 0.0)
    factor = _factor(m, j, k, live, weight_ptr, _pick(scale_ptr, g), J, HAS_SCALE)
    h = tl.sum(acc, 1) * factor  # [C]
    b_row = _pick(b_ptr, g) + start * _pick(stride_b_first, g) + r * _pick(stride_b_row, g)
    last = tl.minimum(span * SPAN + SPAN, columns)
    for o0 in range(span * SPAN, last, BLOCK_O):
        o = o0 + tl.arange(0, BLOCK_O).to(tl.int64)  # [O]
        inside = live[:, None] & (o[None, :] < columns)
        b = tl.load(b_row[:, None] + o[None, :] * _pick(stride_b_col, g), mask=inside, other=0.0)
        y = tl.sum(tl.where(inside, b.to(tl.float32) * h[:, None], 0.0), 0)  # [O]
        if HAS_BASE:
            base_at = row * _pick(stride_base_n, g) + o * _pick(stride_base_o, g)
            y += tl.load(_pick(base_ptr, g) + base_at, mask=o < columns, other=0.0).to(tl.float32)
        to = _pick(y_ptr, g) + row * columns + o
        tl.store(to, y.to(to.dtype.element_ty), mask=o < columns)
