"""What the rows of recycle_few_shot.py say, as tables in Markdown; and pools as pictures."""

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple

import torch
from recycle_methods import FREE, TUNED
from resumable import interval
from small_vit import MEAN, SPREAD

from lora_fused.methods.recycle import Pool

NAMES = {
    "frozen": "frozen features",
    "uniform": "uniform LoRA average",
    "best-teacher": "best single teacher (oracle)",
    "meta": "meta-LoRA",
    "meta-mixed": "meta-LoRA, interpolated",
    "meta-mixed-25": "... 25 % of tokens dropped",
    "meta-mixed-50": "... 50 %",
    "meta-mixed-75": "... 75 %",
    "meta-noise": "... of noise (control)",
    "meta-real": "... of the teachers' data (upper bound)",
    "frozen-unit": "frozen features of length one",
    "meta-mixed-unit": "meta-LoRA, interpolated, tested at length one",
    "unit-meta": "meta-LoRA, interpolated, trained and tested at length one",
    "unit-meta-real": "... of the teachers' data (upper bound)",
    "linear": "linear",
    "lorahub": "LoRAHub + linear",
    "lora": "LoRA + linear",
    "full": "full fine-tuning",
}
PHASES = ("teacher", "pool", "meta", "batching", "ladder")  # besides scores


class Score(NamedTuple):
    """Of one method on one set: means over episodes with half of their 95 % intervals."""

    accuracy: float
    half: float
    minus_frozen: float
    minus_half: float
    episodes: int


Key = tuple[str, int, str, str, str]  # base, seed, set, shots, method


def found(rows: Iterable[dict]) -> dict:
    """Scores by (base, seed, set, shots, method), tuned parts joined; other rows by phase."""
    scores: dict[Key, Score] = {}
    parts: dict[Key, list[dict]] = {}
    rest: dict[str, list[dict]] = {p: [] for p in PHASES}
    for row in rows:
        key = row["base"], int(row["seed"]), row["set"], row["shots"], row["method"]
        if row["phase"] == "cell":
            names = "accuracy", "half_interval", "minus_frozen", "minus_frozen_half_interval"
            scores[key] = Score(*(float(row[n]) for n in names), int(row["episodes"]))
        elif row["phase"] == "tuned":
            parts.setdefault(key, []).append(row)
        else:
            rest[row["phase"]].append(row)
    for key, own in parts.items():
        accuracy, differences = (
            [float(v) for row in own for v in row[column].split()]
            for column in ("accuracies", "differences")
        )
        scores[key] = Score(*_mean(accuracy), *_mean(differences), len(accuracy))
    return {"scores": scores, **rest}


def _mean(values: list[float]) -> tuple[float, float]:
    """Mean and half of Student's interval: of a few episodes it is wider than the normal one."""
    mean, half = interval(values)
    return mean, math.nan if half is None else half


def tables(told: dict) -> str:
    """All tables."""
    bases = dict.fromkeys((key[0], key[1]) for key in told["scores"])
    parts = [text for base, seed in bases for text in _scores(told["scores"], base, seed)]
    parts += [_pools(told["pool"]), _batching(told["batching"]), _metas(told["meta"])]
    parts.append(_teachers(told["teacher"]))
    return "\n\n".join(part for part in parts if part)


def _scores(scores: dict[Key, Score], base: str, seed: int) -> list[str]:
    own = {key[2:]: score for key, score in scores.items() if key[:2] == (base, seed)}
    columns = list(dict.fromkeys((name, shots) for name, shots, _ in own))
    texts = []
    for title, show in (
        ("accuracy", lambda s: f"{s.accuracy:.3f} ± {s.half:.3f}"),
        (
            "minus frozen features, same episodes",
            lambda s: f"{s.minus_frozen:+.3f} ± {s.minus_half:.3f}",
        ),
    ):
        head = [f"{base}, seed {seed}: {title}", "episodes"]
        head += [f"{name}, {shots}-shot" for name, shots in columns]
        lines = []
        for method in (*FREE, *TUNED):
            cells = [own.get((*column, method)) for column in columns]
            done = [score for score in cells if score is not None]
            if done:
                counts = " / ".join(dict.fromkeys(str(score.episodes) for score in done))
                shown = ["" if score is None else show(score) for score in cells]
                lines.append([NAMES[method], counts, *shown])
        texts.append(_table(head, lines))
    return texts


def _pools(rows: list[dict]) -> str:
    head = ["pool", "images", "steps", "own teacher", "least teacher", "untrained head", "CPU s"]
    names = "images", "steps", "accuracy", "least", "untrained_head", "cpu_seconds"
    lines = [[_made(r), *(_short(r[n]) for n in names)] for r in rows]
    return _table(head, lines) if lines else ""


def _made(row: dict) -> str:
    return _seeded(f"{row['base']}, {row['method']}", row["seed"])


def _seeded(title: str, seed: str) -> str:
    return title if seed == "0" else f"{title}, seed {seed}"


def _batching(rows: list[dict]) -> str:
    """All teachers in one batch and one after another: means over seeds, and of the differences."""
    columns = {"accuracy": "own teacher", "last_loss": "weighted prior", "cpu_seconds": "CPU s"}
    lines = []
    for base in dict.fromkeys(row["base"] for row in rows):
        batched, alone = (
            {r["part"]: r for r in rows if (r["base"], r["method"]) == (base, kind)}
            for kind in ("batched", "alone")
        )
        seeds = [part for part in batched if part in alone]
        values = {c: [(float(batched[s][c]), float(alone[s][c])) for s in seeds] for c in columns}
        for title, of in (
            ("one batch", lambda one, _: one),
            ("each alone", lambda _, other: other),
            ("difference", lambda one, other: one - other),
        ):
            means = [_mean([of(*pair) for pair in pairs]) for pairs in values.values()]
            shown = [f"{mean:.3f} ± {half:.3f}" for mean, half in means]
            lines.append([f"{base}, {title}", str(len(seeds)), *shown])
    return _table(["inversion of", "seeds", *columns.values()], lines) if lines else ""


def _metas(rows: list[dict]) -> str:
    head = ["meta-LoRA", "steps", "loss, first tenth", "last tenth", "CPU s"]
    names = "steps", "first_loss", "last_loss", "cpu_seconds"
    lines = [[_made(r), *(_short(r[n]) for n in names)] for r in rows]
    return _table(head, lines) if lines else ""


def _teachers(rows: list[dict]) -> str:
    head, lines = ["teachers", "count", "accuracy, mean", "least", "most", "CPU s each"], []
    for base, seed in dict.fromkeys((row["base"], row["seed"]) for row in rows):
        own = [row for row in rows if (row["base"], row["seed"]) == (base, seed)]
        accuracy = [float(row["accuracy"]) for row in own]
        seconds = statistics.fmean(float(row["cpu_seconds"]) for row in own)
        values = statistics.fmean(accuracy), min(accuracy), max(accuracy)
        shown = [*(f"{v:.3f}" for v in values), f"{seconds:.1f}"]
        lines.append([_seeded(base, seed), str(len(own)), *shown])
    return _table(head, lines) if lines else ""


def _short(value: str) -> str:
    return f"{float(value):.3f}".rstrip("0").rstrip(".") if "." in value else value


def _table(head: list[str], lines: list[list[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def grid(pool: Pool, each: int = 2):
    """A PIL image: a line per teacher, some images of each of its classes side by side."""
    from PIL import Image

    most = max(map(len, pool.class_names))
    size = pool.images.shape[-1]
    sheet = torch.full(
        (len(pool.names), most * each, 3, size + 1, size + 1), 255, dtype=torch.uint8
    )
    for t, names in enumerate(pool.class_names):
        for label in range(len(names)):
            rows = ((pool.teachers == t) & (pool.labels == label)).nonzero().flatten()[:each]
            pixels = ((pool.images[rows] * SPREAD + MEAN) * 255).round().clamp(0, 255)
            at = slice(label * each, label * each + len(rows))
            sheet[t, at, :, :size, :size] = pixels.to(torch.uint8)
    lines, columns, _, side, _ = sheet.shape
    pixels = sheet.permute(0, 3, 1, 4, 2).reshape(lines * side, columns * side, 3)
    return Image.fromarray(pixels.numpy())
