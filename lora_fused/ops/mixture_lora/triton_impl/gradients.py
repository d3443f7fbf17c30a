"""What backward needs beside shrink and expand: sums over the pairs of one adapter."""

import triton
import triton.language as tl

from lora_fused.ops.mixture_lora.triton_impl.common import _load_h, _segment


@triton.jit
def _mixture_lora_outer_kernel(
    h_ptr, x_ptr, start_ptr, rank_ptr, factor_ptr, order_ptr, run_ptr, out_ptr,
    C, J, max_rank, slice_size, slot_rank, stride_xn, stride_xc,
    PACKED: tl.constexpr, HAS_RANKS: tl.constexpr, SLICES: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Ranks of one adapter times a tile of columns: the sum over pairs of factor * h (x) x."""
    k = tl.program_id(0)
    start, rank = _segment(
        k, k >= 0, 0, start_ptr, rank_ptr, slot_rank, max_rank, PACKED, HAS_RANKS
    )
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
            used = mine[:, None] & (r[None, :] < rank)
            h_at = pair[:, None] * max_rank + r[None, :]
            h = _load_h(h_ptr, h_at, used, used, slice_size, SLICES) * factor[:, None]
            at = x_ptr + (pair // J)[:, None] * stride_xn + c[None, :] * stride_xc
            x = tl.load(at, mask=mine[:, None] & (c[None, :] < C), other=0.0)  # [P, C]
            acc = tl.dot(tl.trans(h), x.to(tl.float32), acc, input_precision=PRECISION)
        first = start if PACKED else start * slot_rank[0]
        to = out_ptr + (first + r[:, None]) * C + c[None, :]
        inside = (r[:, None] < rank) & (c[None, :] < C)
        tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _mixture_lora_sum_kernel(value_ptr, order_ptr, run_ptr, out_ptr, BLOCK_P: tl.constexpr):
    """The sum of one adapter's values, in the order of its pairs."""
    k = tl.program_id(0)
    end = tl.load(run_ptr + k + 1)
    acc = tl.zeros((BLOCK_P,), dtype=tl.float64)
    for p0 in range(tl.load(run_ptr + k), end, BLOCK_P):
        offset = p0 + tl.arange(0, BLOCK_P)  # [P]
        pair = tl.load(order_ptr + offset, mask=offset < end, other=0)
        acc += tl.load(value_ptr + pair, mask=offset < end, other=0.0)
    tl.store(out_ptr + k, tl.sum(acc, 0).to(tl.float32))
