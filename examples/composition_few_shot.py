"""Composed adapters on real text tasks: do other tasks' adapters help to learn a new one?

    python examples/composition_few_shot.py --csv results.csv --minutes 50
    python examples/composition_few_shot.py --csv results.csv --table --plot results.svg

The experiment of Asadi et al. (arXiv 2402.15414) on all-MiniLM-L6-v2: every unseen task is learned
from 4, 16 and 64 examples per class and from all, by uniform and learned compositions of the other
tasks' adapters and in six other ways. Each finished cell is a row of the CSV; a second run does
what is missing. docs/composition.md says what came out.
"""

import argparse
import statistics
import sys
from pathlib import Path

from composition_few_shot_methods import METHODS, FewShot, Settings
from composition_few_shot_plot import svg
from composition_few_shot_tables import found, tables
from resumable import Results, best_rate, unknown, words
from text_command import experiment_of, parser_of, resumed

from lora_fused.cli.console import Reporter

SHOTS = ("4", "16", "64", "full")
# One rule for all: the rate with the best mean accuracy on the development tasks at 16 examples per
# class, from three steps of one scale, further on while the best is at an end; the head's first,
# which serves wherever nothing else trains, then the others beside it. It stays at all shots.
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
FIRST_RATE = {"head": 5, "lora": 4, "full": 2, "learned": 7, "learned-free": 6}
RATE_OF = {"uniform": "head", "lorahub": "head", "null-uniform": "head", "null-learned": "learned"}
LADDER_SHOTS = "16"
COLUMNS = [
    "recipe",
    "phase",
    "task",
    "seed",
    "shots",
    "method",
    "rate",
    "head_rate",
    "rows",
    "classes",
    "adapters",
    "steps",
    "parameters",
    "head_parameters",
    "accuracy",
    "cpu_seconds",
    "torch",
    "threads",
    "machine",
    "commit",
    "date",
]
KEY = ("phase", "task", "seed", "shots", "method", "rate")


def cell(experiment: FewShot, results: Results, phase, task, seed, shots, method, rates) -> dict:
    """One row; learned only if the CSV lacks it."""

    def make() -> dict:
        count = None if shots == "full" else int(shots)
        return {"head_rate": rates[1], **experiment.run(task, seed, count, method, rates)}

    key = {"phase": phase, "task": task, "seed": seed, "shots": shots, "method": method}
    return results.cell(make, **key, rate=rates[0])


def chosen_rate(experiment: FewShot, results: Results, method: str, head_rate: float | None):
    """The learning rate of a method by the rule above."""

    def score(rate: float) -> float:
        rates = rate, rate if head_rate is None else head_rate
        return statistics.fmean(
            float(
                cell(experiment, results, "ladder", task, 0, LADDER_SHOTS, method, rates)[
                    "accuracy"
                ]
            )
            for task in experiment.development
        )

    return best_rate(score, RATES, FIRST_RATE[method])


def run(experiment: FewShot, results: Results, options, reporter: Reporter) -> None:
    """All cells that are missing: rates first, then seed by seed, few shots first.

    So what a budget cuts off is seeds, then the cells of all data, never a task.
    """
    rates = {"head": chosen_rate(experiment, results, "head", None)}
    for method in options.methods:
        of = RATE_OF.get(method, method)
        if of not in rates:
            rates[of] = chosen_rate(experiment, results, of, rates["head"])
    cells = [
        (seed, shots, task, method)
        for seed in range(options.seeds)
        for shots in options.shots
        for task in options.tasks
        for method in options.methods
    ]
    with reporter.task(f"{len(cells)} cells", len(cells)) as advance:
        for seed, shots, task, method in cells:
            pair = rates[RATE_OF.get(method, method)], rates["head"]
            cell(experiment, results, "cell", task, seed, shots, method, pair)
            advance(1)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    common = {"seeds": 5, "methods": METHODS, "cache": ".cache/text_adapters"}
    parser = parser_of(__doc__.splitlines()[0], Settings, **common)
    parser.add_argument("--shots", type=words, default=list(SHOTS), help="per class, or 'full'")
    parser.add_argument("--plot", type=Path, help="write accuracy against shots as an SVG here")
    return parser.parse_args(argv)


def wrong(options: argparse.Namespace, experiment: FewShot) -> str | None:
    """What is wrong with the options, in words."""
    unseen = [task for task in experiment.tasks if task not in experiment.development]
    if error := unknown(task=(options.tasks, unseen), method=(options.methods, METHODS)):
        return error
    for value in options.shots:
        if value != "full" and not (value.isdigit() and int(value)):
            return f"shots are numbers above 0 or 'full', got {value}"
    return None


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    experiment = experiment_of(FewShot, Settings, options)
    if error := wrong(options, experiment):
        print(error, file=sys.stderr)
        return 2
    results = resumed(run, experiment, options, rates=RATES, columns=COLUMNS, key=KEY)
    told = found(results.rows.values())
    print(tables(told))
    if options.plot is not None:
        options.plot.write_text(svg(told), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
