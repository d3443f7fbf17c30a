"""Images from teachers: what a frozen model with a LoRA and its head takes for each class.

**The paper says** (LoRA Recycle, Hu et al., CVPR 2025, arXiv 2412.02220): images start as N(0, 1)
noise; Adam changes pixels so that the teacher gives the wanted label, with 0.01 times a prior, the
BatchNorm statistics of a CNN; a random roll and flip each step; from a quarter of the steps on,
tokens with little attention are dropped.
**We compute** the same for all teachers in one batch: rows are routed to their teacher's adapter,
the prior is each teacher's own term, and random numbers are each teacher's own.
**We differ**: what is kept is a copy of the best view (the public code keeps a name for the last);
priors are pluggable, since a vision transformer has no BatchNorm; the tokens kept are returned as
indices, and what the teachers say of the images comes with them.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lora_fused.checks import check_whole, invalid
from lora_fused.methods.progress import show
from lora_fused.methods.recycle.images import Images, pixel_bounds
from lora_fused.methods.recycle.pool import Pool, named_classes
from lora_fused.methods.recycle.priors import NoPrior, Prior
from lora_fused.methods.recycle.runs import (
    Saved,
    fingerprint,
    load_optimizer,
    model_tensors,
    optimizer_state,
    wide,
)
from lora_fused.methods.recycle.teachers import Head, Teachers, plain_heads

_OP = "invert"


def invert(
    handle,
    heads: Mapping[str, Head],
    *,
    per_class: int,
    steps: int,
    size: int | tuple[int, int],
    channels: int = 3,
    pixel_range: tuple[float | Sequence[float], float | Sequence[float]] = (-1.0, 1.0),
    prior: Prior | None = None,
    prior_weight: float = 0.01,
    lr: float = 0.25,
    betas: tuple[float, float] = (0.5, 0.99),
    jitter: int | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    prune=None,
    prune_from: float = 0.25,
    class_names: Mapping[str, Sequence[str]] | None = None,
    seed: int,
    checkpoint=None,
    checkpoint_every: int = 100,
    progress: bool | Callable[[int, int], None] = True,
) -> Pool:
    """Make images of every teacher's classes, all teachers in one batch.

    For teacher t with images x_1 .. x_n of labels y_i the loss is
    mean_i CE(head_t(model_t(view(x_i))), y_i) + prior_weight * prior(view(x_1 .. x_n)),
    view a random roll and flip of the teacher's own. The losses are added, and since no term mixes
    teachers, each one's images are those it would have alone, up to rounding.

    Args:
        handle: Of the model, attached to the teachers and in eval mode.
        heads: Adapter -> nn.Linear, or (weight ``[L, E]``, bias ``[L]`` or None).
        per_class: Images of each class.
        steps: Of Adam; the paper takes 2000.
        size: Height and width in pixels, or one number for both.
        channels: Of the images.
        pixel_range: The least and the largest value the model's normalisation gives to a pixel,
            numbers or one per channel; images are clamped to it after each step.
        prior: See ``Prior``; None: no such term.
        prior_weight: Its factor. Weigh it against the cross-entropy: statistics of EfficientNet's
            32 layers sum to thousands, of which 0.01 leaves no image that its teacher knows.
        lr, betas: Of Adam. A pixel's step does not depend on the loss's scale.
        jitter: The most pixels that an image is rolled by. Default: an eighth of its smaller side.
        features: ``features(images) -> [N, E]``, where ``model(images)`` gives something else.
        prune: ``lora_fused.nn.prune_tokens(model, ratios)``, entered for the later steps.
        prune_from: The share of the steps done before pruning. Images kept earlier are dropped
            then: losses of the whole network and of the pruned one do not compare.
        class_names: Adapter -> a name of each class. Default: ``"<adapter>/<number>"``.
        seed: Of the start, rolls and flips. A teacher's random numbers depend on the seed and its
            name, not on the other teachers.
        checkpoint: ``lora_fused.io.Checkpoint``; an interrupted run goes on from it, to the same
            bits. It must be of the same options and adapters.
        checkpoint_every: Steps between two writes.
        progress: True: a line on stderr where that is a terminal; or called as
            progress(done, total) after each step.

    Returns:
        Of each row the view with the lowest CE + prior_weight * prior, with its teacher's logits
        for it.

    Raises:
        ValueError: a wrong argument; a checkpoint of another run; a loss that is not finite.

    Numerics:
        Pixels, heads and losses are float32 also where the model is of 16 bits; views and features
        have its dtype.

    Cost:
        One forward and backward of all rows per step, for any number of teachers; pixels' gradients
        alone are formed.

    Example:
        >>> pool = invert(handle, heads, per_class=16, steps=2000, size=224, prior=prior, seed=0)
        >>> pool.accuracy()
    """
    heads = plain_heads(_OP, handle, heads)
    named_classes(_OP, heads, class_names)
    prior = NoPrior() if prior is None else prior
    height, width = _sides(size)
    jitter = max(1, min(height, width) // 8) if jitter is None else jitter
    options = {"per_class": per_class, "steps": steps, "seed": seed, "jitter": jitter}
    _check(options | {"channels": channels}, checkpoint_every, lr, prior_weight, prune_from)
    options |= {"size": (height, width), "range": pixel_range, "weight": prior_weight, "lr": lr}
    options |= {"betas": betas, "heads": list(heads), "prior": type(prior).__name__}
    options |= {"prune": None if prune is None else repr(prune), "prune_from": prune_from}
    teachers = Teachers(
        _OP, handle, heads, [per_class * len(w) for w, _ in heads.values()], features
    )
    like = next(handle.model.parameters()).detach()
    like = like.to(wide(like.dtype))  # Adam's epsilon is 0 in float16
    bounds = pixel_bounds(_OP, pixel_range, channels, like)
    images = Images(list(heads), teachers.counts, (channels, height, width), seed, bounds)
    labels = [
        torch.arange(len(weight)).repeat_interleave(per_class) for weight, _ in heads.values()
    ]
    labels = torch.cat(labels).to(like.device)
    run = "" if checkpoint is None else fingerprint(options, _weights(handle, heads, prior))
    saved = Saved(_OP, checkpoint, checkpoint_every, run)
    optimizer = torch.optim.Adam([images.pixels], lr, betas)
    objective = Objective(teachers, labels, prior, prior_weight)
    begin = round(prune_from * steps) if prune is not None else steps
    _descend(images, objective, optimizer, saved, steps, jitter, prune, begin, progress)
    last = {"class_names": class_names, "prune": prune if begin < steps else None}
    return teachers.pool(images.best, labels, images.losses, **last)


def _descend(
    images: Images, objective, optimizer, saved, steps, jitter, prune, begin, progress
) -> None:
    """The steps that are still to be done; ``prune`` is in force from step ``begin`` on."""
    done, found = saved.read()
    if done:
        images.load(found)
        load_optimizer(optimizer, found)
    with contextlib.ExitStack() as stack:
        stack.enter_context(objective.in_force())
        if begin < done < steps:  # a block of pruning without a forward is refused
            stack.enter_context(prune)
        for step in range(done, steps):
            if step == begin:
                images.forget()
                stack.enter_context(prune)
            views = images.views(jitter)
            losses, total = objective(views)
            images.keep(views, losses)
            optimizer.zero_grad()
            total.backward(inputs=[images.pixels])
            optimizer.step()
            images.clamp()
            now = step + 1
            saved.write(now, steps, lambda: images.tensors() | optimizer_state(optimizer))
            line = f"{_OP}: step {now} of {steps}, loss {float(losses.mean()):.4f}"
            show(progress, now, steps, line)


class Objective:
    """What an inversion minimises: the sum of its teachers' losses.

    Args:
        teachers: Whose rows the images are.
        labels: ``[N]``, wanted of each row.
        prior, prior_weight: See ``invert``.
    """

    def __init__(self, teachers: Teachers, labels: Tensor, prior: Prior, prior_weight: float):
        self._teachers, self._labels = teachers, labels
        self._prior, self._weight = prior, prior_weight

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Where it can be called: rows routed to their teachers, the prior watching."""
        handle = self._teachers.handle
        with handle.mix(self._teachers.mixture()), self._prior.watch(handle.model):
            yield

    def __call__(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's loss ``[N]``, without grad, and the scalar to be differentiated."""
        counts = list(self._teachers.counts)
        self._prior.reset()
        entropies = self._teachers.cross_entropy(views, self._labels)
        terms = self._weight * self._prior(views, counts)
        means = torch.stack([part.mean() for part in entropies.split(counts)])
        bad = ~(means + terms).detach().isfinite()
        if bad.any():
            names = [
                name for name, one in zip(self._teachers.heads, bad.tolist(), strict=True) if one
            ]
            raise invalid(_OP, "loss", "stay finite", f"NaN or infinity of {names[:5]}")
        shares = terms.detach().repeat_interleave(torch.tensor(counts, device=terms.device))
        return entropies.detach() + shares, (means + terms).sum()


def _weights(handle, heads: Mapping[str, tuple], prior: Prior) -> Iterator[Tensor]:
    """Every tensor that the losses depend on."""
    yield from model_tensors(handle.model)
    for name, head in heads.items():
        yield from (t for t in head if t is not None)
        for part in handle.bank.adapter(name).modules.values():
            yield from (part.lora_a, part.lora_b, torch.tensor(part.scale))
    yield from prior.tensors()


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2:
        raise invalid(_OP, "size", "be one number of pixels, or height and width", repr(size))
    for side in sides:
        check_whole(_OP, "size", side)
    return sides


def _check(
    whole: dict[str, int], every: int, lr: float, prior_weight: float, prune_from: float
) -> None:
    for label, value in whole.items():
        check_whole(_OP, label, value, 0 if label in ("jitter", "seed") else 1)
    check_whole(_OP, "checkpoint_every", every)
    if not 0 < lr < float("inf"):
        raise invalid(_OP, "lr", "be a positive number", lr)
    if not 0 <= prior_weight < float("inf"):
        raise invalid(_OP, "prior_weight", "be 0 or a positive number", prior_weight)
    if not 0 <= prune_from <= 1:
        raise invalid(_OP, "prune_from", "be a share of the steps, 0 to 1", prune_from)
