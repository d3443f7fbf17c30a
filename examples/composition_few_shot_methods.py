"""One cell of composition_few_shot.py: an unseen task, learned in one way from a few examples."""

import contextlib
import copy
import dataclasses
import gc
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from text_experiment import Encoder, Rows, TextExperiment, TextSettings, seed_of
from torch import Tensor, nn

from lora_fused import AdapterBank, attach
from lora_fused.cli.demo_train import embed
from lora_fused.methods import LearnedComposition, lorahub, uniform
from lora_fused.methods.controls import unrelated

METHODS = (
    "head",
    "lora",
    "full",
    "uniform",
    "learned",
    "learned-free",
    "lorahub",
    "null-uniform",
    "null-learned",
)


@dataclasses.dataclass(frozen=True)
class Settings(TextSettings):
    """Everything besides task, seed, shots, method and learning rate that decides a cell."""

    epochs: int = 8
    least_steps: int = 24
    most_steps: int = 80
    train_rows: int = 1000  # what "full" is, at most
    test_rows: int = 200
    hub_candidates: int = 40  # as LoraHub has it
    hub_rows: int = 32  # at most, of a candidate


class Learner(NamedTuple):
    """What trains besides the head, and the embedding that depends on it."""

    encoder: Encoder
    parameters: list[nn.Parameter]
    values: int  # how many it learns; of LoraHub without a gradient
    seconds: float  # that it took before the training
    adapters: int


class FewShot(TextExperiment):
    """The shared experiment, with the adapters of all other tasks to compose for one."""

    def __init__(self, *where, **options):
        super().__init__(*where, **options)
        self._embedded: dict[tuple[str, str], tuple[dict[str, Tensor], float]] = {}

    def whole(self, task: str) -> Rows:
        return tuple(self.tasks[task].train[: self.settings.train_rows])

    def few(self, task: str, seed: int, shots: int | None) -> Rows:
        """The first rows of each class in the seed's order, so that 4 shots are among 16.

        A class with fewer rows gives them all; None: every row.
        """
        rows, seen, kept = list(self.whole(task)), Counter(), []
        random.Random(f"shots {seed} {task}").shuffle(rows)
        for row in rows:
            seen[row[1]] += 1
            if shots is None or seen[row[1]] <= shots:
                kept.append(row)
        return tuple(kept)

    def steps(self, rows: Rows) -> int:
        s = self.settings
        return min(max(s.epochs * -(-len(rows) // s.batch), s.least_steps), s.most_steps)

    def run(self, task: str, seed: int, shots: int | None, method: str, rates) -> dict:
        """Learn a task and say how good that is, and what it took.

        Args:
            rates: learning rates of what the method trains and of the head.
        """
        rows, test = self.few(task, seed, shots), self.tasks[task].test
        draw, steps = seed_of(f"{task} {seed} {shots}"), self.steps(rows)
        head = self.head(self.tasks[task])
        with self.learner(task, method, rows, draw) as learner:
            options = {"steps": steps, "seed": draw, "rates": rates, "fused": True}
            seconds = self.fit(learner.encoder, learner.parameters, head, rows, **options)
            accuracy = self.accuracy(learner.encoder, head, test)
        gc.collect()  # an attached model and its layers refer to each other
        return {
            "rows": len(rows),
            "classes": len(self.tasks[task].labels),
            "adapters": learner.adapters,
            "steps": steps,
            "parameters": learner.values,
            "head_parameters": sum(p.numel() for p in head.parameters()),
            "accuracy": accuracy,
            "cpu_seconds": round(learner.seconds + seconds, 3),
        }

    @contextlib.contextmanager
    def learner(self, task: str, method: str, rows: Rows, draw: int) -> Iterator[Learner]:
        """A copy of the model that learns as ``method`` says, and is given up afterwards."""
        model, bank = copy.deepcopy(self.model), self.without(task)
        if method.startswith("null-"):
            bank = unrelated(bank, seed=seed_of(task))

        def encoder(texts: list[str]) -> Tensor:
            return embed(model, self.tokens(texts))

        if method == "full":
            parameters = self.all_weights(model)
            yield Learner(encoder, parameters, sum(p.numel() for p in parameters), 0.0, 0)
        elif method == "lora":
            handle, parameters = self.fresh_lora(model, task, draw)
            with handle.mix(task):
                yield Learner(encoder, parameters, sum(p.numel() for p in parameters), 0.0, 0)
        elif "learned" in method:
            constraint = "none" if method == "learned-free" else "softmax"
            composition = LearnedComposition(bank, constraint=constraint)
            handle = attach(model, bank)

            def composed(texts: list[str]) -> Tensor:
                with handle.mix(composition.mixture()):
                    return encoder(texts)

            values = composition.logits.numel()
            yield Learner(composed, [composition.logits], values, 0.0, len(bank))
        elif method == "lorahub":
            yield self._hub(task, model, bank, rows, draw)
        else:
            yield self._fixed(task, method, model, bank, rows)

    def _fixed(self, task: str, method: str, model, bank: AdapterBank, rows: Rows) -> Learner:
        """The frozen model, or a uniform composition on it: each text is embedded once.

        All of a task's texts at once, whatever the cell: what a resumed run embeds is then bitwise
        the same.
        """
        composed = method != "head"
        if (task, method) not in self._embedded:
            mixed = attach(model, bank).mix(uniform(bank)) if composed else contextlib.nullcontext()
            texts = (*self.whole(task), *self.tasks[task].test)
            self._embedded[task, method] = self._known(mixed, model, texts)
        known, each = self._embedded[task, method]
        return Learner(_looked_up(known), [], 0, each * len(rows), len(bank) if composed else 0)

    def _hub(self, task: str, model, bank: AdapterBank, rows: Rows, draw: int) -> Learner:
        """Searched weights, one per adapter; then the model does not change either."""
        start, handle = time.process_time(), attach(model, bank)
        head, few = self.head(self.tasks[task]), rows[: self.settings.hub_rows]
        found = self._searched(handle, head, few, draw)
        seconds, texts = time.process_time() - start, (*rows, *self.tasks[task].test)
        known, each = self._known(handle.mix(found.mixture()), model, texts)
        seconds += each * len(rows)
        return Learner(_looked_up(known), [], len(found.weights), seconds, len(bank))

    def _known(self, mixed, model, rows: Rows) -> tuple[dict[str, Tensor], float]:
        """Embeddings of all texts, and the CPU seconds of one."""
        start = time.process_time()
        with mixed:
            known = self.embedded(rows, model)
        return known, (time.process_time() - start) / len(known)

    def _searched(self, handle, head: nn.Linear, rows: Rows, seed: int):
        """LoraHub's weights, by the losses of the head that is the label names."""
        texts, target = zip(*rows, strict=True)
        batch = {**self.tokens(list(texts)), "target": torch.tensor(target)}

        def losses(batch: dict[str, Tensor]) -> Tensor:
            tokens = {name: value for name, value in batch.items() if name != "target"}
            scores = head(embed(handle.model, tokens)) / self.settings.temperature
            return F.cross_entropy(scores, batch["target"], reduction="none")

        count = self.settings.hub_candidates
        return lorahub(handle, losses, batch, candidates=count, seed=seed, progress=False)


def _looked_up(known: dict[str, Tensor]) -> Encoder:
    return lambda texts: torch.stack([known[text] for text in texts])
