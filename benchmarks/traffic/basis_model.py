"""How long subspace_lora's launches should take on an H100, by the model of model.py.

    python -m benchmarks.traffic.basis_model

This chose the tiles of its own Triton kernels. Nothing here was measured on a GPU; that the bytes
are those that the kernels move is tested against the counter.
"""

from collections.abc import Iterator

from benchmarks.traffic.model import BF16, FLOAT32, LAUNCH, Moved, microseconds
from lora_fused.ops.subspace_lora.triton_impl.launch import LIFT, PROJECT, Tile, slice_of, tile_of

P = 128


def project(
    rows: int, columns: int, tile: Tile, width: int, cores: int = 0, used: int = 0
) -> Moved:
    """z, or slices of it, and t where rows have ``cores`` diagonal cores, ``used`` in all."""
    slices, width = -(-columns // width), min(width, columns)
    n, p = min(tile.rows, rows), min(tile.columns, P)
    z = FLOAT32 * (2 if cores else 1)
    each = (n + p) * width * BF16 + n * p * (z + cores * BF16)
    programs = -(-rows // tile.rows) * -(-P // tile.columns) * slices
    dram = (rows + P) * columns * BF16 + rows * P * z * slices + used * P * BF16
    return Moved(dram, each * programs, each, programs)


def pairs(rows: int, per_row: int, rank: int, used: int) -> Moved:
    """The cores of a row in one program, which reads z and writes t."""
    core = 2 * rank * P * BF16
    each = per_row * core + 2 * P * FLOAT32
    return Moved(rows * 2 * P * FLOAT32 + used * core, each * rows, each, rows)


def lift(rows: int, columns: int, tile: Tile) -> Moved:
    """base + t basis_b."""
    n, c = min(tile.rows, rows), min(tile.columns, columns)
    each = n * P * FLOAT32 + P * c * BF16 + 2 * n * c * BF16
    programs = -(-rows // tile.rows) * -(-columns // tile.columns)
    dram = rows * P * FLOAT32 + P * columns * BF16 + 2 * rows * columns * BF16
    return Moved(dram, each * programs, each, programs)


def shipped(rows: int, columns: int) -> tuple[Moved, Moved]:
    """Project and lift without cores, in the tiles that are shipped."""
    width = slice_of(rows, columns)
    first = project(rows, columns, tile_of(PROJECT, rows, False), width)
    return first, lift(rows, columns, tile_of(LIFT, rows, False))


def tiles(kernel: str, columns: int) -> Iterator[str]:
    """What each tile would cost for batches of many sizes, P = 128, bfloat16."""
    table, sizes = {
        "project": (PROJECT, [(16, 16), (16, 32), (32, 32), (32, 64), (64, 64), (128, 64)]),
        "lift": (LIFT, [(16, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)]),
    }[kernel]
    yield f"{kernel}: microseconds (programs), {columns} wide; * = shipped"
    yield f"{'rows':>6s}" + "".join(f"{f'{n} x {c}':>16s}" for n, c in sizes)
    for rows in (1, 16, 64, 256, 512, 1024, 4096, 16384):
        cells = []
        for n, c in sizes:
            tile = Tile(n, c, 64, 4)
            if kernel == "project":
                moved = project(rows, columns, tile, slice_of(rows, columns))
            else:
                moved = lift(rows, columns, tile)
            star = "*" if (n, c) == tile_of(table, rows, False)[:2] else " "
            cells.append(f"{moved.microseconds:.2f}{star}({moved.programs})")
        yield f"{rows:>6d}" + "".join(f"{cell:>16s}" for cell in cells)


def slices(columns: int) -> Iterator[str]:
    """A whole row of x a program, or slices and one launch more that adds them."""
    yield f"project, {columns} wide: whole rows / slices of 2048 / of 1024, microseconds"
    for rows in (1, 16, 64, 256, 1024):
        cells = []
        for width in (columns, 2048, 1024):
            moved = project(rows, columns, tile_of(PROJECT, rows, False), width)
            count = -(-columns // width)
            z = rows * P * FLOAT32
            added = Moved(z * (count + 1), z * (count + 1), 16 * 16 * FLOAT32 * (count + 1), 8)
            launches = [moved] if count == 1 else [moved, added]
            cells.append(f"{microseconds(launches):.2f}")
        yield f"{rows:>6d}" + "".join(f"{cell:>10s}" for cell in cells)


if __name__ == "__main__":
    for lines in (*(tiles(k, c) for k in ("project", "lift") for c in (2048, 4096)),
                  *(slices(c) for c in (2048, 4096, 8192, 14336))):  # fmt: skip
        print(*lines, "", sep="\n")
    print(f"and {LAUNCH} microseconds a launch")
