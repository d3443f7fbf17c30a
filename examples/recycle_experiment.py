"""What recycle_few_shot.py makes once and keeps: teachers, pools of images, meta-LoRAs."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from recycle_bases import PIXELS, TRAIN, VALIDATION, Base, Images, copied
from resumable import OutOfTime
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_fused import AdapterBank, attach, new_adapter
from lora_fused.io import Checkpoint, load_pool, read_adapter, save_pool, write_adapter
from lora_fused.methods.recycle import Pool, distil, embed, invert, label_pool
from lora_fused.nn.prune import prune_tokens

DROPPED = (25, 50, 75)  # per cent of the patches, half of that share behind each of two blocks


class Meta(NamedTuple):
    """What a meta-LoRA is made of: its pool, tasks across teachers, features of length one."""

    pool: str
    mixed: bool = True
    unit: bool = False


METAS = {
    "meta": Meta("whole", mixed=False),
    "meta-mixed": Meta("whole"),
    **{f"meta-mixed-{share}": Meta(f"dropped-{share}") for share in DROPPED},
    "meta-noise": Meta("noise"),
    "meta-real": Meta("real"),
    "unit-meta": Meta("whole", unit=True),
    "unit-meta-real": Meta("real", unit=True),
}
# Distances of features of length one are at most 4; divided by it they are as large as the others.
UNIT_TEMPERATURE = 0.1


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything besides base and seed that decides a cell."""

    teachers: int = 8
    classes: int = 5  # of a teacher
    rank: int = 4
    teacher_images: int = 100  # of a class
    teacher_steps: int = 100
    teacher_batch: int = 16
    teacher_rate: float = 3e-3
    per_class: int = 8  # images made of a class
    invert_steps: int = 120
    invert_rate: float = 0.1
    prior_weight: float = 0.01
    prior_images: int = 8  # of a class of the development, for a prior that needs some
    distil_steps: int = 300
    distil_rate: float = 1e-3
    restart_every: int = 100
    episodes: int = 600
    tuned_episodes: int = 60
    part: int = 10  # tuned episodes of one row
    queries: int = 15
    tuned_steps: int = 20
    tuned_batch: int = 10
    hub_candidates: int = 40
    development_episodes: int = 6


def recipe_name(base: Base, settings: Settings) -> str:
    """A name of everything besides a cell's own key that decides what it holds."""
    told = [dataclasses.asdict(settings), base.name]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]


class Experiment:
    """One base and one seed, with what was made for it in a cache.

    Args:
        go_on: Whether there is time; asked after every step of the long runs, which stop by
            OutOfTime and go on from their checkpoints the next time.
    """

    def __init__(
        self,
        base: Base,
        settings: Settings,
        seed: int,
        *,
        folder: Path,
        cache: Path,
        go_on: Callable[[], bool],
    ):
        self.base, self.settings, self.seed, self.go_on = base, settings, seed, go_on
        self.images = Images(folder, base.size, settings.teachers, settings.classes)
        self.model = base.fresh(folder)
        self.cache = cache / f"{recipe_name(base, settings)}-{seed}"
        self.names = [f"t{i}" for i in range(settings.teachers)]

    def class_names(self) -> dict[str, list[str]]:
        return {
            name: [str(c) for c in own]
            for name, own in zip(self.names, self.images.teachers, strict=True)
        }

    # Teachers

    def teacher(self, name: str) -> dict:
        """Train one teacher, a LoRA and a head, and keep both: its row."""
        s, at = self.settings, self.names.index(name)
        classes = self.images.teachers[at]
        images, labels = self.images.of(TRAIN, classes, s.teacher_images)
        bank, seed = AdapterBank(), 1000 * self.seed + at
        targets = list(self.base.targets)
        bank.add(new_adapter(self.model, name, rank=s.rank, target_modules=targets, seed=seed))
        handle = attach(copied(self.model), bank)
        head = nn.Linear(self.width, len(classes))
        nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
        start = time.process_time()
        parameters = [*bank.trainable([name]), *head.parameters()]
        with handle.mix(name):
            fit(
                lambda rows: head(handle.model(images[rows])),
                labels,
                [(parameters, s.teacher_rate)],
                steps=s.teacher_steps,
                batch=s.teacher_batch,
                seed=seed,
            )
        seconds = time.process_time() - start
        bank.freeze()
        self.cache.mkdir(parents=True, exist_ok=True)
        values = {"weight": head.weight.detach(), "bias": head.bias.detach()}
        save_file(values, self._head(name))
        write_adapter(bank.adapter(name), self.cache / name, overwrite_ok=True)
        shown, truth = self.images.of(VALIDATION, classes, 50)
        with torch.no_grad():
            right = (head(embed(handle, name, shown)).argmax(1) == truth).double()
        return {"accuracy": float(right.mean()), "cpu_seconds": seconds, "images": len(images)}

    def ensure(self, name: str) -> None:
        """Train a teacher again that a row tells of and the cache lacks."""
        if not (self.cache / name).is_dir():
            self.teacher(name)

    def _head(self, name: str) -> Path:
        return self.cache / f"{name}.head.safetensors"

    @functools.cached_property
    def width(self) -> int:
        with torch.no_grad():
            return self.model(torch.zeros(1, 3, self.base.size, self.base.size)).shape[1]

    @functools.cached_property
    def handle(self):
        """The base attached to all teachers."""
        bank = AdapterBank()
        bank.add_many(
            [dataclasses.replace(read_adapter(self.cache / n), name=n) for n in self.names]
        )
        return attach(copied(self.model), bank)

    @functools.cached_property
    def heads(self) -> dict[str, tuple[Tensor, Tensor]]:
        found = {name: load_file(self._head(name)) for name in self.names}
        return {name: (head["weight"], head["bias"]) for name, head in found.items()}

    # Pools

    def pool(self, kind: str) -> Pool:
        """``"whole"``, ``"dropped-75"``, ``"noise"`` or ``"real"``; made if the cache lacks it."""
        path = self.cache / f"pool_{kind}.safetensors"
        if not path.is_file():
            with self.timed(path):
                save_pool(self._made(kind), path)
        return load_pool(path)

    def _made(self, kind: str) -> Pool:
        s, names = self.settings, self.class_names()
        if kind in ("real", "noise"):
            return label_pool(self.handle, self.heads, self._given(kind), class_names=names)
        prune = None
        if kind != "whole":
            prune = prune_tokens(self.handle.model, self.ratios(int(kind.split("-")[1])))
        with self.checkpoint(f"pool_{kind}") as where:
            return self._inverted(self.names, s.per_class, self.seed, prune=prune, **where)

    def _inverted(self, names: list[str], per_class: int, seed: int, **more) -> Pool:
        s, all_names = self.settings, self.class_names()
        some, _ = self.images.of(VALIDATION, self.images.development, s.prior_images)
        return invert(
            self.handle,
            {name: self.heads[name] for name in names},
            per_class=per_class,
            steps=s.invert_steps,
            size=self.base.size,
            pixel_range=PIXELS,
            prior=self.base.prior(self.handle.model, some),
            prior_weight=s.prior_weight,
            lr=s.invert_rate,
            class_names={name: all_names[name] for name in names},
            seed=seed,
            **more,
        )

    def batching(self, kind: str, seed: int) -> dict:
        """An image of each class, by all teachers in one batch or by each ``"alone"``: its row."""

        def progress(done: int, total: int) -> None:
            if not self.go_on():
                raise OutOfTime

        start = time.process_time()
        batches = [[name] for name in self.names] if kind == "alone" else [self.names]
        pools = [self._inverted(names, 1, seed, progress=progress) for names in batches]
        accuracy = [value for pool in pools for value in pool.accuracy().values()]
        entropies = [F.cross_entropy(p.logits, p.labels, reduction="none") for p in pools]
        priors = torch.cat([p.losses for p in pools]) - torch.cat(entropies)
        return {
            "images": len(priors),
            "steps": self.settings.invert_steps,
            "accuracy": sum(accuracy) / len(accuracy),
            "least": min(accuracy),
            "last_loss": float(priors.mean()),
            "cpu_seconds": time.process_time() - start,
        }

    def _given(self, kind: str) -> dict[str, tuple[Tensor, Tensor]]:
        """Teacher -> the images it was trained on, or noise; with labels."""
        s, found = self.settings, {}
        for at, (name, classes) in enumerate(zip(self.names, self.images.teachers, strict=True)):
            if kind == "real":
                found[name] = self.images.of(TRAIN, classes, s.teacher_images)
                continue
            generator = torch.Generator().manual_seed(1000 * self.seed + at)
            labels = torch.arange(len(classes)).repeat_interleave(s.per_class)
            sides = 3, self.base.size, self.base.size
            noise = torch.randn(len(labels), *sides, generator=generator)
            found[name] = noise.clamp(*PIXELS), labels
        return found

    def ratios(self, share: int) -> dict[int, float]:
        """Block -> share dropped: behind a third and two thirds of them, as much each time."""
        last, each = len(self.model.blocks) - 1, 1 - (1 - share / 100) ** 0.5
        return {last // 3: each, 2 * last // 3: each}

    @torch.no_grad()
    def untrained_head(self, pool: Pool, draws: int = 20) -> float:
        """Accuracy of random heads on the images, under each one's own teacher: chance."""
        generator, right = torch.Generator().manual_seed(self.seed), []
        for t, name in enumerate(pool.names):
            own = pool.teachers == t
            found = embed(self.handle, name, pool.images[own])
            for _ in range(draws):
                head = torch.randn(self.width, self.settings.classes, generator=generator)
                right.append(
                    (((found - found.mean(0)) @ head).argmax(1) == pool.labels[own]).double().mean()
                )
        return float(torch.stack(right).mean())

    # Meta-LoRAs

    def meta(self, name: str):
        """A handle of a meta-LoRA, which is trained if the cache lacks it."""
        s, folder, bank = self.settings, self.cache / name, AdapterBank()
        if folder.is_dir():
            bank.add(dataclasses.replace(read_adapter(folder), name="meta"))
            return attach(copied(self.model), bank)
        kind = METAS[name]
        pool = self.pool(kind.pool)
        targets = list(self.base.targets)
        options = {"rank": s.rank, "target_modules": targets, "seed": self.seed}
        bank.add(new_adapter(self.model, "meta", **options))
        handle = attach(copied(self.model), bank)
        special = {"temperature": self.base.temperature}
        if kind.unit:
            special = {"features": lambda images: F.normalize(handle.model(images), dim=-1)}
            special["temperature"] = UNIT_TEMPERATURE
        with self.timed(folder), self.checkpoint(name) as where:
            made = distil(
                handle,
                pool,
                "meta",
                ways=s.classes,
                shots=1,
                queries=s.per_class - 1,
                interpolate=kind.mixed,
                sparse_tokens=prune_tokens if pool.kept is not None else None,
                steps=s.distil_steps,
                lr=s.distil_rate,
                restart_every=s.restart_every,
                seed=self.seed,
                **special,
                **where,
            )
        save_file({"losses": made.losses}, self.cache / f"{name}.losses.safetensors")
        write_adapter(made.adapter, folder)
        return handle

    # The cache

    @contextlib.contextmanager
    def checkpoint(self, name: str) -> Iterator[dict]:
        """Options of a long run that stops in time, and goes on from its file."""
        path = self.cache / f"{name}.part.safetensors"

        def progress(done: int, total: int) -> None:
            if not self.go_on() and done % 20 == 0 and done < total:
                raise OutOfTime

        yield {"checkpoint": Checkpoint(path), "checkpoint_every": 20, "progress": progress}
        path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def timed(self, path: Path) -> Iterator[None]:
        """Add up the CPU seconds of a run and of those that it goes on from."""
        start = time.process_time()
        try:
            yield
        finally:
            path.parent.mkdir(parents=True, exist_ok=True)
            total = self.seconds(path) + time.process_time() - start
            _beside(path).write_text(f"{total:.3f}\n")

    def seconds(self, path: Path) -> float:
        beside = _beside(path)
        return float(beside.read_text()) if beside.is_file() else 0.0


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.cpu_seconds")


def fit(
    logits: Callable[[Tensor], Tensor],
    labels: Tensor,
    groups: list[tuple[list[nn.Parameter], float]],
    *,
    steps: int,
    batch: int,
    seed: int,
) -> None:
    """AdamW on cross-entropy, one cycle; ``logits(rows)`` of rows of the labels."""
    optimizer = torch.optim.AdamW([{"params": p, "lr": rate} for p, rate in groups], fused=True)
    rates = [rate for _, rate in groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps)
    generator, waiting = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        if not waiting:
            order = torch.randperm(len(labels), generator=generator)
            waiting = list(order.split(batch))
        rows = waiting.pop(0)
        loss = F.cross_entropy(logits(rows), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
