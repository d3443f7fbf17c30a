"""The rank-wide intermediate h = A x of each pair (row, j), in slices of the columns."""

import triton
import triton.language as tl

from lora_fused.ops.mixture_lora.triton_impl.common import _pick, _rank_columns, _segment


@triton.jit
def _mixture_lora_shrink_kernel(
    x_ptr, a_ptr, start_ptr, rank_ptr, ids_ptr, order_ptr, key_ptr, block_ptr, h_ptr,
    I, M, J, K, units, pairs, max_rank, slice_columns, slot_rank,
    stride_xn, stride_xi, stride_first, stride_row, stride_col,
    PACKED: tl.constexpr, HAS_RANKS: tl.constexpr, SHARED: tl.constexpr, PDL: tl.constexpr,
    PRECISION: tl.constexpr, RANK: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """A block of units with one key times a chunk of its rank columns, over a slice of x.

    A unit is a pair and its key the adapter; SHARED: a unit is a row and its key the mixture,
    whose J adapters stand side by side, RANK columns each, so that x is read once for all of them.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    begin = tl.load(block_ptr + tl.program_id(0))
    if begin < units:
        g = tl.program_id(1) // CHUNKS
        key = tl.load(key_ptr + begin)
        offset = begin + tl.arange(0, BLOCK_U)  # [U]
        # Past the end no key: -1 is one, that of rows with a mixture out of range.
        mine = tl.load(key_ptr + offset, mask=offset < units, other=-2) == key
        unit = tl.load(order_ptr + offset, mask=mine, other=0).to(tl.int64)
        c = tl.program_id(1) % CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)  # [C]
        if SHARED:
            j, k, r, known = _rank_columns(c, key.to(tl.int64), ids_ptr, M, J, K, RANK)
            row = unit
            pair = unit[:, None] * J + j[None, :]  # [U, C]
        else:
            k, r = tl.zeros((BLOCK_C,), tl.int32) + key, c
            known = k < K  # out of range on a device counts as none
            row = unit // J
            pair = unit[:, None]
        start, rank = _segment(
            k, known, g, start_ptr, rank_ptr, slot_rank, max_rank, PACKED, HAS_RANKS
        )
        live = known & (r < rank)
        if tl.max(live.to(tl.int32), 0) > 0:
            first = tl.program_id(2) * slice_columns
            last = tl.minimum(first + slice_columns, I)
            x_row = x_ptr + row * stride_xn
            a_row = (
                _pick(a_ptr, g)
                + start * _pick(stride_first, g)
                + r.to(tl.int64) * _pick(stride_row, g)
            )
            acc = tl.zeros((BLOCK_U, BLOCK_C), dtype=tl.float32)
            for i0 in range(first, last, BLOCK_I):
                i = i0 + tl.arange(0, BLOCK_I).to(tl.int64)  # [I]
                x = tl.load(
                    x_row[:, None] + i[None, :] * stride_xi,
                    mask=mine[:, None] & (i[None, :] < last),
                    other=0.0,
                )  # [U, I]
                a = tl.load(
                    a_row[None, :] + i[:, None] * _pick(stride_col, g),
                    mask=live[None, :] & (i[:, None] < last),
                    other=0.0,
                )  # [I, C]
                if x.dtype != a.dtype:
                    x, a = x.to(tl.float32), a.to(tl.float32)
                acc = tl.dot(x, a, acc, input_precision=PRECISION)
            at = (tl.program_id(2).to(tl.int64) * pairs + pair) * max_rank + r[None, :]
            tl.store(_pick(h_ptr, g) + at, acc, mask=mine[:, None] & live[None, :])
