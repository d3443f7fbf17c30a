"""Results as CSV: a row for each case, implementation and thread count, written as they come."""

import csv
import datetime
import math
import os
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.harness import Case, Result, best_baseline

CASE_FIELDS = ("op", "direction", "workload", "N", "K", "J", "R", "I", "O", "dtype")
FIELDS = (
    *("op", "impl", "direction", "workload", "N", "K", "J", "R", "I", "O", "dtype"),
    *("ms_p50", "ms_p20", "ms_p80", "gbytes_per_s", "tflop_per_s", "max_error"),
    *("baseline", "speedup", "device", "torch", "triton", "version", "commit", "date"),
    *("threads", "machine", "isa"),
    *("clock", "rounds", "floor_ms", "memory_mib", "status", "reason"),
)


class WrongResult(RuntimeError):
    """One of our implementations failed the gate: nothing may be recorded for the case."""


class Table:
    """A CSV file that holds whole cases, rewritten after each, so that a stopped run loses none.

    A case measured anew replaces its old rows (those of the same machine and thread count).
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self._cells: dict[tuple, list[dict]] = {}
        if not self.path.exists():
            return
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != FIELDS:
                raise ValueError(f"run: --csv must have the fields of this version, got {path}")
            for row in reader:
                self._cells.setdefault(_key(row), []).append(row)

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._cells.values())

    def has(self, case: Case, *, any_commit: bool = False) -> bool:
        """Whether the case was measured here, at this thread count and (unless any) commit."""
        rows = self._cells.get(_key(_conditions(case)), [])
        return any(any_commit or row["commit"] == machine.commit() for row in rows)

    def put(self, case: Case, rows: list[dict]) -> None:
        """Record the rows of one case and write the file, whole or not at all."""
        self._cells[_key(_conditions(case))] = rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            for cell in self._cells.values():
                writer.writerows(cell)
        os.replace(partial, self.path)


def rows_of(
    case: Case, results: list[Result], *, flops: float, traffic: float, floor: float, clock: str
) -> list[dict]:
    """The CSV rows of a raced case, slower ones like faster ones.

    Raises:
        WrongResult: one of ours is wrong.
    """
    for result in results:
        if result.ours and result.status == "wrong":
            raise WrongResult(f"{case}: {result.name} is wrong: {result.reason}")
    best = best_baseline(results)
    rows = []
    for result in results:
        p20, p50, p80 = (result.quantile(q) for q in (0.2, 0.5, 0.8))
        numbers = {
            "ms_p50": p50 * 1e3,
            "ms_p20": p20 * 1e3,
            "ms_p80": p80 * 1e3,
            "gbytes_per_s": traffic / p50 / 1e9,
            "tflop_per_s": flops / p50 / 1e12,
            "max_error": result.max_error,
            "speedup": best.quantile(0.5) / p50 if best else math.nan,
            "floor_ms": floor * 1e3,
            "memory_mib": result.memory / 2**20,
        }
        rows.append(
            _conditions(case)
            | {field: _digits(value) for field, value in numbers.items()}
            | {
                "impl": result.name,
                "baseline": best.name if best else "",
                "isa": machine.native_isa() if result.name == "native" else machine.torch_isa(),
                "clock": clock,
                "rounds": len(result.seconds),
                "status": result.status,
                "reason": result.reason,
            }
        )
    return rows


def skipped(case: Case, reason: str) -> list[dict]:
    """The one row of a case that was not tried."""
    empty = dict.fromkeys(FIELDS, "")
    return [empty | _conditions(case) | {"impl": "all", "status": "skipped", "reason": reason}]


def _conditions(case: Case) -> dict:
    return {
        **{field: getattr(case, field) for field in CASE_FIELDS},
        **machine.versions(),
        "device": "cpu",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "threads": torch.get_num_threads(),
        "machine": machine.cpu_model(),
    }


def _key(row: dict) -> tuple:
    return tuple(str(row[field]) for field in (*CASE_FIELDS, "threads", "machine"))


def _digits(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"
