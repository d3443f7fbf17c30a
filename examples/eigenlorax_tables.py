"""What the rows of eigenlorax_glue_like.py say, in figures and in tables."""

import math
import statistics
from collections.abc import Iterable

from resumable import by_task, interval

from lora_fused.cli.console import stdout, table

REPORTED = ("error", "null_error", "held_out", "null_held_out", "verdict")


def summary(rows: Iterable[dict], ways: list[str]) -> dict:
    """Everything that the tables say, from the rows alone."""
    phases: dict[str, list[dict]] = {"cell": [], "reconstruct": [], "report": [], "ladder": []}
    for row in rows:
        phases[row["phase"]].append(row)
    cells: dict[str, dict] = {}
    for row in phases["cell"]:
        cells.setdefault(row["method"], {})[(row["task"], int(row["seed"]))] = row
    lora = cells.get("lora", {})
    methods = [_method(name, rows, lora) for name, rows in cells.items()]
    return {
        "methods": methods,
        "reconstruct": [found for way in ways if (found := _way(phases["reconstruct"], way))],
        "report": [{k: row[k] for k in ("task", "method", *REPORTED)} for row in phases["report"]],
    }


def _method(name: str, rows: dict, lora: dict) -> dict:
    first = next(iter(rows.values()))
    accuracy = {at: float(row["accuracy"]) for at, row in rows.items()}
    both = {at: accuracy[at] - float(lora[at]["accuracy"]) for at in accuracy if at in lora}
    steps = {at: float(row["steps_to_95"]) for at, row in rows.items()}
    mean = statistics.fmean
    return {
        "method": name,
        "cells": len(rows),
        "rate": float(first["rate"]),
        "parameters": int(first["parameters"]),
        "lora_ratio": float(first["lora_ratio"]) if first["lora_ratio"] else None,
        "accuracy": interval(list(by_task(accuracy).values())),
        "minus_lora": interval(list(by_task(both).values())),
        "tasks": by_task(accuracy),
        "steps_to_95": interval(list(by_task(steps).values())),
        "saved_mib": mean(float(row["saved_mib"]) for row in rows.values()),
        "train_mib": mean(float(row["train_mib"]) for row in rows.values()),
        "cpu_seconds": mean(float(row["cpu_seconds"]) for row in rows.values()),
    }


def _way(rows: list[dict], way: str) -> dict | None:
    rows = {row["task"]: row for row in rows if row["method"] == way}
    if not rows:
        return None
    errors = [float(row["error"]) for row in rows.values() if row["error"]]
    return {
        "way": way,
        "accuracy": interval([float(row["accuracy"]) for row in rows.values()]),
        "error": statistics.fmean(errors) if errors else None,
        "tasks": {task: float(row["accuracy"]) for task, row in rows.items()},
    }


def show(found: dict) -> None:
    """The tables of a summary."""
    say = stdout().print
    headings = ("method", "cells", "rate", "parameters", "LoRA's / these", "accuracy")
    headings += ("minus LoRA", "steps to 95 %", "MiB kept", "MiB to train", "CPU s")
    columns = {heading: "right" if i else "left" for i, heading in enumerate(headings)}
    cells = []
    for m in found["methods"]:
        ratio = "" if m["lora_ratio"] is None else f"{m['lora_ratio']:.2f}"
        facts = [m["method"], m["cells"], f"{m['rate']:g}", f"{m['parameters']:,}", ratio]
        spans = [_span(m["accuracy"], 3), _span(m["minus_lora"], 3), _span(m["steps_to_95"], 0)]
        sizes = [f"{m[k]:.1f}" for k in ("saved_mib", "train_mib", "cpu_seconds")]
        cells.append([*facts, *spans, *sizes])
    title = "A held-out task, learned (95 % intervals over tasks, each the mean of its seeds)"
    say(table(title, columns, cells))
    for title, kind, name in (
        ("Accuracy by task, learned", "methods", "method"),
        ("Accuracy of adapters given back by a basis, not trained", "reconstruct", "way"),
    ):
        if found[kind]:
            tasks = list(dict.fromkeys(t for m in found[kind] for t in m["tasks"]))
            rows = [
                [
                    m[name],
                    f"{m['accuracy'][0]:.3f}",
                    *(f"{m['tasks'].get(t, math.nan):.3f}" for t in tasks),
                ]
                for m in found[kind]
            ]
            say(table(title, {name: "left", **dict.fromkeys(["mean", *tasks], "right")}, rows))
    if found["report"]:
        columns = {key: "left" for key in found["report"][0]}
        rows = [list(row.values()) for row in found["report"]]
        say(table("Is anything shared? Relative errors", columns, rows))


def _span(pair: list[float | None] | None, digits: int) -> str:
    if pair is None:
        return ""
    half = "" if pair[1] is None else f" ± {pair[1]:.{digits}f}"
    return f"{pair[0]:.{digits}f}{half}"
