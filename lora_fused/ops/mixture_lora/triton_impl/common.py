"""What mixture_lora's Triton kernels share: where an adapter lies, and an exact enough product.

A call may serve several projections of one input. What differs between them comes as a tuple with
one entry each, and ``_pick`` selects by program; with one projection it costs nothing.
"""

import triton
import triton.language as tl

from lora_fused.ops.triton_impl import cut_dot


@triton.jit
def _pick(values, g):
    # values[g], for a g known only to the program; None where none has any.
    picked = values[0]
    for i in tl.static_range(1, len(values)):
        if picked is not None:
            picked = tl.where(g == i, values[i], picked)
    return picked


@triton.jit
def _column_tile(tile, sizes, BLOCK_O: tl.constexpr):
    # The projection of a column tile, and its number there; projections lie one after another.
    g = 0
    first = 0
    total = 0
    for i in tl.static_range(1, len(sizes)):
        total += tl.cdiv(sizes[i - 1], BLOCK_O)
        g = tl.where(tile >= total, i, g)
        first = tl.where(tile >= total, total, first)
    return g, tile - first


@triton.jit
def _segment(
    k, known, g, start_ptr, rank_ptr, slot_rank, max_rank,
    PACKED: tl.constexpr, HAS_RANKS: tl.constexpr,
):  # fmt: skip
    # Where adapter k of projection g begins, in units of its stack's first stride, and its rank;
    # known masks k.
    # No rank is above max_rank, whatever is stored: h has no room, and the next pair's lies there.
    if PACKED:
        start = _pick(start_ptr, g) + k
        first = tl.load(start, mask=known, other=0)
        rank = tl.load(start + 1, mask=known, other=0) - first
        return first.to(tl.int64), tl.minimum(rank, max_rank)
    if HAS_RANKS:
        rank = tl.load(_pick(rank_ptr, g) + k, mask=known, other=0)
        return k.to(tl.int64), tl.minimum(rank, max_rank)
    return k.to(tl.int64), tl.where(known, _pick(slot_rank, g), 0)


@triton.jit
def _rank_columns(c, m, ids_ptr, M, J, K, RANK: tl.constexpr):
    # Column c of a mixture's adapters side by side, RANK columns each: (j, adapter, r, known).
    # A mixture out of range counts as none, so that nothing is read past the ids.
    j = c // RANK
    k = tl.load(ids_ptr + m * J + j, mask=j < tl.where((m >= 0) & (m < M), J, 0), other=-1)
    return j, k, c % RANK, (k >= 0) & (k < K)


@triton.jit
def _factor(m, j, k, known, weight_ptr, scale_ptr, J, HAS_SCALE: tl.constexpr):
    # weights[m, j] * scale[k]; zero where there is no adapter.
    factor = tl.load(weight_ptr + m * J + j, mask=known, other=0.0)
    if HAS_SCALE:
        factor *= tl.load(scale_ptr + k, mask=known, other=0.0)
    return factor


@triton.jit
def _load_h(h_ptr, at, readable, live, slice_size, SLICES: tl.constexpr):
    # The slices of h at offsets ``at`` (int64) added in order, zero where not live. All of a slot
    # is read, for a mask by a loaded rank would keep loads from being 16 bytes wide.
    h = tl.load(h_ptr + at, mask=readable, other=0.0)
    for _ in tl.static_range(1, SLICES):
        at += slice_size
        h += tl.load(h_ptr + at, mask=readable, other=0.0)
    return tl.where(live, h, 0.0)


@triton.jit
def _dot(h, b, acc, TERMS: tl.constexpr, PRECISION: tl.constexpr):
    # h [M, R] float32 times b [R, C] as stored: cut into TERMS where b is bfloat16.
    if TERMS == 0:
        acc = tl.dot(h, b.to(tl.float32), acc, input_precision=PRECISION)
    else:
        acc = cut_dot(h, b, acc, TERMS)
    return acc
