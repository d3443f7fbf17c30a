"""``lora-fused similarity``: which adapters are alike, whatever their A and B look like."""

import math
from pathlib import Path
from typing import Annotated

import typer

from lora_fused.cli.adapters import AllowPickle, AsJson, Paths, Quiet
from lora_fused.cli.console import (
    Reporter,
    check_page,
    counted,
    print_json,
    say,
    stdout,
    table,
    tell_strays,
)


def similarity(
    paths: Paths,
    html: Annotated[str | None, typer.Option(help="Write one HTML page with heat maps.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many pairs to list.")] = 20,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Allow configs that name different bases.")
    ] = False,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare adapters by their updates: cosines, and principal angles of what they read and write.

    Each pair's row and column spaces are told as the mean squared cosine of their principal angles,
    averaged over the layers, beside what random spaces give. Two adapters alone: angles per layer.
    """
    from lora_fused.cli.merge import load
    from lora_fused.io.find import expand
    from lora_fused.methods.similarity import compare_adapters, principal_angles

    if html is not None:
        check_page(html, "similarity", "--html")
    reporter, found = Reporter(quiet), expand(paths)
    tell_strays(paths, reporter)
    bank = load(found, reporter, any_base, allow_pickle)
    with reporter.task(f"comparing {counted(len(bank), 'adapter')}", 1) as advance:
        result = compare_adapters(bank)
        advance(1)
    angles = principal_angles(bank, *bank.names) if len(bank) == 2 else {}
    if html is not None:
        result.save_html(html)
    if as_json:
        print_json(_told(result, found, angles))
        return
    _show(result, angles, top)
    if html is not None:
        say(f"heat maps: {html}")


def _told(result, found: list[Path], angles: dict) -> dict:
    paths = zip(result.names, found, strict=True)
    told = {
        "adapters": [{"name": name, "path": str(path)} for name, path in paths],
        "cosine": result.cosine.tolist(),
        "inputs": _cells(result.inputs),
        "outputs": _cells(result.outputs),
        "chance": {"inputs": _none(result.chance_inputs), "outputs": _none(result.chance_outputs)},
    }
    told["shared_a"] = result.shared_a
    if angles:
        told["angles_in_degrees"] = {
            module: {side: values.rad2deg().tolist() for side, values in sides.items()}
            for module, sides in angles.items()
        }
    return told


def _cells(matrix) -> list[list[float | None]]:
    return [[_none(value) for value in row] for row in matrix.tolist()]


def _none(value: float) -> float | None:
    """JSON has no NaN: adapters without a layer in common have None."""
    return None if math.isnan(value) else value


def _show(result, angles: dict, top: int) -> None:
    pairs = result.pairs(top)
    rows = [[a, b, *map(_figure, values)] for a, b, *values in pairs]
    columns = {"adapter": "left", "and": "left", "cosine": "right"}
    columns |= {"row spaces": "right", "column spaces": "right"}
    count = len(result.names)
    title = f"{len(pairs)} of {count * (count - 1) // 2} pairs, most alike first"
    stdout().print(table(title, columns, rows))
    chance = f"{_figure(result.chance_inputs)} and {_figure(result.chance_outputs)}"
    say(f"spaces: mean squared cosine of the principal angles; random ones have {chance}")
    for note in result.notes():
        say(note)
    if angles:
        rows = [
            [module, *(_span(sides[side]) for side in ("inputs", "outputs"))]
            for module, sides in angles.items()
        ]
        columns = {"layer": "left", "row spaces": "right", "column spaces": "right"}
        stdout().print(table("Principal angles in degrees, least to largest", columns, rows))


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _span(angles) -> str:
    degrees = angles.rad2deg()
    return f"{float(degrees[0]):.1f} to {float(degrees[-1]):.1f}"
