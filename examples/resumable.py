"""What the experiments share that run for hours: a CSV with a row per finished cell, and its facts.

A killed run loses the cell it was in; the next run reads the rest and goes on.
"""

import csv
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("LORA_FUSED_DATA", ROOT.parent / "shared" / "data"))


class OutOfTime(Exception):
    """The budget is spent; what is done is in the CSV."""


class Results:
    """The rows of one recipe in a CSV, which may hold others; a row is written whole.

    Args:
        columns: Of the file; ``"recipe"`` and ``"date"`` are filled in here.
        key: The columns that tell a recipe's cells apart.
        conditions: What every row says besides its cell.
        deadline: No cell begins after this time of ``time.monotonic``.
    """

    def __init__(
        self,
        path: Path,
        recipe: str,
        conditions: dict,
        deadline: float,
        *,
        columns: Sequence[str],
        key: Sequence[str],
    ):
        self.path, self.recipe, self.conditions = path, recipe, conditions
        self.columns, self.key = list(columns), tuple(key)
        self.deadline, self.rows = deadline, {}
        if path.is_file():
            self._read()

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a run was killed while it wrote
            self.path.write_text(whole, encoding="utf-8")
        for row in csv.DictReader(whole.splitlines()):
            if list(row) != self.columns:
                raise ValueError(f"{self.path}: columns must be {self.columns}, got {list(row)}")
            if row["recipe"] == self.recipe:
                self.rows[tuple(row[k] for k in self.key)] = row

    def cell(self, make: Callable[[], dict], **key) -> dict:
        """The row of a cell, computed by ``make()`` unless it is there already."""
        full = {name: str(key.get(name, "")) for name in self.key}
        at = tuple(full.values())
        if at not in self.rows:
            if time.monotonic() >= self.deadline:
                raise OutOfTime
            now = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ")}
            found = {"recipe": self.recipe, **full, **make(), **self.conditions, **now}
            row = {c: "" if found.get(c) is None else str(found[c]) for c in self.columns}
            self._append(row)
            self.rows[at] = row
        return self.rows[at]

    def _append(self, row: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.is_file() or not self.path.stat().st_size
        with self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            if fresh:
                writer.writeheader()
            writer.writerow(row)
            file.flush()


def best_rate(score: Callable[[float], float], rates: Sequence[float], first: int) -> float:
    """The learning rate with the best score, the smaller of equals.

    Three steps of the scale are tried from ``first`` on, and more while the best is at an end.
    """
    low, high = first, first + 2
    while True:
        scores = {i: score(rates[i]) for i in range(low, high + 1)}
        best = max(scores, key=lambda i: (scores[i], -i))
        if best == low > 0:
            low -= 1
        elif best == high < len(rates) - 1:
            high += 1
        else:
            return rates[best]


def unknown(**asked: tuple[Sequence[str], Collection[str]]) -> str | None:
    """The first value that is not among the known ones, in words: ``task=(values, known)``."""
    for label, (values, known) in asked.items():
        for value in values:
            if value not in known:
                return f"no such {label}: {value}; there are {', '.join(known)}"
    return None


def words(text: str) -> list[str]:
    return text.split(",")


def conditions(threads: int) -> dict:
    """What a row says of where it was made."""
    try:
        command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    machine = models[0] if models else "unknown"
    return {"torch": torch.__version__, "threads": threads, "machine": machine, "commit": commit}


def by_task(values: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """Means over a task's seeds: these share its texts, so tasks alone are independent draws."""
    tasks = dict.fromkeys(task for task, _ in values)
    return {t: statistics.fmean(v for (task, _), v in values.items() if task == t) for t in tasks}


def interval(values: Sequence[float]) -> list[float | None] | None:
    """Mean and half of Student's 95 % interval of it; no interval of one value."""
    if not values:
        return None
    if len(values) < 2:
        return [values[0], None]
    n, z = len(values) - 1, 1.959964
    t = z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return [statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values))]
