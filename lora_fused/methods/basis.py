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
            directions, strongest first; ``augmented`` random ones last.
        spectrum: ``[P]``: root of the energy along each row (0: random).
        mean: ``[I]``, the mean of the rows that were factorised if they were centred, else None.
        total: energy ||X||_F^2 of what was factorised (the mean's share only where it is kept).
        count: how many rows were factorised.
        keeps_mean: the mean is a basis vector.
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
        count: int = 0,
        keeps_mean: bool = False,
        augmented: int = 0,
    ):
        super().__init__()
        for name, value in (("basis", basis), ("spectrum", spectrum), ("mean", mean)):
            self.register_buffer(name, value, persistent=False)
        self.total, self.count = float(total), count
        self.keeps_mean, self.augmented = keeps_mean, augmented

    def _apply(self, fn, recurse=True):
        # model.half() converts the basis; what a later add() goes on with stays exact.
        spectrum, mean = self.spectrum, self.mean
        super()._apply(fn, recurse)
        self.spectrum = spectrum.to(self.basis.device)
        self.mean = None if mean is None else mean.to(self.basis.device)
        return self

    def __len__(self) -> int:
        return self.basis.shape[0]

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
        first = int(self.keeps_mean)
        at = slice(first, first + self.principal)
        known = self.spectrum[at, None].double() * self.basis[at].double()
        rows, mean, count = rows.double(), None, self.count + len(rows)
        old_mean_energy = self.mean_energy if self.keeps_mean else 0.0
        new = [known, rows]
        if self.mean is not None:
            old, added = self.mean.double(), rows.mean(0)
            mean = (self.count * old + len(rows) * added) / count
            # The two means differ: their distance is variance of the union.
            between = (self.count * len(rows) / count) ** 0.5 * (old - added)[None]
            new = [known, rows - added, between]
        stack = torch.cat(new)
        total = self.total - old_mean_energy + float(torch.cat(new[1:]).square().sum())
        found = stacked_svd(stack, rank=min(*stack.shape), method="exact")
        room = min(len(stack), stack.shape[1] - first - self.augmented)
        if energy is not None:
            held = found.s.square().cumsum(0)
            rank = max(self.principal, int((held < energy * total).sum()) + 1)
        rank = max(1, min(rank, room))
        return principal(
            found.vh[:rank],
            found.s[:rank],
            total,
            like=self.basis,
            mean=mean,
            count=count,
            keeps_mean=self.keeps_mean,
            random=self.basis[len(self) - self.augmented :],
        )

    @property
    def mean_energy(self) -> float:
        """What the mean adds to the energy: count * |mean|^2."""
        return 0.0 if self.mean is None else self.count * float(self.mean.double().square().sum())

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
            count=self.count,
            keeps_mean=self.keeps_mean,
            augmented=augmented,
        )


def principal(
    rows: Tensor,
    values: Tensor,
    total: float,
    *,
    like: Tensor | None = None,
    mean: Tensor | None = None,
    count: int = 0,
    keeps_mean: bool = False,
    random: Tensor | None = None,
) -> Directions:
    """Directions from principal ones ``[P, I]`` and their singular values, the mean before them."""
    like = rows if like is None else like
    spectrum, basis = values.float(), rows
    if keeps_mean:
        energy = count * float(mean.double().square().sum())
        unit = mean.double() / max(float(mean.double().norm()), 1e-300)
        basis = _orthonormal(torch.cat([unit[None].to(rows.device), rows.double()]))
        spectrum = torch.cat([spectrum.new_tensor([energy**0.5]), spectrum])
        total += energy
    kept = None if mean is None else mean.to(like)
    found = Directions(
        basis.to(like).contiguous(),
        spectrum,
        total,
        mean=kept,
        count=count,
        keeps_mean=keeps_mean,
    )
    if random is None or not len(random):
        return found
    return found._with_random(found.basis, found.spectrum, random, len(random))


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
