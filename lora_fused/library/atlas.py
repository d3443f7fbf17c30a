"""A map of a library: where its adapters lie, which are alike, and what a request would get."""

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_fused.checks import check_whole, invalid
from lora_fused.library.entries import Entry
from lora_fused.methods.prototypes import Prototypes, k_means
from lora_fused.methods.retrieval import Weighted, retrieve
from lora_fused.ops import stacked_svd

_OP = "atlas"
_CLUSTERS, _NEIGHBOURS, _TAGS = 8, 3, 3


class Cluster(NamedTuple):
    """A cluster of prototypes: its size, and its commonest tags with how many have them."""

    size: int
    tags: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Atlas:
    """A library in two dimensions; ``save_html`` draws it.

    Attributes:
        entries: the adapters.
        prototypes: theirs, P in all.
        points: ``[P, 2]`` float32, prototypes along the two directions in which they vary most.
        explained: the part of their variance that either direction holds.
        labels: ``[P]`` int64, the cluster of each prototype.
        clusters: of each label, largest first.
        neighbours: ``[P, n]`` int64, the nearest other adapters of each, by index in ``entries``.
        distances: ``[P, n]`` float64, to them; not squared, in all dimensions.
        chosen: of requests, their adapters and weights; None: none are drawn.
        requests: ``[Q, 2]`` float32, where they lie.
    """

    entries: tuple[Entry, ...]
    prototypes: Prototypes
    points: Tensor
    explained: tuple[float, float]
    labels: Tensor
    clusters: tuple[Cluster, ...]
    neighbours: Tensor
    distances: Tensor
    chosen: Weighted | None
    requests: Tensor

    def html(self) -> str:
        """One page with everything in it: nothing is fetched when it is opened."""
        from lora_fused.library.atlas_page import html

        return html(self)

    def save_html(self, path: str | os.PathLike) -> Path:
        """Write the page, complete or not at all."""
        from lora_fused.report import save

        return save(self.html(), path)


@torch.no_grad()
def make_atlas(
    entries: Sequence[Entry],
    prototypes: Prototypes,
    *,
    clusters: int | None = None,
    chosen: Weighted | None = None,
    seed: int = 0,
) -> Atlas:
    """Lay out a library: two principal directions of its prototypes, clusters, neighbours.

    Args:
        entries: Of a library, ``library.entries()``.
        prototypes: Theirs, ``library.prototypes()``; names as in ``entries``, in any order.
        clusters: At most so many, by k-means in all dimensions. Default: 8, of few adapters fewer.
        chosen: Of requests, by ``weigh`` on the same prototypes; drawn as lines.
        seed: Of k-means.

    Raises:
        ValueError: entries and prototypes of other names; a wrong argument.

    Cost:
        That of comparing all pairs of prototypes: some seconds for 10^4 of 384.

    Example:
        >>> make_atlas(library.entries(), library.prototypes()).save_html("atlas.html")
    """
    by_name = {entry.name: entry for entry in entries}
    if set(by_name) != set(prototypes.names):
        rule = "be those of the prototypes, each once"
        raise invalid(_OP, "entries", rule, f"{len(entries)} for {len(prototypes)} adapters")
    if clusters is not None:
        check_whole(_OP, "clusters", clusters)
    entries = tuple(by_name[name] for name in prototypes.names)
    vectors = prototypes.vectors
    few = max(1, min(_CLUSTERS, len(vectors) // 3))
    count = min(few if clusters is None else clusters, len(vectors))
    labels = _by_size(k_means(vectors, count, seed=seed))
    centre = vectors.double().mean(0)
    directions, explained = _principal((vectors.double() - centre).float())
    neighbours, distances = _neighbours(prototypes)
    queries = vectors[:0] if chosen is None else chosen.found.queries
    return Atlas(
        entries=entries,
        prototypes=prototypes,
        points=_placed(vectors, centre, directions),
        explained=explained,
        labels=labels,
        clusters=_clusters(entries, prototypes, labels),
        neighbours=neighbours,
        distances=distances,
        chosen=chosen,
        requests=_placed(queries, centre, directions),
    )


def _principal(points: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Two directions ``[2, E]``, and the part of the variance that each holds."""
    directions = points.new_zeros(2, points.shape[1])
    if not bool(points.any()):
        return directions, (0.0, 0.0)
    found = stacked_svd(points, rank=min(2, *points.shape))
    directions[: len(found.s)] = found.vh
    return directions, tuple((*found.energy.tolist(), 0.0)[:2])


def _placed(vectors: Tensor, centre: Tensor, directions: Tensor) -> Tensor:
    return ((vectors.double() - centre) @ directions.double().mT).float()


def _by_size(labels: Tensor) -> Tensor:
    """The same clusters, numbered from the largest on."""
    sizes = labels.bincount()
    order = sizes.sort(descending=True, stable=True).indices
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return place[labels]


def _clusters(
    entries: Sequence[Entry], prototypes: Prototypes, labels: Tensor
) -> tuple[Cluster, ...]:
    tags = [Counter() for _ in range(int(labels.max()) + 1)]
    # An adapter counts once, however many of its prototypes lie there.
    for owner, label in set(zip(prototypes.owners.tolist(), labels.tolist(), strict=True)):
        tags[label].update(entries[owner].tags)
    sizes = labels.bincount().tolist()
    # Of equally common tags, those first by name.
    common = [sorted(found.items(), key=lambda pair: (-pair[1], pair[0])) for found in tags]
    parts = zip(sizes, common, strict=True)
    return tuple(Cluster(size, tuple(found[:_TAGS])) for size, found in parts)


def _neighbours(prototypes: Prototypes) -> tuple[Tensor, Tensor]:
    """Of each prototype the nearest adapters but its own, and distances."""
    width = min(_NEIGHBOURS, len(prototypes) - 1)
    if not width:
        empty = prototypes.vectors.new_zeros(len(prototypes.vectors), 0)
        return empty.long(), empty.double()
    found = retrieve(prototypes.vectors, prototypes, k=width + 1)
    own = found.adapters == prototypes.owners[:, None]
    # Where copies are as near, its own may be missing: the farthest goes then.
    own[:, -1] |= ~own.any(1)
    shape = (len(own), width)
    return found.adapters[~own].reshape(shape), found.distances[~own].reshape(shape).sqrt()
