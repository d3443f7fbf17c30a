"""Accuracy against shots as an SVG: the mean of all tasks, and each task by itself."""

import statistics
from collections.abc import Iterator
from html import escape

from composition_few_shot_tables import Found

COLOURS = {
    "head": "#5b6470",
    "lora": "#d55e00",
    "full": "#b8860b",
    "uniform": "#3a9bd9",
    "learned": "#0b4f8a",
    "learned-free": "#7a4fa3",
    "lorahub": "#00855f",
    "null-uniform": "#3a9bd9",
    "null-learned": "#0b4f8a",
}
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1c2430}.t{font-weight:600}.f{fill:#566170}"
    ".g{stroke:#e6e9ed}path{fill:none}"
)
WIDE, SMALL, HIGH = 560, 250, 190  # widths of the large panel and of a small one, its height

Curves = dict[str, dict[str, float]]  # method -> shots -> accuracy


def svg(data: Found) -> str:
    """The picture; dashed lines are adapters that were turned at random."""
    rows = -(-len(data.tasks) // 2)
    high = max(rows, 2) * HIGH
    width = WIDE + 2 * SMALL + 20
    parts = [f'<rect width="{width}" height="{high}" fill="#fff"/>']
    parts += _panel(
        data, "accuracy, mean of tasks", _curves(data, None), (0, 0, WIDE, high), names=True
    )
    for i, task in enumerate(data.tasks):
        box = (WIDE + 20 + (i % 2) * SMALL, (i // 2) * HIGH, SMALL, HIGH)
        parts += _panel(data, task, _curves(data, task), box, names=False)
    size = f'width="{width}" height="{high}" viewBox="0 0 {width} {high}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    title = "<title>Accuracy against examples per class, by method</title>"
    return "\n".join([head, title, f"<style>{STYLE}</style>", *parts, "</svg>"]) + "\n"


def _curves(data: Found, task: str | None) -> Curves:
    """Means over seeds of a task; over tasks of these where there is none."""
    curves: Curves = {}
    for s in data.shots:
        for m, cells in data.accuracy[s].items():
            by_task: dict[str, list[float]] = {}
            for at, value in cells.items():
                if task in (None, at[0]):
                    by_task.setdefault(at[0], []).append(value)
            means = [statistics.fmean(values) for values in by_task.values()]
            if means and (task or len(means) == len(data.tasks)):
                curves.setdefault(m, {})[s] = statistics.fmean(means)
    return {m: curves[m] for m in data.methods if m in curves}


def _panel(data: Found, title: str, curves: Curves, box, *, names: bool) -> Iterator[str]:
    """A chart in a box (x, y, width, height): axes, lines, and their names at the right end."""
    x0, y0, wide, high = box
    left, top, right, bottom = x0 + 40, y0 + 28, x0 + wide - (110 if names else 14), y0 + high - 34
    values = [v for curve in curves.values() for v in curve.values()] or [0.0, 1.0]
    low, above = int(min(values) * 10) / 10, min(1.0, (int(max(values) * 10) + 1) / 10)

    def x(shots: str) -> float:
        return left + (right - left) * data.shots.index(shots) / max(len(data.shots) - 1, 1)

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - low) / (above - low)

    yield f'<text class="t" x="{left}" y="{y0 + 18}">{escape(title)}</text>'
    for tenth in range(round(low * 10), round(above * 10) + 1):
        at = y(tenth / 10)
        yield f'<path class="g" d="M{left} {at:.1f}H{right}"/>'
        style = 'class="f" text-anchor="end"'
        yield f'<text {style} x="{left - 6}" y="{at + 4:.1f}">{tenth / 10}</text>'
    for s in data.shots:
        yield f'<text class="f" x="{x(s):.1f}" y="{bottom + 18}" text-anchor="middle">{s}</text>'
    ends: list[tuple[float, str]] = []
    for m, curve in curves.items():
        points = [(x(s), y(v)) for s, v in curve.items()]
        dash = ' stroke-dasharray="2 4"' if m.startswith("null-") else ""
        path = "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        yield f'<path d="M{path}" stroke="{COLOURS[m]}" stroke-width="2"{dash}/>'
        for a, b in points:
            yield f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{COLOURS[m]}"/>'
        ends.append((points[-1][1], m))
    if names:
        yield f'<text class="f" x="{left}" y="{y0 + high - 2}">examples per class</text>'
        yield from _names(ends, right + 10)


def _names(ends: list[tuple[float, str]], x: float) -> Iterator[str]:
    """Beside the ends of the lines, never closer than a line of text."""
    free = float("-inf")
    for y, m in sorted(ends):
        free = max(y + 4, free + 15)
        style = f'style="fill:{COLOURS[m]}"'
        yield f'<text {style} x="{x}" y="{free:.1f}">{escape(m)}</text>'
