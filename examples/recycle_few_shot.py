"""LoRA Recycle on small vision bases: what a meta-LoRA from other LoRAs gives in a few shots.

    python examples/recycle_few_shot.py --csv results.csv --minutes 50
    python examples/recycle_few_shot.py --csv results.csv --table

Teachers of five classes each are trained, inverted into images and distilled into meta-LoRAs; these
and what one would do without are compared on classes that no teacher has seen. Each finished cell
is a row of the CSV, and everything made is kept in a cache: a second run does what is missing.
docs/recycle.md says what came out.
"""

import argparse
import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from recycle_bases import BASES
from recycle_experiment import METAS, Settings, recipe_name
from recycle_methods import FREE, SETS, TUNED, FewShot
from recycle_tables import found, grid, tables
from resumable import DATA, OutOfTime, Results, best_rate, conditions, unknown, words

from lora_fused.cli.console import Reporter

# One rule for all tuned methods: the rate with the best mean accuracy over 1-shot and 5-shot
# episodes of classes that neither teachers nor tests have, the head's first.
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST_RATE = {"linear": 4, "lora": 3, "full": 1}
RATE_OF = {"lorahub": "linear"}
# What costs less where the base costs more; an option overrides it for all bases.
OF_BASE = {
    "efficientnet": {
        "teacher_steps": 60,
        "per_class": 6,
        "invert_steps": 80,
        "distil_steps": 200,
        "tuned_steps": 10,
        "hub_candidates": 20,
    }
}
COLUMNS = [
    "recipe",
    "phase",
    "base",
    "seed",
    "set",
    "shots",
    "method",
    "part",
    "rate",
    "images",
    "steps",
    "episodes",
    "accuracy",
    "half_interval",
    "minus_frozen",
    "minus_frozen_half_interval",
    "accuracies",
    "differences",
    "least",
    "untrained_head",
    "first_loss",
    "last_loss",
    "cpu_seconds",
    "torch",
    "threads",
    "machine",
    "commit",
    "date",
]
KEY = ("phase", "base", "seed", "set", "shots", "method", "part", "rate")


class Run:
    """The cells of one base and one seed."""

    def __init__(self, experiment: FewShot, results: Results, options, reporter: Reporter):
        self.experiment, self.results, self.options = experiment, results, options
        self._say = reporter.say

    def cell(self, make, **key) -> dict:
        where = {"base": self.experiment.base.name, "seed": self.experiment.seed}
        return self.results.cell(lambda: _rounded(make()), **where, **key)

    def all(self) -> None:
        """Everything that is missing: without tuning first, then what costs most.

        So what a budget cuts off is tuned episodes, never a method or a set.
        """
        for name in self.experiment.names:
            make = functools.partial(self.experiment.teacher, name)
            self.cell(make, phase="teacher", method=name)
            self.experiment.ensure(name)
        wanted = [m for m in self.options.methods if self._can(m)]
        for method in (m for m in FREE if m in wanted):
            if method in METAS:
                self.made(method)
            for name in self.options.sets:
                for shots in self.options.shots:
                    make = functools.partial(self.experiment.free, method, name, shots)
                    self.cell(make, phase="cell", set=name, shots=shots, method=method)
        for part, kind in itertools.product(range(self.options.batching), ("batched", "alone")):
            make = functools.partial(self.experiment.batching, kind, part)
            self.cell(make, phase="batching", method=kind, part=part)
        for part, first, count in self._parts():
            for shots, method, name in itertools.product(
                self.options.shots, TUNED, self.options.sets
            ):
                if method in wanted:
                    rates = self.rate(method), self.rate("linear")
                    what = method, name, shots, rates, first, count
                    make = functools.partial(self.experiment.tuned, *what)
                    key = {"set": name, "shots": shots, "method": method, "part": part}
                    self.cell(make, phase="tuned", **key, rate=rates[0])

    def _can(self, method: str) -> bool:
        pruned = method in METAS and METAS[method].pool.startswith("dropped")
        return self.experiment.base.prunable or not pruned

    def _parts(self) -> Iterator[tuple[int, int, int]]:
        s = self.experiment.settings
        for part, first in enumerate(range(0, s.tuned_episodes, s.part)):
            yield part, first, min(s.part, s.tuned_episodes - first)

    def made(self, method: str) -> None:
        """The rows of a meta-LoRA and of its pool."""
        kind = METAS[method].pool
        self.cell(functools.partial(self._pool, kind), phase="pool", method=kind)
        self.cell(functools.partial(self._meta, method), phase="meta", method=method)

    def _pool(self, kind: str) -> dict:
        experiment = self.experiment
        self._say(f"{experiment.base.name}: the pool {kind!r}")
        pool, path = experiment.pool(kind), experiment.cache / f"pool_{kind}.safetensors"
        accuracy = pool.accuracy().values()
        if self.options.grid is not None and kind not in ("real", "noise"):
            self.options.grid.mkdir(parents=True, exist_ok=True)
            name = f"recycle_{experiment.base.name}_{kind}.png"
            grid(pool).save(self.options.grid / name)
        return {
            "images": len(pool),
            "steps": experiment.settings.invert_steps if kind not in ("real", "noise") else None,
            "accuracy": sum(accuracy) / len(accuracy),
            "least": min(accuracy),
            "untrained_head": experiment.untrained_head(pool),
            "last_loss": float(pool.losses.mean()),
            "cpu_seconds": experiment.seconds(path),
        }

    def _meta(self, method: str) -> dict:
        from safetensors.torch import load_file

        experiment = self.experiment
        self._say(f"{experiment.base.name}: the meta-LoRA {method!r}")
        experiment.meta(method)
        losses = load_file(experiment.cache / f"{method}.losses.safetensors")["losses"]
        tenth = max(1, len(losses) // 10)
        return {
            "steps": len(losses),
            "first_loss": float(losses[:tenth].mean()),
            "last_loss": float(losses[-tenth:].mean()),
            "cpu_seconds": experiment.seconds(experiment.cache / method),
        }

    def rate(self, method: str) -> float:
        """The learning rate of a method by the rule above."""
        of = RATE_OF.get(method, method)
        count = self.experiment.settings.development_episodes

        def score(rate: float) -> float:
            rates = rate, rate if of == "linear" else self.rate("linear")
            scores = []
            for shots in (1, 5):
                what = of, "development", shots, rates, 0, count
                make = functools.partial(self.experiment.tuned, *what)
                key = {"set": "development", "shots": shots, "method": of, "rate": rate}
                scores.append(float(self.cell(make, phase="ladder", **key)["accuracy"]))
            return sum(scores) / len(scores)

        return best_rate(score, RATES, FIRST_RATE[of])


def _rounded(row: dict) -> dict:
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True, help="rows, appended to")
    parser.add_argument("--cache", type=Path, default=Path(".cache/recycle"), help="what is made")
    parser.add_argument("--data", type=Path, default=DATA, help="in place of LORA_FUSED_DATA")
    parser.add_argument("--bases", type=words, default=list(BASES))
    parser.add_argument("--seeds", type=int, default=1, help="0 to N - 1, one after the other")
    parser.add_argument("--methods", type=words, default=[*FREE, *TUNED])
    parser.add_argument("--sets", type=words, default=[name for name in SETS][:-1])
    parser.add_argument("--shots", type=lambda text: [int(n) for n in words(text)], default=[1, 5])
    parser.add_argument("--minutes", type=float, default=math.inf, help="no cell begins after")
    parser.add_argument("--threads", type=int, default=1)
    told = "over how many seeds one batch of all teachers is compared with one after another"
    parser.add_argument("--batching", type=int, default=0, help=told)
    parser.add_argument("--grid", type=Path, help="write surrogate images as PNG into this folder")
    parser.add_argument("--table", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--quiet", "-q", action="store_true")
    for field in dataclasses.fields(Settings):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), help=f"default {field.default}")
    return parser.parse_args(argv)


def wrong(options: argparse.Namespace) -> str | None:
    """What is wrong with the options, in words."""
    methods = options.methods, (*FREE, *TUNED)
    if error := unknown(base=(options.bases, BASES), method=methods, set=(options.sets, SETS)):
        return error
    if not (options.data / "vision").is_dir():
        return f"no images in {options.data / 'vision'} (LORA_FUSED_DATA or --data)"
    return None


def settings_of(base: str, options: argparse.Namespace) -> Settings:
    names = [field.name for field in dataclasses.fields(Settings)]
    given = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    return Settings(**OF_BASE.get(base, {}) | given)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    if error := wrong(options):
        print(error, file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * options.minutes
    torch.set_num_threads(options.threads)
    reporter, facts = Reporter(options.quiet), conditions(options.threads)
    settings = {base: settings_of(base, options) for base in options.bases}
    results = {}
    for base, chosen in settings.items():
        recipe, layout = recipe_name(BASES[base], chosen), {"columns": COLUMNS, "key": KEY}
        results[base] = Results(options.csv, recipe, facts, deadline, **layout)
    where = {"folder": options.data / "vision", "cache": options.cache}
    where["go_on"] = lambda: time.monotonic() < deadline
    try:
        for seed, base in itertools.product(range(0 if options.table else options.seeds), results):
            experiment = FewShot(BASES[base], settings[base], seed, **where)
            Run(experiment, results[base], options, reporter).all()
    except OutOfTime:
        reporter.say(f"stopped after {options.minutes:g} minutes; run again to go on")
    print(tables(found(row for one in results.values() for row in one.rows.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
