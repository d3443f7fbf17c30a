"""``lora-fused recycle``: images from adapters, one meta-LoRA from the images, few-shot scores."""

from pathlib import Path
from typing import Annotated

import typer

from lora_fused.adapters import AdapterBank
from lora_fused.checks import check_whole
from lora_fused.cli.adapters import AllowPickle, AnyBase, AsJson, Overwrite, Paths, Quiet, Seed
from lora_fused.cli.console import Reporter, print_json, say_facts, stdout, table
from lora_fused.cli.merge import load
from lora_fused.cli.recycle_run import (
    check_files,
    check_pool,
    check_prior,
    checkpoint_of,
    prior_of,
    ratios_of,
    timed,
    write_record,
)

app = typer.Typer(
    no_args_is_help=True,
    help="Few-shot classification without tuning, from pre-tuned adapters without their data.",
)

_OP = "recycle"

Model = Annotated[
    str,
    typer.Option(
        metavar="PATH",
        help="A transformers folder of a vision model (hubs are not asked), or timm's name (timm "
        "finds the weights; local-dir:PATH is a folder).",
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...")]
CheckpointPath = Annotated[
    str | None, typer.Option("--checkpoint", help="Write the run's state to this file.")
]
Every = Annotated[int, typer.Option("--checkpoint-every", help="Steps between two writes.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from --checkpoint, where it is there.")
]
Ways = Annotated[int, typer.Option(help="Classes of a task.")]
Shots = Annotated[int, typer.Option(help="Support images of each class.")]
Queries = Annotated[int, typer.Option(help="Query images of each class.")]


@app.command()
def invert(
    paths: Paths,
    model: Model,
    output: Annotated[str, typer.Option("--output", "-o", help="The pool, one file, to write.")],
    heads: Annotated[
        str | None,
        typer.Option(
            help="A safetensors file of <adapter>.weight and .bias. Default: the heads saved in "
            "the adapters (modules_to_save)."
        ),
    ] = None,
    class_names: Annotated[
        str | None,
        typer.Option(
            help="A JSON file, adapter -> names of its classes: equal names are one class."
        ),
    ] = None,
    per_class: Annotated[int, typer.Option(help="Images of each class.")] = 16,
    steps: Annotated[int, typer.Option(help="Steps of Adam on the pixels.")] = 2000,
    lr: Annotated[
        float, typer.Option(help="Step of Adam, in the pixels' normalised units.")
    ] = 0.25,
    prior: Annotated[
        str, typer.Option(help="tv, batchnorm (the model's own), tokens (--prior-images) or none.")
    ] = "tv",
    prior_weight: Annotated[float, typer.Option(help="Factor of the prior in the loss.")] = 0.01,
    prior_images: Annotated[
        str | None,
        typer.Option(help="For tokens: natural images of other data, as for eval --images."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Side in pixels. Default: the image processor's.")
    ] = None,
    prune: Annotated[
        str | None, typer.Option(help="Tokens to drop, as in 1:0.5,3:0.5 (block:share).")
    ] = None,
    png: Annotated[str | None, typer.Option(help="Also write the images as one grid.")] = None,
    seed: Seed = 0,
    checkpoint: CheckpointPath = None,
    checkpoint_every: Every = 100,
    resume: Resume = False,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    any_base: AnyBase = False,
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make images of every adapter's classes, all adapters in one batch: a pool for distil.

    How the pool was made is written beside it, as <pool>.json. With --resume and the same options
    an interrupted run goes on from its --checkpoint, to the same bits.
    """
    from lora_fused.cli.recycle_images import read_class_names, write_grid
    from lora_fused.cli.recycle_vision import attached, heads_of
    from lora_fused.io import save_pool
    from lora_fused.io.find import expand
    from lora_fused.methods import recycle
    from lora_fused.nn.prune import prune_tokens

    options = {"per_class": per_class, "steps": steps, "lr": lr, "prior_weight": prior_weight}
    record = {"command": "recycle invert", "model": model, "heads": heads, **options}
    record |= {"prior": prior, "prior_images": prior_images, "size": size, "prune": prune}
    record |= {"class_names": class_names, "seed": seed}
    check_prior(prior, prior_images)
    check_files(overwrite, output, f"{output}.json", png)
    saved, ratios, reporter = checkpoint_of(checkpoint, resume), ratios_of(prune), Reporter(quiet)
    names = None if class_names is None else read_class_names(class_names)
    found = expand(paths)
    bank = load(found, reporter, any_base, allow_pickle)
    vision, handle = attached(model, bank, device)
    tensors = heads_of(vision, handle.bank, heads)
    with timed(reporter, f"inverting {len(tensors)} adapters, {steps} steps") as clock:
        pool = recycle.invert(
            handle,
            tensors,
            **options,
            **vision.pixels(size),
            prior=prior_of(prior, prior_images, vision, device),
            features=vision.features,
            prune=None if ratios is None else prune_tokens(vision.model, ratios),
            class_names=names,
            seed=seed,
            checkpoint=saved,
            checkpoint_every=checkpoint_every,
            progress=not quiet,
        )
    save_pool(pool, output)
    result = _pool_facts(pool) | {"seconds": clock[0]}
    write_record(f"{output}.json", record | {"adapters": list(map(str, found))}, result)
    if png is not None:
        write_grid(pool, vision, png)
    _tell_pool({"path": output, **result}, as_json)


@app.command()
def distil(
    model: Model,
    pool: Annotated[str, typer.Option(metavar="POOL", help="What invert has written.")],
    output: Annotated[str, typer.Option("--output", "-o", help="The PEFT folder to write.")],
    rank: Annotated[int, typer.Option(help="Rank of the meta-LoRA.")] = 4,
    alpha: Annotated[
        float | None, typer.Option(help="Scale times rank. Default: the rank.")
    ] = None,
    targets: Annotated[
        str | None,
        typer.Option(help="Modules, with commas between. Default: q,v; qkv where they are one."),
    ] = None,
    ways: Ways = 5,
    shots: Shots = 1,
    queries: Queries = 15,
    interpolate: Annotated[
        bool, typer.Option(help="Half of the tasks take classes of several adapters.")
    ] = True,
    sparse_tokens: Annotated[
        bool, typer.Option("--sparse-tokens", help="Run on the tokens that invert --prune kept.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(help="Squared distances of features are divided by it.")
    ] = 1.0,
    steps: Annotated[int, typer.Option(help="Tasks, one a step.")] = 2000,
    lr: Annotated[float, typer.Option(help="Learning rate of Adam.")] = 1e-3,
    seed: Seed = 0,
    checkpoint: CheckpointPath = None,
    checkpoint_every: Every = 100,
    resume: Resume = False,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train one meta-LoRA on tasks drawn from a pool, and write it as a PEFT folder.

    How it was made is written into the folder, as recycle.json.
    """
    from lora_fused.cli.recycle_vision import attached, load_vision, targets_of
    from lora_fused.io import load_pool, write_adapter
    from lora_fused.io.peft import check_target
    from lora_fused.methods import recycle
    from lora_fused.new import new_adapter
    from lora_fused.nn.prune import prune_tokens

    options = {"ways": ways, "shots": shots, "queries": queries, "interpolate": interpolate}
    options |= {"temperature": temperature, "steps": steps, "lr": lr, "seed": seed}
    target = Path(output)
    check_target(target, overwrite, _OP)
    saved, reporter, images = checkpoint_of(checkpoint, resume), Reporter(quiet), load_pool(pool)
    vision = load_vision(model, device=device)
    check_pool(images, vision, pool)
    modules, name = targets_of(vision.model, targets), target.resolve().name
    made = {"rank": rank, "alpha": alpha, "target_modules": modules, "seed": seed}
    bank = AdapterBank()
    bank.add(new_adapter(vision.model, name, **made))
    _, handle = attached(vision, bank)
    with timed(reporter, f"distilling {images}, {steps} steps") as clock:
        found = recycle.distil(
            handle,
            images,
            name,
            **options,
            sparse_tokens=prune_tokens if sparse_tokens else None,
            features=vision.features,
            checkpoint=saved,
            checkpoint_every=checkpoint_every,
            progress=not quiet,
        )
    write_adapter(found.adapter, target, overwrite_ok=overwrite)
    record = {"command": "recycle distil", "model": model, "pool": pool, **options, **made}
    result = {"for": type(vision.model).__name__, "targets": ", ".join(modules)}
    result |= _distilled_facts(found) | {"seconds": clock[0]}
    write_record(target / "recycle.json", record | {"sparse_tokens": sparse_tokens}, result)
    told = {"path": output, **result}
    print_json(told) if as_json else say_facts(told)


@app.command(name="eval")
def evaluate(
    model: Model,
    images: Annotated[
        str,
        typer.Option(
            metavar="DIR", help="One folder per class; or an .npz of jpeg, offset and label."
        ),
    ],
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="A meta-LoRA; may be repeated.")
    ] = None,
    ways: Ways = 5,
    shots: Shots = 1,
    queries: Queries = 15,
    episodes: Annotated[int, typer.Option(help="Random tasks.")] = 600,
    batch_size: Annotated[int, typer.Option(help="Images of one forward.")] = 64,
    seed: Seed = 0,
    device: Device = "cpu",
    allow_pickle: AllowPickle = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Few-shot accuracy of class means on images, of adapters and of the frozen model beside them.

    All are scored on the same episodes. Intervals, 95 %, are of the drawing of episodes; that of
    the gain is of the differences episode by episode.
    """
    from lora_fused.cli.recycle_images import open_images
    from lora_fused.cli.recycle_scores import score_table, scores
    from lora_fused.cli.recycle_vision import attached
    from lora_fused.io.find import expand
    from lora_fused.methods.recycle import draw_episodes

    check_whole(_OP, "--batch-size", batch_size)
    data, reporter = open_images(images), Reporter(quiet)
    sizes = {"ways": ways, "shots": shots, "queries": queries}
    drawn = list(draw_episodes(data.labels, **sizes, count=episodes, seed=seed))
    bank = AdapterBank() if not adapter else load(expand(adapter), reporter, True, allow_pickle)
    vision, handle = attached(model, bank, device)
    options = {"batch_size": batch_size, "device": device}
    rows = scores(vision, handle, data, drawn, shots, options, reporter)
    if as_json:
        facts = {"images": len(data), "classes": len(data.labels.unique()), **sizes}
        print_json({**facts, "episodes": episodes, "seed": seed, "results": rows})
        return
    title = f"{ways}-way {shots}-shot, {episodes} episodes of {len(data)} images"
    stdout().print(score_table(title, rows))


def _pool_facts(pool) -> dict:
    share = pool.accuracy()
    losses = {n: float(pool.losses[pool.teachers == t].mean()) for t, n in enumerate(pool.names)}
    counts = dict(zip(pool.names, map(len, pool.class_names), strict=True))
    facts = {"images": len(pool), "classes": sum(counts.values())}
    facts["tokens_kept"] = None if pool.kept is None else pool.kept.shape[1]
    teachers = {n: {"classes": counts[n], "loss": losses[n], "accuracy": share[n]} for n in share}
    return facts | {"loss": float(pool.losses.mean()), "teachers": teachers}


def _distilled_facts(found) -> dict:
    tenth = max(1, len(found.losses) // 10)
    first, last = (float(part.mean()) for part in (found.losses[:tenth], found.losses[-tenth:]))
    parts = found.adapter.modules.values()
    count = sum(part.lora_a.numel() + part.lora_b.numel() for part in parts)
    return {"parameters": count, "first_loss": first, "last_loss": last}


def _tell_pool(facts: dict, as_json: bool) -> None:
    if as_json:
        print_json(facts)
        return
    teachers = facts.pop("teachers")
    columns = {"adapter": "left", "classes": "right", "loss": "right"}
    columns["accuracy by its own adapter"] = "right"
    rows = [
        [name, one["classes"], f"{one['loss']:.4f}", f"{one['accuracy']:.4f}"]
        for name, one in teachers.items()
    ]
    stdout().print(table("", columns, rows))
    say_facts({name: fact for name, fact in facts.items() if fact is not None})
