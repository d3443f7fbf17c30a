"""What ``lora-fused library add`` is asked to add, and how it does that."""

import json
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from lora_fused.checks import invalid, some
from lora_fused.cli.base_model import base_of, read_rows, read_texts, steps
from lora_fused.cli.console import Reporter, counted

_KEYS = ("adapter", "examples", "name", "tags", "metadata")
_BATCH = 32  # adapters in a commit


class Job(NamedTuple):
    """One adapter to add: where it is, its example texts, and what is said of it."""

    path: Path
    name: str
    texts: list[str]
    tags: list[str]
    metadata: dict


def jobs_of(paths: list[str], examples: str | None, manifest: str | None, field: str) -> list[Job]:
    """What a command line or a manifest names, all of it read; nothing is added before."""
    if (examples is None) == (manifest is None):
        got = "both" if examples else "neither"
        raise invalid("library add", "--examples and --manifest", "be given one of them", got)
    if manifest is None:
        from lora_fused.io.find import expand
        from lora_fused.io.peft import default_name

        found = expand(paths) if paths else []
        if len(found) != 1:
            rule = "name one adapter with --examples (of several: --manifest)"
            raise invalid("library add", "paths", rule, len(found))
        jobs = [Job(found[0], default_name(found[0]), read_texts(examples, field), [], {})]
    else:
        if paths:
            raise invalid("library add", "paths", "be left out with --manifest", paths[0])
        jobs = list(_of_manifest(Path(manifest), field))
    if not jobs:
        raise invalid("library add", str(manifest), "name adapters, one per line", "none")
    seen = set()
    for job in jobs:
        if job.name in seen:
            rule = 'differ (an entry of the manifest may have its own: "name")'
            raise invalid("library add", "names of adapters", rule, f"{job.name!r} twice")
        seen.add(job.name)
    return jobs


def _of_manifest(path: Path, field: str) -> Iterator[Job]:
    from lora_fused.io.peft import default_name
    from lora_fused.library.entries import check_metadata, check_name, check_tags

    if not path.is_file():
        raise FileNotFoundError(f"library add: no such manifest: {path}")
    for where, row in read_rows(path):
        for key in row:
            if key not in _KEYS:
                close = get_close_matches(key, _KEYS, n=1)
                hint = f" (close: {close[0]!r})" if close else ""
                raise invalid("library add", f"keys of {where}", f"be of {_KEYS}{hint}", repr(key))
        for key in ("adapter", "examples"):
            if not isinstance(row.get(key), str):
                rule = f"have a path as {key!r}"
                raise invalid("library add", where, rule, json.dumps(row.get(key)))
        adapter = path.parent / row["adapter"]
        texts = read_texts(path.parent / row["examples"], field)
        name = check_name(row.get("name", default_name(adapter)))
        tags, metadata = check_tags(row.get("tags", []), f"tags of {name!r}"), row.get("metadata")
        yield Job(adapter, name, texts, list(tags), check_metadata(metadata, name))


def add_jobs(library, jobs: list[Job], options: dict, reporter: Reporter) -> dict:
    """Embed and add, some adapters in a commit; what was added stays if it is interrupted."""
    names = set(library.names)
    held = [job.name for job in jobs if job.name in names]
    if held and not options["skip_existing"]:
        rule = "be new (--skip-existing passes over those that are there)"
        raise invalid("library add", "names", rule, some(map(repr, held)))
    left = [job for job in jobs if job.name not in names]
    told = {"added": [], "skipped": held, "noise": None}
    if not left:
        return told
    _check(left, library.space, options, reporter)
    base = base_of(library, options["model"], reporter)
    # Noise is reported against the neighbours, so all must be there at once.
    size = len(left) if options["noise"] else _BATCH
    total = sum(len(job.texts) for job in left)
    label = f"adding {counted(len(left), 'adapter')} by {counted(total, 'example')}"
    try:
        with reporter.task(label, total) as advance:
            for i in range(0, len(left), size):
                noise = _add(library, left[i : i + size], base, options, advance)
                told["added"] += [job.name for job in left[i : i + size]]
    except KeyboardInterrupt:
        done = f"{len(told['added'])} of {len(left)} adapters were added, and stay"
        reporter.say(f"interrupted: {done}; --skip-existing goes on from there")
        raise
    told["noise"] = noise
    return told


def _check(jobs: list[Job], space, options: dict, reporter: Reporter) -> None:
    """Before the base is loaded: adapters that are damaged, or of another base."""
    from lora_fused.library.entries import check_adapter, other_base

    with reporter.task(f"checking {counted(len(jobs), 'adapter')}", len(jobs)) as advance:
        for job in jobs:
            adapter = _read(job, options)
            other = other_base(adapter, space)
            if other is not None and not options["any_base"]:
                rule = f"be of the library's base {space.base} (if the two are one model, create "
                rule += f"the library with --base-name {other}, or pass --any-base)"
                got = f"one trained on {other}"
                raise invalid("library add", f"adapter {job.name!r}", rule, got)
            check_adapter(adapter, space, any_base=True)
            advance(1)


def _read(job: Job, options: dict):
    from lora_fused.io import read_adapter

    return read_adapter(job.path, name=job.name, allow_pickle=options["allow_pickle"])


def _add(library, jobs: list[Job], base, options: dict, advance):
    """One commit; what the noise did, if any."""
    from lora_fused.methods.rpe import make_prototypes

    found = {
        job.name: library.embed(
            base.model, job.texts, tokenizer=base.tokenizer, progress=steps(advance)
        )
        for job in jobs
    }
    minimum = library.space.minimum if options["minimum"] is None else options["minimum"]
    made = make_prototypes(
        found,
        per_adapter=options["per_adapter"],
        minimum=max(1, minimum),
        noise=options["noise"],
        seed=options["seed"],
    )
    library.add_many(
        [_read(job, options) for job in jobs],
        made,
        tags={job.name: [*job.tags, *options["tags"]] for job in jobs},
        metadata={job.name: job.metadata for job in jobs},
        minimum=options["minimum"],
        any_base=options["any_base"],
        progress=False,
    )
    return made.noise
