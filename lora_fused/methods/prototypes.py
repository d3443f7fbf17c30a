"""Prototypes: what a library keeps of an adapter's data, means of features and counts alone.

**The paper says** (RPE, arXiv 2410.09908): one vector per adapter, the mean of the frozen base
model's features over the adapter's own data.
**We compute** that mean in float64.
**We differ**: an adapter of several kinds of data may have several means (k-means); a mean of few
examples says much about each of them, so fewer than ``minimum`` are refused; Gaussian noise can be
added to the means, with a report of what it does to them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_fused.checks import check_whole, invalid, shape

_OP = "make_prototypes"
MINIMUM = 10
_TURNS, _STARTS = 100, 4
_BLOCK = 1 << 22  # distances held at a time


@dataclasses.dataclass(frozen=True)
class NoiseReport:
    """What noise did to a library's prototypes; ``str`` prints it.

    Attributes:
        deviation: the noise's standard deviation per coordinate, in the features' units.
        moved: the median distance by which a prototype moved.
        spacing: the median distance from a prototype to the nearest other adapter's, before.
        kept: the part of adapters whose nearest other adapter is still the same.
        ratio: deviation over what one example can move a mean by, the smallest of all means; a
            replaced example moves a mean of n by at most 2 max_norm / n. Of the data at hand: no
            guarantee for other data, unless features have a fixed norm (``embed(normalize=True)``).
    """

    deviation: float
    moved: float
    spacing: float
    kept: float
    ratio: float

    def __str__(self) -> str:
        spacing = f"{self.spacing:.3g}, the distance between neighbours"
        return (
            f"noise of {self.deviation:.3g} per coordinate moved prototypes by {self.moved:.3g} "
            f"({spacing}); {self.kept:.0%} of the adapters kept their nearest neighbour; "
            f"{self.ratio:.2g} x what one example can move a mean by"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Prototypes:
    """Vectors of named adapters, from one base model, layer and pooling.

    Attributes:
        names: K adapters.
        vectors: ``[P, E]`` float32, P >= K: an adapter may have several.
        owners: ``[P]`` int64, the index in ``names`` of each vector's adapter.
        counts: ``[P]`` int64, the examples in each mean; 0: not known.
        noise: what noise did, if any was added.

    Raises:
        ValueError: shapes that disagree, names that repeat or have no vector, vectors not finite.
    """

    names: tuple[str, ...]
    vectors: Tensor
    owners: Tensor | None = None
    counts: Tensor | None = None
    noise: NoiseReport | None = None

    def __post_init__(self):
        op, names = "Prototypes", tuple(self.names)
        if isinstance(self.names, str) or not names or len(set(names)) < len(names):
            raise invalid(op, "names", "be distinct, and at least one", repr(self.names))
        vectors = checked_features(op, "vectors", self.vectors)
        count = len(vectors)
        owners = torch.arange(count) if self.owners is None else self.owners
        counts = torch.zeros(count, dtype=torch.int64) if self.counts is None else self.counts
        for label, t in (("owners", owners), ("counts", counts)):
            if not isinstance(t, Tensor) or t.shape != (count,) or t.is_floating_point():
                got = shape(t) if isinstance(t, Tensor) else type(t).__name__
                raise invalid(op, label, f"be integers [{count}], one per vector", got)
        if owners.unique().tolist() != list(range(len(names))):
            rule = f"name each of the {len(names)} adapters at least once"
            raise invalid(op, "owners", rule, owners.unique().tolist()[:8])
        device = vectors.device
        facts = {"names": names, "vectors": vectors, "owners": owners.long().to(device)}
        for label, value in {**facts, "counts": counts.long().to(device)}.items():
            object.__setattr__(self, label, value)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        count, size = self.vectors.shape
        return f"Prototypes({len(self)} adapters, {count} vectors of {size})"

    def subset(self, names: Sequence[str]) -> "Prototypes":
        """Those of some adapters, in this order: a pool that leaves some out."""
        place = {name: k for k, name in enumerate(self.names)}
        for name in names:
            if name not in place:
                raise invalid("Prototypes.subset", "names", "be adapters of these", repr(name))
        held = self.owners.cpu()
        order = held.sort(stable=True).indices
        own = order.split(held.bincount(minlength=len(self)).tolist())
        chosen = [own[place[name]] for name in names]
        sizes = torch.tensor([len(rows) for rows in chosen], dtype=torch.int64)
        owners = torch.arange(len(chosen)).repeat_interleave(sizes)
        rows = torch.cat([order[:0], *chosen]).to(self.vectors.device)
        parts = (self.vectors[rows], owners, self.counts[rows])
        return Prototypes(tuple(names), *parts, self.noise)


@torch.no_grad()
def make_prototypes(
    features: Mapping[str, Tensor],
    *,
    per_adapter: int = 1,
    minimum: int = MINIMUM,
    noise: float = 0.0,
    seed: int = 0,
    noise_seed: int | None = None,
) -> Prototypes:
    """Means of each adapter's features: all that is kept of its data.

    z = mean over its examples of features[i]; with several per adapter, the means of k-means

    Args:
        features: adapter -> ``[n, E]``, as ``embed`` gives them.
        per_adapter: At most so many prototypes each: for queries that are single inputs. A task's
            mean is best compared with one mean. Clusters of fewer than ``minimum`` examples
            are dissolved into the others, so there may be fewer.
        minimum: Examples of a mean. Fewer are refused; 1 turns that off.
        noise: Standard deviation of Gaussian noise on each coordinate of each mean.
        seed: Of k-means.
        noise_seed: For tests alone: whoever knows it can take the noise off. Default: a seed that
            nobody keeps.

    Raises:
        ValueError: an adapter of fewer than ``minimum`` examples, by name; features not finite or
            of other sizes.

    Notes:
        Means reveal something about few or unusual examples, which ``minimum`` and ``noise``
        lessen. Neither is a proof of privacy: torch's generator is no cryptographic one, and
        cluster means depend on the data in more ways than the report's ratio counts.

    Example:
        >>> made = make_prototypes({"math": embed(model, texts, tokenizer=tokenizer)})
    """
    features = _checked(features, per_adapter, minimum, noise)
    means, counts = [], []
    for own in features.values():
        labels = k_means(own, min(per_adapter, len(own)), minimum=minimum, seed=seed)
        sizes = labels.bincount()
        sums = own.new_zeros(len(sizes), own.shape[1], dtype=torch.float64)
        means.append(sums.index_add_(0, labels, own.double()) / sizes[:, None])
        counts.append(sizes)
    owners = torch.arange(len(means)).repeat_interleave(torch.tensor([len(m) for m in means]))
    made = Prototypes(tuple(features), torch.cat(means).float(), owners, torch.cat(counts))
    return _noisy(made, features, float(noise), noise_seed) if noise else made


@torch.no_grad()
def k_means(points: Tensor, count: int, *, minimum: int = 1, seed: int = 0) -> Tensor:
    """Labels ``[n]`` from 0 on of at most ``count`` clusters, each of at least ``minimum`` points.

    Seeded by k-means++; the best of a few starts.
    """
    points = points.double()
    points = points - points.mean(0)
    if count == 1:
        return torch.zeros(len(points), dtype=torch.int64, device=points.device)
    generator = torch.Generator().manual_seed(seed)
    best, least = None, math.inf
    for _ in range(_STARTS):
        labels, cost = _settled(points, _seeds(points, count, generator), minimum)
        if cost < least:
            best, least = labels, cost
    return best.unique(return_inverse=True)[1]


def _checked(features: object, per_adapter: int, minimum: int, noise: float) -> dict[str, Tensor]:
    for label, value in (("per_adapter", per_adapter), ("minimum", minimum)):
        check_whole(_OP, label, value)
    if not isinstance(noise, (int, float)) or not 0 <= noise < math.inf:
        raise invalid(_OP, "noise", "be a number, not negative", repr(noise))
    if not isinstance(features, Mapping) or not features:
        rule = "be a dict of adapters' features, not empty"
        raise invalid(_OP, "features", rule, type(features).__name__)
    found = {n: checked_features(_OP, f"features of {n!r}", t) for n, t in features.items()}
    if len({t.shape[1] for t in found.values()}) > 1:
        got = {name: t.shape[1] for name, t in found.items()}
        raise invalid(_OP, "features", "have one size E", got)
    for name, own in found.items():
        if len(own) < minimum:
            rule = f"have at least {minimum} examples (minimum=) for a mean to hide each of them"
            raise invalid(_OP, f"features of {name!r}", rule, len(own))
    return found


def checked_features(op: str, label: str, features: object) -> Tensor:
    """Features ``[n, E]`` as float32, finite, at least one."""
    if not isinstance(features, Tensor) or not features.is_floating_point():
        got = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise invalid(op, label, "be a floating point tensor [n, E]", got)
    if features.dim() != 2 or not features.numel():
        raise invalid(op, label, "be [n, E], not empty", shape(features))
    features = features.detach().float()
    if not bool(features.isfinite().all()):
        raise invalid(op, label, "be finite in float32", "NaN or infinity")
    return features


def squared_distances(points: Tensor, centres: Tensor) -> Tensor:
    """``[n, C]``, not negative; exact to rounding of the larger norms, so give float64."""
    cross = points @ centres.mT
    norms = points.square().sum(-1, keepdim=True) + centres.square().sum(-1)
    return (norms - 2 * cross).clamp_min(0)


def _seeds(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Points drawn far apart (k-means++), fewer than ``count`` where no others differ."""
    first = int(torch.randint(len(points), (1,), generator=generator))
    centres = points[first : first + 1]
    while len(centres) < count:
        odds = squared_distances(points, centres).amin(1).cpu()
        if not bool(odds.sum() > 0):
            break
        drawn = int(torch.multinomial(odds, 1, generator=generator))
        centres = torch.cat((centres, points[drawn : drawn + 1]))
    return centres


def _settled(points: Tensor, centres: Tensor, minimum: int) -> tuple[Tensor, float]:
    """Labels that k-means ends with from these centres, and the sum of squared distances.

    The smallest cluster below the minimum is dissolved, one at a time, and the others settle anew.
    """
    labels = None
    while True:
        for _ in range(_TURNS):
            before, labels = labels, squared_distances(points, centres).argmin(1)
            if before is not None and labels.equal(before):
                break
            sizes = labels.bincount(minlength=len(centres))
            sums = torch.zeros_like(centres).index_add_(0, labels, points)
            # An empty cluster stays where it is until it is dissolved.
            centres = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], centres)
        sizes = labels.bincount(minlength=len(centres))
        if len(centres) == 1 or sizes.min() >= minimum:
            return labels, float((points - centres[labels]).square().sum())
        kept = torch.arange(len(centres), device=centres.device) != sizes.argmin()
        centres, labels = centres[kept], None


def _noisy(
    made: Prototypes, features: Mapping[str, Tensor], deviation: float, seed: int | None
) -> Prototypes:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    drawn = torch.randn(made.vectors.shape, generator=generator, dtype=torch.float64)
    noise = deviation * drawn.to(made.vectors.device)
    noisy = dataclasses.replace(made, vectors=(made.vectors.double() + noise).float())
    before, spacing = _neighbours(made)
    after, _ = _neighbours(noisy)
    norms = torch.stack([own.norm(dim=1).amax() for own in features.values()])[made.owners]
    reach = (2 * norms / made.counts).amax()
    report = NoiseReport(
        deviation=deviation,
        moved=float(noise.norm(dim=1).median()),
        spacing=float(spacing.median()) if len(made) > 1 else math.nan,
        kept=float((before == after).double().mean()),
        ratio=deviation / float(reach) if reach > 0 else math.inf,
    )
    return dataclasses.replace(noisy, noise=report)


def _neighbours(made: Prototypes) -> tuple[Tensor, Tensor]:
    """Of each vector, the nearest adapter but its own, and its distance."""
    points = made.vectors.double()
    points = points - points.mean(0)
    owners, distances = [], []
    size = max(1, _BLOCK // len(points))
    for own, part in zip(made.owners.split(size), points.split(size), strict=True):
        found = squared_distances(part, points)
        found = found.masked_fill(own[:, None] == made.owners, torch.inf)
        least = found.min(1)
        owners.append(made.owners[least.indices])
        distances.append(least.values.sqrt())
    return torch.cat(owners), torch.cat(distances)
