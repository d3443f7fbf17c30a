"""HTML reports: one page with everything in it, charts as SVG. Knows nothing of adapters.

Charts are drawn 360 wide, the width of a phone, and scale with the page. Text is set by the page's
style, so a chart is readable inside a page alone.
"""

import base64
import os
import struct
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

WIDTH = 360
_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff; margin: 0 auto;
  max-width: 62rem; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.verdict { border-left: .4rem solid #888; background: #f4f5f7; padding: .6rem 1rem; }
.good { border-color: #1b8a5a; } .weak { border-color: #c98a00; } .bad { border-color: #c0392b; }
.verdict p { margin: .3rem 0; } .verdict p:first-child { font-weight: 700; font-size: 1.1rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #dfe3e8; text-align: right; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td:first-child { overflow-wrap: anywhere; min-width: 9rem; }
figure { margin: 0; max-width: 40rem; } figure.small { max-width: none; }
figcaption, .note { color: #566170; font-size: .9rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .6rem; }
summary { cursor: pointer; color: #23508e; margin: .6rem 0; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 10px system-ui, sans-serif; fill: #1c2430; } svg .faint { fill: #566170; }
.axis { stroke: #aab2bd; stroke-width: 1; fill: none; } .rule { stroke: #e6e9ed; }
.band { fill: #6b7584; fill-opacity: .55; } .null { stroke: #6b7584; } .dot { fill: #1f5fa8; }
.first, .second, .null { fill: none; stroke-width: 1.6; } .first { stroke: #1f5fa8; }
.second { stroke: #c2541b; stroke-dasharray: 4 2; } .null { stroke-dasharray: 1 2; }
.tree { fill: none; stroke: #566170; }
"""


class Line(NamedTuple):
    """A line of a chart; ``css`` is "first", "second" or "null"."""

    values: Sequence[float]
    css: str


class Track(NamedTuple):
    """A row of ``tracks``: a value, and from where to where the null lies."""

    label: str
    value: float
    low: float
    high: float


def page(title: str, parts: Iterable[str]) -> str:
    """A whole HTML page."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{text(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{_STYLE}</style>
</head>
<body>
{"".join(part + chr(10) for part in parts)}</body>
</html>
"""


def save(html: str, path: str | os.PathLike) -> Path:
    """Write a page, complete or not at all."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save_html: no such folder: {path.parent}")
    handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".html")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(html)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
    return path


def text(value: object) -> str:
    return escape(str(value))


def heading(value: str, level: int = 2) -> str:
    return f"<h{level}>{text(value)}</h{level}>"


def paragraph(value: str, css: str = "") -> str:
    return f'<p class="{css}">{text(value)}</p>' if css else f"<p>{text(value)}</p>"


def verdict(lines: Sequence[str], css: str) -> str:
    """A box: its first line in bold; css is "good", "weak" or "bad"."""
    return f'<div class="verdict {css}">' + "".join(map(paragraph, lines)) + "</div>"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{text(c)}</th>" for c in columns)
    body = "".join(f"<tr>{''.join(f'<td>{text(c)}</td>' for c in row)}</tr>\n" for row in rows)
    head = f"<thead><tr>{head}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>\n{body}</tbody></table></div>'


def figure(svg: str, caption: str = "") -> str:
    told = f"<figcaption>{text(caption)}</figcaption>" if caption else ""
    return f"<figure>{svg}{told}</figure>"


def folded(summary: str, parts: Iterable[str]) -> str:
    """What opens on a click."""
    return f"<details><summary>{text(summary)}</summary>\n" + "\n".join(parts) + "\n</details>"


def grid(parts: Iterable[str]) -> str:
    return '<div class="grid">\n' + "\n".join(parts) + "\n</div>"


def lines(title: str, series: Sequence[Line], top: float) -> str:
    """A small line chart over 1, 2, ..., values from 0 to ``top``, in percent."""
    wide, high, left, above = 240, 130, 34, 20
    most = max(len(line.values) for line in series)
    step = (wide - left - 6) / max(most - 1, 1)
    drawn = [_text(0, 11, shortened(title, 42), title)]
    for share in (0.0, 0.5, 1.0):
        y = high - 16 - share * (high - 16 - above)
        drawn.append(f'<path class="rule" d="M{left} {y:.1f}H{wide - 6}"/>')
        drawn.append(_text(left - 4, y + 3, f"{100 * share * top:.3g}%", anchor="end", faint=True))
    for line in series:
        at = [
            f"{left + i * step:.1f} {high - 16 - min(v / top, 1) * (high - 16 - above):.1f}"
            for i, v in enumerate(line.values)
        ]
        drawn.append(f'<path class="{line.css}" d="M{"L".join(at)}"/>')
    drawn.append(_text(left, high - 4, "1", faint=True))
    drawn.append(_text(wide - 6, high - 4, most, anchor="end", faint=True))
    return _svg(wide, high, drawn, title)


def tracks(rows: Sequence[Track], low: float, high: float, label: str) -> str:
    """One row per label: the value as a dot, where the null lies as a bar."""
    height, drawn = 26, []

    def x(value: float) -> float:
        return 6 + (min(max(value, low), high) - low) / (high - low) * (WIDTH - 12)

    bottom = 16 + height * len(rows)
    for i in range(5):
        value = low + (high - low) * i / 4
        anchor = ("start", "middle", "middle", "middle", "end")[i]
        drawn.append(f'<path class="rule" d="M{x(value):.1f} 14V{bottom}"/>')
        drawn.append(_text(x(value), 10, f"{value:.3g}", anchor=anchor, faint=True))
    for i, row in enumerate(rows):
        y = 16 + height * i
        null = " to ".join(dict.fromkeys(f"{bound:.3f}" for bound in (row.low, row.high)))
        drawn.append(_text(6, y + 10, shortened(row.label, 42), row.label))
        told = f"{row.value:.3f}, null {null}"
        drawn.append(_text(WIDTH - 6, y + 10, told, anchor="end", faint=True))
        start, end = x(row.low) - 2.5, x(row.high) + 2.5
        drawn.append(f'<path class="axis" d="M6 {y + 18}H{WIDTH - 6}"/>')
        size = f'x="{start:.1f}" y="{y + 14}" width="{end - start:.1f}" height="8"'
        drawn.append(f'<rect class="band" {size}/>')
        drawn.append(f'<circle class="dot" cx="{x(row.value):.1f}" cy="{y + 18}" r="3.5"/>')
    return _svg(WIDTH, bottom, drawn, label)


def heat_map(
    matrix: Sequence[Sequence[float]],
    labels: Sequence[str],
    tree: Sequence[Sequence[tuple[float, float]]],
    label: str,
) -> str:
    """A symmetric matrix of values in [-1, 1], its dendrogram to the left.

    Args:
        matrix: Rows and columns in the order of ``labels``.
        labels: Shown where there is room for them.
        tree: Lines of points (position in 0 .. K, height in 0 .. 1); empty: no dendrogram.
        label: What the chart is called for those who cannot see it.
    """
    count, left, size = len(labels), 62 if tree else 2, 206
    room = size / count
    peak = max((abs(matrix[i][j]) for i in range(count) for j in range(i)), default=0) or 1.0
    pixels = [[_colour(value / peak) for value in row] for row in matrix]
    box = f'x="{left}" y="2" width="{size}" height="{size}"'
    style = 'style="image-rendering:pixelated" preserveAspectRatio="none"'
    drawn = [f'<image {box} {style} href="{_png(pixels)}"/>']
    for line in tree:
        points = "L".join(f"{left - 2 - h * (left - 6):.1f} {2 + p * room:.1f}" for p, h in line)
        thin = f'style="stroke-width:{min(1, room / 3):.2f}"'
        drawn.append(f'<path class="tree" {thin} d="M{points}"/>')
    if room >= 5:
        font, x = min(10.0, room), left + size + 4
        most = int((WIDTH - x) / (0.62 * font))
        drawn += [
            _text(x, 2 + room * (i + 0.5) + font / 3, shortened(name, most), name, font)
            for i, name in enumerate(labels)
        ]
    scale = [[_colour(i / 40) for i in range(-40, 41)]]
    y = size + 8
    box = f'x="{left}" y="{y}" width="{size}" height="8"'
    drawn.append(f'<image {box} {style} href="{_png(scale)}"/>')
    for at, value, anchor in ((0, -peak, "start"), (0.5, 0, "middle"), (1, peak, "end")):
        drawn.append(_text(left + at * size, y + 19, f"{value:.2f}", anchor=anchor, faint=True))
    return _svg(WIDTH, y + 24, drawn, label)


def shortened(value: str, most: int) -> str:
    """A long label without its middle."""
    if len(value) <= most:
        return value
    return f"{value[: (most - 1) // 2]}…{value[-(most // 2) :]}"


def _svg(wide: int, high: float, drawn: Iterable[str], label: str) -> str:
    size = f'viewBox="0 0 {wide} {high}" role="img" aria-label="{text(label)}"'
    return f"<svg {size}>" + "".join(drawn) + "</svg>"


def _text(x, y, value, title: str = "", font: float = 10, *, anchor="start", faint=False) -> str:
    """``title``: what a label shows in full when pointed at."""
    size = f' style="font-size:{font:.1f}px"' if font != 10 else ""
    css = ' class="faint"' if faint else ""
    told = f"<title>{text(title)}</title>" if title else ""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f"<text {place}{css}{size}>{told}{text(value)}</text>"


def _colour(value: float) -> bytes:
    """Blue for 1, white for 0, orange for -1; what lies beyond is as the end."""
    end = (31, 95, 168) if value > 0 else (194, 84, 27)
    share = min(abs(value), 1.0)
    return bytes(round(255 + share * (c - 255)) for c in end)


def _png(rows: Sequence[Sequence[bytes]]) -> str:
    """Pixels as a data address, for hundreds of thousands of them would be too much SVG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    size = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 2, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + b"".join(row) for row in rows))
    image = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(image).decode()
