"""The commands of the experiments on text tasks: their options, and a run that goes on."""

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from resumable import OutOfTime, Results, conditions, words
from text_experiment import TextExperiment, TextSettings

from lora_fused.cli.console import Reporter
from lora_fused.cli.demo_tasks import model_path


def parser_of(
    about: str, settings: type[TextSettings], *, seeds: int, methods: Sequence[str], cache: str
) -> argparse.ArgumentParser:
    """The options that every experiment has, those of its settings among them."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--csv", type=Path, required=True, help="rows, appended to")
    parser.add_argument("--cache", type=Path, default=Path(cache), help="adapters")
    parser.add_argument("--model", help="a BERT's folder in place of the packaged one")
    parser.add_argument("--data", type=Path, help="in place of LORA_FUSED_DATA")
    parser.add_argument("--seeds", type=int, default=seeds, help="0 to N - 1, one after the other")
    parser.add_argument("--tasks", type=words, help="held-out tasks, comma-separated")
    parser.add_argument("--methods", type=words, default=list(methods))
    parser.add_argument("--minutes", type=float, default=math.inf, help="no cell begins after")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--quiet", "-q", action="store_true")
    for field in dataclasses.fields(settings):
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=type(field.default), default=field.default)
    return parser


def experiment_of(
    kind: type[TextExperiment], settings: type[TextSettings], options: argparse.Namespace
) -> TextExperiment:
    """What the options ask for; they get a ``deadline``, and tasks where they name none."""
    options.deadline = time.monotonic() + 60 * options.minutes
    torch.set_num_threads(options.threads)
    names = [field.name for field in dataclasses.fields(settings)]
    chosen = settings(**{name: getattr(options, name) for name in names})
    where = {} if options.data is None else {"data": options.data}
    experiment = kind(chosen, options.model or str(model_path()), options.cache, **where)
    options.tasks = options.tasks or experiment.held_out
    return experiment


def resumed(
    run: Callable[..., None],
    experiment: TextExperiment,
    options: argparse.Namespace,
    *,
    rates: Sequence[float],
    columns: Sequence[str],
    key: Sequence[str],
) -> Results:
    """The rows in ``options.csv``, after ``run`` added what it lacks (of ``--table``, nothing).

    ``run(experiment, results, options, reporter)`` finds the pool's adapters there.
    """
    recipe, facts = experiment.recipe_name(rates, options.threads), conditions(options.threads)
    results = Results(options.csv, recipe, facts, options.deadline, columns=columns, key=key)
    if options.table:
        return results
    reporter = Reporter(options.quiet)
    try:
        if not experiment.load_pool(reporter.say, lambda: time.monotonic() < options.deadline):
            raise OutOfTime
        run(experiment, results, options, reporter)
    except OutOfTime:
        reporter.say(f"stopped after {options.minutes:g} minutes; run again to go on")
    return results
