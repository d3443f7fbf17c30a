"""One cell of eigenlorax_glue_like.py: a held-out task, learned in one way from one seed."""

import contextlib
import copy
import dataclasses
import gc
import random
from collections.abc import Callable, Iterator

import torch
from text_experiment import Encoder, Rows, TextExperiment, TextSettings, seed_of
from torch import Tensor, nn

from lora_fused import AdapterBank, attach
from lora_fused.cli.demo_train import embed
from lora_fused.methods import Subspace, fit_subspace
from lora_fused.methods.controls import unrelated


@dataclasses.dataclass(frozen=True)
class Settings(TextSettings):
    """Everything besides task, seed, method and learning rate that decides a cell."""

    steps: int = 120
    train_rows: int = 800
    validation_rows: int = 128
    checks: int = 10  # looks at the validation rows while training


@dataclasses.dataclass
class Learner:
    """A model ready to train: the embedding it gives to texts, and what trains besides the head."""

    model: nn.Module
    encoder: Encoder
    parameters: list[nn.Parameter]
    expected: int | None  # how many values those are by the formula


class Experiment(TextExperiment):
    """The shared experiment, and the subspaces of all adapters but one."""

    def __init__(self, *where, **options):
        super().__init__(*where, **options)
        self._subspaces: dict[tuple, Subspace] = {}

    def subspace(self, left_out: str | None, kind: str, size: int, drawn: int = 0) -> Subspace:
        """A basis of ``size`` directions, the mean's among them, and so many random ones more.

        Fitted to the adapters of all tasks, or of all but one.
        """
        key = (left_out, kind, size, drawn)
        if key not in self._subspaces:
            self._subspaces[key] = self._fit(*key)
        return self._subspaces[key]

    def _fit(self, left_out: str | None, kind: str, size: int, drawn: int) -> Subspace:
        bank = self.without(left_out)
        if kind == "null":
            bank = unrelated(bank, seed=seed_of(str(left_out)))
        if kind == "hosvd":
            return fit_subspace(bank, rank=size, method="hosvd", progress=False)
        return fit_subspace(bank, rank=size - 1, augment=drawn, progress=False)

    @contextlib.contextmanager
    def learner(self, task: str, seed: int, method: str) -> Iterator[Learner]:
        """A copy of the model that trains as ``method`` says, and is given up afterwards."""
        model = copy.deepcopy(self.model)
        s, kind, sizes = self.settings, *parse(method)

        def encoder(texts: list[str]) -> Tensor:
            return embed(model, self.tokens(texts))

        options = {"rank": s.rank, "alpha": s.alpha, "seed": seed_of(f"{task} {seed}")}
        widths = [(k.in_features, k.out_features) for k in self.bank.stacks.values()]
        if kind == "probe":
            yield Learner(model, torch.no_grad()(encoder), [], 0)
        elif kind == "full":
            yield Learner(model, encoder, self.all_weights(model), None)
        elif kind == "lora":
            handle, parameters = self.fresh_lora(model, task, options["seed"])
            with handle.mix(task):
                expected = s.rank * sum(i + o for i, o in widths)
                yield Learner(model, encoder, parameters, expected)
        else:
            fitted = self.subspace(task, kind, *sizes)
            # The bases alone: the cores of the other tasks are of no use to this one.
            mine = Subspace(fitted.bases, AdapterBank(), fitted.options)
            parameters = mine.new_task(task, **options)
            handle = attach(model, mine)
            with handle.mix(task):
                yield Learner(model, encoder, parameters, 2 * sum(sizes) * s.rank * len(widths))
            handle.detach()  # the bases serve the next cell

    def split(self, task: str, seed: int) -> tuple[Rows, Rows, Rows]:
        """Rows to train on, to validate with and to test with; the first two differ by seed."""
        s, rows = self.settings, list(self.tasks[task].train)
        random.Random(f"split {seed} {task}").shuffle(rows)
        held = min(s.validation_rows, len(rows) // 5)
        return tuple(rows[held:][: s.train_rows]), tuple(rows[:held]), self.tasks[task].test

    def run(self, task: str, seed: int, method: str, rates: tuple[float, float], checks: bool):
        """Train on a task and say how good it is, and what that took.

        Args:
            rates: learning rates of what the method trains and of the head.
            checks: look at the validation rows in between, for the steps to 95 %.
        """
        rows, validation, test = self.split(task, seed)
        with self.learner(task, seed, method) as learner:
            head = self.head(self.tasks[task])
            facts = self._facts(learner, head)
            if method == "probe":  # the model never changes: each text is embedded once
                known = self.embedded((*rows, *validation, *test))
                learner.encoder = lambda texts: torch.stack([known[text] for text in texts])
            curve = {}

            def look(step: int) -> None:
                curve[step] = self.accuracy(learner.encoder, head, validation)

            seconds = self._train(learner, head, rows, task, seed, rates, look if checks else None)
            facts["accuracy"] = self.accuracy(learner.encoder, head, test)
        gc.collect()  # an attached model and its layers refer to each other
        facts["cpu_seconds"] = round(seconds, 2)
        if checks:
            final = self.settings.steps
            facts["validation"] = curve[final]
            facts["steps_to_95"] = next(s for s in sorted(curve) if curve[s] >= 0.95 * curve[final])
        return facts

    def _train(self, learner, head, rows, task, seed, rates, look) -> float:
        """Train in place, with looks in between and one at the end; return the steps' CPU time."""
        s = self.settings
        every = max(1, s.steps // s.checks)
        seconds = self.fit(
            learner.encoder,
            learner.parameters,
            head,
            rows,
            steps=s.steps,
            seed=seed_of(f"{task} {seed}"),
            rates=rates,
            look=look and (lambda step: None if step % every else look(step)),
        )
        if look:
            look(s.steps)
        return seconds

    def _facts(self, learner: Learner, head: nn.Linear) -> dict:
        """What training takes: values, and memory beside the model at the longest rows."""
        count = sum(p.numel() for p in learner.parameters)
        if learner.expected is not None and count != learner.expected:
            raise RuntimeError(f"{count} values train, the formula gives {learner.expected}")
        tasks = [(" ".join(["word"] * self.settings.max_length), 0)] * self.settings.batch
        lora = self.settings.rank * sum(
            k.in_features + k.out_features for k in self.bank.stacks.values()
        )
        saved = saved_bytes(learner.model, lambda: self.loss(learner.encoder, head, tasks))
        heads = sum(p.numel() for p in head.parameters())
        # The gradient and AdamW's two moments, of float32 values.
        return {
            "parameters": count,
            "head_parameters": heads,
            "lora_ratio": round(lora / count, 3) if count else None,
            "saved_mib": round(saved / 2**20, 2),
            "train_mib": round((saved + 3 * 4 * (count + heads)) / 2**20, 2),
        }


def parse(method: str) -> tuple[str, tuple[int, ...]]:
    """ "eigenlorax-32" -> ("eigenlorax", (32,)); "augmented-16+16": 16 fitted and 16 random."""
    kind, _, sizes = method.partition("-")
    return kind, tuple(int(size) for size in sizes.split("+") if size)


def saved_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """What a forward keeps for its backward, in bytes, beyond the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = loss()  # alive, so that no address is given out twice
    del held
    return sum(kept.values())
