"""How long a launch should take on an H100, from the bytes that its programs move.

    python -m benchmarks.traffic.model

A launch takes the longest of: its bytes from DRAM at 3.35 TB/s, all its programs' bytes from L2 at
5.5 TB/s, the largest program's bytes at 100 GB/s; and LAUNCH microseconds for being one more. This
chose the tiles of mixture_lora's Triton kernels and when one launch serves. Nothing here was
measured on a GPU; that the bytes are those that the kernels move is tested against the counter.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fused.ops.mixture_lora import plan as plans
from lora_fused.ops.mixture_lora.triton_impl import launch
from lora_fused.testing import sample_ids

DRAM, L2, PROGRAM = 3.35e6, 5.5e6, 0.1e6  # bytes a microsecond
LAUNCH = 2.0  # microseconds
BF16, FLOAT32 = 2, 4


@dataclass(frozen=True)
class Moved:
    """Bytes of one launch: read and written from DRAM, by all programs, by the largest one."""

    dram: int
    total: int
    largest: int
    programs: int

    @property
    def microseconds(self) -> float:
        return max(self.dram / DRAM, self.total / L2, self.largest / PROGRAM)


def shrink(ids_nj: Tensor, rank: int, columns: int, width: int, block: int = 32) -> Moved:
    """Grouped by adapter: blocks of pairs, slices of the columns."""
    counts = ids_nj[ids_nj >= 0].unique(return_counts=True)[1].tolist()
    blocks = [min(block, c - at) for c in counts for at in range(0, c, block)]
    slices, width = -(-columns // width), min(width, columns)
    each = [(pairs + rank) * width * BF16 + pairs * rank * FLOAT32 for pairs in blocks]
    dram = (ids_nj.shape[0] + len(counts) * rank) * columns * BF16
    dram += ids_nj.numel() * rank * slices * FLOAT32
    return Moved(dram, sum(each) * slices, max(each), len(each) * slices)


def expand(ids_nj: Tensor, rank: int, columns: int, slices: int, tile: launch.Tile) -> Moved:
    """Tiles of rows, in ascending order of their first adapter, by tiles of columns."""
    order = ids_nj[:, 0].argsort(stable=True)
    each = []
    for at in range(0, len(order), tile.rows):
        ids = ids_nj[order[at : at + tile.rows]]
        pairs, adapters = int((ids >= 0).sum()), ids[ids >= 0].unique().numel()
        h = pairs * rank * slices * FLOAT32
        each.append(h + (adapters * rank + 2 * len(ids)) * tile.columns * BF16)
    tiles = -(-columns // tile.columns)
    used = ids_nj[ids_nj >= 0].unique().numel()
    dram = (used * rank + 2 * len(order)) * columns * BF16
    dram += ids_nj.numel() * rank * slices * FLOAT32
    return Moved(dram, sum(each) * tiles, max(each), len(each) * tiles)


def one(ids_nj: Tensor, rank: int, columns: int) -> Moved:
    """A row and a span of the output's columns, as many as the input's, in one program."""
    rows, per_row = ids_nj.shape
    spans, span = -(-columns // plans.SPAN), min(plans.SPAN, columns)
    each = ((per_row * rank + 1) * columns + (per_row * rank + 2) * span) * BF16
    used = ids_nj.unique().numel()
    dram = (2 * used * rank + 3 * rows) * columns * BF16
    return Moved(dram, each * rows * spans, each, rows * spans)


def two(ids_nj: Tensor, rank: int, columns: int, tile: launch.Tile | None = None) -> list[Moved]:
    """Shrink and expand, in the tiles that are shipped if no other is named."""
    width = launch.slice_of(columns)
    tile = tile or (launch.FEW if len(ids_nj) <= 64 else launch.MANY)
    slices = -(-columns // width)
    return [shrink(ids_nj, rank, columns, width), expand(ids_nj, rank, columns, slices, tile)]


def microseconds(launches: list[Moved]) -> float:
    return sum(moved.microseconds + LAUNCH for moved in launches)


def one_or_two(columns: int = 4096) -> Iterator[str]:
    """A table over rows, adapters a row and rank: one launch against two, distinct adapters."""
    yield f"one launch / two launches, microseconds, I = O = {columns}, bfloat16; * = shipped"
    ranks = (4, 8, 16, 32, 64)
    yield f"{'N':>4s}{'J':>3s}" + "".join(f"{f'r = {r}':>18s}" for r in ranks)
    for rows, per_row in ((1, 1), (1, 2), (1, 4), (2, 2), (4, 1), (8, 1), (8, 2), (16, 1), (32, 1)):
        ids = torch.arange(rows * per_row).view(rows, per_row)
        cells = []
        for rank in ranks:
            x, b = torch.empty(rows, columns), torch.empty(0, columns, dtype=torch.bfloat16)
            shipped = plans.is_one_launch(x, [b], per_row, rank)
            alone, pair = microseconds([one(ids, rank, columns)]), two(ids, rank, columns)
            stars = ("*", " ") if shipped else (" ", "*")
            cells.append(f"{alone:.2f}{stars[0]} / {microseconds(pair):.2f}{stars[1]}")
        yield f"{rows:>4d}{per_row:>3d}" + "".join(f"{cell:>18s}" for cell in cells)


def tiles() -> Iterator[str]:
    """What each tile of expand would cost on works of many kinds; rank 16, bfloat16."""
    works = [
        ("64 rows, 1 of 4, 1024", sample_ids("uniform", 64, 1, 4), 1024),
        ("64 rows, 4 of 16, 1024", sample_ids("uniform", 64, 4, 16), 1024),
        ("8 rows, 2 of 8, 4096", sample_ids("distinct", 8, 2, 8), 4096),
        ("32 rows, 4 of 64, 4096", sample_ids("uniform", 32, 4, 64), 4096),
        ("256 rows, 4 of 64, 4096", sample_ids("uniform", 256, 4, 64), 4096),
        ("512 rows, 3 of 64, 1024", sample_ids("uniform", 512, 3, 64), 1024),
    ]
    sizes = [(16, 64), (32, 32), (32, 64), (64, 32), (64, 64), (64, 128)]
    yield "expand: microseconds (bytes through L2 / compulsory, programs); * = shipped"
    yield f"{'work':<26s}" + "".join(f"{f'{n} x {o}':>20s}" for n, o in sizes)
    for name, ids, columns in works:
        rows, used = len(ids), ids.unique().numel()
        compulsory = (used * 16 + 2 * rows) * columns * BF16
        shipped = launch.FEW if rows <= 64 else launch.MANY
        cells = []
        for n, o in sizes:
            moved = two(ids, 16, columns, launch.Tile(n, o, 4, o))[1]
            star = "*" if (n, o) == shipped[:2] else " "
            ratio = moved.total / compulsory
            cells.append(f"{moved.microseconds:.2f}{star}({ratio:.1f}, {moved.programs})")
        yield f"{name:<26s}" + "".join(f"{cell:>20s}" for cell in cells)


if __name__ == "__main__":
    print(*tiles(), "", *one_or_two(), "", *one_or_two(1024), sep="\n")
