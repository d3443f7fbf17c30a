"""The methods of stacked_svd: each finds a basis of right vectors, then reads off the SVD there.

All work on the scaled matrix of a source and return (u, s, vh) of every component that was found,
or the ``count`` largest; ``Wanted`` says how many are asked for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fused.ops.stacked_svd.gram_matrix import leading_vectors
from lora_fused.ops.stacked_svd.group import Group
from lora_fused.ops.stacked_svd.orthonormal import extend, tall_qr
from lora_fused.ops.stacked_svd.plan import (
    FIRST_WIDTH,
    block_width,
    gram_steps,
    krylov_steps,
)
from lora_fused.ops.stacked_svd.reference import blocks
from lora_fused.ops.stacked_svd.sources import Rows

Factors = tuple[Tensor, Tensor, Tensor]

SMALLEST = 1e-5  # ratio of singular values down to which a float64 Gram matrix of y is used
WIDE = 0.02  # ratio down to which float32 keeps what it is divided by orthonormal
GRAM_NOISE = 3e-3  # below this ratio a Gram matrix in float32 holds no singular vector


@dataclass
class Wanted:
    """Either a rank or the fraction of the energy that the components must hold."""

    rank: int | None
    energy: float | None
    oversampling: int
    iterations: int

    def count(self, s: Tensor, total: Tensor, complete: bool = True) -> int | None:
        """How many of the components s [L, D] are wanted; None where s does not show it yet.

        Squares of s never exceed the true ones, so a fraction that they reach is certain. Unless
        the subspace is ``complete``, a quarter of it must remain: what lies near its end is too
        small, and would make the count too large.
        """
        if self.rank is not None:
            return self.rank
        held = s.double().square().cumsum(-1)
        # The whole matrix holds all of its energy, but for the rounding.
        short = held < self.energy * total[:, None] * (1 - 1e-6)
        count = int(short.sum(-1).max()) + 1
        spare = 0 if complete else max(self.oversampling, s.shape[-1] // 4)
        return count if count <= s.shape[-1] - spare else None


def randomized(source: Rows, wanted: Wanted) -> Factors:
    """Subspace iteration, an orthonormalisation after every half step's worth of squares."""
    width = (wanted.rank or FIRST_WIDTH) + wanted.oversampling
    while True:
        width = min(width, source.columns)
        if wanted.iterations == 0:
            y, z = source.sweep(None, width)
            u, s, vh = _from_sketch(y, z, source.group)
        else:
            _, z = source.sweep(None, width, want_y=False)
            basis = _agreed(source, extend(None, z.mT))
            u, s, vh = _iterated(source, basis, wanted.iterations - 1)
        full = width >= min(source.columns, source.all_rows())
        total = source.total * source.scale.double() ** 2
        count = wanted.count(s, total, complete=full)
        if count is not None or full:
            return _cut(u, s, vh, count)
        width *= 2


def krylov(source: Rows, wanted: Wanted) -> Factors:
    """Block Krylov: every block that was multiplied stays in the basis.

    For a rank, blocks of half the width and q + 2 steps, whose exponents grow with each; q = 0
    still yields as many columns as the sketch has. For an energy, steps until it is certain.
    """
    if wanted.rank is None:
        width, steps = FIRST_WIDTH, None
    else:
        width = min(block_width(wanted.rank + wanted.oversampling), source.columns)
        steps = krylov_steps(wanted.iterations)
    _, z = source.sweep(None, min(width, source.columns), want_y=False)
    limit = min(source.columns, source.all_rows())
    newest = _agreed(source, extend(None, z.mT[..., :limit]))
    room = min(width * (steps or 8), limit)
    basis, y = Columns(source.columns, room, newest), Columns(source.rows, room, newest)
    total = source.total * source.scale.double() ** 2
    basis.append(newest)
    step = 0
    while True:
        step += 1
        width = min(width, limit - basis.width)
        last = width == 0 or step == steps
        _, z = source.sweep(newest, want_z=not last, y=y.next(newest.shape[-1]))
        if last or (steps is None and step > wanted.iterations):
            found = TallSvd(y.used, source.group)
            count = wanted.count(found.s, total, complete=width == 0)
            if last or count is not None:
                u, s, v = found.leading(count)
                return u, s, (basis.used @ v).mT
        newest = _agreed(source, extend(basis.used, z.mT[..., :width]))
        basis.append(newest)


class Columns:
    """A matrix [L, n, D] that grows by columns in place."""

    def __init__(self, length: int, room: int, like: Tensor):
        self.all = like.new_empty(like.shape[0], length, room)
        self.width = 0

    @property
    def used(self) -> Tensor:
        return self.all[..., : self.width]

    def next(self, width: int) -> Tensor:
        """Room for ``width`` more columns, to be filled in."""
        if self.width + width > self.all.shape[-1]:
            self.all = torch.cat([self.all, torch.empty_like(self.all)], -1)
        self.width += width
        return self.all[..., self.width - width : self.width]

    def append(self, columns: Tensor) -> None:
        self.next(columns.shape[-1]).copy_(columns)


def gram(source: Rows, wanted: Wanted) -> Factors:
    """Eigenvectors of M^T M as a basis; squares lose small singular values, so those iterate."""
    g = source.gram()
    side = g.shape[-1]
    if wanted.rank is None:
        power, turn = torch.linalg.eigh(g)
        s = power.flip(-1).clamp_min(0).sqrt()
        estimate = wanted.count(s, s.double().square().sum(-1)) or side
        turn = turn.flip(-1)
        first = turn[..., : min(estimate + wanted.oversampling, side)]
    else:
        width, steps = min(wanted.rank + wanted.oversampling, side), gram_steps(wanted.iterations)
        turn = leading_vectors(g, width, steps, source.seed)
        first = turn[..., : wanted.rank]
    u, s, vh = _iterated(source, _agreed(source, first), 0, wanted.rank)
    total = source.total * source.scale.double() ** 2
    count = wanted.count(s, total)
    short = count is None or bool((s[:, count - 1] < GRAM_NOISE * s[:, 0]).any())
    if short and (count is None or first.shape[-1] < side):
        u, s, vh = _iterated(source, _agreed(source, turn), max(wanted.iterations, 1))
        count = wanted.count(s, total)
    return _cut(u, s, vh, count)


def exact(source: Rows, wanted: Wanted) -> Factors:
    """LAPACK's (or cuSOLVER's) SVD of the whole matrix."""
    source.sweep(None, want_y=False, want_z=False, run=_measure_only)
    parts = []
    for _, x, weights in source.pieces():
        m = source.rows_of(x, weights, slice(None), slice(None), source.dtype)
        parts.append(m * source.scale[:, None, None])
    u, s, vh = torch.linalg.svd(torch.cat(parts, 1), full_matrices=False)
    return _cut(u, s, vh, wanted.count(s, source.total * source.scale.double() ** 2))


class TallSvd:
    """The SVD of y [L, T here, D]: s and v at once, the left vectors for as many as are wanted."""

    def __init__(self, y: Tensor, group: Group):
        self.y, self.group = y, group
        self.q: Tensor | None = None
        power, turn = torch.linalg.eigh(group.sum(_gram64(y)))
        self.s = power.flip(-1).clamp_min(0).sqrt()
        self.v = group.same(turn.flip(-1))

    def leading(self, count: int | None) -> Factors:
        """u, s and v of the ``count`` largest (None: all), in y's dtype."""
        s, v = self.s[:, :count], self.v[..., :count]
        if self.y.dtype == torch.float64 or bool((s[:, -1] <= SMALLEST * s[:, 0]).any()):
            return self._by_reflections(count)
        dtype = self.y.dtype
        if bool((s[:, -1] > WIDE * s[:, 0]).all()):
            return self.y @ (v / s[:, None]).to(dtype), s.to(dtype), v.to(dtype)
        u = torch.empty(*self.y.shape[:2], s.shape[-1], dtype=dtype, device=s.device)
        for l, t in blocks(self.y):
            u[l, t] = (self.y[l, t].double() @ (v[l] / s[l, None])).to(u.dtype)
        return u, s.to(u.dtype), v.to(u.dtype)

    def _by_reflections(self, count: int | None) -> Factors:
        q, r = tall_qr(self.y, self.group)
        turn, s, vh = (self.group.same(t) for t in torch.linalg.svd(r, full_matrices=False))
        return q @ turn[..., :count], s[:, :count], vh.mT[..., :count]


def _iterated(source: Rows, basis: Tensor, iterations: int, count: int | None = None) -> Factors:
    for _ in range(iterations):
        _, z = source.sweep(basis, want_y=False)
        basis = _agreed(source, extend(None, z.mT))
    y, _ = source.sweep(basis, want_z=False)
    u, s, v = TallSvd(y, source.group).leading(count)
    return u, s, (basis @ v).mT


def _from_sketch(y: Tensor, z: Tensor, group: Group) -> Factors:
    """One pass: y = M omega = q r and z = y^T M give q^T M = r^-T z, and its SVD that of M."""
    q, r = tall_qr(y, group)
    left, size, right = torch.linalg.svd(r, full_matrices=False)
    # Rounding of z grows by the inverse; directions below this are noise either way.
    kept = size > size[:, :1] * torch.finfo(y.dtype).eps ** 0.5
    inverse = torch.where(kept, 1 / torch.where(kept, size, 1.0), 0.0)
    small = group.same(left @ (inverse[..., None] * (right @ z)))
    turn, s, vh = torch.linalg.svd(small, full_matrices=False)
    return q @ group.same(turn), group.same(s), group.same(vh)


def _gram64(y: Tensor) -> Tensor:
    found = y.new_zeros(y.shape[0], y.shape[2], y.shape[2], dtype=torch.float64)
    for l, t in blocks(y):
        part = y[l, t].double()
        found[l].baddbmm_(part.mT, part)
    return found


def _agreed(source: Rows, basis: Tensor) -> Tensor:
    return source.group.same(basis)


def _cut(u: Tensor, s: Tensor, vh: Tensor, count: int | None) -> Factors:
    return u[..., :count], s[:, :count], vh[:, :count]


def _measure_only(x: Tensor, *_) -> tuple[Tensor, Tensor]:
    return x.new_empty(0), x.new_empty(0)
