"""The frozen half of a subspace: orthonormal directions that all adapters of a layer share."""

import torch
from torch import Tensor, nn

from lora_fused.adapters import AdapterStack
from lora_fused.checks import invalid
from lora_fused.methods.products import Updates
from lora_fused.ops import stacked_svd


class Directions(nn.Module):
    """One side of a layer's basis: orthonormal rows, and how much of the adapters lies along each.

    Attributes:
        basis: ``[P, I]``: where ``keeps_mean``, the mean's direction first; then principal
            directions (of what the mean does not hold), strongest first; ``augmented`` random ones
            last.
        spectrum: ``[P]``: root of the energy along each row (0: random).
        mean: ``[I]``, the mean of the rows if they were centred or it is kept, else None.
        inside: ``[P, P]`` where ``keeps_mean``: rows with the Gram matrix that the factorised ones
            have in this basis, random directions apart. None: diag(spectrum) is one.
        total: energy ||X||_F^2 of what was factorised (the mean's share only where it is kept).
        count: how many rows were factorised.
        augmented: how many rows are random.

    Buffers follow ``model.to()`` and enter no state_dict: subspaces are saved by lora_fused.io.
    """

    def __init__(
        self,
        basis: Tensor,
        spectrum: Tensor,
        total: float,
        *,
        mean: Tensor | None = None,
        inside: Tensor | None = None,
        count: int = 0,
        augmented: int = 0,
    ):
        super().__init__()
        parts = {"basis": basis, "spectrum": spectrum, "mean": mean, "inside": inside}
        for name, value in parts.items():
            self.register_buffer(name, value, persistent=False)
        self.total, self.count, self.augmented = float(total), count, augmented

    def _apply(self, fn, recurse=True):
        # model.half() converts the basis; what a later add() goes on with stays exact.
        exact = {name: getattr(self, name) for name in ("spectrum", "mean", "inside")}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            setattr(self, name, None if value is None else value.to(self.basis.device))
        return self

    def __len__(self) -> int:
        return self.basis.shape[0]

    @property
    def keeps_mean(self) -> bool:
        """The mean is a basis vector."""
        return self.inside is not None

    @property
    def principal(self) -> int:
        """How many rows are principal directions."""
        return len(self) - self.keeps_mean - self.augmented

    @property
    def explained(self) -> Tensor:
        """``[P]``: the share of ``total`` that the first 1, 2, ... rows hold."""
        if self.total <= 0:
            return torch.ones_like(self.spectrum)
        return (self.spectrum.double().square().cumsum(0) / self.total).clamp_max(1).float()

    @torch.no_grad()
    def coordinates(self, rows: Tensor) -> Tensor:
        """Rows ``[T, I]`` in this basis, ``[T, P]``."""
        return rows.to(self.basis) @ self.basis.mT

    @torch.no_grad()
    def augment(self, count: int, generator: torch.Generator) -> "Directions":
        """The same with ``count`` random directions behind, orthogonal to all before."""
        size = self.basis.shape[1]
        if len(self) + count > size:
            rule = f"leave room: the basis has {len(self)} of {size} directions"
            raise invalid("fit_subspace", "augment", rule, count)
        drawn = torch.randn(count, size, generator=generator).to(self.basis)
        return self._with_random(self.basis, self.spectrum, drawn, self.augmented + count)

    @torch.no_grad()
    def extended(self, rows: Tensor, *, rank: int | None, energy: float | None):
        """The directions of the old rows and the new: an SVD of [spectrum * basis; new rows].

        Equal to a fit of all rows but for what the old basis had already left out.

        Args:
            rows: New rows ``[R, I]``, as they would have been factorised.
            rank: How many principal directions, or fewer where there are not so many.
            energy: In place of rank: the share of the new total that they must hold.
        """
        rows, known, mean, pull = rows.double(), self._known(), None, None
        count, new = self.count + len(rows), [known, rows]
        if self.mean is not None:
            old, added = self.mean.double(), rows.mean(0)
            mean = (self.count * old + len(rows) * added) / count
            if not self.keeps_mean:
                # The two means differ: their distance is variance of the union.
                between = (self.count * len(rows) / count) ** 0.5 * (old - added)[None]
                new = [known, rows - added, between]
        stack = torch.cat(new)
        total = self.total + float(stack[len(known) :].square().sum())
        if self.keeps_mean:
            pull = take_out(mean, stack)
        found = stacked_svd(stack, rank=min(*stack.shape), method="exact")
        room = min(len(stack), stack.shape[1] - self.keeps_mean - self.augmented)
        if energy is not None:
            held = found.s.square().cumsum(0)
            whole = total if pull is None else total - float(_unit(mean) @ pull)
            rank = max(self.principal, int((held < energy * whole).sum()) + 1)
        rank = max(1, min(rank, room))
        return principal(
            found.vh[:rank],
            found.s[:rank],
            total,
            like=self.basis,
            mean=mean,
            count=count,
            pull=pull,
            random=self.basis[len(self) - self.augmented :],
        )

    @torch.no_grad()
    def truncated(self, rank: int) -> tuple["Directions", Tensor]:
        """The same with the first ``rank`` principal directions, and which rows that leaves."""
        first, inside = int(self.keeps_mean), self.inside
        at = torch.arange(len(self), device=self.basis.device)
        at = at[(at < first + rank) | (at >= first + self.principal)]
        if inside is not None:
            held = first + min(rank, self.principal)
            inside = torch.linalg.qr(inside[:, :held].double(), mode="r").R.float()
        facts = {"mean": self.mean, "count": self.count, "augmented": self.augmented}
        made = Directions(self.basis[at], self.spectrum[at], self.total, inside=inside, **facts)
        return made, at

    def _known(self) -> Tensor:
        """Rows ``[P, I]`` float64 with the Gram matrix of the old ones, as far as it is known."""
        basis = self.basis[: len(self) - self.augmented].double()
        if self.inside is not None:
            return self.inside.double() @ basis
        return self.spectrum[: len(basis), None].double() * basis

    def _with_random(self, basis: Tensor, spectrum: Tensor, drawn: Tensor, augmented: int):
        fresh = drawn.double()
        for _ in range(2):  # once leaves what rounding let through
            fresh = fresh - (fresh @ basis.double().mT) @ basis.double()
        fresh = _orthonormal(fresh).to(basis)
        return Directions(
            torch.cat([basis, fresh]),
            torch.cat([spectrum, spectrum.new_zeros(len(fresh))]),
            self.total,
            mean=self.mean,
            inside=self.inside,
            count=self.count,
            augmented=augmented,
        )


def take_out(mean: Tensor, rows: Tensor) -> Tensor:
    """Take the mean's direction out of rows X ``[T, I]``, in place; returns X^T X m for it.

    What is left has the directions that serve best beside the mean's: those of the centred rows
    may hold it once more, or lose with it what lies along it.
    """
    unit = _unit(mean).to(rows)
    along = rows @ unit
    pull = along @ rows
    rows.addr_(along, unit, alpha=-1)
    return pull


def principal(
    rows: Tensor,
    values: Tensor,
    total: float,
    *,
    like: Tensor | None = None,
    mean: Tensor | None = None,
    count: int = 0,
    pull: Tensor | None = None,
    random: Tensor | None = None,
) -> Directions:
    """Directions from principal ones ``[P, I]`` and their singular values.

    With ``pull``, from ``take_out``, the mean's direction goes before them.
    """
    like = rows if like is None else like
    spectrum, basis, inside = values.float(), rows, None
    if pull is not None:
        unit, pull = _unit(mean).to(rows.device), pull.double()
        basis = _orthonormal(torch.cat([unit[None], rows.double()]))
        inside = _root(unit @ pull, values.double(), rows.double() @ pull).float()
        spectrum = inside.norm(dim=0)
    kept = None if mean is None else mean.to(like)
    found = Directions(
        basis.to(like).contiguous(), spectrum, total, mean=kept, inside=inside, count=count
    )
    if random is None or not len(random):
        return found
    return found._with_random(found.basis, found.spectrum, random, len(random))


def _unit(mean: Tensor) -> Tensor:
    return mean.double() / mean.double().norm().clamp_min(1e-300)


def _root(energy: Tensor, values: Tensor, cross: Tensor) -> Tensor:
    """F with F^T F = [[energy, cross], [cross^T, diag(values^2)]]."""
    share = torch.where(values > 0, cross / values.clamp_min(1e-300), 0.0)
    rest = (energy - share.square().sum()).clamp_min(0).sqrt()
    root = torch.cat([rest[None], values]).diag()
    root[1:, 0] = share
    return root


class SharedBasis(nn.Module):
    """The basis of one layer: y += basis_b^T core (basis_a x).

    Attributes:
        a: Directions of the inputs, ``[P, I]``.
        b: Directions of the outputs, ``[P, O]``; the two P may differ.
        embedding: the layer is an nn.Embedding (I is its vocabulary).
    """

    def __init__(self, a: Directions, b: Directions, *, embedding: bool = False):
        super().__init__()
        self.a, self.b, self.embedding = a, b, embedding

    @property
    def basis_a(self) -> Tensor:
        return self.a.basis

    @property
    def basis_b(self) -> Tensor:
        return self.b.basis


def extended_basis(basis: SharedBasis, stack: AdapterStack, options) -> SharedBasis:
    """The basis of the old adapters and those of a stack, weighted as a fit would weigh them."""
    updates, sides = Updates(stack, equal=options.weighting == "equal"), []
    for name, side in (("a", basis.a), ("b", basis.b)):
        energy = options.energy
        if options.method == "eigenlorax":
            rows = updates.weighted_rows(name, options.weighting)
        else:
            rows = updates.seen_rows(name)
            energy = None if energy is None else (1 + energy) / 2
        sides.append(side.extended(rows, rank=options.rank, energy=energy))
    return SharedBasis(*sides, embedding=basis.embedding)


def _orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal rows of the same span and order, each along its own row, in float64."""
    q, r = torch.linalg.qr(rows.double().mT)
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)
    return (q * sign).mT
