"""``lora-fused merge``: several PEFT folders into one."""

import os
from pathlib import Path
from typing import Annotated

import typer

from lora_fused.adapters import AdapterBank
from lora_fused.checks import invalid
from lora_fused.cli.adapters import AllowPickle, Overwrite, Quiet
from lora_fused.cli.console import Reporter, counted, finite, print_json, stdout, table, tell_strays

_DEFAULT = "cat"
_SHOWN = 20  # adapters
_DTYPES = ("float32", "float16", "bfloat16")

Paths = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[PATH]...",
        help="Adapter folders or files, patterns, directories to search, or @list.txt.",
    ),
]


def merge(
    paths: Paths = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The folder to write.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="A number per adapter, as in .5,.3,-.2. Default: 1/K each.")
    ] = None,
    combination_type: Annotated[
        str | None,
        typer.Option(
            "--type", "-t", help="How to merge: cat (default), svd, linear, ties, ties_svd, ..."
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Rank of the result, for svd and types that end in _svd, _core or _knots. "
            "Default: the largest of the adapters."
        ),
    ] = None,
    energy: Annotated[
        float | None, typer.Option(help="The share of energy to keep, 0 to 1, in place of --rank.")
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            help="The share of entries to keep, 0 to 1; ties, dare and magnitude_prune need it."
        ),
    ] = None,
    majority_sign_method: Annotated[
        str | None, typer.Option(help="How ties elects signs: total (default) or frequency.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the entries that dare drops. Default: 0.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Write float32, float16 or bfloat16. Default: the files' dtype."),
    ] = None,
    saved_modules: Annotated[
        str | None,
        typer.Option(help="What to do with fully trained modules: error (default) or ignore."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A YAML file that names the adapters and options, in place of the command line."
        ),
    ] = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Merge and report, but write nothing.")
    ] = False,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Allow configs that name different bases.")
    ] = False,
    allow_pickle: AllowPickle = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    quiet: Quiet = False,
) -> None:
    """Merge adapters into one PEFT folder, and say how far it is from the exact weighted sum.

    The recipe of the merge is written beside the result, as recipe.yaml.
    """
    from lora_fused.cli.recipe import need_yaml

    need_yaml()
    options = {
        "combination_type": combination_type,
        "rank": rank,
        "energy": energy,
        "density": density,
        "majority_sign_method": majority_sign_method,
        "seed": seed,
        "dtype": dtype,
        "saved_modules": saved_modules,
    }
    options = {key: value for key, value in options.items() if value is not None}
    found, numbers, options = _asked(paths, weights, recipe, options)
    _check_density(options)
    target = _target(output, overwrite, dry_run, found)
    reporter = Reporter(quiet)
    tell_strays(paths or [], reporter)
    bank = load(found, reporter, any_base, allow_pickle)
    given = dict(zip(bank.names, numbers, strict=True))
    merged = _merged(bank, given, options, reporter)
    if target is not None:
        _write(merged, target, overwrite, found, options)
    if as_json:
        print_json(_told(merged.report, target, found))
    else:
        _show(merged.report, target)


def _asked(paths, weights: str | None, recipe: str | None, options: dict):
    """The adapters' paths, their weights and the options, from the line or from a recipe."""
    from lora_fused.cli.recipe import read_recipe
    from lora_fused.io.find import expand

    if recipe is not None:
        if paths or weights or options:
            also = [*(paths or []), *(["--weights"] if weights else []), *options]
            rule = "stand without paths, weights and options of the merge"
            raise invalid("merge", "--recipe", rule, ", ".join(also))
        pairs, options = read_recipe(recipe)
        found = [expand([path]) for path, _ in pairs]
        for (path, _), several in zip(pairs, found, strict=True):
            if len(several) > 1:
                raise invalid("merge", f"path {path!r}", "be one adapter", f"{len(several)}")
        return [one for (one,) in found], [weight for _, weight in pairs], options
    if not paths:
        raise invalid("merge", "paths", "name adapters (or give --recipe)", "none")
    found = expand(paths)
    return found, _numbers(weights, found), options


def _check_density(options: dict) -> None:
    """Before anything is read."""
    from lora_fused.methods.merge_request import RULES, TYPES

    kind = options.get("combination_type", _DEFAULT)
    if kind in TYPES and kind.startswith(RULES) and "density" not in options:
        rule = f"be given for --type {kind}: the share of entries to keep, in (0, 1]"
        raise invalid("merge", "--density", rule, "none")


def _numbers(weights: str | None, found: list[Path]) -> list[float]:
    if weights is None:
        return [1 / len(found)] * len(found)
    try:
        numbers = [float(part) for part in weights.split(",")]
    except ValueError:
        rule = "be numbers with commas between, as in .5,.3,-.2"
        raise invalid("merge", "--weights", rule, repr(weights)) from None
    if len(numbers) != len(found):
        names = ", ".join(path.name for path in found[:6]) + (", ..." if len(found) > 6 else "")
        rule = f"be {len(found)} numbers, one per adapter ({names})"
        raise invalid("merge", "--weights", rule, f"{len(numbers)}")
    return numbers


def _target(output: str | None, overwrite: bool, dry_run: bool, found: list[Path]) -> Path | None:
    """The folder to write, which may be written; None in a dry run."""
    from lora_fused.io.peft import check_target

    if output is None and not dry_run:
        raise invalid("merge", "--output", "be given (or --dry-run)", "none")
    if output is None:
        return None
    path = Path(output)
    # Replaced, it would not be there for the recipe; found in a folder, it may be an older result.
    if path.resolve() in {(p.parent if p.is_file() else p).resolve() for p in found}:
        raise invalid("merge", "--output", "be none of the adapters merged", path)
    check_target(path, True, "merge")
    if not overwrite and path.exists() and any(path.iterdir()):
        raise FileExistsError(f"merge: {path} exists (--overwrite replaces it)")
    return None if dry_run else path


def load(found: list[Path], reporter: Reporter, any_base: bool, allow_pickle: bool) -> AdapterBank:
    from lora_fused.io import load_adapters

    names = _distinct_names(found)
    with reporter.task(f"reading {counted(len(found), 'adapter')}", len(found)) as advance:
        return load_adapters(
            found,
            names=names,
            any_base=any_base,
            allow_pickle=allow_pickle,
            on_progress=lambda *_: advance(1),
        )


def _distinct_names(found: list[Path]) -> list[str]:
    """Names of adapters; checkpoints of one name in several runs with what tells their paths apart.

    That must not depend on where the program runs: what DARE draws depends on names, and a recipe
    has to repeat it.
    """
    from lora_fused.io.peft import default_name

    groups: dict[str, list[str]] = {}
    for path in found:
        groups.setdefault(default_name(path), []).append(os.path.abspath(path))
    names = []
    for path in found:
        name, full = default_name(path), os.path.abspath(path)
        if len(groups[name]) > 1:
            top = os.path.commonpath([os.path.dirname(other) for other in groups[name]])
            name = Path(os.path.relpath(full, top)).as_posix()
        names.append(name)
    return names


def _merged(bank: AdapterBank, weights: dict, options: dict, reporter: Reporter):
    import torch

    from lora_fused.methods import merge as run

    options = {"combination_type": _DEFAULT, **options}
    if "dtype" in options:
        if options["dtype"] not in _DTYPES:
            raise invalid("merge", "dtype", f"be one of {_DTYPES}", repr(options["dtype"]))
        options["dtype"] = getattr(torch, options["dtype"])
    name = "merged"
    while name in bank:
        name += "_"
    with reporter.task(f"merging {len(bank.modules)} modules", len(bank.modules)) as advance:
        done = 0

        def progress(now: int, _: int) -> None:
            nonlocal done
            advance(now - done)
            done = now

        return run(bank, weights, name=name, progress=progress, **options)


def _write(merged, target: Path, overwrite: bool, found: list[Path], options: dict) -> None:
    """Write the adapter, and its recipe beside it."""
    from lora_fused.cli.recipe import write_recipe
    from lora_fused.io import write_adapter

    report = merged.report
    write_adapter(merged.adapter, target, overwrite_ok=overwrite)
    record = {"combination_type": report.combination_type, **report.options}
    record |= {key: options[key] for key in ("dtype", "saved_modules") if key in options}
    pairs = list(zip(found, report.weights.values(), strict=True))
    write_recipe(target, pairs, record, figures(report))


def _told(report, target: Path | None, found: list[Path]) -> dict:
    adapters = zip(found, report.weights.items(), strict=True)
    return {
        "path": None if target is None else str(target),
        "combination_type": report.combination_type,
        "adapters": [{"name": n, "path": str(path), "weight": w} for path, (n, w) in adapters],
        "options": report.options,
        **figures(report),
        "modules": {module: finite(part._asdict()) for module, part in report.modules.items()},
    }


def figures(report) -> dict:
    """What a merge kept, as JSON can hold it: the error of what should be zero is None."""
    told = {
        "rank": list(report.ranks),
        "energy": report.energy,
        "error_to_exact": report.error_to_exact,
    }
    return finite(told)


def _show(report, target: Path | None) -> None:
    console = stdout()

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    say(str(report).splitlines()[0])
    if report.options:
        say(", ".join(f"{key} {value}" for key, value in report.options.items()))
    weights = [[name, f"{weight:g}"] for name, weight in report.weights.items()]
    rest = [[f"and {len(weights) - _SHOWN} more", ""]] if len(weights) > _SHOWN else []
    columns = {"adapter": "left", "weight": "right"}
    console.print(table("", columns, weights[:_SHOWN] + rest))
    rows = [
        [
            module,
            part.rank,
            "" if part.energy is None else f"{part.energy:.4f}",
            f"{part.error_to_exact:.3g}",
        ]
        for module, part in report.worst(8)
    ]
    columns = {"furthest from the exact sum": "left", "rank": "right"}
    columns |= {"energy kept": "right", "error": "right"}
    console.print(table("", columns, rows))
    say("nothing written (dry run)" if target is None else f"written: {target}")
