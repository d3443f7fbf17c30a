"""Few-shot classification without tuning: class means of support features, the nearest wins."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lora_fused.checks import check_whole, invalid, shape
from lora_fused.methods.recycle.runs import checked_bank, features_of


class Classified(NamedTuple):
    """What ``classify`` found.

    Attributes:
        labels: ``[Q]`` the nearest class of each query.
        scores: ``[Q, C]`` minus the squared Euclidean distances to the class means.
        classes: ``[C]`` the labels of the support, ascending: the columns of ``scores``.
    """

    labels: Tensor
    scores: Tensor
    classes: Tensor


class Episodes(NamedTuple):
    """What ``evaluate`` found.

    Attributes:
        accuracy: The mean over episodes.
        interval: Half of its 95 % interval, 1.96 standard errors; NaN for one episode.
        accuracies: ``[count]`` of each episode.
    """

    accuracy: float
    interval: float
    accuracies: Tensor


def prototype_scores(support: Tensor, queries: Tensor) -> Tensor:
    """Minus squared distances ``[..., Q, C]`` of ``[..., Q, E]`` to means of ``[..., C, S, E]``."""
    means = support.mean(-2)
    return -(queries.unsqueeze(-2) - means.unsqueeze(-3)).square().sum(-1)


@torch.no_grad()
def classify(
    handle,
    mixture,
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    *,
    features: Callable[[Tensor], Tensor] | None = None,
) -> Classified:
    """Classify images by a few labelled ones, in one forward pass and without training.

    Args:
        handle: Of the model, attached and in eval mode.
        mixture: What ``handle.mix`` takes for all rows: the meta-LoRA's name, weights of several,
            or None for the frozen model.
        support: ``[S, C, H, W]``.
        labels: ``[S]`` integers of any values.
        query: ``[Q, C, H, W]``.
        features: As in ``invert``.

    Example:
        >>> classify(handle, "meta", support, labels, query).labels
    """
    op = "classify"
    checked_bank(op, handle)
    if labels.shape != support.shape[:1] or not len(labels) or labels.is_floating_point():
        rule = f"be integers, one for each of {len(support)} support images"
        raise invalid(op, "labels", rule, f"{labels.dtype} {shape(labels)}")
    with handle.mix(mixture):
        found = features_of(op, handle, features, torch.cat([support, query]))
    _check_finite(op, found)
    classes, at = labels.to(found.device).unique(return_inverse=True)
    ours, queries = found.split([len(support), len(query)])
    means = torch.stack([ours[at == i].mean(0) for i in range(len(classes))])
    scores = prototype_scores(means.unsqueeze(-2), queries)
    return Classified(classes[scores.argmax(-1)], scores, classes)


def draw_episodes(
    labels: Tensor, *, ways: int, shots: int, queries: int, count: int, seed: int
) -> Iterator[Tensor]:
    """Rows of seeded tasks, ``[ways, shots + queries]`` each: the support first, then the queries.

    The same labels and seed give the same tasks, so methods can be compared task by task.
    """
    op = "draw_episodes"
    sizes = {"ways": ways, "shots": shots, "queries": queries, "count": count}
    for label, value in sizes.items():
        check_whole(op, label, value)
    if labels.dim() != 1 or labels.is_floating_point():
        raise invalid(op, "labels", "be [N] integers", f"{labels.dtype} {shape(labels)}")
    each = shots + queries
    rows = [(labels == one).nonzero().flatten() for one in labels.unique()]
    rows = [own for own in rows if len(own) >= each]
    if len(rows) < ways:
        rule = f"hold {ways} classes with {each} images each (shots + queries)"
        raise invalid(op, "labels", rule, f"{len(rows)} such classes")
    generator = torch.Generator().manual_seed(seed)
    return (_draw(rows, ways, each, generator) for _ in range(count))


def _draw(rows: list[Tensor], ways: int, each: int, generator: torch.Generator) -> Tensor:
    chosen = torch.randperm(len(rows), generator=generator)[:ways].tolist()
    picks = [rows[c][torch.randperm(len(rows[c]), generator=generator)[:each]] for c in chosen]
    return torch.stack(picks)


@torch.no_grad()
def embed(
    handle,
    mixture,
    images: Tensor,
    *,
    features: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Features ``[N, E]`` of images under one mixture for all rows."""
    checked_bank("embed", handle)
    check_whole("embed", "batch_size", batch_size)
    with handle.mix(mixture):
        parts = images.split(batch_size)
        return torch.cat([features_of("embed", handle, features, part) for part in parts])


@torch.no_grad()
def evaluate(
    handle,
    mixture,
    images: Tensor,
    labels: Tensor,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int = 600,
    seed: int,
    features: Callable[[Tensor], Tensor] | None = None,
    batch_size: int = 256,
) -> Episodes:
    """Accuracy of ``classify`` over random tasks of unseen classes, with its 95 % interval.

    Features are computed once per image; an episode then is index arithmetic. The interval is that
    of the drawing of episodes from these images, not of other images or another training run.

    Args:
        handle, mixture, features: As in ``classify``.
        images: ``[N, C, H, W]``.
        labels: ``[N]`` integers.
        ways: Classes of an episode.
        shots: Support images of each.
        queries: Query images of each.
        episodes: How many.
        seed: Of the episodes.
        batch_size: Images of one forward.
    """
    check_whole("evaluate", "episodes", episodes)
    if len(labels) != len(images):
        rule = f"be one for each of {len(images)} images"
        raise invalid("evaluate", "labels", rule, shape(labels))
    drawn = draw_episodes(
        labels, ways=ways, shots=shots, queries=queries, count=episodes, seed=seed
    )
    found = embed(handle, mixture, images, features=features, batch_size=batch_size)
    return score_episodes(found, drawn, shots)


def score_episodes(features: Tensor, drawn: Iterator[Tensor], shots: int) -> Episodes:
    """Accuracies of nearest class means, of features ``[N, E]`` and rows of tasks."""
    _check_finite("score_episodes", features)
    accuracies = []
    for rows in drawn:
        own = features[rows.to(features.device)]
        queries = own[:, shots:]
        scores = prototype_scores(own[:, :shots], queries.flatten(0, 1))
        truth = torch.arange(len(rows), device=own.device).repeat_interleave(queries.shape[1])
        accuracies.append((scores.argmax(-1) == truth).double().mean())
    accuracies = torch.stack(accuracies).cpu()
    return Episodes(float(accuracies.mean()), half_interval(accuracies), accuracies)


def _check_finite(op: str, features: Tensor) -> None:
    # Of NaN distances the first would pass for the nearest.
    if not features.isfinite().all():
        raise invalid(op, "features", "be finite", "NaN or infinity")


def half_interval(values: Tensor) -> float:
    """Half of the 95 % interval of their mean, 1.96 standard errors; NaN for one value."""
    if len(values) < 2:
        return math.nan
    return 1.96 * float(values.std()) / math.sqrt(len(values))
