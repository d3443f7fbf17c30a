"""``lora-fused subspace``: one basis for many adapters, from PEFT folders and back to them."""

from pathlib import Path
from typing import Annotated

import typer

from lora_fused.adapters import AdapterBank
from lora_fused.checks import invalid
from lora_fused.cli.adapters import AllowPickle, AnyBase, AsJson, Overwrite, Paths, Quiet, Seed
from lora_fused.cli.console import Reporter, counted, print_json, say, stdout, table, tell_strays

app = typer.Typer(no_args_is_help=True, help="Fit, use and judge one basis for many adapters.")

Folder = Annotated[str, typer.Argument(metavar="SUBSPACE", help="A folder that fit has written.")]


@app.command()
def fit(
    paths: Paths,
    output: Annotated[str, typer.Option("--output", "-o", help="The folder to write.")],
    rank: Annotated[
        int | None, typer.Option(help="How many directions each side keeps (or --energy).")
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="The share of energy to keep, 0 to 1, in place of --rank.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="How to fit: eigenlorax, hosvd, hooi or jd_diag.")
    ] = "eigenlorax",
    weighting: Annotated[
        str, typer.Option(help="How adapters are weighed: updates, equal or factors.")
    ] = "updates",
    drop_mean: Annotated[
        bool,
        typer.Option("--drop-mean", help="Leave the mean out of the basis, as the paper's code."),
    ] = False,
    augment: Annotated[int, typer.Option(help="How many random directions to add.")] = 0,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    any_base: AnyBase = False,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fit one basis per layer to adapters, and write it with every adapter's core."""
    from lora_fused.io import save_subspace
    from lora_fused.methods import fit_subspace

    if (rank is None) == (energy is None):
        got = "neither" if rank is None else "both"
        raise invalid("subspace fit", "--rank or --energy", "be given, one of the two", got)
    _check_target(output, overwrite)
    reporter = Reporter(quiet)
    bank = _load(paths, reporter, allow_pickle, any_base)
    with reporter.task(f"fitting {len(bank.modules)} modules", len(bank.modules)) as advance:
        subspace = fit_subspace(
            bank,
            rank=rank,
            energy=energy,
            method=method,
            weighting=weighting,
            keep_mean=not drop_mean,
            augment=augment,
            seed=seed,
            progress=lambda *_: advance(1),
        )
    path = save_subspace(subspace, output, overwrite_ok=overwrite)
    errors = subspace.errors(bank)
    facts = {"path": str(path), **_facts(subspace), "error": errors.overall}
    _tell(facts, {"adapter": "error"}, errors.adapters, as_json, "errors")
    if not as_json:
        say("An error of adapters in the fit says little: see lora-fused subspace report.")


@app.command()
def info(folder: Folder, as_json: AsJson = False) -> None:
    """Show what a subspace holds: options, sizes, its base, adapters and where they come from."""
    from lora_fused.io import load_subspace

    subspace = load_subspace(folder)
    facts = {
        "path": folder,
        **_facts(subspace),
        "weighting": subspace.options.weighting,
        "seed": subspace.options.seed,
        "base": subspace.base_names,
        "fingerprint": bool(subspace.base.weights),
    }
    sources = {name: subspace.cores.metadata[name].get("path") for name in subspace.names}
    ranks = {name: _core_ranks(subspace, name) for name in subspace.names}
    if as_json:
        print_json({**facts, "ranks": ranks, "sources": sources})
        return
    _say_facts({**facts, "base": ", ".join(facts["base"]) or "not named"})
    columns = {"adapter": "left", "rank of its core": "right", "from": "left"}
    rows = [[name, ranks[name], sources[name] or ""] for name in subspace.names]
    stdout().print(table("", columns, rows))


@app.command()
def project(
    folder: Folder,
    paths: Paths,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="A folder for the subspace with these cores added."),
    ] = None,
    overwrite: Overwrite = False,
    any_base: AnyBase = False,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show how much of other adapters a basis holds; it stays as it is."""
    from lora_fused.io import load_subspace, save_subspace

    _check_target(output, overwrite)
    subspace, reporter = load_subspace(folder), Reporter(quiet)
    bank = _load(paths, reporter, allow_pickle, any_base, subspace)
    adapters, errors = [bank.adapter(name) for name in bank.names], {}
    with reporter.task(f"projecting {counted(len(adapters), 'adapter')}", len(adapters)) as advance:
        for adapter in adapters:
            errors[adapter.name] = subspace.distance(adapter)
            advance(1)
    facts: dict = {"path": folder}
    if output is not None:
        subspace.cores.add_many([subspace.project(adapter) for adapter in adapters])
        facts["written"] = str(save_subspace(subspace, output, overwrite_ok=overwrite))
    _tell(facts, {"adapter": "error"}, errors, as_json, "errors")


@app.command()
def reconstruct(
    folder: Folder,
    output: Annotated[str, typer.Option("--output", "-o", help="The folder to write them in.")],
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME...]", help="Names of adapters. Default: all."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of the results. Default: that of their cores.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write adapters of a subspace (default: all) as PEFT folders again; alpha is kept."""
    from lora_fused.io import load_subspace, save_adapters

    subspace, bank = load_subspace(folder), AdapterBank()
    names = names or subspace.names
    label = f"reconstructing {counted(len(names), 'adapter')}"
    with Reporter(quiet).task(label, len(names)) as advance:
        for name in names:
            bank.add(subspace.reconstruct(name, rank=rank))
            advance(1)
        written = save_adapters(bank, output, overwrite_ok=overwrite)
    if as_json:
        print_json({"written": [str(path) for path in written]})
        return
    for path in written:
        say(str(path))


@app.command()
def add(
    folder: Folder,
    paths: Paths,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="The folder to write. Default: SUBSPACE itself."),
    ] = None,
    overwrite: Overwrite = False,
    any_base: AnyBase = False,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Add adapters and adapt the basis to them; the old ones need not be there."""
    from lora_fused.io import load_subspace, save_subspace

    _check_target(output, overwrite)
    subspace, reporter = load_subspace(folder), Reporter(quiet)
    bank = _load(paths, reporter, allow_pickle, any_base, subspace)
    with reporter.task(f"adding {counted(len(bank), 'adapter')}", 1) as advance:
        subspace.add_many([bank.adapter(name) for name in bank.names])
        advance(1)
    replaced = output is None
    path = save_subspace(subspace, output or folder, overwrite_ok=overwrite or replaced)
    errors = subspace.errors(bank)
    facts = {"path": str(path), **_facts(subspace), "error_of_the_added": errors.overall}
    _tell(facts, {"adapter": "error"}, errors.adapters, as_json, "errors")


@app.command()
def report(
    folder: Folder,
    paths: Paths,
    html: Annotated[str | None, typer.Option(help="Write one HTML page with plots.")] = None,
    null_draws: Annotated[
        int, typer.Option(help="How many draws of adapters that share nothing to compare with.")
    ] = 3,
    sample: Annotated[
        int, typer.Option(help="Leave out at most so many adapters in turn, drawn at random.")
    ] = 100,
    seed: Seed = 0,
    any_base: AnyBase = False,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Say whether adapters share a subspace: left out of the fit, and against a null."""
    from lora_fused.io import load_subspace

    if html is not None and not Path(html).absolute().parent.is_dir():
        raise FileNotFoundError(f"report: no such folder: {Path(html).absolute().parent}")
    if html is not None and Path(html).is_dir():
        raise IsADirectoryError(f"report: {html} is a folder, not a page")
    subspace, reporter = load_subspace(folder), Reporter(quiet)
    bank = _load(paths, reporter, allow_pickle, any_base, subspace)
    with reporter.task("fitting, adapters left out in turn", None) as advance:
        made = subspace.report(
            bank,
            null_draws=null_draws,
            sample=sample,
            seed=seed,
            progress=lambda _, total: advance(1, total),
        )
    if html is not None:
        made.save_html(html)
    if as_json:
        print_json(made.to_dict())
        return
    say(str(made))
    if html is not None:
        say(f"\nplots and tables: {html}")


@app.command()
def bench(
    folder: Folder,
    rows: Annotated[int, typer.Option(min=1, help="How many rows the batch has.")] = 64,
    per_row: Annotated[int, typer.Option(min=1, help="How many adapters each row mixes.")] = 4,
    repeat: Annotated[int, typer.Option(min=1, help="How many times to time each side.")] = 20,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Compare serving in the basis with the uncompressed adapters: bytes, and time on this CPU."""
    from lora_fused.cli.subspace_bench import compare
    from lora_fused.io import load_subspace

    found = compare(load_subspace(folder), rows, per_row, repeat, seed)
    if as_json:
        print_json(found)
        return
    title = f"One layer, {rows} rows, {found['per_row']} of {found['adapters']} adapters each"
    cells = [
        [what, *(_short(found[key][side]) for side in ("adapters", "subspace", "ratio"))]
        for what, key in (
            ("bytes stored, all layers", "stored_bytes"),
            ("bytes read by the batch", "read_bytes"),
            ("milliseconds", "milliseconds"),
        )
    ]
    columns = {"what": "left", "adapters": "right", "subspace": "right", "ratio": "right"}
    stdout().print(table(title, columns, cells))
    say(f"layer {found['module']}, {counted(found['threads'], 'thread')}; medians, taken in turn")


def _check_target(output: str | None, overwrite: bool) -> None:
    """Before anything is read: what could not be written would be lost at the end."""
    from lora_fused.io.sealed import check_target

    if output is not None:
        check_target(Path(output).absolute(), overwrite)


def _load(
    paths: list[str], reporter: Reporter, allow_pickle: bool, any_base: bool, subspace=None
) -> AdapterBank:
    from lora_fused.io import load_adapters
    from lora_fused.io.find import expand
    from lora_fused.io.subspace import check_same_base

    found = expand(paths)
    tell_strays(paths, reporter)
    with reporter.task(f"reading {counted(len(found), 'adapter')}", len(found)) as advance:
        bank = load_adapters(
            found,
            allow_pickle=allow_pickle,
            any_base=any_base,
            on_progress=lambda *_: advance(1),
        )
    if subspace is not None and not any_base:
        check_same_base(subspace, bank)
    return bank


def _facts(subspace) -> dict:
    from lora_fused.cli.subspace_bench import stored

    options, sizes = subspace.options, stored(subspace)
    sides = [len(side) for basis in subspace.bases.values() for side in (basis.a, basis.b)]
    return {
        "adapters": len(subspace),
        "modules": len(subspace.modules),
        "method": options.method,
        "directions": [min(sides), max(sides)],
        "mean_kept": options.method == "eigenlorax" and options.center and options.keep_mean,
        "random_directions": options.augment,
        "parameters": sizes["subspace"],
        "parameters_uncompressed": sizes["adapters"],
    }


def _core_ranks(subspace, name: str) -> str:
    ranks = {part.lora_a.shape[0] for part in subspace.cores.adapter(name).modules.values()}
    return ", ".join(map(str, sorted(ranks)))


def _tell(facts: dict, columns: dict, values: dict, as_json: bool, key: str) -> None:
    """The facts, then a table of one value per adapter."""
    if as_json:
        print_json({**facts, key: values})
        return
    _say_facts(facts)
    ((first, second),) = columns.items()
    cells = [[name, _plain(value)] for name, value in values.items()]
    stdout().print(table("", {first: "left", second: "right"}, cells))


def _say_facts(facts: dict) -> None:
    for name, fact in facts.items():
        say(f"{name.replace('_', ' ')}: {_plain(fact)}")


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " to ".join(map(str, dict.fromkeys(value)))
    return f"{value:,}" if isinstance(value, int) else str(value)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
