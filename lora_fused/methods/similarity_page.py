"""The HTML page of a Similarity."""

from torch import Tensor

from lora_fused.methods.subspace_page import dendrogram
from lora_fused.report import figure, folded, heading, heat_map, page, paragraph, table

_SHOWN = 40  # pairs


def html(found) -> str:
    """The page: a map of each measure in one order, then the pairs most alike."""
    order, tree, reason = dendrogram(found.cosine)
    names = [found.names[i] for i in order]
    told = reason or "Tree: average linkage of 1 - cosine, heights stretched."
    maps = (
        ("Cosines of the updates", found.cosine, f"Over all layers. {told}"),
        (
            "Row spaces: what the updates read",
            found.inputs,
            f"Mean squared cosine of the principal angles, averaged over the layers. Random spaces "
            f"of these sizes: {found.chance_inputs:.3f}.",
        ),
        (
            "Column spaces: where the updates write",
            found.outputs,
            f"As above. Random spaces of these sizes: {found.chance_outputs:.3f}.",
        ),
    )
    title = f"How alike {len(names)} adapters are"
    parts = [heading(title, 1)]
    note = "From the updates scale * B A alone: another split of them into A and B changes nothing."
    parts.append(paragraph(f"{note} Diagonals are left white.", "note"))
    parts += [paragraph(note) for note in found.notes()]
    for label, matrix, caption in maps:
        chart = heat_map(_ordered(matrix, order), names, tree, label)
        parts += [heading(label), figure(chart, caption)]
    parts.append(folded("Names from top to bottom", [paragraph(", ".join(names))]))
    rows = [
        (f"{a}, {b}", *(f"{value:.3f}" for value in values))
        for a, b, *values in found.pairs(_SHOWN)
    ]
    columns = ["pair", "cosine", "row spaces", "column spaces"]
    return page(title, [*parts, heading("The pairs most alike"), table(columns, rows)])


def _ordered(matrix: Tensor, order: list[int]) -> list[list[float]]:
    cells = matrix[order][:, order].nan_to_num(0.0).fill_diagonal_(0.0)
    return cells.tolist()
