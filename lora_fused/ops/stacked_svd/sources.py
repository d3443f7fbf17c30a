"""What stacked_svd factorises, behind one method: sweep, a pass over all rows.

A source knows its rows as pieces [L, T, I]: one tensor, chunks of one, or products of factors
(factored.py). Whatever a sweep returns is summed over the process group.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from lora_fused.checks import invalid, shape
from lora_fused.ops.stacked_svd.contract import OP, STORAGE, check_rank
from lora_fused.ops.stacked_svd.group import Group
from lora_fused.ops.stacked_svd.reference import blocks
from lora_fused.ops.stacked_svd.registration import Pass

# float32 squares of row norms in this range neither overflow nor vanish.
SAFE = (1e-15, 1e15)
UNSCALED = 12  # largest row norms of 2^-12 to 2^12 are left as they are

TRACED = 1 << 13  # rows whose squares float32 adds up as well as norms of single rows


class Rows:
    """Rows held as one tensor [L, T, I]; also what the other sources share.

    Attributes:
        layers, columns, device, dtype: dtype is what is computed in.
        rows: here, T; known to a stream once it was read.
        once: the rows can be read a single time.
        scale: [L] powers of two that bring the largest row norm near 1.
        total: [L] float64, squared Frobenius norm of the (unscaled) matrix, over the group.
    """

    def __init__(
        self,
        x: Tensor,
        weights: Tensor | None,
        run: Pass,
        seed: int,
        group: Group,
        first_layer: int = 0,
    ):
        self.x, self.weights, self.first_layer = x, weights, first_layer
        self.layers, rows, self.columns = x.shape
        self.device = x.device
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.run, self.seed, self.group = run, seed, group
        self.mean: Tensor | None = None
        self.rows: int | None = rows
        self.scale = torch.ones(self.layers, dtype=self.dtype, device=self.device)
        self.total = torch.zeros(self.layers, dtype=torch.float64, device=self.device)
        self.measured = False
        self.once = False
        self.in_memory = True  # as one piece
        self.rank: int | None = None  # refused as soon as the rows are known to be too few

    def pieces(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Where (for messages), rows [L, t, I] and their weights [L, t]."""
        yield "", self.x, self.weights

    def sweep(
        self,
        basis: Tensor | None,
        width: int = 0,
        *,
        want_y: bool = True,
        want_z: bool = True,
        y: Tensor | None = None,
        run: Callable | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """y = scale * M @ basis of the rows here, and z = scale * y^T @ M over the group.

        basis [L, I, Q]; None: the test matrix of ``width`` columns. y [L, T, Q], z [L, Q, I].
        A later sweep than the first writes into ``y`` if given. ``run`` stands in for the
        implementation's pass.
        """
        run = run or self.run
        if not self.measured:
            return self.group.together(lambda: self._first(run, basis, width, want_y, want_z))
        z, done = None, 0
        if want_y and y is None:
            y = torch.empty(
                self.layers, self.rows, basis.shape[-1], dtype=self.dtype, device=self.device
            )
        for _, x, weights in self.pieces():
            part_y, part_z = self._run(run, x, weights, basis, width, want_y, want_z)
            if done + x.shape[1] <= self.rows and want_y:
                y[:, done : done + x.shape[1]] = part_y
            z = part_z if z is None else z.add_(part_z)
            done += x.shape[1]
        if done != self.rows:
            rule = f"give the same {self.rows} rows each time it is iterated"
            raise invalid(OP, "stack", rule, done)
        return y, self._reduced(z, want_z)

    def gram(self) -> Tensor:
        """N^T N of the scaled matrix N over the group, [L, I, I]: a first sweep of its own."""
        return self.group.together(self._first_gram)

    def residual(self, u: Tensor, s: Tensor, vh: Tensor) -> Tensor:
        """||M - u diag(s) vh||_F^2 of the scaled matrix [L], measured block by block in float64."""
        found, done = torch.zeros_like(self.total), 0
        right = s[..., None].double() * vh.double()
        for _, x, weights in self.pieces():
            for l, t in blocks(x):
                m = self.rows_of(x, weights, l, t, torch.float64) * self.scale[l, None, None]
                at = slice(done + t.start, done + t.start + m.shape[1])
                m = torch.baddbmm(m, u[l, at].double(), right[l], alpha=-1)
                found[l] += m.square().sum((1, 2))
            done += x.shape[1]
        return self.group.sum(found)

    def all_rows(self) -> int:
        """T over the group."""
        return int(self.group.sum(torch.tensor(float(self.rows), device=self.device)))

    def center(self) -> None:
        """Find the mean row, weighted by the squares of the weights: one pass of its own."""
        found = torch.zeros(self.layers, self.columns, dtype=torch.float64, device=self.device)
        counted = torch.zeros(self.layers, 1, dtype=torch.float64, device=self.device)
        for _, x, weights in self.pieces():
            share = x.new_ones(x.shape[:2], dtype=self.dtype) if weights is None else weights**2
            for l, t in blocks(x):
                part = share[l, t].unsqueeze(1) @ x[l, t].to(self.dtype)
                found[l] += part.squeeze(1).double()
            counted += share.sum(1, keepdim=True, dtype=torch.float64)
        found, counted = self.group.sum(found), self.group.sum(counted)
        self.mean = (found / counted.clamp_min(torch.finfo(torch.float64).tiny)).to(self.dtype)

    def _first(self, run, basis, width, want_y, want_z):
        parts_y, z = [], None
        for x, weights, change in self._measured():
            z = _times(change, parts_y, z)
            part_y, part_z = self._run(run, x, weights, basis, width, want_y, want_z)
            parts_y.append(part_y)
            z = part_z if z is None else z.add_(part_z)

        def finish():
            change = self._agree()
            found_z = _times(change, parts_y, z)
            return self._joined(parts_y, want_y), self._reduced(found_z, want_z)

        return finish

    def _first_gram(self):
        size = (self.layers, self.columns, self.columns)
        g = torch.zeros(size, dtype=self.dtype, device=self.device)
        if not self._traced(g):
            g.zero_()
            for x, weights, change in self._measured():
                _times(change, [g], g)  # twice, where the square may overflow
                self.run.gram(g, x, weights, self.mean, self.scale, self.in_memory)
            if not self.in_memory:
                none = g.new_empty(self.layers, 0, self.columns)
                self.run.gram(g, none, None, None, self.scale, True)

        def finish():
            return self.group.sum(_times(self._agree(), [g], g))

        return finish

    def _traced(self, g: Tensor) -> bool:
        """Find g and, from its diagonal, the total without another reading; False: not sound."""
        if not self.in_memory or self.rows > TRACED:
            return False
        self.run.gram(g, self.x, self.weights, self.mean, self.scale, True)
        squares = g.diagonal(dim1=-2, dim2=-1).double()
        largest = squares.amax(-1).sqrt()
        if not bool(((largest > 2.0**-UNSCALED) & (largest < 2.0**UNSCALED)).all()):
            return False  # to be scaled, or not finite
        self.total, self.largest, self.measured = squares.sum(-1), largest, True
        return True

    def _measured(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """Pieces of the first sweep, checked and measured, and by how much the scale changed.

        It may still change as rows come; what was found before is then to be multiplied.
        """
        rows, self.largest = 0, self.total.clone()
        for where, x, weights in self.pieces():
            total, norm = self._measure(where, x, weights)
            self.total += total
            self.largest = torch.maximum(self.largest, norm)
            yield x, weights, self._rescale(self.largest)
            rows += x.shape[1]
        if rows == 0 and self.group.size == 1:
            raise invalid(OP, "stack", "have at least one row", "none")
        if self.weights is not None and self.weights.shape[1] != rows:
            rule = f"be [{rows}], one for each row of stack"
            raise invalid(OP, "weights", rule, f"[{self.weights.shape[1]}]")
        self.rows, self.measured = rows, True

    def _agree(self) -> Tensor | None:
        """Bring ranks to one scale; the change of it here."""
        check_rank(self.rank, self.all_rows(), self.columns)
        self.total = self.group.sum(self.total)
        return self._rescale(self.group.largest(self.largest))

    def _run(self, run, x, weights, basis, width, want_y, want_z):
        args = (x, weights, self.mean, basis, self.scale, self.seed, width, want_y, want_z)
        return run(*args)

    def _rescale(self, largest: Tensor) -> Tensor | None:
        scale = _power_of_two(largest, self.dtype)
        change, self.scale = (scale / self.scale)[:, None, None], scale
        return None if bool((change == 1).all()) else change

    def _joined(self, parts: list[Tensor], wanted: bool) -> Tensor | None:
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)) if wanted else None

    def _reduced(self, z: Tensor | None, wanted: bool) -> Tensor | None:
        if not wanted:
            return None
        plain = bool((self.scale == 1).all())
        return self.group.sum(z if plain else z.mul_(self.scale[:, None, None]))

    def rows_of(self, x, weights, l: slice, t: slice, dtype: torch.dtype) -> Tensor:
        m = x[l, t].to(dtype)
        if self.mean is not None:
            m = m - self.mean[l, None].to(dtype)
        return m if weights is None else m * weights[l, t, None].to(dtype)

    def _measure(self, where: str, x: Tensor, weights) -> tuple[Tensor, Tensor]:
        """Sum of squares and largest norm of a row (or column) in float64; all must be finite."""
        total, largest = torch.zeros_like(self.total), torch.zeros_like(self.total)
        plain = weights is None and self.mean is None
        for l, t in blocks(x):
            m = x[l, t] if plain else self.rows_of(x, weights, l, t, self.dtype)
            along = -1 if m.stride(-1) == 1 else -2  # as it lies in memory
            norms = torch.linalg.vector_norm(m, dim=along, dtype=self.dtype).double()
            top = norms.amax(1)
            if not bool(((top > SAFE[0]) & (top < SAFE[1])).all()):
                if not bool(x[l, t].isfinite().all()):
                    raise self.not_finite(where, x)
                norms = torch.linalg.vector_norm(m, dim=along, dtype=torch.float64)
                top = norms.amax(1)
            total[l] += norms.square().sum(1)
            largest[l] = torch.maximum(largest[l], top)
        return total, largest

    def not_finite(self, where: str, x: Tensor) -> ValueError:
        at = (~x.isfinite()).nonzero()[0].tolist()
        layer = at[0] + self.first_layer
        row = f"row {at[1]} of layer {layer}" if layer or self.layers > 1 else f"row {at[1]}"
        return invalid(OP, "stack", "be finite", f"{x[tuple(at)].item()} in {row}{where}")


class Chunks(Rows):
    """Rows that come in chunks [t, I] from an iterable, which each sweep iterates anew."""

    def __init__(self, chunks: Iterable, weights, run: Pass, seed: int, group: Group):
        self.chunks = chunks
        first = next(iter(chunks), None) if not isinstance(chunks, Iterator) else None
        self.ahead = None
        if isinstance(chunks, Iterator):
            first = self.ahead = next(chunks, None)
        if first is None:
            raise invalid(OP, "stack", "have at least one chunk", "none")
        _check_chunk(first, 0, first)
        super().__init__(first[None], weights, run, seed, group)
        # A reference to the first chunk would keep it in memory through every sweep.
        self.like, self.x, self.rows = first[:0].clone(), None, None
        self.once = isinstance(chunks, Iterator)
        self.in_memory = False

    def pieces(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        done, ahead, self.ahead = 0, self.ahead, None
        for number, chunk in enumerate(_with(ahead, self.chunks)):
            _check_chunk(chunk, number, self.like)
            at = slice(done, done + len(chunk))
            done = at.stop
            part = None if self.weights is None else self.weights[:, at]
            if part is not None and part.shape[1] != len(chunk):
                rule = "have one entry for each row of stack"
                raise invalid(OP, "weights", rule, f"{self.weights.shape[1]}, fewer than rows")
            if len(chunk):
                yield f" of chunk {number}", chunk[None], part


def _with(first: Tensor | None, rest: Iterable) -> Iterator[Tensor]:
    if first is not None:
        yield first
    yield from rest


def _check_chunk(chunk: object, number: int, like: Tensor) -> None:
    label = f"stack (chunk {number})"
    if not isinstance(chunk, Tensor) or chunk.dim() != 2:
        got = shape(chunk) if isinstance(chunk, Tensor) else type(chunk).__name__
        raise invalid(OP, label, "be a tensor [T, I]", got)
    if chunk.dtype not in (*STORAGE, torch.float64):
        raise invalid(OP, label, "be floating point", chunk.dtype)
    if chunk.shape[1] != like.shape[1]:
        rule = f"have {like.shape[1]} columns like chunk 0"
        raise invalid(OP, label, rule, chunk.shape[1])
    if chunk.dtype != like.dtype or chunk.device != like.device:
        rule = f"be {like.dtype} on {like.device} like chunk 0"
        raise invalid(OP, label, rule, f"{chunk.dtype} on {chunk.device}")


def _times(change: Tensor | None, parts_y: list[Tensor], z: Tensor | None) -> Tensor | None:
    for t in () if change is None else (*parts_y, z):
        if t is not None and t.numel():
            t *= change
    return z


def _power_of_two(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """2^-e for the least e with largest < 2^e; 1 where squares of sums are safe without it."""
    exponent = torch.frexp(largest).exponent.clamp(-120, 120)
    exponent = torch.where(exponent.abs() > UNSCALED, exponent, torch.zeros_like(exponent))
    return torch.ldexp(torch.ones_like(largest), -exponent).to(dtype)
