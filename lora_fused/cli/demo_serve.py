"""The demo's main act: one mixed batch, its difference to PEFT row by row, and its time."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_fused.adapters import AdapterBank
from lora_fused.cli.demo_peft import PeftRows, output
from lora_fused.mixture import Mixture, Row
from lora_fused.nn import Handle

ROUNDS = 7
MANY = 24  # adapters loaded for the second half of the race
KINDS = 6  # of rows, see example_rows
UNIFORM_OVER = 8  # at most so many adapters in a row's uniform mixture

MakeModel = Callable[[torch.dtype], nn.Module]


def example_rows(names: list[str], count: int, weighted: bool = True) -> list[Row]:
    """Rows that use no adapter, one, and (if weighted) sets of several, also of negative weight."""
    rows = []
    for i in range(count):
        a, b, c, d = (names[(first_adapter(i) + j) % len(names)] for j in range(4))
        some = names[:UNIFORM_OVER]
        kinds = (
            None,
            {a: 1.0},
            {a: 0.7, b: 0.3},
            {a: 1.0, b: -0.5},
            dict.fromkeys(some, 1.0 / len(some)),
            {a: 0.5, b: 0.3, c: 0.4, d: -0.2},
        )
        rows.append(kinds[i % (KINDS if weighted else 2)])
    return rows


def first_adapter(i: int) -> int:
    """Row i's first adapter, modulo their number: in time every one meets every kind of row."""
    return i + i // KINDS


@torch.no_grad()
def mixed_batch(handle: Handle, tokens: dict[str, Tensor], rows: list[Row]) -> Tensor:
    """One forward in which every row has its own weighted set of adapters."""
    with handle.mix(Mixture.rows(rows)):
        return output(handle.model, tokens)


@dataclasses.dataclass
class Difference:
    """Largest absolute differences over all real tokens of all rows.

    Attributes:
        to_peft: mixed batch to PEFT, row by row in the same dtype.
        error: mixed batch to PEFT, row by row in float64.
        peft_error: PEFT to itself in float64.
        budget: 2 * (peft_error + eps * max|float64 output|), the limit of ``error``.
        effect: what the adapters change in the float64 output, to judge the others by.
    """

    to_peft: float
    error: float
    peft_error: float
    budget: float
    effect: float

    @property
    def within(self) -> bool:
        return self.error <= self.budget


def compare(
    mixed: Tensor, tokens: dict[str, Tensor], rows: list[Row], peft: PeftRows, truth: PeftRows, tick
) -> Difference:
    """Hold a mixed batch against PEFT running each row alone, in the same dtype and in float64."""
    worst = dict.fromkeys(("to_peft", "error", "peft_error", "effect", "largest"), 0.0)
    for i, row in enumerate(rows):
        alone = {name: t[i : i + 1] for name, t in tokens.items()}
        # A classifier's logits have no token axis.
        keep = alone["attention_mask"].bool() if mixed.dim() == 3 else slice(None)
        actual, competitor = mixed[i : i + 1][keep], peft.weighted(alone, row)[keep]
        exact, base = truth.weighted(alone, row)[keep], truth.base(alone)[keep]
        seen = {
            "to_peft": actual.double() - competitor.double(),
            "error": actual.double() - exact,
            "peft_error": competitor.double() - exact,
            "effect": exact - base,
            "largest": exact,
        }
        for key, value in seen.items():
            # A NaN must not pass as the smaller of two numbers.
            worst[key] = max(worst[key], float(value.abs().max().nan_to_num(nan=torch.inf)))
        tick(1)
    eps = torch.finfo(mixed.dtype).eps
    budget = 2 * (worst["peft_error"] + eps * worst.pop("largest"))
    return Difference(**worst, budget=budget)


@dataclasses.dataclass
class Timing:
    """Median milliseconds of one way to run a batch, and how often the base's time that is."""

    work: str
    how: str
    loaded: int
    milliseconds: float
    ratio: float


def race(
    handle: Handle,
    peft: PeftRows,
    plain: nn.Module,
    tokens: dict[str, Tensor],
    rows: list[Row],
    folders: list[Path],
    tick,
) -> list[Timing]:
    """Time the same batch in every way, interleaved round by round, at two numbers of adapters."""
    names = handle.bank.names
    single = [None if i % 8 == 0 else names[i % len(names)] for i in range(len(rows))]
    peft.merge(single + rows)
    one, sets = "one adapter per row", "weighted set per row"
    cases = {
        ("no adapter", "the model alone"): lambda: output(plain, tokens),
        (one, "lora_fused, one batch"): lambda: mixed_batch(handle, tokens, single),
        (one, "PEFT adapter_names"): lambda: peft.by_adapter_names(tokens, single),
        (one, "PEFT, a forward per adapter"): lambda: peft.by_group(tokens, single),
        (sets, "lora_fused, one batch"): lambda: mixed_batch(handle, tokens, rows),
        (sets, "PEFT, a forward per set"): lambda: peft.by_group(tokens, rows),
    }
    if all(row is None or list(row.values()) == [1.0] for row in rows):
        cases = {case: run for case, run in cases.items() if case[0] != sets}
    held = len(names)
    timings = _medians(cases, held, tick)
    more = max(MANY, 2 * held)
    _load_copies(handle.bank, more)
    peft.load_copies(folders, more)
    # Only these two can depend on how many adapters are loaded but not used.
    again = dict(list(cases.items())[:3])
    return timings + _medians(again, more, tick)


def _medians(cases: dict, loaded: int, tick) -> list[Timing]:
    seconds: dict[tuple, list[float]] = {case: [] for case in cases}
    for turn in range(ROUNDS + 1):
        for case, run in cases.items():
            start = time.perf_counter()
            run()
            if turn:  # the first round warms up
                seconds[case].append(time.perf_counter() - start)
        tick(1)
    medians = {case: 1e3 * statistics.median(s) for case, s in seconds.items()}
    base = medians[("no adapter", "the model alone")]
    return [Timing(*case, loaded, ms, ms / base) for case, ms in medians.items()]


def _load_copies(bank: AdapterBank, count: int) -> None:
    names = bank.names
    copies = [
        dataclasses.replace(bank.adapter(names[i % len(names)]), name=f"copy {i}", metadata={})
        for i in range(len(names), count)
    ]
    bank.add_many(copies)
