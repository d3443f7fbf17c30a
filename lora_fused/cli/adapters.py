"""``lora-fused inspect`` and ``validate``: what adapters are, and whether they are sound."""

import dataclasses
from collections import Counter
from typing import Annotated

import typer

from lora_fused.adapters import Adapter
from lora_fused.cli.console import Reporter, counted, expand, print_json, stdout, table, tell_strays
from lora_fused.cli.facts import Facts, facts_of, inert
from lora_fused.methods.initialisations import shared_initialisations

Paths = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH...",
        help="Adapter folders or files, patterns, directories to search, or @list.txt.",
    ),
]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Also read .bin files (torch.load, weights_only=True)."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of all that is random.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is already there.")]
AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Allow adapters whose configs name different bases.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]

SHARED_NOTE = (
    "Adapters of one random A (one seed, or checkpoints of one run) look low-rank when stacked: a "
    "subspace fitted to them says more about the seed than about the tasks."
)


def inspect(
    paths: Paths, as_json: AsJson = False, allow_pickle: AllowPickle = False, quiet: Quiet = False
) -> None:
    """Show adapters: base, rank, scale, modules, norms, effective rank, faults, shared random A.

    Norm: Frobenius norm of scale * B A. Effective rank: exp of the entropy of its singular values
    (Roy and Vetterli 2007). Both are least / median / largest over the modules, found from the
    factors. Exit code 1 where a path cannot be read; the others are shown all the same.
    """
    adapters, facts, unreadable = [], [], []
    found, reporter = expand(paths), Reporter(quiet)
    passed = [str(path) for path in tell_strays(paths, reporter)]
    with reporter.task(f"reading {counted(len(found), 'adapter')}", len(found)) as advance:
        for path, reason in found:
            adapter, reason = _read(path, reason, allow_pickle)
            if reason is None:
                adapters.append(adapter)
                facts.append(facts_of(adapter, str(path)))
            else:
                unreadable.append({"path": str(path), "reason": reason})
            advance(1)
    _tell_apart(adapters, facts)
    groups = shared_initialisations(adapters)
    if as_json:
        listed = [dataclasses.asdict(f) for f in facts]
        told = {"adapters": listed, "shared_a": groups, "unreadable": unreadable}
        print_json({**told, "passed_over": passed})
    else:
        _show(facts, groups, unreadable)
    raise typer.Exit(1 if unreadable else 0)


def validate(
    paths: Paths,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
    allow_pickle: AllowPickle = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print faults only.")] = False,
) -> None:
    """Print "ok" or one line per fault for each adapter; exit code 1 where there is any fault.

    A fault is whatever loading refuses (damaged or missing files, values that are not finite,
    settings that cannot be honoured exactly, ...), or an adapter that changes nothing. What a
    pattern matches besides adapters is passed over, and counted on stderr.
    """
    checked, passed = [], tell_strays(paths, Reporter(quiet))
    for path, reason in expand(paths):
        adapter, reason = _read(path, reason, allow_pickle)
        faults = [reason] if reason else inert(adapter)
        if faults or not quiet:
            checked.append({"path": str(path), "faults": faults})
            for line in [] if as_json else faults or ["ok"]:
                print(f"{path}: {line}")
    if as_json:
        print_json({"adapters": checked, "passed_over": [str(path) for path in passed]})
    raise typer.Exit(1 if any(one["faults"] for one in checked) else 0)


def _tell_apart(adapters: list[Adapter], facts: list[Facts]) -> None:
    """Call adapters whose folders have the same name by their paths."""
    counts = Counter(fact.name for fact in facts)
    for adapter, fact in zip(adapters, facts, strict=True):
        if counts[fact.name] > 1:
            adapter.name = fact.name = fact.path


def _read(path, reason: str | None, allow_pickle: bool):
    """Read one adapter; return it and None, or None and the reason in one line."""
    from lora_fused.io import read_adapter

    if reason is not None:
        return None, reason
    try:
        return read_adapter(path, allow_pickle=allow_pickle), None
    except (ValueError, RuntimeError, OSError) as error:
        return None, " ".join(str(error).split())


def _show(facts: list[Facts], groups: list[dict], unreadable: list[dict]) -> None:
    console = stdout()

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    bases = {fact.base_model or "unknown" for fact in facts}
    if facts:
        base = f"{len(bases)} base models" if len(bases) > 1 else f"base model {bases.pop()}"
        columns = {"adapter": "left"} | ({"base model": "left"} if bases else {})
        numbers = ("rank", "alpha", "scale", "parameters", "norm", "effective rank")
        columns |= {"modules": "left", "dtype": "left", **dict.fromkeys(numbers, "right")}
        columns |= {"saved": "left"} if any(fact.saved_modules for fact in facts) else {}
        rows = [[str(cells[name]) for name in columns] for cells in map(_cells, facts)]
        console.print(table(f"{counted(len(facts), 'adapter')}, {base}", columns, rows))
        say("norm and effective rank: least / median / largest over the modules")
    for fact in facts:
        for fault in fact.faults:
            say(f"{fact.path}: {fault}")
    for group in groups:
        cosine = group["median_cosine"]
        say(f"one random A (median |cosine| {cosine:.2f}): {', '.join(group['adapters'])}")
    if groups:
        say(SHARED_NOTE)
    for entry in unreadable:
        say(f"{entry['path']}: {entry['reason']}")


def _cells(fact: Facts) -> dict[str, str]:
    kinds = ", ".join(f"{count} {kind}" for kind, count in fact.kinds.items())
    return {
        "adapter": fact.name,
        "base model": fact.base_model or "unknown",
        "rank": _list(fact.ranks),
        "alpha": _list(fact.alpha),
        "scale": _list(fact.scale),
        "modules": f"{fact.modules}: {kinds}",
        "parameters": f"{fact.parameters:,}",
        "dtype": ", ".join(fact.dtypes),
        "norm": _triple(fact.norm_range),
        "effective rank": _triple(fact.effective_rank_range),
        "saved": ", ".join(fact.saved_modules) or "none",
    }


def _list(values: list) -> str:
    return ", ".join(f"{value:g}" for value in values) or "?"


def _triple(values: tuple[float, float, float]) -> str:
    return " / ".join(f"{value:.3g}" for value in values)
