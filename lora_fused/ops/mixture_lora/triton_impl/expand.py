"""y = base + sum over a row's pairs of factor * h * B, each element written once."""

import triton
import triton.language as tl

from lora_fused.ops.mixture_lora.triton_impl.common import (
    _column_tile,
    _dot,
    _factor,
    _load_h,
    _pick,
    _rank_columns,
    _segment,
)

NONE = tl.constexpr(2**31 - 1)  # past every adapter id


@triton.jit
def _finish(acc, base_ptr, y_ptr, row, o, inside, O, stride_n, stride_o, HAS_BASE: tl.constexpr):
    # base + update, formed in float32 and rounded once; base may be y itself.
    if HAS_BASE:
        at = base_ptr + row[:, None] * stride_n + o[None, :] * stride_o
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row[:, None] * O + o[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _mixture_lora_expand_kernel(
    h_ptr, b_ptr, start_ptr, rank_ptr, ids_ptr, weight_ptr, scale_ptr, group_ptr, order_ptr,
    base_ptr, y_ptr,
    N, O, M, J, K, max_rank, slice_size, rows_per_group, slot_rank,
    stride_first, stride_row, stride_col, stride_base_n, stride_base_o,
    PACKED: tl.constexpr, HAS_RANKS: tl.constexpr, HAS_GROUPS: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BASE: tl.constexpr, PDL: tl.constexpr, SLICES: tl.constexpr,
    TERMS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """A tile of rows and of columns: walk the tile's distinct adapters in ascending order.

    What a row does not use is never added to it, so no adapter, NaN or not, reaches another row.
    """
    offset = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    live = offset < N
    row = tl.load(order_ptr + offset, mask=live, other=0).to(tl.int64)
    group = row // rows_per_group
    if HAS_GROUPS:
        group = tl.load(group_ptr + group, mask=live, other=0).to(tl.int64)
    j = tl.arange(0, BLOCK_J)  # [J]
    at = group[:, None] * J + j[None, :]
    there = live & (group >= 0) & (group < M)  # a mixture out of range counts as none
    named = there[:, None] & (j[None, :] < J)
    ids = tl.load(ids_ptr + at, mask=named, other=-1)  # [N, J]
    weight = tl.load(weight_ptr + at, mask=named, other=0.0)
    g, tile = _column_tile(tl.program_id(1), O, BLOCK_O)
    columns = _pick(O, g)
    o = tile * BLOCK_O + tl.arange(0, BLOCK_O).to(tl.int64)  # [O]
    side = _pick(b_ptr, g) + o[None, :] * _pick(stride_col, g)
    acc = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
    k = tl.min(tl.min(tl.where(ids >= 0, ids, NONE), 1), 0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    while k < K:
        match = ids == k
        mine = tl.max(match.to(tl.int32), 1) > 0  # [N]
        factor = tl.sum(tl.where(match, weight, 0.0), 1)  # [N]: an adapter named twice adds up
        if HAS_SCALE:
            factor *= tl.load(_pick(scale_ptr, g) + k)
        pair = row * J + tl.min(tl.where(match, j[None, :], BLOCK_J), 1)  # [N]
        start, rank = _segment(
            k, k < K, g, start_ptr, rank_ptr, slot_rank, max_rank, PACKED, HAS_RANKS
        )
        part = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
        for r0 in tl.range(0, rank, BLOCK_R, num_stages=2):
            r = r0 + tl.arange(0, BLOCK_R)  # [R]
            slot = mine[:, None] & (r[None, :] < max_rank)
            h_at = pair[:, None] * max_rank + r[None, :]
            used = mine[:, None] & (r[None, :] < rank)
            h = _load_h(_pick(h_ptr, g), h_at, slot, used, slice_size, SLICES)
            b = tl.load(
                side
                + start * _pick(stride_first, g)
                + r[:, None].to(tl.int64) * _pick(stride_row, g),
                mask=(r[:, None] < rank) & (o[None, :] < columns),
                other=0.0,
            )  # [R, O]
            part = _dot(h * factor[:, None], b, part, TERMS, PRECISION)
        acc = tl.where(mine[:, None], acc + part, acc)
        k = tl.min(tl.min(tl.where(ids > k, ids, NONE), 1), 0)
    inside = live[:, None] & (o[None, :] < columns)
    _finish(
        acc, _pick(base_ptr, g), _pick(y_ptr, g), row, o, inside, columns,
        _pick(stride_base_n, g), _pick(stride_base_o, g), HAS_BASE,
    )  # fmt: skip


@triton.jit
def _shared_h(
    chunk, g, m, row, mine, h_ptr, start_ptr, rank_ptr, ids_ptr, weight_ptr, scale_ptr,
    M, J, K, max_rank, slice_size, slot_rank, stride_first, stride_row,
    PACKED: tl.constexpr, HAS_RANKS: tl.constexpr, HAS_SCALE: tl.constexpr,
    SLICES: tl.constexpr, RANK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # A chunk of the mixture's rank columns: weighted h [N, C], offsets of B's rows, live [C].
    c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)  # [C]
    j, k, r, known = _rank_columns(c, m, ids_ptr, M, J, K, RANK)
    start, rank = _segment(k, known, g, start_ptr, rank_ptr, slot_rank, max_rank, PACKED, HAS_RANKS)
    live = known & (r < rank)
    factor = _factor(m, j, k, live, weight_ptr, _pick(scale_ptr, g), J, HAS_SCALE)
    slot = mine[:, None] & (j < J)[None, :] & (r < max_rank)[None, :]
    at = (row[:, None] * J + j[None, :]) * max_rank + r[None, :]
    h = _load_h(_pick(h_ptr, g), at, slot, mine[:, None] & live[None, :], slice_size, SLICES)
    b_row = start * _pick(stride_first, g) + r.to(tl.int64) * _pick(stride_row, g)
    return h * factor[None, :], b_row, live


@triton.jit
def _mixture_lora_expand_shared_kernel(
    h_ptr, b_ptr, start_ptr, rank_ptr, ids_ptr, weight_ptr, scale_ptr,
    order_ptr, key_ptr, block_ptr, base_ptr, y_ptr,
    N, O, M, J, K, max_rank, slice_size, slot_rank,
    stride_first, stride_row, stride_col, stride_base_n, stride_base_o,
    PACKED: tl.constexpr, HAS_RANKS: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_BASE: tl.constexpr, PDL: tl.constexpr, SLICES: tl.constexpr, TERMS: tl.constexpr,
    PRECISION: tl.constexpr, RANK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_O: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A block of rows with one mixture times SPAN columns, BLOCK_O at a time.

    The mixture's adapters stand side by side as in shrink, so one product sums over all of them,
    and the block's h is read once for the whole span.
    """
    begin = tl.load(block_ptr + tl.program_id(0))
    if begin < N:
        key = tl.load(key_ptr + begin)
        offset = begin + tl.arange(0, BLOCK_N)  # [N]
        mine = tl.load(key_ptr + offset, mask=offset < N, other=-2) == key  # as in shrink
        row = tl.load(order_ptr + offset, mask=mine, other=0).to(tl.int64)
        m = key.to(tl.int64)
        g, span = _column_tile(tl.program_id(1), O, SPAN)
        columns = _pick(O, g)
        if PDL:
            tl.extra.cuda.gdc_wait()
        first_h, first_row, first_live = _shared_h(
            0, g, m, row, mine, h_ptr, start_ptr, rank_ptr, ids_ptr, weight_ptr, scale_ptr,
            M, J, K, max_rank, slice_size, slot_rank, stride_first, stride_row,
            PACKED, HAS_RANKS, HAS_SCALE, SLICES, RANK, BLOCK_C,
        )  # fmt: skip
        last = tl.minimum(span * SPAN + SPAN, columns)
        for o0 in range(span * SPAN, last, BLOCK_O):
            o = o0 + tl.arange(0, BLOCK_O).to(tl.int64)  # [O]
            acc = tl.zeros((BLOCK_N, BLOCK_O), dtype=tl.float32)
            for chunk in tl.range(CHUNKS, num_stages=1):  # more would hold several h at once
                if CHUNKS == 1:
                    h, b_row, live = first_h, first_row, first_live
                else:
                    h, b_row, live = _shared_h(
                        chunk, g, m, row, mine, h_ptr, start_ptr, rank_ptr, ids_ptr, weight_ptr,
                        scale_ptr, M, J, K, max_rank, slice_size, slot_rank, stride_first,
                        stride_row, PACKED, HAS_RANKS, HAS_SCALE, SLICES, RANK, BLOCK_C,
                    )  # fmt: skip
                b = tl.load(
                    _pick(b_ptr, g) + b_row[:, None] + o[None, :] * _pick(stride_col, g),
                    mask=live[:, None] & (o[None, :] < columns),
                    other=0.0,
                )  # [C, O]
                acc = _dot(h, b, acc, TERMS, PRECISION)
            inside = mine[:, None] & (o[None, :] < columns)
            _finish(
                acc, _pick(base_ptr, g), _pick(y_ptr, g), row, o, inside, columns,
                _pick(stride_base_n, g), _pick(stride_base_o, g), HAS_BASE,
            )  # fmt: skip
