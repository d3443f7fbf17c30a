"""The HTML page of a SubspaceReport."""

import dataclasses
import json
from itertools import accumulate

from torch import Tensor

from lora_fused.report import (
    Line,
    Track,
    figure,
    folded,
    grid,
    heading,
    heat_map,
    lines,
    page,
    paragraph,
    table,
    tracks,
    verdict,
)

_CSS = {"shared": "good", "partly shared": "weak", "hardly shared": "weak", "not shared": "bad"}
_SHOWN = 12  # scree plots before the fold


def html(report) -> str:
    """The page: the verdict, then what it rests on."""
    found = report.verdict
    title = f"Subspace of {len(report.fitted.names)} adapters: {found.label}"
    parts = [heading(title, 1), paragraph(_subtitle(report), "note")]
    css = _CSS.get(found.label, "")
    css = "weak" if css == "good" and report.shared_a else css
    parts.append(verdict(found.sentences, css))
    parts.append(table(["", ""], report.figures()))
    parts += _held_out(report) + _scree(report) + _map(report) + _initialisations(report)
    return page(title, [*parts, *_tables(report), *_notes(report)])


def _subtitle(report) -> str:
    options = report.options
    size = f"P = {options.rank}" if options.rank else f"energy {options.energy:g}"
    parts = [options.method, size, f"{len(report.scree)} modules"]
    told = ", ".join([*parts, f"{len(report.null_fitted)} draws of the null"])
    idle = [module for module in report.fitted.modules if module not in report.scree]
    if idle:
        told += f". No adapter changes {', '.join(idle)}"
    if report.skipped:
        told += f". Not in both bank and subspace, so passed over: {', '.join(report.skipped)}"
    return f"{told}. {report.sampled}" if report.sampled else told


def _held_out(report) -> list[str]:
    rows = [
        Track(m["module"], m["held_out"], min(m["null_held_out"]), max(m["null_held_out"]))
        for m in report.modules()
    ]
    low = min(min(row.value, row.low) for row in rows)
    low = max(0.0, int(low * 10 - 0.5) / 10)
    high = max(1.0, *(max(row.value, row.high) for row in rows))
    caption = (
        "Dot: relative error at a layer, of adapters left out of the fit (0: nothing lost, 1: "
    )
    caption += "all). Grey: where it lies for adapters that share nothing."
    chart = tracks(rows, low, high, "Error of adapters left out of the fit, per layer")
    return [heading("Adapters left out of the fit, per layer"), figure(chart, caption)]


def _scree(report) -> list[str]:
    charts = []
    for module, scree in report.scree.items():
        sides = ((scree.null_a, "null"), (scree.null_b, "null"), (scree.a, "first"))
        series = [
            Line(list(accumulate(values)), css) for values, css in (*sides, (scree.b, "second"))
        ]
        charts.append(figure(lines(module, series, 1.0)))
    told = (
        "Energy that the first 1, 2, ... directions hold. Blue: inputs (A), orange: outputs (B), "
    )
    told += "dotted: the same for adapters that share nothing. Only the distance from it counts."
    parts = [heading("Explained energy per module"), paragraph(told, "note"), grid(charts[:_SHOWN])]
    if len(charts) > _SHOWN:
        rest = [grid(charts[_SHOWN:])]
        parts.append(folded(f"The other {len(charts) - _SHOWN} modules", rest))
    return parts


def _map(report) -> list[str]:
    order, tree, reason = dendrogram(report.similarity)
    names = [report.mapped[i] for i in order]
    matrix = report.similarity[order][:, order].tolist()
    for i in range(len(matrix)):
        matrix[i][i] = 0.0  # it would hide all others
    told = "Cosines of the updates over all layers, the diagonal left white. "
    told += reason or "Tree: average linkage of 1 - cosine, heights stretched."
    chart = heat_map(matrix, names, tree, "Cosines of the adapters' updates")
    parts = [heading("Which adapters are alike"), figure(chart, told)]
    return [*parts, folded("Names from top to bottom", [paragraph(", ".join(names))])]


def dendrogram(similarity: Tensor) -> tuple[list[int], list[list[tuple[float, float]]], str]:
    """An order that puts like beside like, lines (position 0 .. K, height 0 .. 1), and a reason.

    The reason says why there is no tree: scipy is not installed.
    """
    try:
        from scipy.cluster.hierarchy import dendrogram as draw
        from scipy.cluster.hierarchy import linkage
    except ImportError:
        why = "No tree, and in the order of the bank: scipy is not installed (pip install scipy)."
        return list(range(len(similarity))), [], why
    upper = similarity.new_ones(similarity.shape).triu(1).bool()
    distances = (1 - similarity[upper]).clamp_min(0)
    drawn = draw(linkage(distances.numpy(), "average", optimal_ordering=True), no_plot=True)
    low, high = (bound(h for line in drawn["dcoord"] for h in line[1:3]) for bound in (min, max))
    # Unlike adapters join at 0.9 to 1.0: drawn from zero, all lines would lie on one another.
    span = max(high - low, 1e-9) / 0.85
    tree = [
        [
            (p / 10, 0.15 + (h - low) / span if h else 0.0)
            for p, h in zip(positions, heights, strict=True)
        ]
        for positions, heights in zip(drawn["icoord"], drawn["dcoord"], strict=True)
    ]
    return drawn["leaves"], tree, ""


def _initialisations(report) -> list[str]:
    parts = [heading("Adapters of one random A")]
    if not report.shared_a:
        return [*parts, paragraph("None: no two A's are more alike than chance makes them.")]
    told = "They were trained from the same seed, or from one another. Their A's are alike before "
    told += "any training, which raises every figure of the inputs' side."
    rows = [
        (f"{len(g['adapters'])}: {', '.join(g['adapters'])}", f"{g['median_cosine']:.2f}")
        for g in report.shared_a
    ]
    return [*parts, paragraph(told), table(["adapters", "median |cosine| of A"], rows)]


def _tables(report) -> list[str]:
    adapters = [
        (
            a["adapter"],
            *(_error(a[k]) for k in ("error", "null_error", "held_out", "null_held_out")),
        )
        for a in report.adapters()
    ]
    modules = [
        (
            m["module"],
            _percent(m["kept"], m["null_kept"]),
            _percent(m["explained_a"], m["null_explained_a"]),
            _percent(m["explained_b"], m["null_explained_b"]),
            f"{m['held_out']:.3f} / {max(m['null_held_out']):.3f}",
        )
        for m in report.modules()
    ]
    head = ["adapter", "in the fit", "null", "left out", "null"]
    parts = [heading("Figures"), folded("Errors per adapter", [table(head, adapters)])]
    head = ["module / null", "updates held", "inputs (A)", "outputs (B)", "error left out"]
    return [*parts, folded("Per module", [table(head, modules)])]


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _percent(value: float, null: float) -> str:
    return f"{100 * value:.0f} % / {100 * null:.0f} %"


def _notes(report) -> list[str]:
    notes = (
        "Error: ||D - its reconstruction|| / ||D|| over all adapters, D = scale * B A.",
        "Null: every D turned by random rotations of its own, so that ranks, norms and singular "
        "values stay and nothing is shared; fitted and left out in the same way.",
        "Left out: each adapter in a basis fitted to all the others (of many, to 99 % of them).",
        "Change of gauge: (A, B) as (M A, M^-T B), M random, is the same update.",
    )
    parts = [heading("What is what"), *(paragraph(note, "note") for note in notes)]
    return [
        *parts,
        paragraph("Fitted with " + json.dumps(dataclasses.asdict(report.options)), "note"),
    ]
