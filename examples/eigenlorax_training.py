"""One cell of eigenlorax_glue_like.py: a held-out task, learned in one way from one seed.

Every way trains the same linear head on the text's embedding, which begins as the label names in
the frozen model's embedding, with the same rows in the same order; they differ in what else trains.
"""

import contextlib
import copy
import dataclasses
import json
import os
import random
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fused import AdapterBank, attach, load_adapters
from lora_fused.cli.demo_tasks import Task, load_tasks, sampled
from lora_fused.cli.demo_train import Recipe, adapter_folder, embed, encode, load_model, train
from lora_fused.methods import Subspace, fit_subspace
from lora_fused.methods.controls import unrelated
from lora_fused.new import new_adapter

Rows = tuple[tuple[str, int], ...]
Encoder = Callable[[list[str]], Tensor]

# No two of these share more than 1.5 % of their sentences. One held-out task of each kind
# (question, sentiment, tweet, dialogue, intent, lexical), named before anything was measured.
HELD_OUT = ("trec6", "cr", "tw_emotion", "nps_chat", "clinc_banking", "wn_verb")
DEVELOPMENT = ("clickbait", "stackoverflow")  # learning rates are chosen on these
POOL_ONLY = (
    "mr",
    "pros_cons",
    "tw_offensive",
    "election_author",
    "clinc_home",
    "reuters_r8",
    "deb_section",
    "wsd_interest",
)
DATA = Path(
    os.environ.get("LORA_FUSED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything besides task, seed, method and learning rate that decides a cell."""

    steps: int = 120
    batch: int = 16
    train_rows: int = 800
    validation_rows: int = 128
    test_rows: int = 500
    pool_rows: int = 480
    pool_epochs: int = 3
    rank: int = 8
    alpha: int = 16
    max_length: int = 32
    temperature: float = 0.05
    checks: int = 10  # looks at the validation rows while training


@dataclasses.dataclass
class Learner:
    """A model ready to train: the embedding it gives to texts, and what trains besides the head."""

    model: nn.Module
    encoder: Encoder
    parameters: list[nn.Parameter]
    expected: int | None  # how many values those are by the formula


class Experiment:
    """The model, the tasks, the adapters of all tasks, and the subspaces of all but one."""

    def __init__(self, settings: Settings, model: str, cache: Path, data: Path = DATA):
        self.settings, self.cache, self.data = settings, cache, data
        self.recipe = Recipe(
            model, epochs=settings.pool_epochs, rank=settings.rank, alpha=settings.alpha
        )
        self.model, self.tokenizer = load_model(model)
        self.model.requires_grad_(False)
        self.tasks, self.development = _tasks(data, settings)
        self.bank = AdapterBank()
        self._subspaces: dict[tuple, Subspace] = {}

    @property
    def held_out(self) -> list[str]:
        known = [name for name in HELD_OUT if name in self.tasks]
        return known or [name for name in self.tasks if name not in self.development]

    def load_pool(self, said: Callable[[str], None], go_on: Callable[[], bool]) -> bool:
        """One LoRA of every task, trained where the cache lacks it; False: stopped before all."""
        folders = {}
        for i, task in enumerate(self.tasks.values()):
            # Another seed for each: with one random A in common they would look alike.
            recipe = dataclasses.replace(self.recipe, seed=i)
            few = dataclasses.replace(task, train=task.train[: self.settings.pool_rows])
            folders[task.name] = adapter_folder(few, recipe, self.cache)
            if not folders[task.name].is_dir():
                if not go_on():
                    return False
                said(f"training the adapter of {task.name}")
                self.cache.mkdir(parents=True, exist_ok=True)
                train(few, recipe, 0, folders[task.name], lambda: None)
        self.bank = load_adapters(folders)
        return True

    def subspace(self, left_out: str | None, kind: str, size: int, drawn: int = 0) -> Subspace:
        """A basis of ``size`` directions, the mean's among them, and so many random ones more.

        Fitted to the adapters of all tasks, or of all but one.
        """
        key = (left_out, kind, size, drawn)
        if key not in self._subspaces:
            self._subspaces[key] = self._fit(*key)
        return self._subspaces[key]

    def _fit(self, left_out: str | None, kind: str, size: int, drawn: int) -> Subspace:
        bank = self.bank
        if left_out is not None:
            bank = bank.subset([name for name in bank.names if name != left_out])
        if kind == "null":
            bank = unrelated(bank, seed=_seed(str(left_out)))
        if kind == "hosvd":
            return fit_subspace(bank, rank=size, method="hosvd", progress=False)
        return fit_subspace(bank, rank=size - 1, augment=drawn, progress=False)

    @contextlib.contextmanager
    def learner(self, task: str, seed: int, method: str) -> Iterator[Learner]:
        """A copy of the model that trains as ``method`` says, and is given up afterwards."""
        model = copy.deepcopy(self.model)
        s, kind, sizes = self.settings, *parse(method)

        def encoder(texts: list[str]) -> Tensor:
            return embed(model, encode(self.tokenizer, texts, s.max_length))

        options = {"rank": s.rank, "alpha": s.alpha, "seed": _seed(f"{task} {seed}")}
        widths = [(k.in_features, k.out_features) for k in self.bank.stacks.values()]
        if kind == "probe":
            yield Learner(model, torch.no_grad()(encoder), [], 0)
        elif kind == "full":
            model.requires_grad_(True)
            unused = {id(p) for p in model.pooler.parameters()}  # by the mean of the hidden states
            trained = [p for p in model.parameters() if id(p) not in unused]
            yield Learner(model, encoder, trained, None)
        elif kind == "lora":
            bank, targets = AdapterBank(), list(self.recipe.targets)
            bank.add(new_adapter(model, task, target_modules=targets, **options))
            with attach(model, bank).mix(task):
                expected = s.rank * sum(i + o for i, o in widths)
                yield Learner(model, encoder, bank.trainable([task]), expected)
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

    def frozen(self, rows: Rows) -> dict[str, Tensor]:
        """The frozen model's embeddings of texts."""
        texts = sorted({text for text, _ in rows}, key=lambda text: (len(text), text))
        found = {}
        with torch.no_grad():
            for start in range(0, len(texts), 32):
                part = texts[start : start + 32]
                tokens = encode(self.tokenizer, part, self.settings.max_length)
                found.update(zip(part, embed(self.model, tokens), strict=True))
        return found

    def run(self, task: str, seed: int, method: str, rates: tuple[float, float], checks: bool):
        """Train on a task and say how good it is, and what that took.

        Args:
            rates: learning rates of what the method trains and of the head.
            checks: look at the validation rows in between, for the steps to 95 %.
        """
        rows, validation, test = self.split(task, seed)
        with self.learner(task, seed, method) as learner:
            head = self._head(self.tasks[task])
            facts = self._facts(learner, head)
            if method == "probe":  # the model never changes: each text is embedded once
                known = self.frozen((*rows, *validation, *test))
                learner.encoder = lambda texts: torch.stack([known[text] for text in texts])
            looks = validation if checks else ()
            curve, seconds = self._train(learner, head, rows, _seed(f"{task} {seed}"), rates, looks)
            facts["accuracy"] = self._accuracy(learner.encoder, head, test)
        facts["cpu_seconds"] = round(seconds, 2)
        if checks:
            final = self.settings.steps
            facts["validation"] = curve[final]
            facts["steps_to_95"] = next(s for s in sorted(curve) if curve[s] >= 0.95 * curve[final])
        return facts

    def _head(self, task: Task) -> nn.Linear:
        head = nn.Linear(self.model.config.hidden_size, len(task.labels))
        with torch.no_grad():
            names = encode(self.tokenizer, list(task.labels), self.settings.max_length)
            head.weight.copy_(embed(self.model, names))
            head.bias.zero_()
        return head

    def _train(self, learner, head, rows, seed, rates, validation) -> tuple[dict, float]:
        """Train in place; return step -> accuracy on the validation rows, and the steps' time."""
        s, curve, seconds = self.settings, {}, 0.0
        groups = [{"params": head.parameters(), "lr": rates[1]}]
        if learner.parameters:
            groups.append({"params": learner.parameters, "lr": rates[0]})
        optimizer = torch.optim.AdamW(groups)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in groups], total_steps=s.steps
        )
        every = max(1, s.steps // s.checks)
        for step, batch in enumerate(_batches(rows, s.steps, s.batch, seed), 1):
            if validation and (step - 1) % every == 0:
                curve[step - 1] = self._accuracy(learner.encoder, head, validation)
            start = time.process_time()
            loss = self._loss(learner.encoder, head, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            seconds += time.process_time() - start
        if validation:
            curve[s.steps] = self._accuracy(learner.encoder, head, validation)
        return curve, seconds

    def _loss(self, encoder: Encoder, head: nn.Linear, rows) -> Tensor:
        texts, target = zip(*rows, strict=True)
        return F.cross_entropy(
            head(encoder(list(texts))) / self.settings.temperature, torch.tensor(target)
        )

    @torch.no_grad()
    def _accuracy(self, encoder: Encoder, head: nn.Linear, rows: Rows) -> float:
        rows, right = sorted(rows, key=lambda row: len(row[0])), 0
        for start in range(0, len(rows), 32):
            texts, target = zip(*rows[start : start + 32], strict=True)
            right += int((head(encoder(list(texts))).argmax(1) == torch.tensor(target)).sum())
        return right / len(rows)

    def _facts(self, learner: Learner, head: nn.Linear) -> dict:
        """What training takes: values, and memory beside the model at the longest rows."""
        count = sum(p.numel() for p in learner.parameters)
        if learner.expected is not None and count != learner.expected:
            raise RuntimeError(f"{count} values train, the formula gives {learner.expected}")
        tasks = [(" ".join(["word"] * self.settings.max_length), 0)] * self.settings.batch
        lora = self.settings.rank * sum(
            k.in_features + k.out_features for k in self.bank.stacks.values()
        )
        saved = saved_bytes(learner.model, lambda: self._loss(learner.encoder, head, tasks))
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


def _tasks(data: Path, settings: Settings) -> tuple[dict[str, Task], tuple[str, ...]]:
    """The pool's tasks of a folder of texts, or those that the demo takes out of a package."""
    listing = data / "text" / "tasks.json"
    if not listing.is_file():
        tasks = {task.name: task for task in load_tasks(6, seed=0)}
        return tasks, tuple(tasks)[:2]
    known = {entry["task"]: entry for entry in json.loads(listing.read_text(encoding="utf-8"))}
    tasks = {}
    for name in (*HELD_OUT, *DEVELOPMENT, *POOL_ONLY):
        if name in known:
            parts: dict[str, list] = {"train": [], "test": []}
            lines = (data / "text" / f"{name}.tsv").read_text(encoding="utf-8").split("\n")
            for line in lines[1:]:
                if line:
                    split, label, text = line.split("\t", 2)
                    parts[split].append((text, int(label)))
            whole = Task(name, tuple(known[name]["labels"]), parts["train"], parts["test"])
            tasks[name] = sampled(whole, 0, len(whole.train), settings.test_rows)
    return tasks, tuple(name for name in DEVELOPMENT if name in tasks)


def _batches(rows: Rows, steps: int, size: int, seed: int) -> Iterator[Rows]:
    """Batches of texts of like length, so that little is padding, each text once an epoch."""
    draw, waiting = random.Random(seed), []
    for _ in range(steps):
        if not waiting:
            order = draw.sample(rows, len(rows))
            for start in range(0, len(order), 8 * size):
                near = sorted(order[start : start + 8 * size], key=lambda row: len(row[0]))
                waiting += [near[i : i + size] for i in range(0, len(near), size)]
            draw.shuffle(waiting)
        yield waiting.pop()


def _seed(text: str) -> int:
    """The same in every process."""
    return zlib.crc32(text.encode())
