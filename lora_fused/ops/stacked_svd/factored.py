"""Stacks that are given by their factors, and are never multiplied out as a whole."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fused.ops.stacked_svd.group import Group
from lora_fused.ops.stacked_svd.reference import signs
from lora_fused.ops.stacked_svd.registration import Pass
from lora_fused.ops.stacked_svd.sources import Rows

FORMS = ("rows", "columns", "sum")
BLOCK_ROWS = 256  # rank rows, or rows of the sum, that are formed at a time


@dataclass
class FactoredStack:
    """The matrix of all updates D_k = scale[k] * B_k A_k of a packed stack of adapters.

    Attributes:
        lora_a: ``[T, I]``, one row per rank component, adapter after adapter.
        lora_b: ``[T, O]``, B transposed, as mixture_lora reads it.
        row_start: ``[K + 1]`` int32, first row of each adapter.
        scale: ``[K]``; default: ones.
        form: ``"rows"``: D_k below one another, ``[K * O, I]``. ``"columns"``: side by side,
            ``[O, K * I]``. ``"sum"``: their sum, ``[O, I]``.

    At most T components can be asked for; where ``s`` is zero, the vectors of ``rows`` and
    ``columns`` on the stacked side may be zero too.
    """

    lora_a: Tensor
    lora_b: Tensor
    row_start: Tensor
    scale: Tensor | None = None
    form: str = "rows"


class FactoredRows(Rows):
    """D_k below one another. With B_k^T B_k = L_k^T L_k, an isometry of the stack of L_k A_k.

    So the [T, I] stack with the rows mixed inside each adapter has the same singular values and
    right vectors, and ``lift`` finds the left vectors.
    """

    def __init__(self, inner, outer, starts, scale, run: Pass, seed: int, group: Group):
        super().__init__(inner[None], None, run, seed, group)
        self.inner, self.outer, self.starts = inner, outer, starts
        self.in_memory = False
        self.roots: list[Tensor] = []
        self.inverses: list[Tensor] = []
        for k, factor in enumerate(scale.double().tolist()):
            b = outer[starts[k] : starts[k + 1]].double()
            power, turn = torch.linalg.eigh(b @ b.mT)
            root = power.clamp_min(0).sqrt()
            kept = power > power[-1:] * 1e-12
            self.roots.append(((factor * root)[:, None] * turn.mT).to(self.dtype))
            inverse = torch.where(kept, 1 / torch.where(kept, root, 1.0), 0.0)
            self.inverses.append((turn * inverse).to(self.dtype))

    def pieces(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        first = 0
        while first < len(self.roots):
            last = first + 1
            limit = self.starts[first] + BLOCK_ROWS
            while last < len(self.roots) and self.starts[last + 1] <= limit:
                last += 1
            yield f" of adapters {first} to {last - 1}", self._block(first, last)[None], None
            first = last

    def lift(self, u: Tensor) -> Tensor:
        """Left vectors [1, K * O, P] of the updates from those of the rows [1, T, P]."""
        count, out = len(self.roots), self.outer.shape[1]
        lifted = u.new_zeros(1, count * out, u.shape[-1])
        for k, inverse in enumerate(self.inverses):
            at = slice(self.starts[k], self.starts[k + 1])
            small = inverse @ u[0, at]
            lifted[0, k * out : (k + 1) * out] = self.outer[at].to(self.dtype).mT @ small
        return lifted

    def _block(self, first: int, last: int) -> Tensor:
        begin, end = self.starts[first], self.starts[last]
        rows = self.inner[begin:end].to(self.dtype)
        ranks = {len(root) for root in self.roots[first:last]}
        if len(ranks) == 1:
            mixed = torch.stack(self.roots[first:last]) @ rows.view(last - first, *ranks, -1)
            return mixed.flatten(0, 1)
        spans = zip(self.roots[first:last], range(first, last), strict=True)
        parts = [m @ rows[self.starts[k] - begin : self.starts[k + 1] - begin] for m, k in spans]
        return torch.cat(parts)


class FactoredSum(Rows):
    """The sum of all D_k, lora_b^T diag(scale) lora_a, applied factor by factor."""

    def __init__(self, inner, outer, row_scale, run: Pass, seed: int, group: Group):
        super().__init__(inner.new_empty(1, outer.shape[1], inner.shape[1]), None, run, seed, group)
        self.x, self.in_memory = None, False
        self.inner, self.outer = inner, outer
        self.row_scale = row_scale.to(self.dtype)[:, None]

    def pieces(self) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Rows of the sum; asked for where its entries themselves are measured."""
        for t in range(0, self.rows, BLOCK_ROWS):
            part = self.outer[:, t : t + BLOCK_ROWS].to(self.dtype) * self.row_scale
            yield "", self._times(part.mT, self.inner)[None], None

    def sweep(self, basis, width=0, *, want_y=True, want_z=True, y=None, run=None):
        if run is not None:
            return super().sweep(basis, width, want_y=want_y, want_z=want_z, run=run)
        if not self.measured:
            super().sweep(None, want_y=False, want_z=False, run=_nothing)
        if basis is None:
            basis = signs(self.seed, 0, self.columns, width, self.device, self.dtype)[None]
        found = self._through(basis[0], self.inner, self.outer) * self.scale
        z = (self._through(found, self.outer, self.inner) * self.scale).mT if want_z else None
        if y is not None:
            y[0] = found
        return (found[None] if y is None else y), None if z is None else z[None]

    def _through(self, right: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """second^T (row_scale * (first @ right)), in blocks of rank rows."""
        found = right.new_zeros(second.shape[1], right.shape[1])
        for t in range(0, len(first), BLOCK_ROWS):
            at = slice(t, t + BLOCK_ROWS)
            small = first[at].to(self.dtype) @ right * self.row_scale[at]
            found.addmm_(second[at].to(self.dtype).mT, small)
        return found

    def _times(self, left: Tensor, right: Tensor) -> Tensor:
        found = left.new_zeros(left.shape[0], right.shape[1])
        for t in range(0, left.shape[1], BLOCK_ROWS):
            at = slice(t, t + BLOCK_ROWS)
            found.addmm_(left[:, at], right[at].to(self.dtype))
        return found


def core_of_sum(inner: Tensor, outer: Tensor, row_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal q_out [O, T], q_in [I, T] and the core [T, T] with sum = q_out core q_in^T."""
    dtype = torch.float64 if inner.dtype == torch.float64 else torch.float32
    q_in, r_in = torch.linalg.qr(inner.mT.to(dtype))
    q_out, r_out = torch.linalg.qr(outer.mT.to(dtype))
    return q_out, q_in, (r_out * row_scale.to(dtype)) @ r_in.mT


def _nothing(x, *_) -> tuple[Tensor, Tensor]:
    return x.new_empty(0), x.new_empty(0)
