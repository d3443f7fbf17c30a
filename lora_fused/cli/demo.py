"""``lora-fused demo``: the main job on real input, packaged or the user's own."""

import enum
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from lora_fused.cli.console import Reporter, counted, print_json, stdout, table

OURS = "lora_fused, one batch"


class SavedModules(str, enum.Enum):
    """What to do about fully trained modules in the user's adapters; see ``attach``."""

    error = "error"
    ignore = "ignore"
    apply = "apply"


def demo(
    adapters: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with your adapters (with --model).")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Your model's folder (with --adapters).")
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A file of texts for your model, one per line. Default: random tokens.",
        ),
    ] = None,
    saved_modules: Annotated[
        SavedModules,
        typer.Option(
            help="What to do with heads saved in your adapters: refuse them, use the model's own, "
            "or apply them (rows then have one adapter at most)."
        ),
    ] = SavedModules.error,
    any_base: Annotated[
        bool, typer.Option("--any-base", help="Allow adapters that name different base models.")
    ] = False,
    cache: Annotated[
        Path, typer.Option(metavar="DIR", help="The folder that keeps trained adapters.")
    ] = Path(".cache/demo"),
    tasks: Annotated[
        int, typer.Option(min=2, max=6, help="How many of the six text tasks to serve.")
    ] = 6,
    epochs: Annotated[
        int, typer.Option(min=1, help="How many epochs to train each adapter for.")
    ] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="How many CPU threads to use. Default: all cores.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling, training and random tokens.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Serve many adapters in one mixed batch and hold results and time against PEFT.

    Without options: trains one LoRA for each of six text tasks on all-MiniLM-L6-v2 (cached), and
    also prints accuracies. With --adapters and --model: the same batch on your own.
    """
    if (adapters is None) != (model is None):
        raise typer.BadParameter("--adapters and --model must be given together")
    if text is not None and model is None:
        raise typer.BadParameter("--text must come with --adapters and --model")
    if model is None and (any_base or saved_modules is not SavedModules.error):
        given = "--any-base" if any_base else "--saved-modules"
        raise typer.BadParameter(f"{given} must come with --adapters and --model")
    from lora_fused.cli.demo_job import Loading, own_job, packaged_job

    start = time.perf_counter()
    threads = threads or torch.get_num_threads()
    reporter = Reporter(quiet)
    if model is not None:
        loading = Loading(saved_modules.value, any_base)
        result = own_job(adapters, model, text, seed, threads, reporter, loading)
    else:
        result = packaged_job(cache, tasks, epochs, seed, threads, reporter)
    result["seconds"] = round(time.perf_counter() - start, 1)
    if as_json:
        print_json(result)
    else:
        _show(result)
    if not result["difference"]["within"]:
        raise RuntimeError("demo: the mixed batch must agree with PEFT within the budget, got more")


def _show(result: dict) -> None:
    console = stdout()

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    if "accuracy" in result:
        console.print(_accuracy_table(result["accuracy"]))
        say("A text is the mean of its hidden states; the pooler is neither adapted nor used.")
        say(f"{result['trained']} adapters trained now, the others from the cache.")
    say(
        f"\n{len(result['rows'])} rows in one batch, {len(result['adapters'])} adapters, "
        f"{result['modules']} adapted modules. The first rows:"
    )
    for i, row in enumerate(result["rows"][:8]):
        terms = (f"{weight:+.2f} {name}" for name, weight in row.items())
        say(f"  row {i}: {' '.join(terms) or 'no adapter'}")
    console.print(_difference_table(result["difference"]))
    console.print(_timing_table(result["timing"]))
    say(f"{result['seconds']} s in all.")


def _accuracy_table(rows: list[dict]):
    headings = ("task", "classes", "train", "test", "base", "own adapter", "uniform mixture")
    columns = {heading: "right" if i else "left" for i, heading in enumerate(headings)}
    cells = [
        [r["task"], r["classes"], r["train"], r["test"]]
        + [f"{r[kind]:.3f}" for kind in ("base", "own", "uniform")]
        for r in rows
    ]
    means = [sum(r[kind] for r in rows) / len(rows) for kind in ("base", "own", "uniform")]
    cells.append(["mean", "", "", "", *(f"{mean:.3f}" for mean in means)])
    return table("Accuracy (class = nearest label name)", columns, cells)


def _difference_table(difference: dict):
    verdict = "within budget" if difference["within"] else "OVER BUDGET"
    cells = [
        ["mixed batch to PEFT row by row, float32", f"{difference['to_peft']:.2e}", ""],
        ["mixed batch to float64", f"{difference['error']:.2e}", verdict],
        ["PEFT row by row to float64", f"{difference['peft_error']:.2e}", ""],
        ["budget: 2 * (PEFT's error + eps * max)", f"{difference['budget']:.2e}", ""],
        ["what the adapters change, for scale", f"{difference['effect']:.2e}", ""],
    ]
    columns = {"largest difference of an output": "left", "value": "right", "verdict": "left"}
    return table("Exactness", columns, cells)


def _timing_table(timing: dict):
    cases = timing["cases"]
    ours = {(c["work"], c["loaded"]): c["milliseconds"] for c in cases if c["how"] == OURS}
    cells = []
    for c in cases:
        own = ours.get((c["work"], c["loaded"]))
        against = "" if own is None else f"{c['milliseconds'] / own:.2f}"
        ratios = [f"{c['milliseconds']:.1f}", f"{c['ratio']:.2f}", against]
        cells.append([c["work"], c["how"], c["loaded"], *ratios])
    columns = {"rows use": "left", "run by": "left"}
    numbers = ("adapters loaded", "ms", "times the base", "times lora_fused")
    columns |= dict.fromkeys(numbers, "right")
    title = (
        f"Time of {timing['rows']} rows x {timing['tokens']} tokens, "
        f"{counted(timing['threads'], 'thread')}, "
        f"medians of {timing['rounds']} interleaved rounds"
    )
    return table(title, columns, cells)
