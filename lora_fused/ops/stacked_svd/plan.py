"""Which method is cheapest, from sizes alone."""

FIRST_WIDTH = 32  # block of a search for energy, whose rank nobody knows
# Measured on one AVX-512 core, float32, as shares of the best product's rate: a product with a
# sketch runs at two thirds of it, an eigendecomposition of side m costs 25 m^3, and
# orthonormalising and rotating D columns of length n costs 6 n D^2.
SKETCH, EIGEN, ORTHONORMAL = 1.5, 25.0, 6.0
GRAM = 0.6  # of a product: one triangle and what tiles stand over
BLIND = 2.0  # times what a Krylov basis costs, where it must grow to an unknown width
SMALL_SIDE, SMALL_SIZE = 64, 1 << 20  # where LAPACK's SVD costs less than thinking about it


def choose_method(
    rows: int | None, columns: int, width: int | None, iterations: int, either_side: bool
) -> str:
    """The cheapest of exact, gram and krylov for M [T, I] and a sketch of ``width`` columns.

    rows None: a stream, taken to be long. width None: the rank is not known. either_side: the Gram
    matrix may be that of the rows.
    """
    side = columns if rows is None or not either_side else min(rows, columns)
    if rows is not None and side <= SMALL_SIDE and rows * columns <= SMALL_SIZE:
        return "exact"
    blind = BLIND if width is None else 1.0
    width = FIRST_WIDTH * 4 if width is None else width
    if iterations == 0:
        return "randomized"
    if width >= side:
        return "gram"
    length = 64 * columns if rows is None else rows
    size = float(length) * columns
    block, steps = block_width(width), krylov_steps(iterations)
    krylov = SKETCH * size * block * (2 * steps + 1)
    krylov += ORTHONORMAL * (length + columns) * (block * steps) ** 2
    gram = GRAM * size * side + SKETCH * size * width
    gram += min(EIGEN * side**3, 10.0 * side * (4 * width) ** 2)
    return "gram" if gram < blind * krylov else "krylov"


def block_width(width: int) -> int:
    """Columns of a Krylov block: half a sketch's, in sixteens (up to 16 more take no longer)."""
    return -(-width // 32) * 16


def krylov_steps(iterations: int) -> int:
    """Blocks of a Krylov basis: with q = 0 as many columns as a sketch, one more for each."""
    return iterations + 2


def gram_steps(iterations: int) -> int:
    """The same on a Gram matrix in memory, where blocks are a third and steps cost little."""
    return 2 * iterations + 3
