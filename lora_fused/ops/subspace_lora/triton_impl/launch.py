"""Block sizes and launches of subspace_lora's own Triton kernels.

Every choice depends on shapes alone, never on values. The arithmetic behind the numbers is in
ops/subspace_lora/README.md.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lora_fused import backends
from lora_fused.ops.mixture_lora.triton_impl.launch import Call
from lora_fused.ops.subspace_lora.triton_impl.kernels import (
    _subspace_lora_diagonal_kernel,
    _subspace_lora_lift_kernel,
    _subspace_lora_project_kernel,
    _subspace_lora_sum_kernel,
)


class Tile(NamedTuple):
    """Rows and columns (of the result) of a program, the inner step, and its warps."""

    rows: int
    columns: int
    step: int
    warps: int


# Up to so many rows each tile. Small ones while programs are few, for then the largest one sets
# the time (100 GB/s each); then large ones, which read x and the basis from L2 less often.
PROJECT = {
    64: Tile(16, 16, 128, 4),
    383: Tile(16, 32, 128, 4),
    767: Tile(32, 32, 64, 4),
    2047: Tile(32, 64, 64, 4),
    2**62: Tile(128, 64, 64, 8),
}
LIFT = {64: Tile(32, 64, 32, 4), 383: Tile(64, 128, 32, 8), 2**62: Tile(128, 128, 32, 8)}
SUM = Tile(16, 16, 0, 4)
INVARIANT = 2047  # rows whose tiles LORA_FUSED_BATCH_INVARIANT pins for every N
# Few rows of so many columns or more are cut into slices, which cost a launch that adds them: one
# program would read for longer than that takes. More rows are enough programs without.
FEW, WIDE, SLICE, SLICES = 64, 8192, 2048, 8


def tile_of(table: dict[int, Tile], rows: int, full: bool) -> Tile:
    """The tile for so many rows; ``full``: operands are float32, cut in three on NVIDIA."""
    rows = INVARIANT if backends.BATCH_INVARIANT else rows
    tile = next(tile for most, tile in table.items() if rows <= most)
    if not full:
        return tile
    return Tile(min(tile.rows, 64), min(tile.columns, 64), min(tile.step, 32), tile.warps)


def slice_of(rows: int, columns: int) -> int:
    """Columns of one project program."""
    if rows > FEW or columns < WIDE or backends.BATCH_INVARIANT:
        return max(columns, 1)
    return max(SLICE, triton.cdiv(columns, SLICES * SLICE) * SLICE)


def _terms(kept: torch.dtype, side: Tensor) -> int:
    """Into how many bfloat16 numbers the other operand is cut where side is one.

    16 bits suffice for a float16 operand and for a 16-bit result.
    """
    if side.dtype != torch.bfloat16:
        return 0
    return 3 if kept == torch.float32 else 2


def project(call: Call, x: Tensor, side: Tensor, diagonal: Tensor | None) -> tuple[Tensor, Tensor]:
    """z = x side^T [N, P] in float32, and t = z * the row's core; z again without such cores."""
    columns, directions = x.shape[1], side.shape[0]
    z = torch.empty(call.rows, directions, dtype=torch.float32, device=x.device)
    t = z if diagonal is None else torch.empty_like(z)
    if z.numel() == 0:
        return z, t
    tile = tile_of(PROJECT, call.rows, max(x.itemsize, side.itemsize) == 4)
    width = slice_of(call.rows, columns)
    slices = max(1, triton.cdiv(columns, width))
    parts = z if slices == 1 else z.new_empty(slices, *z.shape)
    grid = (triton.cdiv(directions, tile.columns), triton.cdiv(call.rows, tile.rows))
    scale = call.scale[0] if call.scale else None
    cores = (t, diagonal, call.adapter_ids, call.weights, scale, call.row_mixture)
    sizes = (call.mixtures, call.per_row, call.count)
    tail = (call.rows // max(call.groups, 1), *_strides(diagonal))
    form = {"HAS_GROUPS": call.row_mixture is not None, "HAS_SCALE": scale is not None}
    _subspace_lora_project_kernel[(*grid, slices)](
        x, side, parts, *cores, call.rows, columns, directions, *sizes, width,
        *x.stride(), *side.stride(), *tail,
        **form, **_blocks(tile, call), DIAGONAL=diagonal is not None and slices == 1,
        TERMS=_terms(x.dtype, side), PRECISION=call.precision, BLOCK_C=tile.step,
    )  # fmt: skip
    if slices > 1:
        grid = (triton.cdiv(directions, SUM.columns), triton.cdiv(call.rows, SUM.rows))
        _subspace_lora_sum_kernel[grid](
            parts, z, *cores, call.rows, directions, *sizes, slices, *tail,
            **form, **_blocks(SUM, call), DIAGONAL=diagonal is not None,
        )  # fmt: skip
    return z, t


def lift(call: Call, t: Tensor, side: Tensor, out: Tensor, base: Tensor | None) -> Tensor:
    """Write base + t side [N, C] into out; base alone for rows without an adapter."""
    columns = out.shape[1]
    if out.numel() == 0:
        return out
    tile = tile_of(LIFT, call.rows, side.dtype != torch.bfloat16)
    grid = (triton.cdiv(columns, tile.columns), triton.cdiv(call.rows, tile.rows))
    row_start = call.row_start[0] if call.row_start else None
    _subspace_lora_lift_kernel[grid](
        t, side, call.adapter_ids, call.row_mixture, row_start, base, out,
        call.rows, columns, side.shape[0], call.mixtures, call.per_row, call.count,
        call.rows // max(call.groups, 1), *side.stride(), *_strides(out if base is None else base),
        HAS_GROUPS=call.row_mixture is not None, PAIRS=row_start is not None,
        HAS_BASE=base is not None, TERMS=_terms(out.dtype, side), PRECISION=call.precision,
        BLOCK_N=tile.rows, BLOCK_P=tile.step, BLOCK_C=tile.columns,
        BLOCK_J=triton.next_power_of_2(max(call.per_row, 1)), num_warps=tile.warps,
    )  # fmt: skip
    return out


def diagonal_gradients(
    call: Call, z: Tensor, q: Tensor, core: Tensor, factor: Tensor, runs: tuple
) -> tuple[Tensor, Tensor]:
    """Gradient of the cores [K, P], and <core, z * q> of each pair, float64 [N * J]."""
    directions = core.shape[1]
    tiles = triton.cdiv(directions, 128)
    grad = torch.zeros(core.shape, dtype=core.dtype, device=z.device)
    dot = torch.zeros(tiles, call.pairs, dtype=torch.float32, device=z.device)
    if 0 not in (directions, call.pairs, call.count):
        _subspace_lora_diagonal_kernel[(call.count, tiles)](
            z, q, core, factor, *runs, grad, dot,
            directions, call.per_row, call.pairs, *core.stride(), BLOCK_U=32, BLOCK_P=128,
        )  # fmt: skip
    return grad, dot.sum(0, dtype=torch.float64)


def _blocks(tile: Tile, call: Call) -> dict:
    """A tile and how many diagonal cores of a row are loaded at once, as kernels take them."""
    cores = max(1, min(4, 16 * 32 * tile.warps // (tile.rows * tile.columns)))  # more spilled
    return {
        "BLOCK_N": tile.rows, "BLOCK_P": tile.columns, "num_warps": tile.warps,
        "BLOCK_J": min(cores, triton.next_power_of_2(max(call.per_row, 1))),
    }  # fmt: skip


def _strides(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else t.stride()
