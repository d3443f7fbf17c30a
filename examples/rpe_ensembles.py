"""One cell of rpe_leave_one_out.py: a task and the ensemble of adapters that it gets in one way."""

import contextlib
import dataclasses
import functools
import random
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from text_experiment import TextExperiment, TextSettings
from torch import Tensor

from lora_fused import Mixture, attach
from lora_fused.cli.demo_train import embed, load_model
from lora_fused.methods import rpe
from lora_fused.methods.controls import unrelated

RETRIEVED = ("uniform", "similarity", "linear", "l1", "simplex")  # of k neighbours
NULLS = ("null-uniform", "null-simplex")  # the same weights, of adapters turned at random
METHODS = ("base", "single", "nearest", *RETRIEVED, "explain", *NULLS)


@dataclasses.dataclass(frozen=True)
class Settings(TextSettings):
    """Everything besides the key of a cell that decides what it holds."""

    test_rows: int = 400
    inputs: int = 64  # unlabelled texts that stand for a task
    k: int = 8
    warn_level: float = 0.9  # with 15 other tasks as reference, 0.95 could never warn


class Way(NamedTuple):
    """How a task's rows get their adapters; "" where a field has no say.

    Attributes:
        pool: "others" or "all": is the task's own adapter among those to retrieve?
        of: one ensemble for the "task", or one for each "input".
        features: "raw" as the paper has them, or each text's of "unit" length.
        adapter: of "single".
    """

    method: str
    pool: str = ""
    k: int | str = ""
    units: str = ""
    value: float | str = ""
    of: str = ""
    features: str = ""
    adapter: str = ""


def way(
    method: str,
    k: int,
    pool: str = "others",
    of: str = "task",
    *,
    units: str = "raw",
    value: float = 1.0,
    features: str = "raw",
) -> Way:
    """A retrieval method's, with one name for each: strength and units where they matter."""
    k = 1 if method == "nearest" else k
    strength = (units, value) if method in ("similarity", "l1") else ("", "")
    return Way(method, pool, k, *strength, of, features)


def ensemble_key(task: str, method: str, ensemble: str) -> tuple[str, bool, str]:
    """Cells of one key have one accuracy."""
    return task, method in NULLS, ensemble


class LeaveOneOut(TextExperiment):
    """The adapters of all tasks on one model, and the features that they are retrieved by."""

    def __init__(self, *where, **options):
        super().__init__(*where, **options)
        self.known: dict[tuple[str, bool, str], float] = {}  # see ensemble_key
        self._tests: dict[str, list] = {}
        self._features: dict[tuple, Tensor] = {}

    @property
    def held_out(self) -> list[str]:
        return list(self.tasks)

    @functools.cached_property
    def handle(self):
        return attach(self.model, self.bank)

    @functools.cached_property
    def null_handle(self):
        """A copy of the model with adapters of the same ranks, norms and spectra, and no sense."""
        return attach(load_model(self.recipe.model)[0], unrelated(self.bank, seed=0))

    @functools.cached_property
    def _library(self) -> dict[str, Tensor]:
        """Features of the texts that each adapter was trained on."""
        few = {name: task.train[: self.settings.pool_rows] for name, task in self.tasks.items()}
        return {name: self._embedded([text for text, _ in rows]) for name, rows in few.items()}

    def prototypes(self, names: list[str], features: str) -> rpe.Prototypes:
        """One of each adapter: the mean over its texts."""
        return rpe.make_prototypes({name: _as(features, self._library[name]) for name in names})

    def pool(self, task: str, how: Way) -> rpe.Prototypes:
        names = [name for name in self.tasks if how.pool == "all" or name != task]
        return self.prototypes(names, how.features)

    def inputs(self, task: str, seed: int, features: str = "raw") -> Tensor:
        """Features ``[n, E]`` of texts that neither its adapter nor a test row has."""
        if (task, seed) not in self._features:
            texts = [text for text, _ in self.tasks[task].train[self.settings.pool_rows :]]
            draw = random.Random(f"inputs {seed} {task}")
            drawn = draw.sample(texts, min(self.settings.inputs, len(texts)))
            self._features[task, seed] = self._embedded(drawn)
        return _as(features, self._features[task, seed])

    def run(self, task: str, seed: int | str, how: Way) -> dict:
        """What a task's test rows get in one way, and how many of them are right."""
        start = time.process_time()
        if how.method == "explain":
            facts = self._explained(task, seed, how)
        elif how.of == "input":
            chosen = self._weighed(_as(how.features, self._tested(task)), task, how)
            facts = {"adapters": round(float((chosen.weights != 0).sum(1).double().mean()), 2)}
            facts["negative_mass"] = _negative(chosen.weights)
            facts["accuracy"] = self._scored(task, lambda at: _taken(chosen, at).mixture())
        else:
            facts = self._of_task(task, seed, how)
        return {**facts, "cpu_seconds": round(time.process_time() - start, 2)}

    def _of_task(self, task: str, seed: int | str, how: Way) -> dict:
        facts, weights = {}, {}
        if how.method == "single":
            weights = {how.adapter: 1.0}
            for column, features in (("distance", "raw"), ("unit_distance", "unit")):
                asked = self.inputs(task, 0, features).mean(0)
                found = rpe.retrieve(asked, self.prototypes([how.adapter], features))
                facts[column] = round(float(found.distances.sqrt()), 4)
        if how.pool:
            chosen = self._weighed(self.inputs(task, seed, how.features).mean(0), task, how)
            row = zip(chosen.found.names(0), chosen.weights[0].tolist(), strict=True)
            # Three digits, so that ways which come to the same ensemble run once.
            weights = {name: round(w, 3) for name, w in row if round(w, 3)}
            facts["negative_mass"] = _negative(chosen.weights)
        told = " ".join(f"{name}:{weights[name]:g}" for name in sorted(weights))
        key = ensemble_key(task, how.method, told)
        if key not in self.known:
            mixture = Mixture.of(weights) if weights else None
            handle = self.null_handle if how.method in NULLS else self.handle
            self.known[key] = self._scored(task, lambda at: mixture, handle)
        return {
            **facts,
            "adapters": len(weights),
            "ensemble": told,
            "accuracy": self.known[key],
        }

    def _weighed(self, queries: Tensor, task: str, how: Way) -> rpe.Weighted:
        found = rpe.retrieve(queries, self.pool(task, how), k=how.k)
        options = {}
        if how.units:
            strength = "temperature" if how.method == "similarity" else "l1"
            options = {strength: how.value, "units": how.units}
        return rpe.weigh(found, how.method.removeprefix("null-"), **options)

    def _explained(self, task: str, seed: int | str, how: Way) -> dict:
        """How far the task is from the library, and how many of its test rows are warned of."""
        prototypes = self.pool(task, how)
        asked = rpe.retrieve(self.inputs(task, seed).mean(0), prototypes, k=how.k)
        level = self.settings.warn_level
        one = rpe.explain(rpe.weigh(asked, "l1"), level=level)[0]
        served = torch.cat([self.inputs(name, seed) for name in prototypes.names])
        rows = rpe.weigh(rpe.retrieve(self._tested(task), prototypes, k=how.k), "simplex")
        warned = [row.outside for row in rpe.explain(rows, reference=served)]
        return {
            "nearest": one.adapters[0],
            "distance": round(one.distances[0], 4),
            "hull": round(one.hull_distance, 4),
            "place": f"{one.nearer}/{one.of}",
            "outside": one.outside,
            "warned": round(sum(map(bool, warned)) / len(warned), 4),
        }

    def _tested(self, task: str) -> Tensor:
        """Features of the test rows, in the order of ``_batches``."""
        if task not in self._features:
            texts = [text for batch in self._batches(task) for text in batch[2]]
            self._features[task] = self._embedded(texts)
        return self._features[task]

    def _batches(self, task: str) -> list[tuple[dict[str, Tensor], Tensor, list[str]]]:
        """Test rows as tokens, labels and texts, in batches of like length."""
        if task not in self._tests:
            rows = sorted(self.tasks[task].test, key=lambda row: len(row[0]))
            self._tests[task] = []
            for start in range(0, len(rows), 32):
                texts, labels = zip(*rows[start : start + 32], strict=True)
                batch = (self.tokens(list(texts)), torch.tensor(labels), list(texts))
                self._tests[task].append(batch)
        return self._tests[task]

    @torch.no_grad()
    def _scored(self, task: str, mixture: Callable[[slice], Mixture | None], handle=None) -> float:
        """Accuracy of the label names, a batch of test rows with its mixture at a time."""
        handle = self.handle if handle is None else handle
        labels = embed(handle.model, self.tokens(list(self.tasks[task].labels)))
        right = done = 0
        for tokens, target, _ in self._batches(task):
            mixed = mixture(slice(done, done + len(target)))
            with contextlib.nullcontext() if mixed is None else handle.mix(mixed):
                scores = embed(handle.model, tokens) @ labels.T
            right += int((scores.argmax(1) == target).sum())
            done += len(target)
        return right / done

    def _embedded(self, texts: list[str]) -> Tensor:
        """Raw features, as RPE has them, of the model without adapters; padded with their like."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        options = {"tokenizer": self.tokenizer, "max_length": self.settings.max_length}
        found = rpe.embed(self.handle, [texts[i] for i in order], progress=False, **options)
        return found[torch.tensor(order).argsort()]


def _as(features: str, found: Tensor) -> Tensor:
    return torch.nn.functional.normalize(found, dim=1) if features == "unit" else found


def _taken(chosen: rpe.Weighted, rows: slice) -> rpe.Weighted:
    return rpe.Weighted(chosen.found.take(rows), chosen.weights[rows], chosen.rule)


def _negative(weights: Tensor) -> float:
    return round(float(weights.clamp_max(0).sum(1).abs().mean()), 4)
