"""``lora-fused library``: adapters of one base, found by what they were trained for."""

import dataclasses
import datetime
from pathlib import Path
from typing import Annotated

import typer

from lora_fused.checks import invalid
from lora_fused.cli.adapters import AllowPickle, AsJson, Overwrite, Quiet
from lora_fused.cli.base_model import asked, load_base, place_of, steps
from lora_fused.cli.console import (
    Reporter,
    check_page,
    check_writable,
    counted,
    finite,
    print_json,
    say,
    say_facts,
    stdout,
    table,
)

app = typer.Typer(
    no_args_is_help=True,
    help="Keep adapters, and find them by example inputs. Errors are text on stderr, with --json, "
    "too.",
)

Uri = Annotated[str, typer.Argument(metavar="URI", help="The library: a folder, or s3://...")]
Store = Annotated[
    str | None, typer.Option(help="Folder of the weights, where the URI is no folder.")
]
Model = Annotated[
    str | None,
    typer.Option(help="Folder of the frozen base, or its package. Default: that of create."),
]
Inputs = Annotated[
    str | None, typer.Option(help="A file of inputs: .txt with one per line, or .jsonl.")
]
Text = Annotated[list[str] | None, typer.Option(help="An input, in place of --inputs; repeatable.")]
Field = Annotated[str, typer.Option(help="The field of a .jsonl file that holds the input.")]
Filter = Annotated[
    str | None,
    typer.Option("--filter", help="Keep entries by SQL: 'rank <= 8 AND count > 50'."),
]
Tags = Annotated[
    list[str] | None, typer.Option("--tag", help="Keep entries with this tag; repeatable.")
]
Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of entries.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of k-means.")]
AnyBase = Annotated[
    bool, typer.Option("--any-base", help="Allow adapters whose configs name another base.")
]


@app.command()
def create(
    uri: Uri,
    model: Annotated[str, typer.Option(help="Folder of the frozen base, or its package.")],
    base_name: Annotated[
        str | None,
        typer.Option(
            help="What adapters' configs call the base. Default: the folder's or package's name."
        ),
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Layer to read: a module or a number. Default: the output.")
    ] = None,
    pooling: Annotated[
        str | None, typer.Option(help="How to pool tokens: mean (default), first, last or max.")
    ] = None,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Scale every vector to length one.")
    ] = False,
    max_length: Annotated[
        int | None, typer.Option(help="Cut inputs to so many tokens. Default: the tokenizer's.")
    ] = None,
    minimum: Annotated[
        int, typer.Option(help="Fewest examples of a prototype, so that it hides each of them.")
    ] = 10,
    store: Store = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make an empty library for the adapters of one base."""
    from lora_fused.library import AdapterLibrary
    from lora_fused.methods.rpe import embed

    layer = int(layer) if layer is not None and layer.lstrip("-").isdigit() else layer
    options = {"layer": layer, "pooling": pooling, "normalize": normalize, "max_length": max_length}
    place = place_of(model)
    base = load_base(model, Reporter(quiet))
    probe = embed(base.model, ["a text"], tokenizer=base.tokenizer, progress=False, **options)
    library = AdapterLibrary.create(
        uri,
        base=base.model,
        size=probe.shape[1],
        base_name=base_name or place,
        base_place=place,
        minimum=minimum,
        store=store,
        **options,
    )
    told = _space(uri, library.space)
    print_json(told) if as_json else say_facts(told)


@app.command()
def add(
    uri: Uri,
    paths: Annotated[
        list[str] | None,
        typer.Argument(metavar="ADAPTER", help="One adapter (of many: --manifest)."),
    ] = None,
    examples: Annotated[
        str | None, typer.Option(help="A file of inputs that this adapter was trained on.")
    ] = None,
    manifest: Annotated[
        str | None,
        typer.Option(
            help='A .jsonl file that names many: {"adapter": PATH, "examples": FILE, "name": ..., '
            '"tags": [...], "metadata": {...}}; paths from where it lies.'
        ),
    ] = None,
    field: Field = "text",
    tags: Annotated[list[str] | None, typer.Option("--tag", help="Tag all; repeatable.")] = None,
    per_adapter: Annotated[int, typer.Option(help="Most prototypes that an adapter gets.")] = 1,
    noise: Annotated[
        float, typer.Option(help="Standard deviation of noise on prototypes; its effect is told.")
    ] = 0.0,
    minimum: Annotated[
        int | None, typer.Option(help="Fewest examples of a prototype. Default: the library's.")
    ] = None,
    skip_existing: Annotated[
        bool, typer.Option("--skip-existing", help="Pass over names that are there.")
    ] = False,
    model: Model = None,
    store: Store = None,
    seed: Seed = 0,
    any_base: AnyBase = False,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Add adapters with the means of their example inputs, embedded by the frozen base.

    One: lora-fused library add LIB adapters/pets --examples pets.txt

    Many: lora-fused library add LIB --manifest all.jsonl, with lines as
    {"adapter": "adapters/pets", "examples": "pets.txt", "tags": ["living"]}
    """
    from lora_fused.cli.library_add import add_jobs, jobs_of

    library = open_library(uri, store)
    options = {"per_adapter": per_adapter, "noise": noise, "minimum": minimum, "seed": seed}
    options |= {"tags": tags or [], "skip_existing": skip_existing, "model": model}
    options |= {"any_base": any_base, "allow_pickle": allow_pickle}
    jobs = jobs_of(paths or [], examples, manifest, field)
    told = add_jobs(library, jobs, options, Reporter(quiet))
    noise_told = told["noise"]
    if as_json:
        noise_told = None if noise_told is None else finite(dataclasses.asdict(noise_told))
        print_json({**told, "noise": noise_told, "entries": len(library)})
        return
    say(f"added {len(told['added'])}, the library holds {len(library)}")
    if told["skipped"]:
        say(f"passed over {len(told['skipped'])} that were there")
    if noise_told is not None:
        say(str(noise_told))


@app.command(name="list")
def list_entries(
    uri: Uri, where: Filter = None, tags: Tags = None, store: Store = None, as_json: AsJson = False
) -> None:  # fmt: skip
    """Show the entries, or those that a filter and tags select."""
    found = open_library(uri, store).entries(where, tags=tags or [])
    if as_json:
        print_json([facts(entry) for entry in found])
        return
    columns = {"name": "left", "tags": "left", "rank": "right", "examples": "right"}
    columns |= {"KiB": "right", "added": "left"}
    rows = [[*_row(e), f"{e.bytes / 1024:.0f}", f"{e.created:%Y-%m-%d}"] for e in found]
    stdout().print(table(counted(len(found), "entry"), columns, rows))


@app.command()
def search(
    uri: Uri,
    inputs: Inputs = None,
    text: Text = None,
    field: Field = "text",
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many entries to find.")] = 8,
    where: Filter = None,
    tags: Tags = None,
    per_input: Annotated[
        bool, typer.Option("--per-input", help="Search for each input alone, not the mean of all.")
    ] = False,
    model: Model = None,
    store: Store = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Find the adapters whose examples are most like some inputs."""
    library = open_library(uri, store)
    texts, queries, _ = asked(library, inputs, text, field, per_input, model, Reporter(quiet))
    hits = library.search(queries, k=k, filter=where, tags=tags or [])
    entries = {name: library.entry(name) for name in {n for hit in hits for n in hit.names}}
    found = [
        [
            {**facts(entries[name]), "distance": max(far, 0.0) ** 0.5}
            for name, far in zip(hit.names, hit.distances, strict=True)
        ]
        for hit in hits
    ]
    if as_json:
        print_json([{"input": t, "found": rows} for t, rows in zip(texts, found, strict=True)])
        return
    columns = {"name": "left", "tags": "left", "rank": "right", "examples": "right"}
    for title, rows, hit in zip(texts, found, hits, strict=True):
        cells = [
            [*_row(entries[n]), f"{r['distance']:.4g}"]
            for n, r in zip(hit.names, rows, strict=True)
        ]
        stdout().print(table(title, columns | {"distance": "right"}, cells))


@app.command()
def remove(uri: Uri, names: Names, store: Store = None, as_json: AsJson = False) -> None:
    """Take entries out; compact frees their room."""
    library = open_library(uri, store)
    library.remove(names)
    if as_json:
        print_json({"removed": names, "entries": len(library)})
    else:
        say(f"removed {len(names)}, the library holds {len(library)}")


@app.command()
def verify(uri: Uri, store: Store = None, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """Read every entry and check it against its checksum; exit code 1 where something is wrong."""
    library = open_library(uri, store)
    with Reporter(quiet).task("verifying", len(library)) as advance:
        faults = library.verify(progress=steps(advance))
    if as_json:
        print_json({"entries": len(library), "faults": [fault._asdict() for fault in faults]})
    else:
        say(f"{counted(len(library), 'entry')}, {counted(len(faults), 'fault')}")
        for fault in faults:
            say(f"{fault.name}: {fault.what}")
    raise typer.Exit(1 if faults else 0)


@app.command()
def stats(uri: Uri, store: Store = None, as_json: AsJson = False) -> None:
    """Show what a library holds: entries, tags, ranks, bytes, its base."""
    library = open_library(uri, store)
    told = {**_space(uri, library.space), **dataclasses.asdict(library.stats())}
    if as_json:
        print_json(told)
        return
    tags = [[tag, count] for tag, count in told.pop("tags").items()]
    say_facts(told)
    stdout().print(table("", {"tag": "left", "entries": "right"}, tags))


@app.command()
def export(
    uri: Uri,
    names: Names,
    output: Annotated[str, typer.Option("--output", "-o", help="The folder to write them in.")],
    overwrite: Overwrite = False,
    store: Store = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write entries as PEFT folders, one per name, with what their files said."""
    from lora_fused.io.peft import check_target
    from lora_fused.library.sources import listed

    library = open_library(uri, store)
    for name in listed(names):
        library.entry(name)
        check_target(Path(output, name), overwrite, "library export")
    check_writable(Path(output, names[0]), "library export")
    with Reporter(quiet).task(f"writing {counted(len(names), 'adapter')}", len(names)) as advance:
        for name in names:
            library.export(name, Path(output, name), overwrite_ok=overwrite)
            advance(1)
    if as_json:
        print_json({"written": [str(Path(output, name)) for name in names]})
    else:
        for name in names:
            say(f"written: {Path(output, name)}")


@app.command()
def compact(
    uri: Uri,
    keep_days: Annotated[
        float, typer.Option(min=0, help="Days for which older states are kept, for readers.")
    ] = 1.0,
    index: Annotated[
        bool, typer.Option("--index", help="Build the vector index, too (from 10^4 vectors on).")
    ] = False,
    store: Store = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Free the room of removed and replaced entries."""
    library = open_library(uri, store)
    before = library.stats().disk
    with Reporter(quiet).task("compacting", 2) as advance:
        library.compact(keep=datetime.timedelta(days=keep_days))
        advance(1)
        built = library.index() if index else False
        advance(1)
    told = {"disk_before": before, "disk": library.stats().disk, "indexed": built}
    print_json(told) if as_json else say_facts(told)


@app.command()
def atlas(
    uri: Uri,
    output: Annotated[str, typer.Option("--output", "-o", help="The HTML page to write.")],
    inputs: Inputs = None,
    text: Text = None,
    field: Field = "text",
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="How many adapters to weigh.")] = 5,
    weights: Annotated[str, typer.Option(help="How to weigh, as lora-fused retrieve does.")] = "l1",
    clusters: Annotated[int | None, typer.Option(min=1, help="Most clusters. Default: 8.")] = None,
    where: Filter = None,
    tags: Tags = None,
    seed: Seed = 0,
    model: Model = None,
    store: Store = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Draw a map of the library as one HTML page, with a request's adapters and weights."""
    from lora_fused.library.atlas import make_atlas
    from lora_fused.methods.rpe import retrieve, weigh

    check_page(output, "library atlas", "--output")
    check_writable(output, "library atlas")
    library, chosen = open_library(uri, store), None
    entries, prototypes = selected(library, where, tags)
    if inputs is not None or text:
        _, query, _ = asked(library, inputs, text, field, False, model, Reporter(quiet))
        chosen = weigh(retrieve(query, prototypes, k=k), weights)
    made = make_atlas(entries, prototypes, clusters=clusters, chosen=chosen, seed=seed)
    made.save_html(output)
    told = {
        "written": output,
        "adapters": len(entries),
        "prototypes": len(made.points),
        "variance_shown": sum(made.explained),
        "clusters": [cluster.size for cluster in made.clusters],
    }
    print_json(told) if as_json else say_facts(told)


def open_library(uri: str, store: str | None):
    from lora_fused.library import AdapterLibrary

    return AdapterLibrary.open(uri, store=store)


def selected(library, where: str | None, tags: list[str] | None) -> tuple[list, object]:
    """The entries that a filter and tags leave, and their prototypes."""
    entries = library.entries(where, tags=tags or [])
    if not entries:
        rule = "leave entries of the library" if where or tags else "hold entries"
        raise invalid("library", "--filter and --tag" if where or tags else "URI", rule, "none")
    all_of_them = where is None and not tags
    names = None if all_of_them else [entry.name for entry in entries]
    return entries, library.prototypes(names)


def facts(entry) -> dict:
    """An entry as JSON."""
    told = dataclasses.asdict(entry)
    times = {key: told[key].isoformat() for key in ("created", "updated")}
    return {**told, **times, "tags": list(entry.tags), "counts": list(entry.counts)}


def _row(entry) -> list[object]:
    known = sum(entry.counts) if all(entry.counts) else "not known"
    return [entry.name, ", ".join(entry.tags), entry.rank, known]


def _space(uri: str, space) -> dict:
    names = ("size", "base", "base_place", "fingerprint", "minimum")
    names += ("layer", "pooling", "normalize", "max_length")
    return {"library": uri, **{name: getattr(space, name) for name in names}}
