"""stacked_svd in Triton: a pass over the rows of all layers in one launch a stage.

y = scale * diag(weights) (x - mean) @ basis is one launch, z = y^T M another; each reads x once,
as stored, and centres after the product: no float32 copy of x and no x - mean in memory. Where
tiles are too few to fill a GPU, the sum is cut into slices of fixed size, and a last launch adds
them in order. No atomics and no reads by the host; every choice depends on shapes alone.

One launch for y and z together would read x from DRAM once instead of twice, but z [Q, I] does not
fit a program: it would be read and written in L2 for each tile of rows, 8 Q bytes a column against
the 256 of 128 bfloat16 rows of x that it saves, so it loses from Q = 32 on.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_fused import backends


class Tile(NamedTuple):
    """A program's output tile, the step of its sum, its warps and the depth of its pipeline."""

    tall: int
    wide: int
    step: int
    warps: int
    stages: int


PROGRAMS = 256  # about two for each multiprocessor of an H100
LEAST = 512  # terms of a slice: fewer, and writing and adding slices costs as much as reading x
WIDEST = 128  # sketch columns of a tile; also the bits of one Philox counter, which no tile splits


def project_tile(rows: int, width: int, x: Tensor, signs: bool) -> Tile:
    """[rows, sketch columns]; the step is in columns of x."""
    wide = _block(width, WIDEST)
    # Every tile of rows reads the whole basis, from L2: 128 rows of bfloat16 x are then 256 bytes
    # a column beside the 4 Q of the basis; 64 would make the basis the larger part.
    tall = _block(rows, 128)
    # Bytes of a row of x in one step: 128 are a whole line of DRAM and of shared memory's swizzle.
    # With a basis half of it: [64, 128] float32 three deep is more than sm_120's 100 KiB.
    step = (128 if signs else 64) // x.itemsize
    return Tile(tall, wide, step, 8 if tall * wide >= 128 * 64 else 4, 3)


def backproject_tile(columns: int, width: int, x: Tensor) -> Tile:
    """[sketch columns, columns of x]; the step is in rows."""
    tall = _block(width, WIDEST)
    # Every tile of columns reads all of y, from L2: as above, with rows and columns exchanged.
    wide = _block(columns, 128)
    return Tile(tall, wide, 32, 8 if tall * wide >= 128 * 64 else 4, 3)


def _block(size: int, most: int) -> int:
    return min(max(triton.next_power_of_2(size), 16), most)


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
        y = _project(x, weights, mean, basis, scale.contiguous(), seed, width)
    z = _backproject(x, weights, mean, y) if want_z else none
    return y if want_y else none, z


def _project(x, weights, mean, basis, scale, seed: int, width: int) -> Tensor:
    layers, rows, columns = x.shape
    tile = project_tile(rows, width, x, basis is None)
    tiles_t, tiles_q = triton.cdiv(rows, tile.tall), triton.cdiv(width, tile.wide)
    slices, extent = _slices(layers * tiles_t * tiles_q, columns, tile.step)
    parts = x.new_empty(slices, layers, rows, width, dtype=torch.float32)
    _stacked_svd_project_kernel[(layers * tiles_t * slices * tiles_q,)](
        x, weights, mean, basis, scale, parts,
        layers, rows, columns, width, tiles_t, tiles_q, slices, extent, seed,
        *x.stride(), *(basis.stride() if basis is not None else (0, 0, 0)),
        HAS_WEIGHTS=weights is not None, HAS_MEAN=mean is not None, HAS_BASIS=basis is not None,
        PRECISION=_precision(), BLOCK_T=tile.tall, BLOCK_Q=tile.wide, BLOCK_I=tile.step,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return _sum(parts)


def _backproject(x, weights, mean, y: Tensor) -> Tensor:
    layers, rows, columns = x.shape
    width = y.shape[-1]
    tile = backproject_tile(columns, width, x)
    tiles_q, tiles_i = triton.cdiv(width, tile.tall), triton.cdiv(columns, tile.wide)
    slices, extent = _slices(layers * tiles_q * tiles_i, rows, tile.step)
    parts = x.new_empty(slices, layers, width, columns, dtype=torch.float32)
    _stacked_svd_backproject_kernel[(layers * slices * tiles_i * tiles_q,)](
        x, weights, mean, y, parts,
        layers, rows, columns, width, tiles_i, tiles_q, slices, extent, *x.stride(),
        HAS_WEIGHTS=weights is not None, HAS_MEAN=mean is not None, PRECISION=_precision(),
        BLOCK_Q=tile.tall, BLOCK_I=tile.wide, BLOCK_T=tile.step,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return _sum(parts)


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
    if backends.INTERPRETING:
        return "ieee"
    backend = triton.runtime.driver.active.get_current_target().backend
    return "tf32x3" if backend == "cuda" else "ieee"


@triton.jit
def _is_minus(seed, i, first_q, BLOCK_Q: tl.constexpr):
    # [I, Q]: whether the test matrix has -1 at rows i, columns first_q and on (reference.signs).
    low = (i & 0xFFFFFFFF).to(tl.uint32)
    none = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, (i >> 32).to(tl.uint32), none + first_q // 128, none)
    q = first_q + tl.arange(0, BLOCK_Q)  # [Q]
    word = ((q % 128) // 32)[None, :]
    left = tl.where(word == 0, w0[:, None], w1[:, None])
    right = tl.where(word == 2, w2[:, None], w3[:, None])
    bits = tl.where(word < 2, left, right) >> (q % 32).to(tl.uint32)[None, :]
    return (bits & 1) != 0


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    # acc + a @ b to float32's precision. A bfloat16 b is exact in tensor cores; a float32 a is cut
    # into three bfloat16 numbers, 8 bits each, which hold all 24 of its bits: 3 passes at twice
    # the rate of the 3 in TF32. float16 has too few exponents for that.
    if a.dtype == b.dtype and a.dtype != tl.float32:
        acc = tl.dot(a, b, acc)
    elif b.dtype != tl.bfloat16:
        acc = tl.dot(a, b.to(tl.float32), acc, input_precision=PRECISION)
    else:
        for _ in tl.static_range(3):
            part = a.to(tl.bfloat16)
            acc = tl.dot(part, b, acc)
            a -= part.to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["seed"])
def _stacked_svd_project_kernel(
    x_ptr, weight_ptr, mean_ptr, basis_ptr, scale_ptr, y_ptr,
    L, T, I, Q, tiles_t, tiles_q, slices, extent, seed,
    stride_xl, stride_xt, stride_xi, stride_bl, stride_bi, stride_bq,
    HAS_WEIGHTS: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_BASIS: tl.constexpr,
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
    shift = tl.zeros((BLOCK_Q,), dtype=tl.float32)
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
            if HAS_MEAN:
                mean = tl.load(mean_ptr + l * I + i, mask=i < last, other=0.0)
                shift += tl.sum(b * mean[None, :], 1)
        else:
            minus = _is_minus(seed, i, first_q, BLOCK_Q)
            kind: tl.constexpr = tl.bfloat16 if x.dtype == tl.float32 else x.dtype
            one = tl.full((1, 1), 1.0, kind)
            acc = _dot(x, tl.where(minus, -one, one), acc, PRECISION)
            if HAS_MEAN:
                mean = tl.load(mean_ptr + l * I + i, mask=i < last, other=0.0)[:, None]
                shift += tl.sum(tl.where(minus, -mean, mean), 0)
    if HAS_BASIS:
        acc = tl.trans(acc)
    if HAS_MEAN:
        acc -= shift[None, :]
    if HAS_WEIGHTS:
        acc *= tl.load(weight_ptr + l * T + t, mask=t < T, other=0.0)[:, None]
    acc *= tl.load(scale_ptr + l)
    at = ((piece * L + l) * T + t)[:, None] * Q + q[None, :]
    tl.store(y_ptr + at, acc, mask=(t < T)[:, None] & (q < Q)[None, :])


@triton.jit
def _stacked_svd_backproject_kernel(
    x_ptr, weight_ptr, mean_ptr, y_ptr, z_ptr,
    L, T, I, Q, tiles_i, tiles_q, slices, extent, stride_xl, stride_xt, stride_xi,
    HAS_WEIGHTS: tl.constexpr, HAS_MEAN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_T: tl.constexpr,
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
            y_ptr + (l * T + t)[None, :] * Q + q[:, None],
            mask=(q < Q)[:, None] & (t < last)[None, :],
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
