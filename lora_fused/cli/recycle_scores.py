"""Few-shot scores of adapters for ``lora-fused recycle eval``, the frozen model beside them."""

import contextlib

import torch
from rich.table import Table

from lora_fused.cli.console import Reporter, finite, table


def scores(vision, handle, data, drawn, shots: int, options: dict, reporter: Reporter) -> list:
    """A dict per row, that of the frozen model first; all on the same episodes."""
    from lora_fused.methods.recycle import score_episodes

    features = _embed(vision, handle, data, reporter=reporter, **options)
    scored = {name: score_episodes(found, drawn, shots) for name, found in features.items()}
    return [_score(name, one, scored[None]) for name, one in scored.items()]


@torch.no_grad()
def _embed(vision, handle, data, *, batch_size: int, device: str, reporter: Reporter) -> dict:
    """Features of all images: under None those of the frozen model, and under each adapter."""
    names = [None] if handle is None else [None, *handle.bank.names]
    parts: dict[str | None, list[torch.Tensor]] = {name: [] for name in names}
    with reporter.task(f"embedding {len(data)} images", len(data)) as advance:
        for batch in data.batches(vision.prepare, batch_size):
            batch = batch.to(device)
            for name in names:
                with contextlib.nullcontext() if handle is None else handle.mix(name):
                    parts[name].append(vision.features(batch))
            advance(len(batch))
    return {name: torch.cat(found) for name, found in parts.items()}


def _score(name: str | None, one, frozen) -> dict:
    from lora_fused.methods.recycle import half_interval

    row = {"features": name or "frozen model", "accuracy": one.accuracy}
    row |= {"interval": one.interval, "gain": None, "gain_interval": None}
    if name is not None:
        differences = one.accuracies - frozen.accuracies
        row["gain"] = float(differences.mean())
        row["gain_interval"] = half_interval(differences)
    return finite(row)


def _interval(value: float, half: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if half is None else f" +- {half:.4f}")


def score_table(title: str, rows: list[dict]) -> Table:
    columns = {"features": "left", "accuracy": "right", "gain over frozen": "right"}
    cells = []
    for row in rows:
        gain = "" if row["gain"] is None else _interval(row["gain"], row["gain_interval"], "+")
        cells.append([row["features"], _interval(row["accuracy"], row["interval"]), gain])
    return table(title, columns, cells)
