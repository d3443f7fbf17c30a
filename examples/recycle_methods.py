"""One cell of recycle_few_shot.py: few-shot episodes of one image set, by one method."""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from recycle_bases import CIFAR, VALIDATION, copied
from recycle_experiment import METAS, Experiment, fit
from torch import Tensor, nn

from lora_fused import AdapterBank, attach, new_adapter
from lora_fused.methods import lorahub, uniform
from lora_fused.methods.recycle import (
    Episodes,
    draw_episodes,
    embed,
    half_interval,
    score_episodes,
)

# Set -> (file, images of a class at most). "development" is what rates are chosen on.
SETS = {
    "unseen": (VALIDATION, 50),
    "cifar10": (CIFAR, 60),
    "mnist": ("mnist", 60),
    "development": (VALIDATION, 50),
}
UNIT = "-unit"  # of features divided by their norm: cosines in the place of distances
_PLAIN = tuple(name for name, kind in METAS.items() if not kind.unit)
_UNIT = tuple(name for name, kind in METAS.items() if kind.unit)
FREE = ("frozen", "uniform", "best-teacher", *_PLAIN, f"frozen{UNIT}", f"meta-mixed{UNIT}", *_UNIT)
TUNED = ("linear", "lorahub", "lora", "full")


class FewShot(Experiment):
    """The experiment, and what each method makes of an episode."""

    @functools.lru_cache(maxsize=4)  # noqa: B019  (one experiment lives as long as its process)
    def set(self, name: str) -> tuple[Tensor, Tensor]:
        file, each = SETS[name]
        classes = {"unseen": self.images.unseen, "development": self.images.development}
        return self.images.of(file, classes.get(name), each)

    def episodes(self, name: str, shots: int, count: int):
        """The first episodes of a set: the same ones for every method."""
        options = {"ways": 5, "shots": shots, "queries": self.settings.queries}
        return draw_episodes(self.set(name)[1], count=count, seed=self.seed, **options)

    # Without tuning

    def free(self, method: str, name: str, shots: int) -> dict:
        """A row of a method that only compares features with class means."""
        count = self.settings.episodes
        start = time.process_time()
        scored = [
            score_episodes(found, self.episodes(name, shots, count), shots)
            for found in self._features(method, name)
        ]
        best = max(scored, key=lambda found: found.accuracy)
        seconds = time.process_time() - start
        off = best.accuracies - self.frozen(name, shots).accuracies
        return {
            "episodes": count,
            "accuracy": best.accuracy,
            "half_interval": best.interval,
            "minus_frozen": float(off.mean()),
            "minus_frozen_half_interval": half_interval(off),
            "cpu_seconds": seconds,
        }

    def frozen(self, name: str, shots: int) -> Episodes:
        drawn = self.episodes(name, shots, self.settings.episodes)
        return score_episodes(self._features("frozen", name)[0], drawn, shots)

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def _features(self, method: str, name: str) -> list[Tensor]:
        """Of all images of a set; of the best teacher, one for each."""
        if method.endswith(UNIT):
            of = self._features(method.removesuffix(UNIT), name)
            return [F.normalize(features, dim=-1) for features in of]
        images, _ = self.set(name)
        if method in METAS:
            found = embed(self.meta(method), "meta", images)
            return [F.normalize(found, dim=-1) if METAS[method].unit else found]
        mixtures = {"frozen": [None], "uniform": [uniform(self.handle.bank)]}
        return [embed(self.handle, one, images) for one in mixtures.get(method, self.names)]

    # Tuned on the support

    def tuned(self, method: str, name: str, shots: int, rates, first: int, count: int) -> dict:
        """A row of some episodes, each learned from its support alone.

        Args:
            rates: learning rates of what trains beside the head, and of the head.
            first, count: Which episodes.
        """
        images, _ = self.set(name)
        drawn = list(itertools.islice(self.episodes(name, shots, first + count), first, None))
        tuner, found = self._tuner(method), []
        start = time.process_time()
        for at, rows in enumerate(drawn):
            own = images[rows]
            support, queries = own[:, :shots].flatten(0, 1), own[:, shots:].flatten(0, 1)
            truth = torch.arange(len(rows))
            seed = 1000 * self.seed + first + at
            guess = tuner(support, truth.repeat_interleave(shots), queries, rates, seed)
            right = guess.argmax(1) == truth.repeat_interleave(self.settings.queries)
            found.append(float(right.double().mean()))
        seconds = time.process_time() - start
        frozen = score_episodes(self._features("frozen", name)[0], iter(drawn), shots).accuracies
        found = torch.tensor(found, dtype=torch.float64)
        return {
            "episodes": count,
            "accuracy": float(found.mean()),
            "accuracies": " ".join(f"{value:.4f}" for value in found.tolist()),
            "minus_frozen": float((found - frozen).mean()),
            "differences": " ".join(f"{value:.4f}" for value in (found - frozen).tolist()),
            "cpu_seconds": seconds,
        }

    @functools.lru_cache(maxsize=1)  # noqa: B019
    def _tuner(self, method: str) -> Callable[..., Tensor]:
        return {
            "linear": self._linear,
            "lorahub": self._lorahub,
            "lora": Tuned(self, full=False),
            "full": Tuned(self, full=True),
        }[method]

    def _linear(self, support, labels, queries, rates, seed) -> Tensor:
        """A linear layer on the frozen features."""
        return self._on(None, support, labels, queries, rates, seed)

    def _on(self, mixture, support, labels, queries, rates, seed) -> Tensor:
        features = embed(self.handle, mixture, torch.cat([support, queries]))
        known, asked = features.split([len(support), len(queries)])
        head = self.means(known, labels)
        self.learn(
            lambda rows: head(known[rows]), labels, [(list(head.parameters()), rates[1])], seed
        )
        with torch.no_grad():
            return head(asked)

    def _lorahub(self, support, labels, queries, rates, seed) -> Tensor:
        """One weight for each teacher, searched by the frozen class means; then a linear layer."""
        s = self.settings
        head = self.means(embed(self.handle, None, support), labels)
        few = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        few = few[: s.tuned_batch]

        def losses(batch: dict[str, Tensor]) -> Tensor:
            scores = head(self.handle.model(batch["images"]))
            return F.cross_entropy(scores, batch["labels"], reduction="none")

        batch = {"images": support[few], "labels": labels[few]}
        options = {"candidates": s.hub_candidates, "seed": seed, "progress": False}
        found = lorahub(self.handle, losses, batch, **options)
        return self._on(found.mixture(), support, labels, queries, rates, seed)

    @torch.no_grad()
    def means(self, features: Tensor, labels: Tensor) -> nn.Linear:
        """A linear layer whose scores are those of the nearest class mean, before it learns."""
        centre = torch.stack([features[labels == c].mean(0) for c in labels.unique()])
        head = nn.Linear(features.shape[1], len(centre))
        head.weight.copy_(2 * centre / self.base.temperature)
        head.bias.copy_(-centre.square().sum(1) / self.base.temperature)
        return head

    def learn(self, logits, labels: Tensor, groups, seed: int) -> None:
        s = self.settings
        fit(logits, labels, groups, steps=s.tuned_steps, batch=s.tuned_batch, seed=seed)


class Tuned:
    """A copy of the base that learns an episode, with a head, and begins anew for the next one."""

    def __init__(self, experiment: FewShot, *, full: bool):
        self.experiment, self.model = experiment, copied(experiment.model)
        self._mixed: Callable = contextlib.nullcontext
        if full:
            self.model.requires_grad_(True)
            self.parameters = [p for n, p in self.model.named_parameters() if _used(n)]
        else:
            bank, targets = AdapterBank(), list(experiment.base.targets)
            rank = experiment.settings.rank
            bank.add(new_adapter(self.model, "own", rank=rank, target_modules=targets, seed=1))
            handle = attach(self.model, bank)
            self.parameters = bank.trainable(["own"])
            self._mixed = functools.partial(handle.mix, "own")
        self._start = [p.detach().clone() for p in self.parameters]

    def __call__(self, support, labels, queries, rates, seed) -> Tensor:
        with torch.no_grad():
            for parameter, values in zip(self.parameters, self._start, strict=True):
                parameter.copy_(values)
        with self._mixed():
            with torch.no_grad():
                head = self.experiment.means(self.model(support), labels)
            groups = [(self.parameters, rates[0]), (list(head.parameters()), rates[1])]
            self.experiment.learn(
                lambda rows: head(self.model(support[rows])), labels, groups, seed
            )
            with torch.no_grad():
                return head(self.model(queries))


def _used(name: str) -> bool:
    """Whether features depend on a parameter: on classifiers of the pretraining they do not."""
    return not name.startswith(("head.", "distill.", "net._fc."))
