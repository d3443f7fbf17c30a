"""Inversion of many teachers at once, and what pruning tokens saves, on the small ViT.

    python -m benchmarks.bench_recycle --csv benchmarks/results/recycle.csv

"invert": one step of Adam on the pixels of 8 teachers (rank 4 on q and v), 1, 5 or 25 images each,
all in one batch, under the priors of the experiment. Against it: one teacher after another with its
LoRA merged into the weights, where adapters cost nothing; ours, one teacher after another; and, as
a bound, the frozen model on the whole batch. max_error is that of the gradients against float64.
"invert pruned" and "distil": a step of inversion of 8 x 5 images, with tokens dropped behind blocks
1 and 3, and a step of meta-training (5 ways, 1 shot, 15 queries) on kept tokens alone, beside the
same on whole images. N counts tokens before any is dropped, CLS with them. One thread, the CPU
clock, in turns. Times do not depend on the weights' values: without the packaged model in
LORA_FUSED_DATA they are random.
"""

import argparse
import contextlib
import copy
import importlib
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import machine, table
from benchmarks.bench_composition import in_turns
from benchmarks.harness import Case, Gate, Result
from lora_fused import Adapter, AdapterBank, attach, new_adapter
from lora_fused.methods.recycle import FeatureStatistics, Pool, Prior, TotalVariation, Weighted
from lora_fused.methods.recycle.distil import Student, task_loss
from lora_fused.methods.recycle.images import Images
from lora_fused.methods.recycle.invert import Objective
from lora_fused.methods.recycle.tasks import Tasks
from lora_fused.methods.recycle.teachers import Teachers
from lora_fused.nn.prune import prune_tokens

TEACHERS, RANK, CLASSES = 8, 4, 5
IMAGES = (1, 5, 25)  # of each teacher
DROPPED = (0.0, 0.25, 0.5, 0.75)
WAYS, SHOTS, QUERIES = 5, 1, 15
WHOLE, BOUND = "whole images", "no adapters, in one batch"
DATA = Path(os.environ.get("LORA_FUSED_DATA", "../shared/data"))
JITTER, PRIOR_WEIGHT = 4, 0.01


def small_vit() -> nn.Module:
    sys.path.insert(0, str(machine.ROOT / "examples"))
    module = importlib.import_module("small_vit")
    sys.path.pop(0)
    torch.manual_seed(0)
    packaged = DATA / "vision" / "small_vit.safetensors"
    return module.load_small_vit(packaged) if packaged.is_file() else module.SmallViT().eval()


def adapters(model: nn.Module) -> list[Adapter]:
    """Teachers whose B is not 0."""
    found = []
    for seed in range(TEACHERS):
        one = new_adapter(model, f"t{seed}", rank=RANK, target_modules=["q", "v"], seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for part in one.modules.values():
            part.lora_b = 0.05 * torch.randn(part.lora_b.shape, generator=generator)
        found.append(one)
    return found


def heads(model: nn.Module) -> dict[str, tuple]:
    found = {}
    for seed in range(TEACHERS):
        generator = torch.Generator().manual_seed(100 + seed)
        weight = 0.1 * torch.randn(CLASSES, model.norm.normalized_shape[0], generator=generator)
        found[f"t{seed}"] = (weight, None)
    return found


def merged(model: nn.Module, adapter: Adapter) -> nn.Module:
    """A copy of the model with the adapter in its weights."""
    model = copy.deepcopy(model).requires_grad_(False)
    for name, part in adapter.modules.items():
        model.get_submodule(name).weight += part.scale * part.lora_b.T @ part.lora_a
    return model


class Inversion:
    """Steps of inversion; each run returns the pixels' gradients."""

    def __init__(self, model: nn.Module, each: int):
        self.model, self.each = model, each
        self.adapters, self.heads = adapters(model), heads(model)
        self.labels = torch.arange(each) % CLASSES
        self.size = (3, *_sides(model))
        images = torch.randn(64, *self.size, generator=torch.Generator().manual_seed(0))
        self.targets = FeatureStatistics.of_tokens(model, images.clamp(-1, 1)).targets

    def prior(self, model: nn.Module) -> Prior:
        statistics = FeatureStatistics(model, self.targets)
        return Weighted([(statistics, 0.3), (TotalVariation(), 60.0)])

    def attached(self):
        bank = AdapterBank()
        bank.add_many(self.adapters)
        return attach(copy.deepcopy(self.model).requires_grad_(False), bank)

    def step(self, images: Images, names: list[str], handle, prune=None) -> Callable[[], Tensor]:
        chosen = {name: self.heads[name] for name in names}
        routed = Teachers("bench", handle, chosen, [self.each] * len(names))
        prior = self.prior(handle.model)
        objective = Objective(routed, self.labels.repeat(len(names)), prior, PRIOR_WEIGHT)
        optimizer = torch.optim.Adam([images.pixels], 0.25, (0.5, 0.99))
        start = images.pixels.detach().clone()

        def run() -> Tensor:
            with torch.no_grad():
                images.pixels.copy_(start)
            with objective.in_force():
                with prune or contextlib.nullcontext():
                    total = objective(images.views(JITTER))[1]
                optimizer.zero_grad()
                total.backward(inputs=[images.pixels])
            optimizer.step()
            images.clamp()
            return images.pixels.grad

        return run

    def pixels(self, names: list[str], dtype: torch.dtype = torch.float32) -> Images:
        """From the same start for all, and with the same views in the same run."""
        bounds = tuple(torch.full((1, 1, 1), end, dtype=dtype) for end in (-1.0, 1.0))
        return Images(names, [self.each] * len(names), self.size, 0, bounds)

    def batched(self, prune_ratios: dict[int, float] | None = None) -> Callable[[], Tensor]:
        handle, names = self.attached(), list(self.heads)
        prune = None if prune_ratios is None else prune_tokens(handle.model, prune_ratios)
        return self.step(self.pixels(names), names, handle, prune)

    def one_at_a_time(self) -> Callable[[], Tensor]:
        handle = self.attached()
        steps = [self.step(self.pixels([name]), [name], handle) for name in self.heads]
        return lambda: torch.cat([step() for step in steps])

    def merged(self, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
        """Plain PyTorch: a step for each teacher, with its own merged model."""
        models = [merged(self.model, adapter).to(dtype) for adapter in self.adapters]
        images = [self.pixels([name], dtype) for name in self.heads]
        start = [one.pixels.detach().clone() for one in images]
        optimizers = [torch.optim.Adam([one.pixels], 0.25, (0.5, 0.99)) for one in images]
        priors = [self.prior(model) for model in models]

        def run() -> Tensor:
            rows = zip(models, priors, self.heads.values(), images, start, optimizers, strict=True)
            for model, prior, (weight, _), one, first, optimizer in rows:
                with torch.no_grad():
                    one.pixels.copy_(first)
                optimizer.zero_grad()
                views = one.views(JITTER)
                with prior.watch(model):
                    logits = F.linear(model(views), weight.to(dtype))
                    term = prior(views, [len(views)]).sum()
                (F.cross_entropy(logits, self.labels) + PRIOR_WEIGHT * term).backward()
                optimizer.step()
                one.clamp()
            return torch.cat([one.pixels.grad for one in images])

        return run

    def no_adapters(self) -> Callable[[], Tensor]:
        """The frozen model on all rows at once: what batching can give at best."""
        base = copy.copy(self)
        base.adapters, base.heads = [Adapter("none", {})], {"none": next(iter(self.heads.values()))}
        base.each, base.labels = TEACHERS * self.each, self.labels.repeat(TEACHERS)
        return base.merged()

    def race(self, rounds: int) -> list[Result]:
        gate = Gate((self.merged(torch.float64)(),), (self.merged()(),))
        runs = {
            "lora_fused": self.batched(),
            "lora_fused one at a time": self.one_at_a_time(),
            "merged one at a time": self.merged(),
            BOUND: self.no_adapters(),
        }

        def check(name: str, grad: Tensor) -> tuple[float, str]:
            if name == BOUND:
                return math.nan, ""
            return gate.check((grad,), name.startswith("lora_fused"))

        return in_turns(runs, check, rounds)

    def race_pruned(self, rounds: int) -> list[Result]:
        runs = {WHOLE: self.batched()}
        for dropped in DROPPED:
            each = 1 - math.sqrt(1 - dropped)
            ratios = dict.fromkeys(_blocks(self.model), each)
            runs[f"{dropped:.0%} dropped"] = self.batched(ratios)
        return in_turns(runs, _same_as_whole(self.batched()()), rounds)


class Meta:
    """Steps of meta-training; each run returns the gradient of the last factor."""

    def __init__(self, model: nn.Module):
        self.model, each = model, SHOTS + QUERIES
        count = TEACHERS * CLASSES * each
        generator = torch.Generator().manual_seed(0)
        sides = _sides(model)
        self.patches = model.pos.shape[1] - 1
        self.pool = Pool(
            torch.randn(count, 3, *sides, generator=generator).clamp(-1, 1),
            torch.arange(CLASSES).repeat_interleave(each).repeat(TEACHERS),
            torch.arange(TEACHERS).repeat_interleave(CLASSES * each),
            torch.randn(count, CLASSES, generator=generator),
            torch.zeros(count),
            tuple(f"t{t}" for t in range(TEACHERS)),
            tuple(tuple(f"t{t}/{i}" for i in range(CLASSES)) for t in range(TEACHERS)),
        )

    def step(self, dropped: float | None) -> Callable[[], Tensor]:
        bank, model = AdapterBank(), copy.deepcopy(self.model).requires_grad_(False)
        bank.add(new_adapter(model, "meta", rank=RANK, target_modules=["q", "v"], seed=0))
        handle, pool, sparse = attach(model, bank), self.pool, None
        if dropped is not None:
            generator = torch.Generator().manual_seed(1)
            order = torch.rand(len(pool), self.patches, generator=generator).argsort(1)
            left = max(1, round((1 - dropped) * self.patches))
            pool = Pool(**{**vars(pool), "kept": order[:, :left].sort(1).values})
            sparse = prune_tokens
        parameters = bank.trainable(["meta"])
        optimizer = torch.optim.Adam(parameters, 1e-3)
        student = Student(handle, "meta", pool, sparse, None)
        tasks = Tasks("bench", pool, ways=WAYS, each=SHOTS + QUERIES, interpolate=True)
        task = tasks.draw(torch.Generator().manual_seed(0))
        start = [p.detach().clone() for p in parameters]

        def run() -> Tensor:
            with torch.no_grad():
                for p, value in zip(parameters, start, strict=True):
                    p.copy_(value)
            optimizer.zero_grad()
            loss = task_loss(student(task), task, pool, SHOTS)
            loss.backward(inputs=parameters)
            optimizer.step()
            return parameters[-1].grad

        return run

    def race(self, rounds: int) -> list[Result]:
        runs = {WHOLE: self.step(None)}
        runs |= {f"{dropped:.0%} dropped": self.step(dropped) for dropped in DROPPED}
        return in_turns(runs, _same_as_whole(runs[WHOLE]()), rounds)


def _same_as_whole(whole: Tensor):
    whole = whole.clone()

    def check(name: str, grad: Tensor) -> tuple[float, str]:
        if name not in (WHOLE, "0% dropped"):
            return math.nan, ""  # another network: its accuracy is another table's
        worst = float((grad - whole).abs().max())
        return worst, "" if worst == 0 else f"a gradient differs by {worst:.3g}"

    return check


def _blocks(model: nn.Module) -> tuple[int, int]:
    """Behind which inversion drops tokens: of 6 blocks 1 and 3, counted from 0."""
    last = len(model.blocks) - 1
    return last // 3, 2 * last // 3


def _sides(model: nn.Module) -> tuple[int, int]:
    side = math.isqrt(model.pos.shape[1] - 1) * model.patch.stride[0]
    return side, side


def report(case: Case, raced: list[Result], base: str, results) -> None:
    """Print a case beside ``base``, and record it; every row but the base's is ours."""
    print(case)
    for result in raced:
        result.ours = result.name != base
    slowest = next(r for r in raced if r.name == base).quantile(0.5)
    for result in raced:
        took = result.quantile(0.5)
        line = f"  {result.name:26s} {took * 1e3:10.1f} ms, {slowest / took:5.2f}x as fast"
        print(f"{line}, max error {result.max_error:.2g}, {result.status} {result.reason}")
    if results is not None:
        unknown = {"flops": math.nan, "traffic": math.nan, "floor": math.nan}
        results.put(case, table.rows_of(case, raced, **unknown, clock="cpu"))


def main(argv: list[str] | None = None, make: Callable[[], nn.Module] = small_vit) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_recycle", description=__doc__)
    parser.add_argument("--csv", type=Path, help="where rows go; nothing is written without it")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, nargs="+", default=list(IMAGES))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    model = make()
    results = table.Table(options.csv) if options.csv else None
    print(f"{machine.cpu_model()}, torch {torch.__version__}, one thread, CPU clock")
    tokens, width = model.pos.shape[1:]
    rest = (TEACHERS, 1, RANK, width, width)
    for each in options.images:
        case = Case("recycle", "invert", f"{each} images each", TEACHERS * each * tokens, *rest)
        raced = Inversion(model, each).race(options.rounds)
        report(case, raced, "merged one at a time", results)
    count = TEACHERS * CLASSES
    case = Case("recycle", "invert pruned", f"{CLASSES} images each", count * tokens, *rest)
    report(case, Inversion(model, CLASSES).race_pruned(options.rounds), WHOLE, results)
    count = WAYS * (SHOTS + QUERIES)
    workload = f"{WAYS} ways {SHOTS} shot {QUERIES} queries"
    case = Case("recycle", "distil", workload, count * tokens, 1, 1, RANK, width, width)
    report(case, Meta(model).race(options.rounds), WHOLE, results)


if __name__ == "__main__":
    main()
