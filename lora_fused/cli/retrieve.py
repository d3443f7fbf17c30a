"""``lora-fused retrieve``: the ensemble of a library's adapters for some inputs, and why it."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from lora_fused.checks import invalid
from lora_fused.cli.adapters import AsJson, Overwrite, Quiet
from lora_fused.cli.base_model import asked, read_texts
from lora_fused.cli.console import Reporter, check_writable, print_json, say
from lora_fused.cli.library import (
    Field,
    Filter,
    Inputs,
    Model,
    Store,
    Tags,
    Text,
    Uri,
    open_library,
    selected,
)
from lora_fused.cli.merge import figures

FILE = "retrieval.yaml"
_WHOLE = 100_000  # entries up to which all prototypes are compared
_SHOWN = 20  # inputs
_TYPES = ("cat", "svd")
# Single inputs lie farther out than means do: by the prototypes, known ones would be outside, too.
_UNJUDGED = {"nearer": 0, "of": 0, "outside": None}
_HINTS = (" (of single inputs, see reference=)", " (give reference=)")  # options differ here


def retrieve(
    uri: Uri,
    inputs: Inputs = None,
    text: Text = None,
    field: Field = "text",
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many adapters to weigh.")] = 5,
    weights: Annotated[
        str, typer.Option(help="How to weigh: uniform, nearest, similarity, linear, l1 or simplex.")
    ] = "l1",
    per_input: Annotated[
        bool,
        typer.Option(
            "--per-input", help="Give each input its own ensemble, not one to their mean."
        ),
    ] = False,
    max_adapters: Annotated[
        int | None, typer.Option(min=1, help="Most adapters that get a weight. Default: all of -k.")
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(help="Squared distance over which --weights similarity fades."),
    ] = 1.0,
    l1: Annotated[
        float, typer.Option("--l1", help="Penalty that --weights l1 puts on negative mass.")
    ] = 1.0,
    units: Annotated[
        str,
        typer.Option(
            help="Unit of --temperature and --l1: raw (squared features) or median (distance)."
        ),
    ] = "raw",
    reference: Annotated[
        str | None,
        typer.Option(
            help="A file of inputs known to be served, which --per-input judges each input by."
        ),
    ] = None,
    where: Filter = None,
    tags: Tags = None,
    apply: Annotated[
        str | None, typer.Option(help="Write the ensemble as one PEFT folder here.")
    ] = None,
    combination_type: Annotated[
        str,
        typer.Option("--type", "-t", help="How --apply merges: cat (exact), or svd with --rank."),
    ] = "cat",
    rank: Annotated[int | None, typer.Option(min=1, help="Rank that --type svd cuts to.")] = None,
    overwrite: Overwrite = False,
    model: Model = None,
    store: Store = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Weigh the adapters nearest to unlabelled inputs, and say how far the library knows such.

    Distances are of prototypes, not squared; weights sum to one. The mean of several inputs is
    judged by the library's own prototypes; a single input needs --per-input and --reference. With
    --apply, the record of the retrieval is written beside the adapter, as retrieval.yaml. Errors
    are text on stderr, with --json, too.
    """
    from lora_fused.methods.rpe import explain, weigh

    options = {"max_adapters": max_adapters, "temperature": temperature, "l1": l1, "units": units}
    _check_options(weights, options, reference is not None and not per_input)
    _check_apply(apply, combination_type, rank, per_input, overwrite)
    library, reporter = open_library(uri, store), Reporter(quiet)
    known = [] if reference is None else read_texts(reference, field)
    asked_for = (inputs, text, field, per_input, model)
    texts, queries, single = asked(library, *asked_for, reporter, known)
    found = _found(library, queries[: len(texts)], k, where, tags)
    others = queries[len(texts) :] if known else None
    explained = explain(weigh(found, weights, **options), reference=others)
    judged = others is not None or not single
    if not judged:
        explained = [dataclasses.replace(one, **_UNJUDGED) for one in explained]
    told = [
        {"input": title, **dataclasses.asdict(one)}
        for title, one in zip(texts, explained, strict=True)
    ]
    merged = None
    if apply is not None:
        merged = _applied(library, explained[0], combination_type, rank, reporter)
        record = {"library": os.path.abspath(uri) if "://" not in uri else uri, "k": k}
        record |= {"weights": weights, **options, "filter": where, "tags": tags}
        _write(merged, explained[0], Path(apply), overwrite, record)
    if as_json:
        report = None if merged is None else _result(merged.report)
        print_json({"queries": told, "written": apply, "merge": report})
        return
    hint = "" if single or known else " (of single inputs: --per-input with --reference)"
    for title, one in list(zip(texts, explained, strict=True))[:_SHOWN]:
        say(f"{title}\n{_shown(one, hint)}\n")
    if len(explained) > _SHOWN:
        say(f"and {len(explained) - _SHOWN} more inputs (--json shows all)")
    if not judged:
        say("not judged: single inputs scatter; --per-input with --reference judges them")
    if merged is not None:
        say(f"{str(merged.report).splitlines()[0]}\nwritten: {apply}")


def _check_options(weights: str, options: dict, stray: bool) -> None:
    """What weigh would refuse, before a model is loaded: by weighing one adapter."""
    from lora_fused.methods.rpe import Prototypes, weigh
    from lora_fused.methods.rpe import retrieve as nearest

    if stray:
        rule = "come with --per-input: inputs alone scatter more than means"
        raise invalid("retrieve", "--reference", rule, "without")
    point = torch.zeros(1, 1)
    weigh(nearest(point, Prototypes(("any",), point)), weights, **options)


def _check_apply(
    apply: str | None, combination_type: str, rank: int | None, per_input: bool, overwrite: bool
) -> None:
    """Before anything is read."""
    if apply is None:
        if rank is not None or combination_type != _TYPES[0]:
            raise invalid("retrieve", "--type and --rank", "come with --apply", "without")
        return
    from lora_fused.cli.recipe import need_yaml
    from lora_fused.io.peft import check_target

    need_yaml()
    if per_input:
        rule = "go without --per-input: one folder holds one ensemble"
        raise invalid("retrieve", "--apply", rule, "both")
    if combination_type not in _TYPES:
        raise invalid("retrieve", "--type", f"be one of {_TYPES}", repr(combination_type))
    if (combination_type == "svd") != (rank is not None):
        rule = "be given with --type svd, and with it alone"
        raise invalid("retrieve", "--rank", rule, f"{rank} with {combination_type}")
    check_target(Path(apply), overwrite, "retrieve")
    check_writable(apply, "retrieve")


def _found(library, queries, k: int, where: str | None, tags: list[str] | None):
    """The nearest adapters, among all prototypes while these are few.

    ``explain`` judges a request by how the whole library lies, of which an index gives a part.
    """
    from lora_fused.methods.rpe import retrieve as nearest

    if len(library) > _WHOLE:
        return library.retrieve(queries, k=k, filter=where, tags=tags or [])
    return nearest(queries, selected(library, where, tags)[1], k=k)


def _applied(library, chosen, combination_type: str, rank: int | None, reporter: Reporter):
    from lora_fused.methods import merge

    weights = {n: w for n, w in zip(chosen.adapters, chosen.weights, strict=True) if w}
    bank = library.load(list(weights))
    name = "ensemble"
    while name in bank:
        name += "_"
    with reporter.task(f"merging {len(bank.modules)} modules", 1) as advance:
        made = merge(bank, weights, combination_type=combination_type, rank=rank, name=name)
        advance(1)
    return made


def _write(merged, chosen, target: Path, overwrite: bool, asked_for: dict) -> None:
    """The adapter, and the record of what it is made of beside it."""
    import yaml

    from lora_fused import __version__
    from lora_fused.io import write_adapter

    adapters = [
        {"name": name, "weight": weight, "distance": distance}
        for name, weight, distance in zip(
            chosen.adapters, chosen.weights, chosen.distances, strict=True
        )
    ]
    facts = ("negative_mass", "residual", "hull_distance", "outside")
    content = {
        **{key: value for key, value in asked_for.items() if value is not None},
        "adapters": adapters,
        "query": {name: getattr(chosen, name) for name in facts},
        "result": _result(merged.report),
        "lora_fused": __version__,
    }
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    with _without_record(target / FILE):
        write_adapter(merged.adapter, target, overwrite_ok=overwrite)
    # Not straight to its name: half a record could be read as a whole one.
    draft = target / f".{FILE}.new"
    draft.write_text("# What lora-fused retrieve made this adapter of.\n" + text, "utf-8")
    draft.replace(target / FILE)


@contextlib.contextmanager
def _without_record(path: Path) -> Iterator[None]:
    """The old record goes first: a killed process must not leave it beside the new adapter."""
    if not path.is_file():
        yield
        return
    record, folder = path.read_bytes(), path.parent.stat().st_ino
    path.unlink()
    try:
        yield
    except BaseException:
        # The old adapter, whose record this is, lies in the old folder.
        if path.parent.is_dir() and path.parent.stat().st_ino == folder:
            path.write_bytes(record)
        raise


def _shown(explained, hint: str) -> str:
    text = str(explained)
    for said in _HINTS:
        text = text.replace(said, hint)
    return text


def _result(report) -> dict:
    return {"combination_type": report.combination_type, **figures(report)}
