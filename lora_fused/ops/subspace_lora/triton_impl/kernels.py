"""The two products with a basis, and the diagonal cores between them."""

import triton
import triton.language as tl

from lora_fused.ops.mixture_lora.triton_impl.common import _dot
from lora_fused.ops.mixture_lora.triton_impl.expand import _finish


@triton.jit
def _ids(
    row, live, j, ids_ptr, group_ptr, start_ptr, M, J, K, rows_per_group,
    HAS_GROUPS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    # Entries j [J] of the rows [N]: where they lie, the adapters, and which are there. A mixture or
    # an adapter out of range counts as none, and so does an empty one.
    m = row // rows_per_group
    if HAS_GROUPS:
        m = tl.load(group_ptr + m, mask=live, other=-1).to(tl.int64)
    named = (live & (m >= 0) & (m < M))[:, None] & (j < J)[None, :]
    at = m[:, None] * J + j[None, :]
    k = tl.load(ids_ptr + at, mask=named, other=-1)  # [N, J]
    known = (k >= 0) & (k < K)
    if PAIRS:
        first = tl.load(start_ptr + k, mask=known, other=0)
        known = known & (tl.load(start_ptr + k + 1, mask=known, other=0) > first)
    return at, k, known


@triton.jit
def _store_z(
    z, row, live, p, z_ptr, t_ptr, core_ptr, ids_ptr, weight_ptr, scale_ptr, group_ptr,
    P, M, J, K, rows_per_group, stride_core_k, stride_core_p,
    DIAGONAL: tl.constexpr, HAS_GROUPS: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    # z [N, P], and for diagonal cores t = z * sum over j of weight * scale * core.
    inside = live[:, None] & (p < P)[None, :]
    to = row[:, None] * P + p[None, :]
    tl.store(z_ptr + to, z, mask=inside)
    if DIAGONAL:
        core = tl.zeros((BLOCK_N, BLOCK_P), dtype=tl.float32)
        used = tl.zeros((BLOCK_N,), dtype=tl.int32)
        for j0 in range(0, J, BLOCK_J):
            j = j0 + tl.arange(0, BLOCK_J)  # [J]
            at, k, known = _ids(
                row, live, j, ids_ptr, group_ptr, None, M, J, K, rows_per_group, HAS_GROUPS, False
            )
            factor = tl.load(weight_ptr + at, mask=known, other=0.0)
            if HAS_SCALE:
                factor *= tl.load(scale_ptr + k, mask=known, other=0.0)
            # All cores of a row at once: their loads wait for each other's ids, not for each other.
            k_at = k.to(tl.int64)[:, :, None] * stride_core_k
            part = tl.load(
                core_ptr + k_at + p[None, None, :] * stride_core_p,
                mask=known[:, :, None] & (p < P)[None, None, :],
                other=0.0,
            ).to(tl.float32)  # [N, J, P]
            core += tl.sum(part * factor[:, :, None], 1)
            used = tl.maximum(used, tl.max(known.to(tl.int32), 1))
        # Selected: what no adapter uses may be infinite, and lift adds it to nothing.
        tl.store(t_ptr + to, tl.where(used[:, None] > 0, z * core, 0.0), mask=inside)


@triton.jit
def _subspace_lora_project_kernel(
    x_ptr, side_ptr, z_ptr, t_ptr, core_ptr, ids_ptr, weight_ptr, scale_ptr, group_ptr,
    N, C, P, M, J, K, width, stride_xn, stride_xc, stride_p, stride_c,
    rows_per_group, stride_core_k, stride_core_p,
    DIAGONAL: tl.constexpr, HAS_GROUPS: tl.constexpr, HAS_SCALE: tl.constexpr,
    TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """z = x side^T for a tile of rows and directions, over a slice of the columns."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)  # [P]
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)  # [N]
    part = tl.program_id(2)
    live = row < N
    x_row = x_ptr + row[:, None] * stride_xn
    side_row = side_ptr + p[None, :] * stride_p
    last = tl.minimum(part * width + width, C)
    acc = tl.zeros((BLOCK_N, BLOCK_P), dtype=tl.float32)
    for c0 in range(part * width, last, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C).to(tl.int64)  # [C]
        x = tl.load(
            x_row + c[None, :] * stride_xc, mask=live[:, None] & (c[None, :] < last), other=0.0
        )  # [N, C]
        side = tl.load(
            side_row + c[:, None] * stride_c, mask=(p < P)[None, :] & (c[:, None] < last), other=0.0
        )  # [C, P]
        if x.dtype == side.dtype:
            acc = tl.dot(x, side, acc, input_precision=PRECISION)
        else:
            acc = _dot(x.to(tl.float32), side, acc, TERMS, PRECISION)
    _store_z(
        acc, row, live, p, z_ptr + part.to(tl.int64) * N * P, t_ptr, core_ptr, ids_ptr, weight_ptr,
        scale_ptr, group_ptr, P, M, J, K, rows_per_group, stride_core_k, stride_core_p,
        DIAGONAL, HAS_GROUPS, HAS_SCALE, BLOCK_N, BLOCK_P, BLOCK_J,
    )  # fmt: skip


@triton.jit
def _subspace_lora_sum_kernel(
    part_ptr, z_ptr, t_ptr, core_ptr, ids_ptr, weight_ptr, scale_ptr, group_ptr,
    N, P, M, J, K, slices, rows_per_group, stride_core_k, stride_core_p,
    DIAGONAL: tl.constexpr, HAS_GROUPS: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """z from its slices, added in order."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)  # [P]
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)  # [N]
    live = row < N
    inside = live[:, None] & (p < P)[None, :]
    of = row
    z = tl.zeros((BLOCK_N, BLOCK_P), dtype=tl.float32)
    for _ in range(slices):
        z += tl.load(part_ptr + of[:, None] * P + p[None, :], mask=inside, other=0.0)
        of += N
    _store_z(
        z, row, live, p, z_ptr, t_ptr, core_ptr, ids_ptr, weight_ptr, scale_ptr, group_ptr,
        P, M, J, K, rows_per_group, stride_core_k, stride_core_p,
        DIAGONAL, HAS_GROUPS, HAS_SCALE, BLOCK_N, BLOCK_P, BLOCK_J,
    )  # fmt: skip


@triton.jit
def _subspace_lora_lift_kernel(
    t_ptr, side_ptr, ids_ptr, group_ptr, start_ptr, base_ptr, y_ptr,
    N, C, P, M, J, K, rows_per_group, stride_p, stride_c, stride_base_n, stride_base_c,
    HAS_GROUPS: tl.constexpr, PAIRS: tl.constexpr, HAS_BASE: tl.constexpr,
    TERMS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """base + t side for a tile of rows and columns; rows without an adapter are left as they are.

    Not by zeros in t: what such a row does not use may be infinite here too, in side.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)  # [C]
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)  # [N]
    live = row < N
    _, _, known = _ids(
        row, live, tl.arange(0, BLOCK_J), ids_ptr, group_ptr, start_ptr, M, J, K, rows_per_group,
        HAS_GROUPS, PAIRS,
    )  # fmt: skip
    acc = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for p0 in range(0, P, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P).to(tl.int64)  # [P]
        t = tl.load(
            t_ptr + row[:, None] * P + p[None, :],
            mask=live[:, None] & (p < P)[None, :],
            other=0.0,
        )  # [N, P]
        side = tl.load(
            side_ptr + p[:, None] * stride_p + c[None, :] * stride_c,
            mask=(p < P)[:, None] & (c < C)[None, :],
            other=0.0,
        )  # [P, C]
        acc = _dot(t, side, acc, TERMS, PRECISION)
    used = tl.max(known.to(tl.int32), 1)  # [N]
    acc = tl.where(used[:, None] > 0, acc, 0.0)
    inside = live[:, None] & (c < C)[None, :]
    _finish(acc, base_ptr, y_ptr, row, c, inside, C, stride_base_n, stride_base_c, HAS_BASE)


@triton.jit
def _subspace_lora_diagonal_kernel(
    z_ptr, q_ptr, core_ptr, factor_ptr, order_ptr, run_ptr, grad_ptr, dot_ptr,
    P, J, pairs, stride_core_k, stride_core_p, BLOCK_U: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Over the pairs of one adapter: the sum of factor * z * q, and of each pair <core, z * q>."""
    k = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P).to(tl.int64)  # [P]
    at_k = core_ptr + k * stride_core_k + p * stride_core_p
    core = tl.load(at_k, mask=p < P, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_P,), dtype=tl.float32)
    end = tl.load(run_ptr + k + 1)
    for u0 in range(tl.load(run_ptr + k), end, BLOCK_U):
        offset = u0 + tl.arange(0, BLOCK_U)  # [U]
        mine = offset < end
        pair = tl.load(order_ptr + offset, mask=mine, other=0).to(tl.int64)
        inside = mine[:, None] & (p < P)[None, :]
        at = (pair // J)[:, None] * P + p[None, :]
        z = tl.load(z_ptr + at, mask=inside, other=0.0)
        product = z * tl.load(q_ptr + at, mask=inside, other=0.0)  # [U, P]
        factor = tl.load(factor_ptr + pair, mask=mine, other=0.0)
        acc += tl.sum(product * factor[:, None], 0)
        to = dot_ptr + tl.program_id(1).to(tl.int64) * pairs + pair
        tl.store(to, tl.sum(product * core[None, :], 1), mask=mine)
    to = grad_ptr + k * P + p
    tl.store(to, acc.to(grad_ptr.dtype.element_ty), mask=p < P)
