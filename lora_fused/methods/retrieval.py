"""The nearest adapters of each query, and their weights: the arithmetic of RPE. See rpe.py."""

import dataclasses
import functools
import math

import torch
from torch import Tensor

from lora_fused.checks import check_whole, invalid, shape
from lora_fused.methods.prototypes import Prototypes, checked_features, squared_distances
from lora_fused.methods.quadratic import affine, lasso, simplex
from lora_fused.mixture import Mixture

WEIGHTS = ("uniform", "nearest", "similarity", "linear", "l1", "simplex")
UNITS = ("raw", "median")
_SOLVED = ("linear", "l1", "simplex")
_BLOCK = 1 << 22  # numbers held at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Retrieved:
    """The k nearest adapters of each of Q queries, nearest first.

    Attributes:
        queries: ``[Q, E]`` float32.
        prototypes: where they were looked for.
        adapters: ``[Q, k]`` int64, indices in ``prototypes.names``; distinct in a row.
        rows: ``[Q, k]`` int64, of ``prototypes.vectors``: each adapter's nearest one.
        distances: ``[Q, k]`` float64, squared.
        narrowed: ``prototypes`` are those near these queries alone, of a larger library: they do
            not tell how it lies.
    """

    queries: Tensor
    prototypes: Prototypes
    adapters: Tensor
    rows: Tensor
    distances: Tensor
    narrowed: bool = False

    def __len__(self) -> int:
        return len(self.queries)

    def names(self, query: int) -> list[str]:
        return [self.prototypes.names[k] for k in self.adapters[query].tolist()]

    def take(self, queries: Tensor | slice) -> "Retrieved":
        """Of some queries alone."""
        parts = (self.adapters[queries], self.rows[queries], self.distances[queries])
        return Retrieved(self.queries[queries], self.prototypes, *parts, self.narrowed)


@torch.no_grad()
def retrieve(queries: Tensor, prototypes: Prototypes, *, k: int = 8) -> Retrieved:
    """The k adapters nearest to each query in squared L2; all of them where there are fewer.

    d[q, k] = min over the adapter's prototypes of ||z[q] - z[p]||^2

    Args:
        queries: ``[Q, E]``, or ``[E]`` for one: means over a task's inputs, or single inputs.
        prototypes: The library's. A vector index can narrow it first: prototypes of all its hits
            for all queries give the same result as the whole library.
        k: Adapters, not prototypes: each comes with the nearest of its prototypes.

    Raises:
        ValueError: a wrong argument, queries of another size E or not finite.

    Numerics:
        Distances are float64 sums of squared differences; equal ones keep the order of ``names``.

    Cost:
        Q * P * E multiply-adds in float64: exact search, for up to some 10^5 prototypes.
    """
    op = "retrieve"
    if not isinstance(prototypes, Prototypes):
        raise invalid(op, "prototypes", "be Prototypes", type(prototypes).__name__)
    if isinstance(queries, Tensor) and queries.dim() == 1:
        queries = queries[None]
    vectors = prototypes.vectors
    queries = checked_features(op, "queries", queries).to(vectors.device)
    if queries.shape[1] != vectors.shape[1]:
        rule = f"have the prototypes' size {vectors.shape[1]}"
        raise invalid(op, "queries", rule, shape(queries))
    check_whole(op, "k", k)
    k = min(k, len(prototypes))
    points, owners, count = vectors.double(), prototypes.owners, len(prototypes)
    size = max(1, _BLOCK // max(len(points), k * vectors.shape[1]))
    parts = [_nearest(z.double(), points, owners, count, k) for z in queries.split(size)]
    return Retrieved(queries, prototypes, *map(torch.cat, zip(*parts, strict=True)))


def _nearest(z: Tensor, points: Tensor, owners: Tensor, count: int, k: int) -> tuple:
    """The k nearest of ``count`` adapters, each by its nearest row, of equal ones the first."""
    found, at = squared_distances(z, points), owners.expand(len(z), -1)
    least = found.new_full((len(z), count), torch.inf).scatter_reduce_(1, at, found, "amin")
    adapters = least.topk(k, largest=False).indices.sort(1).values
    end = len(points)
    rows = torch.arange(end, device=z.device).where(found == least.gather(1, at), end)
    rows = rows.new_full((len(z), count), end).scatter_reduce_(1, at, rows, "amin")
    rows = rows.gather(1, adapters)
    # What the product left of small distances is rounding; differences are exact.
    distances = (z[:, None] - points[rows]).square().sum(-1)
    order = distances.sort(dim=1, stable=True).indices
    return tuple(t.gather(1, order) for t in (adapters, rows, distances))


@dataclasses.dataclass(frozen=True, eq=False)
class Weighted:
    """Weights of the retrieved adapters: see ``weigh``.

    Attributes:
        found: the retrieved adapters.
        weights: ``[Q, k]`` float64; each row sums to one.
        rule: which of ``WEIGHTS``.
    """

    found: Retrieved
    weights: Tensor
    rule: str

    def mixture(self, *, per: str = "sample") -> Mixture:
        """A Mixture with a row per query, by name: for any bank that holds these adapters.

        A single query's fits any input. ``.repeat(n)`` for n inputs, or beams, of each query.
        """
        width = int((self.weights != 0).sum(1).max())
        order = (self.weights == 0).int().sort(dim=1, stable=True).indices[:, :width]
        weights = self.weights.gather(1, order).cpu()
        names = self.found.prototypes.names
        rows = zip(self.found.adapters.gather(1, order).tolist(), weights.tolist(), strict=True)
        table = tuple(
            tuple(names[k] if w else None for k, w in zip(*row, strict=True)) for row in rows
        )
        return Mixture(table, weights.float(), per)


@torch.no_grad()
def weigh(
    found: Retrieved,
    weights: str = "l1",
    *,
    max_adapters: int | None = None,
    temperature: float = 1.0,
    l1: float = 1.0,
    units: str = "raw",
) -> Weighted:
    """Weights of the retrieved adapters, each query's of its own, sum one.

    Args:
        found: By ``retrieve``.
        weights: ``"uniform"``: 1 / k. ``"nearest"``: the nearest alone. ``"similarity"``:
            softmax(-d / temperature), d squared distances. Of argmin ||z - sum_k w_k z_k||^2:
            ``"linear"``: any signs, the shortest w where many are as good; ``"l1"``: with
            + l1 ||w||_1; ``"simplex"``: w >= 0, what a large l1 gives.
        max_adapters: At most so many nonzero weights: the largest are kept and weighed anew, half
            of the surplus dropped at a time. A heuristic: the best set may be another.
        temperature: Of "similarity", 1 / lambda_1 of the paper.
        l1: lambda_2 of the paper (10 for its images, 1 for its texts). As the weights sum to one,
            ||w||_1 = 1 + 2 * (negative mass): it weighs negative mass alone.
            Far outside of all prototypes "linear" and a small l1 run past them, with large weights
            of both signs that can wreck a model; "simplex" cannot. ``explain`` tells such queries.
        units: In which temperature and l1 are: ``"raw"``, those of squared features, or
            ``"median"``: the median of a query's distances to its neighbours is one, whatever the
            features' scale.

    Raises:
        ValueError: a wrong argument. RuntimeError: weights beyond some 10^8, of prototypes that
            are almost the same seen from far away, that float64 cannot tell.

    Numerics:
        float64. "l1" and "simplex" by an interior-point method and an exact solve on its support:
        zeros are exact. Duplicates get equal weights. Differences of prototypes below 1e-6 of the
        largest have no say in "linear".

    Cost:
        Of "l1", some 20 batched Cholesky factorisations of k x k.
    """
    _check_weigh(found, weights, max_adapters, temperature, l1, units)
    k = found.adapters.shape[1]
    limit = k if max_adapters is None else min(max_adapters, k)
    solve = functools.partial(_solved, rule=weights, l1=l1, units=units)
    if weights in _SOLVED:
        size = max(1, _BLOCK // (k * max(k, found.queries.shape[1])))
        parts = torch.arange(len(found), device=found.queries.device).split(size)
        w = torch.cat([_limited(found.take(part), limit, solve) for part in parts])
    else:
        w = torch.zeros_like(found.distances)
        limit = 1 if weights == "nearest" else limit
        if weights == "similarity":
            # quantile takes 2^24 numbers at most
            unit = torch.cat([_unit(d, units) for d in found.distances.split(1 << 16)])
            w[:, :limit] = (-found.distances[:, :limit] / (unit * temperature)).softmax(1)
        else:
            w[:, :limit] = 1 / limit
    return Weighted(found, w, weights)


def _limited(found: Retrieved, limit: int, solve) -> Tensor:
    """Weights of at most ``limit`` adapters each."""
    w = solve(found)
    while (left := int((w != 0).sum(1).max())) > limit:
        left = (left + limit) // 2
        # Of equal weights, equal but for rounding, the nearer adapters stay.
        size = (w.abs() / w.abs().amax(1, keepdim=True) * 1e9).round()
        kept = size.sort(dim=1, descending=True, stable=True).indices[:, :left].sort(1).values
        parts = (t.gather(1, kept) for t in (found.adapters, found.rows, found.distances))
        part = Retrieved(found.queries, found.prototypes, *parts)
        w = torch.zeros_like(w).scatter_(1, kept, solve(part, distances=found.distances))
    return w


def _solved(found: Retrieved, *, rule: str, l1: float, units: str, distances=None) -> Tensor:
    """Weights of all the found; ``distances`` are those that give the unit, if others."""
    vectors = found.prototypes.vectors.double()[found.rows]
    first = vectors[:, :1]  # duplicates cancel exactly
    points = vectors - first
    centre = points.mean(1, keepdim=True)
    points = points - centre
    target = found.queries.double() - first[:, 0] - centre[:, 0]
    gram = points @ points.mT
    linear = -2 * (points @ target[..., None])[..., 0]
    if rule == "linear":
        return affine(gram, linear)
    if rule == "simplex":
        return simplex(gram, linear)
    unit = _unit(found.distances if distances is None else distances, units)
    return lasso(gram, linear, l1 * unit[:, 0])


def _unit(distances: Tensor, units: str) -> Tensor:
    """``[Q, 1]``: what one is, in squared raw units."""
    if units == "raw":
        return distances.new_ones(len(distances), 1)
    median = distances.where(distances > 0, torch.nan).sqrt().nanquantile(0.5, 1, keepdim=True)
    return median.square().nan_to_num(1.0)


def _check_weigh(found, weights, max_adapters, temperature, l1, units) -> None:
    op = "weigh"
    if not isinstance(found, Retrieved):
        raise invalid(op, "found", "be what retrieve gives", type(found).__name__)
    if weights not in WEIGHTS:
        raise invalid(op, "weights", f"be one of {WEIGHTS}", repr(weights))
    if units not in UNITS:
        raise invalid(op, "units", f"be one of {UNITS}", repr(units))
    if max_adapters is not None:
        check_whole(op, "max_adapters", max_adapters)
    for label, value, least in (
        ("temperature", temperature, "positive"),
        ("l1", l1, "not negative"),
    ):
        number = isinstance(value, (int, float)) and 0 <= value < math.inf
        if not number or (least == "positive" and value == 0):
            raise invalid(op, label, f"be a number, {least}", repr(value))
