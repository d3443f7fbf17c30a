"""Races: several ways to compute one thing, gated for correctness and timed in turns.

A bench module states a ``Case`` and builds its ``Problem``; this file does the rest. Competitors
take turns in one process, in an order that changes, so that drift and a noisy machine hit all
alike. What fits a cache stays there between turns, for all alike; a model would find it colder.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_fused.testing import error

MIN_ROUNDS, MAX_ROUNDS = 5, 400
WARM_UP_RUNS, WARM_UP_SECONDS = 20, 0.02  # at least two runs, then whichever ends first
SAMPLE_SECONDS = 2e-4  # shorter runs are repeated within a sample: the clock costs 0.1 us
COMPETITOR_SECONDS = 10.0  # a competitor whose MIN_ROUNDS would take longer is skipped
MEMORY_LIMIT = 2 * 2**30  # bytes; for the inputs of a case, and for what a competitor adds
PEER_SLACK = 2.0  # peers are refused for being wrong, not for rounding a little more than the loop
# Times the best baseline: slower ones, whose exact time matters less, get MIN_ROUNDS and no more.
CONTENDER, CONTENDER_OURS = 2.0, 8.0
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One cell of a benchmark; letters as everywhere in this project."""

    op: str
    direction: str
    workload: str
    N: int
    K: int
    J: int
    R: int
    I: int
    O: int
    dtype: str = "float32"

    def __str__(self) -> str:
        sizes = " ".join(f"{letter}{getattr(self, letter)}" for letter in "NKJRIO")
        return f"{self.op} {self.direction} {self.workload} {sizes} {self.dtype}"


@dataclass(frozen=True)
class Competitor:
    """One way to compute the case.

    Attributes:
        name: the implementation's name in tables and rows.
        build: prepares, untimed, and returns what is timed.
        ours: under test, rather than a baseline.
        memory: bytes it needs beyond inputs and outputs, by arithmetic.
    """

    name: str
    build: Callable[[], Callable[[], Outputs]]
    ours: bool = False
    memory: int = 0


@dataclass(frozen=True)
class Problem:
    """A case with its data.

    Attributes:
        competitors: who races.
        truth: float64 results.
        rounded: results of a plain same-dtype formulation; its error sets the tolerance.
        gradients: run with autograd on.
    """

    competitors: list[Competitor]
    truth: Callable[[], Outputs]
    rounded: Callable[[], Outputs]
    gradients: bool = False


@dataclass
class Result:
    """What became of one competitor: "timed", "wrong" or "skipped" (with the reason)."""

    name: str
    ours: bool
    status: str = "timed"
    reason: str = ""
    max_error: float = math.nan
    memory: int = 0
    seconds: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        """Linear between samples; NaN where nothing was timed."""
        ordered = sorted(self.seconds)
        if not ordered:
            return math.nan
        at = q * (len(ordered) - 1)
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


class Gate:
    """The project's error budget against float64, for each output on its own.

    error(actual) <= 2 * (error(rounded) + eps * max|truth|), eps of the case's dtype; PEER_SLACK
    times that for a peer.
    """

    def __init__(self, truth: Outputs, rounded: Outputs):
        self.truth = truth
        self.budget = [
            2 * (error(r, t) + torch.finfo(r.dtype).eps * float(t.abs().max()))
            for r, t in zip(rounded, truth, strict=True)
        ]

    def check(self, actual: Outputs, ours: bool = True) -> tuple[float, str]:
        """The largest error, and why the result is refused ("" where it is right)."""
        budgets = [b if ours else PEER_SLACK * b for b in self.budget]
        worst, reason = 0.0, ""
        for i, (a, t, budget) in enumerate(zip(actual, self.truth, budgets, strict=True)):
            if a.shape != t.shape:
                return math.inf, f"output {i} has shape {list(a.shape)}, not {list(t.shape)}"
            off = error(a, t)
            worst = max(worst, off)
            if off > budget:
                reason = reason or f"output {i}: error {off:.3g} exceeds {budget:.3g}"
        return worst, reason


def race(problem: Problem, budget: float = 1.0, clock: str = "wall") -> list[Result]:
    """Check and time every competitor of a problem.

    Args:
        problem: what to compute and who competes.
        budget: seconds of timing for the case; every competitor gets five rounds even beyond it.
        clock: "wall", or "cpu": time of the calling thread, for a busy machine and one thread.

    Returns:
        One result for each competitor, in the order given.
    """
    if clock == "cpu" and torch.get_num_threads() > 1:
        raise ValueError(f"race: clock must be 'wall' at {torch.get_num_threads()} threads")
    with torch.set_grad_enabled(problem.gradients):
        return _race(problem, budget, CLOCKS[clock])


def best_baseline(results: list[Result]) -> Result | None:
    """The fastest correct competitor that is not ours."""
    timed = [r for r in results if r.seconds and not r.ours]
    return min(timed, key=lambda r: r.quantile(0.5), default=None)


def _race(problem: Problem, budget: float, now: Callable[[], float]) -> list[Result]:
    gate = Gate(problem.truth(), problem.rounded())
    results, entrants = [], []
    for competitor in problem.competitors:
        result, run, single = _admit(competitor, gate, now)
        results.append(result)
        if run is not None:
            entrants.append((result, run, max(1, int(SAMPLE_SECONDS / max(single, 1e-9)))))
    until = time.perf_counter() + budget
    for turn in _rounds(entrants, until):
        for result, run, repeats in turn:
            start = now()
            for _ in range(repeats):
                run()
            result.seconds.append((now() - start) / repeats)
    return results


def _admit(competitor: Competitor, gate: Gate, now: Callable[[], float]):
    # Gate and warm-up: (result, what to time or None, seconds of one run).
    result = Result(competitor.name, competitor.ours, memory=competitor.memory)
    if competitor.memory > MEMORY_LIMIT:
        result.status = "skipped"
        result.reason = f"needs {competitor.memory / 2**30:.1f} GiB beside the inputs"
        return result, None, 0.0
    run = competitor.build()
    start = now()
    outputs = run()
    single = now() - start
    result.max_error, fault = gate.check(outputs, competitor.ours)
    if fault:
        result.status, result.reason = "wrong", fault
        return result, None, 0.0
    if single * MIN_ROUNDS > COMPETITOR_SECONDS:
        result.status = "skipped"
        result.reason = f"{MIN_ROUNDS} rounds would take {single * MIN_ROUNDS:.0f} s"
        return result, None, 0.0
    until = time.perf_counter() + WARM_UP_SECONDS
    for i in range(WARM_UP_RUNS):
        if i >= 2 and time.perf_counter() > until:
            break
        start = now()
        run()
        single = min(single, now() - start)
    return result, run, single


def _rounds(entrants: list, until: float) -> Iterator[list]:
    # All for MIN_ROUNDS, then whoever is near the best while time lasts. Shuffled, not rotated:
    # what a run leaves in caches and allocator must not always fall to the same neighbour.
    chance = random.Random(0)
    for i in range(MAX_ROUNDS):
        if i == MIN_ROUNDS and entrants:
            medians = {r.name: statistics.median(r.seconds) for r, *_ in entrants}
            baselines = [medians[r.name] for r, *_ in entrants if not r.ours]
            best = min(baselines or medians.values())
            limit = {True: CONTENDER_OURS * best, False: CONTENDER * best}
            entrants = [e for e in entrants if medians[e[0].name] <= limit[e[0].ours]]
        if not entrants or (i >= MIN_ROUNDS and time.perf_counter() > until):
            return
        yield chance.sample(entrants, len(entrants))
