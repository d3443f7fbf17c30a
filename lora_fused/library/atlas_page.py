"""The HTML page of an Atlas: a canvas that a script on the page fills, for SVG is slow at 10^4."""

import colorsys
import json

from lora_fused.report import heading, page, paragraph, table, text

_PALETTE = ("#1f5fa8", "#c2541b", "#1b8a5a", "#8e44ad", "#c98a00", "#0097a7", "#c0392b", "#6b7584")
_SHOWN = 12  # requests in tables; all are drawn
_MORE = 240  # characters of an adapter's metadata

_STYLE = """<style>
.map { position: relative; border: 1px solid #dfe3e8; }
.map canvas { width: 100%; height: 34rem; display: block; touch-action: none; cursor: crosshair; }
.tip { position: absolute; pointer-events: none; background: #fff; border: 1px solid #aab2bd;
  padding: .4rem .6rem; font-size: .85rem; max-width: 20rem; white-space: pre-line; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; padding: .5rem 0; }
.legend label { cursor: pointer; } .find { font: inherit; padding: .2rem .5rem; margin: .5rem 0; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: 50%; }
</style>"""

_SCRIPT = """<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const canvas = document.querySelector(".map canvas"), tip = document.querySelector(".tip");
const find = document.querySelector(".find"), hidden = new Set();
const count = data.x.length, pen = canvas.getContext("2d");
let zoom = 1, shiftX = 0, shiftY = 0, drag = null, pointed = -1, sought = "";
const px = data.x.concat(data.requests.map(r => r.x));
const py = data.y.concat(data.requests.map(r => r.y));
const least = v => v.reduce((a, b) => Math.min(a, b), Infinity);
const most = v => v.reduce((a, b) => Math.max(a, b), -Infinity);
const midX = (least(px) + most(px)) / 2, midY = (least(py) + most(py)) / 2;
const spanX = most(px) - least(px) || 1, spanY = most(py) - least(py) || 1;

function place(x, y) {
  const wide = canvas.clientWidth, high = canvas.clientHeight;
  const scale = zoom * Math.min((wide - 40) / spanX, (high - 40) / spanY);
  return [wide / 2 + shiftX + (x - midX) * scale, high / 2 + shiftY - (y - midY) * scale];
}
function dot(x, y, size, colour) {
  pen.beginPath(); pen.arc(x, y, size, 0, 7); pen.fillStyle = colour; pen.fill();
}
function draw() {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * ratio; canvas.height = canvas.clientHeight * ratio;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  const size = Math.max(1.5, Math.min(5, 80 / Math.sqrt(count)));
  for (let i = 0; i < count; i++) {
    if (hidden.has(data.cluster[i])) continue;
    const found = sought && data.adapters[data.owner[i]].name.toLowerCase().includes(sought);
    pen.globalAlpha = sought && !found ? 0.15 : 0.85;
    dot(...place(data.x[i], data.y[i]), found ? size + 2 : size, data.colours[data.cluster[i]]);
  }
  pen.globalAlpha = 1;
  data.requests.forEach(lines);
  if (pointed >= 0) {
    pen.beginPath(); pen.arc(...place(data.x[pointed], data.y[pointed]), size + 3, 0, 7);
    pen.strokeStyle = "#1c2430"; pen.lineWidth = 1.5; pen.stroke();
  }
}
function lines(request) {
  const [x, y] = place(request.x, request.y);
  for (const [row, weight] of request.weights) {
    if (weight === 0) continue;
    pen.beginPath(); pen.moveTo(x, y); pen.lineTo(...place(data.x[row], data.y[row]));
    pen.lineWidth = Math.max(0.75, 10 * Math.min(1, Math.abs(weight)));
    pen.setLineDash(weight < 0 ? [5, 4] : []);
    pen.strokeStyle = weight < 0 ? "rgba(192,57,43,.7)" : "rgba(28,36,48,.55)"; pen.stroke();
  }
  pen.setLineDash([]); pen.fillStyle = "#1c2430"; pen.fillRect(x - 5, y - 5, 10, 10);
}
function nearest(x, y) {
  let best = -1, far = 100;
  for (let i = 0; i < count; i++) {
    if (hidden.has(data.cluster[i])) continue;
    const [a, b] = place(data.x[i], data.y[i]), d = (a - x) ** 2 + (b - y) ** 2;
    if (d < far) { far = d; best = i; }
  }
  return best;
}
function told(i) {
  const adapter = data.adapters[data.owner[i]];
  const near = data.near[i].map(([j, d]) => data.adapters[j].name + " (" + d + ")").join(", ");
  const parts = [adapter.name, "tags: " + (adapter.tags.join(", ") || "none")];
  parts.push("rank: " + adapter.rank, "examples: " + (data.examples[i] || "not known"));
  parts.push("cluster: " + (data.cluster[i] + 1));
  if (near) parts.push("nearest: " + near);
  if (adapter.more) parts.push(adapter.more);
  return parts.join("\\n");
}
canvas.addEventListener("pointermove", event => {
  const box = canvas.getBoundingClientRect(), x = event.clientX - box.left;
  const y = event.clientY - box.top;
  if (drag) {
    shiftX += x - drag[0]; shiftY += y - drag[1]; drag = [x, y]; draw(); return;
  }
  const found = nearest(x, y);
  tip.hidden = found < 0;
  if (found >= 0) {
    tip.textContent = told(found);
    tip.style.left = Math.max(0, Math.min(x + 14, canvas.clientWidth - tip.offsetWidth)) + "px";
    tip.style.top = y + 14 + "px";
  }
  if (found !== pointed) { pointed = found; draw(); }
});
canvas.addEventListener("pointerdown", event => {
  const box = canvas.getBoundingClientRect();
  drag = [event.clientX - box.left, event.clientY - box.top];
  canvas.setPointerCapture(event.pointerId);
});
for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, () => drag = null);
canvas.addEventListener("pointerleave", () => { tip.hidden = true; pointed = -1; draw(); });
canvas.addEventListener("wheel", event => {
  event.preventDefault();
  const box = canvas.getBoundingClientRect(), by = Math.exp(-event.deltaY / 400);
  const x = event.clientX - box.left - canvas.clientWidth / 2;
  const y = event.clientY - box.top - canvas.clientHeight / 2;
  zoom *= by; shiftX = x - (x - shiftX) * by; shiftY = y - (y - shiftY) * by; draw();
}, { passive: false });
canvas.addEventListener("dblclick", () => { zoom = 1; shiftX = shiftY = 0; draw(); });
find.addEventListener("input", () => { sought = find.value.toLowerCase(); draw(); });
document.querySelectorAll(".legend input").forEach((box, i) => {
  box.addEventListener("change", () => {
    if (box.checked) hidden.delete(i); else hidden.add(i);
    draw();
  });
});
window.addEventListener("resize", draw);
draw();
</script>"""


def html(atlas) -> str:
    """The page: the map, its legend, and what each request gets."""
    adapters, prototypes = len(atlas.entries), len(atlas.points)
    title = f"Atlas of {adapters} adapters"
    first, second = (f"{100 * share:.0f} %" for share in atlas.explained)
    told = f"{prototypes} prototypes. To the right and up: the two directions in which they vary "
    told += f"most, which hold {first} and {second} of their variance; clusters, neighbours and "
    told += "distances are of all dimensions, so what looks near may be far."
    use = "Point at a dot to see its adapter; drag, turn the wheel and double-click to look around."
    parts = [_STYLE, heading(title, 1), paragraph(told, "note"), paragraph(use, "note")]
    colours = [_colour(i) for i in range(len(atlas.clusters))]
    parts += [
        '<input class="find" type="search" placeholder="Find a name" aria-label="Find a name">',
        _legend(atlas.clusters, colours),
        f'<div class="map"><canvas role="img" aria-label="{text(title)}"></canvas>',
        '<div class="tip" hidden></div></div>',
        "<noscript><p>A script on this page draws the map; allow it to run.</p></noscript>",
        f'<script type="application/json" id="data">{_embedded(_data(atlas, colours))}</script>',
        *_requests(atlas.chosen),
        _SCRIPT,
    ]
    return page(title, parts)


def _colour(number: int) -> str:
    """The palette's; of more clusters, hues as far from one another as a golden angle is."""
    if number < len(_PALETTE):
        return _PALETTE[number]
    parts = colorsys.hls_to_rgb(number * 0.618034 % 1, 0.4 + 0.15 * (number % 2), 0.55)
    return "#" + "".join(f"{round(255 * part):02x}" for part in parts)


def _legend(clusters, colours: list[str]) -> str:
    drawn = []
    for i, (cluster, colour) in enumerate(zip(clusters, colours, strict=True)):
        tags = ", ".join(f"{tag} {count}" for tag, count in cluster.tags) or "no tags"
        key = f'<span class="key" style="background:{colour}"></span>'
        told = text(f"{i + 1}: {cluster.size} ({tags})")
        drawn.append(f'<label><input type="checkbox" checked> {key} {told}</label>')
    return '<div class="legend">\n' + "\n".join(drawn) + "\n</div>"


def _data(atlas, colours: list[str]) -> dict:
    """What the script draws, as columns: a row per prototype."""
    x, y = (side.tolist() for side in atlas.points.unbind(1))
    near = [
        [[j, float(f"{d:.3g}")] for j, d in zip(ids, far, strict=True)]
        for ids, far in zip(atlas.neighbours.tolist(), atlas.distances.tolist(), strict=True)
    ]
    return {
        "x": [float(f"{value:.4g}") for value in x],
        "y": [float(f"{value:.4g}") for value in y],
        "owner": atlas.prototypes.owners.tolist(),
        "cluster": atlas.labels.tolist(),
        "examples": atlas.prototypes.counts.tolist(),
        "near": near,
        "adapters": [_adapter(entry) for entry in atlas.entries],
        "colours": colours,
        "requests": [] if atlas.chosen is None else _lines(atlas),
    }


def _adapter(entry) -> dict:
    more = "\n".join(f"{key}: {value}" for key, value in entry.metadata.items())
    more = more if len(more) <= _MORE else more[: _MORE - 1] + "…"
    return {"name": entry.name, "tags": list(entry.tags), "rank": entry.rank, "more": more}


def _lines(atlas) -> list[dict]:
    rows, weights = atlas.chosen.found.rows.tolist(), atlas.chosen.weights.tolist()
    return [
        {"x": x, "y": y, "weights": [[r, float(f"{w:.4g}")] for r, w in zip(own, ws, strict=True)]}
        for (x, y), own, ws in zip(atlas.requests.tolist(), rows, weights, strict=True)
    ]


def _requests(chosen) -> list[str]:
    if chosen is None:
        return []
    told = f"Lines: weights by {chosen.rule}, the wider the larger; dashed where negative. "
    parts = [heading("What the request gets"), paragraph(told + "A square is a request.", "note")]
    for q in range(min(len(chosen.found), _SHOWN)):
        found = zip(
            chosen.found.names(q),
            chosen.found.distances[q].sqrt().tolist(),
            chosen.weights[q].tolist(),
            strict=True,
        )
        rows = [(name, f"{far:.4g}", f"{weight:+.4f}") for name, far, weight in found]
        parts.append(table(["adapter", "distance", "weight"], rows))
    if len(chosen.found) > _SHOWN:
        parts.append(paragraph(f"And {len(chosen.found) - _SHOWN} other requests.", "note"))
    return parts


def _embedded(value: dict) -> str:
    """JSON that no text within can end the script element of."""
    written = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        written = written.replace(sign, f"\\u{ord(sign):04x}")
    return written
