"""stacked_svd in Triton: a pass over the rows of all layers in one launch a stage.

y = scale * diag(weights) (x - mean) @ basis is one launch, z = y^T M another; each reads x once,
as stored, and centres after the product: no float32 copy of x and no x - mean in memory. The mean
is projected like a row, in a small launch of its own. The test matrix is made first, as bits: made
anew by every program, its integer work would outlast the reading of x. Where tiles are too few to
fill a GPU, a sum is cut into slices of fixed size, and a last launch adds them in order. No atomics
and no reads by the host; every choice depends on shapes alone.

One launch for y and z together would read x from DRAM once instead of twice, but z [Q, I] does not
fit a program: it would be read and written in L2 for each tile of rows, 8 Q bytes a column against
the 256 bytes of DRAM that 128 bfloat16 rows save. At 5.5 and 3.35 TB/s that loses from Q = 53 on,
and below it the gain is less than the rows' second reading.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fused.ops.triton_impl import capability, cut_dot


class Tile(NamedTuple):
    """Rows, sketch columns and columns of x that a program holds at a time, and its warps."""

    rows: int
    width: int
    columns: int
    warps: int


# Sketches of up to 64 columns have a tile of their own. "tf32" is what takes three TF32 products,
# "bfloat16" what runs in bfloat16. Several longer steps and wider tiles spilled, on sm_80, sm_120
# or gfx942 first; test_stacked_svd_aot.py holds every row of these tables to none.
SIGNS = {  # a line of 128 bytes of x a step; the bits are few, so rows may be too: more programs
    ("bfloat16", 64): Tile(64, 64, 64, 4),
    ("bfloat16", 128): Tile(64, 128, 64, 4),
    ("float32", 64): Tile(64, 64, 32, 4),
    ("float32", 128): Tile(64, 128, 32, 8),
}
PROJECT = {  # each tile of rows reads all of the basis, 4 Q bytes a column, from L2: many rows
    ("bfloat16", 64): Tile(128, 64, 16, 4),
    ("bfloat16", 128): Tile(128, 128, 16, 8),
    ("tf32", 64): Tile(64, 64, 32, 4),  # the products set the time here, not L2
    ("tf32", 128): Tile(64, 64, 16, 4),
}
BACKPROJECT = {  # each tile of columns reads all of y, 4 Q bytes a row, from L2: many columns
    ("bfloat16", 64): Tile(32, 64, 128, 4),
    ("bfloat16", 128): Tile(32, 128, 128, 8),
    ("tf32", 64): Tile(16, 64, 128, 8),
    ("tf32", 128): Tile(16, 128, 128, 8),
}
PROGRAMS = 256  # about two for each multiprocessor of an H100
LEAST = 512  # terms of a slice: fewer, and writing and adding slices costs as much as reading x


def tile_of(table: dict, x: Tensor, width: int) -> Tile:
    """The tile for a sketch of ``width`` columns."""
    if table is SIGNS:
        kind = "float32" if x.dtype == torch.float32 else "bfloat16"
    else:
        kind = "bfloat16" if x.dtype == torch.bfloat16 else "tf32"
    return table[kind, 64 if width <= 64 else 128]


def forward(
    x: Tensor,
    weights: Tensor | None,
    mean: Tensor | None,
    basis: Tensor | None,
    scale: Tensor,
    seed: int,
    width: int,
    want_y: bool,
    want_z: bool,
) -> tuple[Tensor, Tensor]:
    """One pass, as reference.forward; x [L, T, I] is float32, float16 or bfloat16."""
    layers, rows, columns = x.shape
    width = width if basis is None else basis.shape[-1]
    weights, mean = (None if t is None else t.contiguous() for t in (weights, mean))
    none = x.new_empty(0, dtype=torch.float32)
    if 0 in (*x.shape, width):
        y = x.new_zeros(layers, rows, width, dtype=torch.float32) if want_y else none
        z = x.new_zeros(layers, width, columns, dtype=torch.float32) if want_z else none
        return y, z
    y = none
    if want_y or want_z:
        # What stays here has rows of whole 64 bytes, so that they are loaded 16 bytes at a time.
        row = width if want_y else triton.cdiv(width, 16) * 16
        shift, scale = None, scale.contiguous()
        signs = _signs(x, seed, width) if basis is None else None
        if mean is not None:
            shift = _project(mean[:, None], None, None, basis, signs, scale, width, row)
        y = _project(x, weights, shift, basis, signs, scale, width, row)
    z = _backproject(x, weights, mean, y, width) if want_z else none
    return y if want_y else none, z


def _project(x, weights, shift, basis, signs, scale, width: int, row: int) -> Tensor:
    """scale * weights * (x @ basis - shift) [L, T, row], or with signs, as bits, for a basis."""
    layers, rows, columns = x.shape
    tile = tile_of(SIGNS if basis is None else PROJECT, x, width)
    tiles_t, tiles_q = triton.cdiv(rows, tile.rows), triton.cdiv(width, tile.width)
    slices, extent = _slices(layers * tiles_t * tiles_q, columns, tile.columns)
    parts = x.new_empty(slices, layers, rows, row, dtype=torch.float32)
    strides = (0, signs.stride(0), 0) if basis is None else basis.stride()
    _stacked_svd_project_kernel[(layers * tiles_t * slices * tiles_q,)](
        x, weights, shift, signs if basis is None else basis, scale, parts,
        layers, rows, columns, width, row, tiles_t, tiles_q, slices, extent, *x.stride(), *strides,
        HAS_WEIGHTS=weights is not None, HAS_SHIFT=shift is not None, HAS_BASIS=basis is not None,
        PRECISION=_precision(), **_blocks(tile),
    )  # fmt: skip
    return _sum(parts)


def _backproject(x, weights, mean, y: Tensor, width: int) -> Tensor:
    layers, rows, columns = x.shape
    tile = tile_of(BACKPROJECT, x, width)
    tiles_q, tiles_i = triton.cdiv(width, tile.width), triton.cdiv(columns, tile.columns)
    slices, extent = _slices(layers * tiles_q * tiles_i, rows, tile.rows)
    parts = x.new_empty(slices, layers, width, columns, dtype=torch.float32)
    _stacked_svd_backproject_kernel[(layers * slices * tiles_i * tiles_q,)](
        x, weights, mean, y, parts,
        layers, rows, columns, width, y.shape[-1], tiles_i, tiles_q, slices, extent, *x.stride(),
        HAS_WEIGHTS=weights is not None, HAS_MEAN=mean is not None, PRECISION=_precision(),
        **_blocks(tile),
    )  # fmt: skip
    return _sum(parts)


def _signs(x, seed: int, width: int) -> Tensor:
    """The test matrix as bits [I, words of 32], made once for all tiles of rows and all layers."""
    columns, blocks = x.shape[2], triton.cdiv(width, 128)
    bits = x.new_empty(columns, blocks * 4, dtype=torch.int32)
    grid = (triton.cdiv(columns, 128) * blocks,)
    _stacked_svd_signs_kernel[grid](bits, columns, blocks, seed, BLOCK_I=128)
    return bits


def _blocks(tile: Tile) -> dict:
    sizes = {"BLOCK_T": tile.rows, "BLOCK_Q": tile.width, "BLOCK_I": tile.columns}
    return {**sizes, "num_warps": tile.warps, "num_stages": 3 if capability() else 2}


def _slices(programs: int, length: int, step: int) -> tuple[int, int]:
    """Into how many slices a sum over ``length`` is cut, and the length of one."""
    slices = max(1, min(triton.cdiv(PROGRAMS, programs), length // LEAST))
    extent = triton.cdiv(triton.cdiv(length, slices), step) * step
    return triton.cdiv(length, extent), extent


def _sum(parts: Tensor) -> Tensor:
    if parts.shape[0] == 1:
        return parts[0]
    out = torch.empty_like(parts[0])
    grid = (triton.cdiv(out.numel(), 1024),)
    _stacked_svd_sum_kernel[grid](parts, out, out.numel(), SLICES=parts.shape[0], BLOCK=1024)
    return out


def _precision() -> str:
    """How float32 meets float32: on NVIDIA three TF32 products, 22 bits of each factor."""
    return "tf32x3" if capability() else "ieee"


@triton.jit(do_not_specialize=["seed"])
def _stacked_svd_signs_kernel(bits_ptr, I, blocks, seed, BLOCK_I: tl.constexpr):
    """The test matrix [I, Q] as bits, 128 columns in four words, from the counters of reference."""
    block = tl.program_id(0) % blocks
    i = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)  # [I]
    low = (i & 0xFFFFFFFF).to(tl.uint32)
    none = low * 0
    words = tl.philox(seed, low, (i >> 32).to(tl.uint32), none + block, none)
    for k in tl.static_range(4):
        at = bits_ptr + (i * blocks + block) * 4 + k
        tl.store(at, words[k].to(tl.int32, bitcast=True), mask=i < I)


@triton.jit
def _is_minus(bits_ptr, i, live, first_q, row, BLOCK_I: tl.constexpr, BLOCK_Q: tl.constexpr):
    # [I, Q]: whether the test matrix has -1 at rows i, columns first_q and on.
    word = first_q // 32 + tl.arange(0, BLOCK_Q // 32)
    words = tl.load(
        bits_ptr + i[:, None] * row + word[None, :], mask=live[:, None], other=0
    )  # [I, words]
    bits = words[:, :, None] >> tl.arange(0, 32)[None, None, :]
    return tl.reshape((bits & 1) != 0, (BLOCK_I, BLOCK_Q))


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    # acc + a @ b to float32's precision: a cut in three where b is bfloat16. float16 has too few
    # exponents for that.
    if a.dtype == b.dtype and a.dtype != tl.float32:
        acc = tl.dot(a, b, acc)
    elif b.dtype != tl.bfloat16:
        acc = tl.dot(a, b.to(tl.float32), acc, input_precision=PRECISION)
    else:
        acc = cut_dot(a, b, acc, 3)
    return acc


@triton.jit
def _stacked_svd_project_kernel(
    x_ptr, weight_ptr, shift_ptr, basis_ptr, scale_ptr, y_ptr,
    L, T, I, Q, row, tiles_t, tiles_q, slices, extent,
    stride_xl, stride_xt, stride_xi, stride_bl, stride_bi, stride_bq,
    HAS_WEIGHTS: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_BASIS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """A tile of y over a slice of the columns of x; column tiles of one x tile run side by side."""
    pid = tl.program_id(0)
    first_q = pid % tiles_q * BLOCK_Q
    piece = pid // tiles_q % slices
    l = (pid // (tiles_q * slices * tiles_t)).to(tl.int64)
    t = pid // (tiles_q * slices) % tiles_t * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)  # [T]
    q = first_q + tl.arange(0, BLOCK_Q)  # [Q]
    x_row = x_ptr + l * stride_xl + t * stride_xt
    # With a basis the tile lies on its side: what is cut into terms should stand on the left, where
    # tensor cores take registers.
    if HAS_BASIS:
        b_row = basis_ptr + l * stride_bl + q.to(tl.int64) * stride_bq
        acc = tl.zeros((BLOCK_Q, BLOCK_T), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_T, BLOCK_Q), dtype=tl.float32)
    last = tl.minimum(piece * extent + extent, I)
    for i0 in range(piece * extent, last, BLOCK_I):
        i = i0 + tl.arange(0, BLOCK_I).to(tl.int64)  # [I]
        x = tl.load(
            x_row[:, None] + i[None, :] * stride_xi,
            mask=(t < T)[:, None] & (i < last)[None, :],
            other=0.0,
        )  # [T, I]
        if HAS_BASIS:
            b = tl.load(
                b_row[:, None] + i[None, :] * stride_bi,
                mask=(q < Q)[:, None] & (i < last)[None, :],
                other=0.0,
            )  # [Q, I]
            acc = _dot(b, tl.trans(x), acc, PRECISION)
        else:
            minus = _is_minus(basis_ptr, i, i < last, first_q, stride_bi, BLOCK_I, BLOCK_Q)
            kind: tl.constexpr = tl.bfloat16 if x.dtype == tl.float32 else x.dtype
            one = tl.full((1, 1), 1.0, kind)
            acc = _dot(x, tl.where(minus, -one, one), acc, PRECISION)
    if HAS_BASIS:
        acc = tl.trans(acc)
    acc *= tl.load(scale_ptr + l)
    if HAS_SHIFT:
        width = tl.where(piece == 0, row, 0)  # the first slice alone takes it off
        acc -= tl.load(shift_ptr + l * row + q, mask=q < width, other=0.0)[None, :]
    if HAS_WEIGHTS:
        acc *= tl.load(weight_ptr + l * T + t, mask=t < T, other=0.0)[:, None]
    at = ((piece * L + l) * T + t)[:, None] * row + q[None, :]
    tl.store(y_ptr + at, acc, mask=(t < T)[:, None] & (q < row)[None, :])


@triton.jit
def _stacked_svd_backproject_kernel(
    x_ptr, weight_ptr, mean_ptr, y_ptr, z_ptr,
    L, T, I, Q, row, tiles_i, tiles_q, slices, extent, stride_xl, stride_xt, stride_xi,
    HAS_WEIGHTS: tl.constexpr, HAS_MEAN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """A tile of z over a slice of the rows; tiles that read the same of x run side by side."""
    pid = tl.program_id(0)
    q = pid % tiles_q * BLOCK_Q + tl.arange(0, BLOCK_Q)  # [Q]
    i = pid // tiles_q % tiles_i * BLOCK_I + tl.arange(0, BLOCK_I).to(tl.int64)  # [I]
    piece = pid // (tiles_q * tiles_i) % slices
    l = (pid // (tiles_q * tiles_i * slices)).to(tl.int64)
    x_column = x_ptr + l * stride_xl + i * stride_xi
    acc = tl.zeros((BLOCK_Q, BLOCK_I), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    last = tl.minimum(piece * extent + extent, T)
    for t0 in range(piece * extent, last, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T).to(tl.int64)  # [T]
        y = tl.load(
            y_ptr + (l * T + t)[None, :] * row + q[:, None],
            mask=(q < row)[:, None] & (t < last)[None, :],
            other=0.0,
        )  # [Q, T]
        x = tl.load(
            x_column[None, :] + t[:, None] * stride_xt,
            mask=(t < last)[:, None] & (i < I)[None, :],
            other=0.0,
        )  # [T, I]
        if HAS_WEIGHTS:
            y *= tl.load(weight_ptr + l * T + t, mask=t < last, other=0.0)[None, :]
        acc = _dot(y, x, acc, PRECISION)
        if HAS_MEAN:
            total += tl.sum(y, 1)
    if HAS_MEAN:
        acc -= total[:, None] * tl.load(mean_ptr + l * I + i, mask=i < I, other=0.0)[None, :]
    at = ((piece * L + l) * Q + q)[:, None] * I + i[None, :]
    tl.store(z_ptr + at, acc, mask=(q < Q)[:, None] & (i < I)[None, :])


@triton.jit
def _stacked_svd_sum_kernel(part_ptr, out_ptr, size, SLICES: tl.constexpr, BLOCK: tl.constexpr):
    """The slices added in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(part_ptr + at, mask=at < size, other=0.0)
    for _ in tl.static_range(1, SLICES):
        part_ptr += size
        total += tl.load(part_ptr + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, total, mask=at < size)
