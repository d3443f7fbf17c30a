"""What the rows of composition_few_shot.py say: figures, and tables in Markdown."""

import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from composition_few_shot_methods import METHODS
from resumable import by_task, interval

COMPARED = ("head", "lora", "full", "uniform", "learned", "lorahub")
CLOSE = 0.02  # accuracies that differ by no more are comparable
# (the paper's claim or our control, one method, another): the first is to be better.
CLAIMS = tuple(
    (f"{one} beats {other}", one, other)
    for one, others in {
        "uniform": ("full", "lora", "head", "null-uniform"),
        "learned": ("full", "lora", "head", "null-learned", "uniform"),
        "learned-free": ("full", "lora", "head", "learned"),
        "lorahub": ("full", "lora", "head", "uniform", "learned"),
    }.items()
    for other in others
)

Pair = tuple[str, int]  # task and seed


class Found(NamedTuple):
    """The finished cells.

    Attributes:
        shots: in order, ``"full"`` last.
        accuracy, seconds: shots -> method -> (task, seed) -> value, of the tasks and seeds that all
            of COMPARED have, so that methods compare on the same cells; a method that lacks one is
            left out there.
        facts: method -> a row.
    """

    methods: list[str]
    shots: list[str]
    tasks: list[str]
    accuracy: dict[str, dict[str, dict[Pair, float]]]
    seconds: dict[str, dict[str, dict[Pair, float]]]
    facts: dict[str, dict]


def found(rows: Iterable[dict]) -> Found:
    """Collect the cells of a recipe."""
    cells: dict[str, dict[str, dict[Pair, dict]]] = {}
    for row in rows:
        if row["phase"] == "cell":
            at = row["task"], int(row["seed"])
            cells.setdefault(row["shots"], {}).setdefault(row["method"], {})[at] = row
    shots = sorted(cells, key=lambda s: (s == "full", int(s) if s != "full" else 0))
    run = {m for s in shots for m in cells[s]}
    methods = [m for m in METHODS if m in run]
    values: dict[str, dict] = {"accuracy": {}, "cpu_seconds": {}}
    for s in shots:
        asked = [set(of) for m, of in cells[s].items() if m in COMPARED]
        shared = set.intersection(*asked) if asked else set()
        for name, held in values.items():
            held[s] = {
                m: {at: float(of[at][name]) for at in of if at in shared}
                for m, of in cells[s].items()
                if shared and shared <= of.keys()
            }
    tasks = dict.fromkeys(
        at[0] for s in shots for of in values["accuracy"][s].values() for at in of
    )
    facts = {m: next(iter(cells[s][m].values())) for s in shots for m in cells[s]}
    return Found(methods, shots, list(tasks), values["accuracy"], values["cpu_seconds"], facts)


def difference(data: Found, shots: str, one: str, other: str) -> tuple[list | None, int]:
    """Mean of one minus other with its 95 % interval over tasks, and how many tasks.

    Seeds of a task are averaged first: they share its test rows and are no samples of their own.
    """
    cells = data.accuracy.get(shots, {})
    first, second = cells.get(one, {}), cells.get(other, {})
    means = list(by_task({at: first[at] - second[at] for at in first if at in second}).values())
    return interval(means), len(means)


def better(span: Sequence[float | None] | None) -> str:
    """Is a difference above 0?"""
    if span is None or span[1] is None:
        return "too little data"
    mean, half = span
    if mean - half > 0:
        return "yes"
    return "no, the opposite" if mean + half < 0 else "not shown"


def comparable(span: Sequence[float | None] | None) -> str:
    """Is a difference small?"""
    if span is None or span[1] is None:
        return "too little data"
    mean, half = span
    if abs(mean) + half <= CLOSE:
        return "yes"
    if mean - half > 0:
        return "better"
    return "no, worse" if mean + half < 0 else "not shown"


def tables(data: Found) -> str:
    """Everything, in Markdown."""
    parts = [_accuracies(data), _claims(data), _by_task(data), _costs(data)]
    return "\n\n".join(parts)


def _accuracies(data: Found) -> str:
    rows = []
    for m in data.methods:
        spans = [interval(list(data.accuracy[s].get(m, {}).values())) for s in data.shots]
        rows.append([m, *map(_span, spans)])
    counts = []
    for s in data.shots:
        pairs = {at for of in data.accuracy[s].values() for at in of}
        tasks, seeds = len({t for t, _ in pairs}), len({seed for _, seed in pairs})
        counts.append(f"{tasks} x {seeds}" if len(pairs) == tasks * seeds else f"{len(pairs)}")
    title = "Accuracy, mean and 95 % interval over tasks x seeds"
    return _table(title, ["method", *data.shots], [*rows, ["tasks x seeds", *counts]])


def _claims(data: Found) -> str:
    rows = []
    for told, one, other in CLAIMS:
        cells = []
        for s in data.shots:
            span, _ = difference(data, s, one, other)
            cells.append("" if span is None else f"{points(span)}: {better(span)}")
        if any(cells):
            rows.append([told, *cells])
    span, _ = difference(data, "full", "learned", "lora")
    if span is not None:
        blank = [""] * (len(data.shots) - 1)
        rows.append(
            ["learned is comparable to lora", *blank, f"{points(span)}: {comparable(span)}"]
        )
    title = "Differences in points of accuracy, 95 % interval over tasks (a task's seeds averaged)"
    return _table(title, ["claim", *data.shots], rows)


def _by_task(data: Found) -> str:
    columns = ["task", "shots", *data.methods]
    rows = []
    for task in data.tasks:
        for s in data.shots:
            cells = []
            for m in data.methods:
                values = [v for at, v in data.accuracy[s].get(m, {}).items() if at[0] == task]
                cells.append(f"{statistics.fmean(values):.3f}" if values else "")
            if any(cells):
                rows.append([task, s, *cells])
    return _table("Accuracy by task, mean over seeds", columns, rows)


def _costs(data: Found) -> str:
    rows = []
    for m in data.methods:
        cells = []
        for s in data.shots:
            values = list(data.seconds[s].get(m, {}).values())
            cells.append(f"{statistics.fmean(values):.1f}" if values else "")
        fact = data.facts[m]
        rows.append([m, f"{float(fact['rate']):g}", f"{int(fact['parameters']):,}", *cells])
    columns = ["method", "rate", "values besides the head", *(f"CPU s, {s}" for s in data.shots)]
    return _table("What learning takes", columns, rows)


def _span(pair: Sequence[float | None] | None) -> str:
    if pair is None:
        return ""
    return f"{pair[0]:.3f}" + ("" if pair[1] is None else f" ± {pair[1]:.3f}")


def points(pair: Sequence[float | None] | None) -> str:
    """Mean and half interval as points of accuracy, signed."""
    if pair is None:
        return ""
    return f"{100 * pair[0]:+.1f}" + ("" if pair[1] is None else f" ± {100 * pair[1]:.1f}")


def _table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    return f"{title}:\n\n{grid(columns, rows)}"


def grid(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, its columns as wide as what they hold."""
    widths = [max(len(r[i]) for r in [columns, *rows]) for i in range(len(columns))]
    lines = [columns, ["-" * w for w in widths], *rows]
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in lines
    )
