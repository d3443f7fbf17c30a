"""EigenLoRAx on real text tasks: is a basis of other tasks' adapters enough for a new one?

    python examples/eigenlorax_glue_like.py --csv results.csv --minutes 50
    python examples/eigenlorax_glue_like.py --csv results.csv --table

all-MiniLM-L6-v2; every held-out task is learned from coefficients in a basis that was fitted to the
adapters of all other tasks, and in six other ways. Each finished cell is a row of the CSV; a second
run does what is missing. docs/eigenlorax.md says what came out.
"""

import argparse
import functools
import statistics
import sys

from eigenlorax_reconstruction import PUBLIC, SIZES, families, reconstructed, reported, ways
from eigenlorax_tables import REPORTED, show, summary
from eigenlorax_training import Experiment, Settings, parse
from resumable import Results, best_rate
from text_command import experiment_of, parser_of, resumed

from lora_fused.cli.console import Reporter, print_json

METHODS = (
    "probe",
    "lora",
    "full",
    "eigenlorax-8",
    "eigenlorax-16",
    "eigenlorax-32",
    "augmented-16+16",
    "hosvd-32",
    "null-32",
)
# One rule for all: the rate with the best mean accuracy on the development tasks, from three steps
# of one scale, further on while the best is at an end. One rate for all methods that train
# coefficients: it is chosen with the basis in the middle.
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
FIRST_RATE = {"probe": 5, "lora": 4, "full": 2, "coefficients": 5}
STANDS_FOR = {"coefficients": "eigenlorax-16"}
COLUMNS = [
    "recipe",
    "phase",
    "task",
    "seed",
    "method",
    "rate",
    "head_rate",
    "parameters",
    "head_parameters",
    "lora_ratio",
    "accuracy",
    "validation",
    "steps_to_95",
    "saved_mib",
    "train_mib",
    "cpu_seconds",
    *REPORTED,
    "torch",
    "threads",
    "machine",
    "commit",
    "date",
]
KEY = ("phase", "task", "seed", "method", "rate")


def family(method: str) -> str:
    """The methods that share a learning rate."""
    return method if method in FIRST_RATE else "coefficients"


def chosen_rate(experiment: Experiment, results: Results, of: str, head_rate: float | None):
    """The learning rate of a family by the rule above."""

    def score(rate: float) -> float:
        return statistics.fmean(
            float(_ladder(experiment, results, task, of, rate, head_rate)["accuracy"])
            for task in experiment.development
        )

    return best_rate(score, RATES, FIRST_RATE[of])


def _ladder(experiment, results, task, of, rate, head_rate) -> dict:
    method = STANDS_FOR.get(of, of)
    rates = (rate, head_rate if head_rate is not None else rate)

    def make() -> dict:
        return {"head_rate": rates[1], **experiment.run(task, 0, method, rates, checks=False)}

    return results.cell(make, phase="ladder", task=task, seed=0, method=method, rate=rate)


def run(experiment: Experiment, results: Results, options, reporter: Reporter) -> None:
    """All cells that are missing: rates first, then seed by seed: tasks come before seeds."""
    wanted = [family(method) for method in options.methods]
    rates = {"probe": chosen_rate(experiment, results, "probe", None)}
    for of in dict.fromkeys(wanted):
        if of != "probe":
            rates[of] = chosen_rate(experiment, results, of, rates["probe"])
    cells = [
        (s, t, m) for s in range(options.seeds) for t in options.tasks for m in options.methods
    ]
    with reporter.task(f"{len(cells)} cells", len(cells)) as advance:
        for seed, task, method in cells:
            pair = rates[family(method)], rates["probe"]

            def make(key=(task, seed, method), pair=pair) -> dict:
                return {"head_rate": pair[1], **experiment.run(*key, pair, checks=True)}

            results.cell(make, phase="cell", task=task, seed=seed, method=method, rate=pair[0])
            advance(1)
            if seed == 0 and (task, method) == (options.tasks[-1], options.methods[-1]):
                _without_training(experiment, results, options, reporter)


def _without_training(experiment: Experiment, results: Results, options, reporter) -> None:
    if options.no_reconstruction:
        return
    banks = dict(families(experiment))
    # A pool's own report costs most, and says the same at every size.
    fits = [
        (name, f"{kind}-{size}")
        for name in banks
        for kind in ("eigenlorax", "hosvd")
        for size in (SIZES if name in PUBLIC else SIZES[-1:])
    ]
    pairs = [(task, way) for task in experiment.tasks for way in ways()]
    with reporter.task("reconstruction", len(fits) + len(pairs)) as advance:
        for task, way in pairs:
            make = functools.partial(reconstructed, experiment, task, way)
            results.cell(make, phase="reconstruct", task=task, method=way)
            advance(1)
        for name, method in fits:
            kind, (size,) = parse(method)
            make = functools.partial(reported, banks[name], kind, size)
            results.cell(make, phase="report", task=name, method=method)
            advance(1)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    common = {"seeds": 3, "methods": METHODS, "cache": ".cache/eigenlorax"}
    parser = parser_of(__doc__.splitlines()[0], Settings, **common)
    parser.add_argument("--no-reconstruction", action="store_true", help="only what is trained")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    experiment = experiment_of(Experiment, Settings, options)
    unknown = [t for t in options.tasks if t not in experiment.tasks or t in experiment.development]
    if unknown:
        print(f"no task to hold out: {', '.join(unknown)}", file=sys.stderr)
        return 2
    results = resumed(run, experiment, options, rates=RATES, columns=COLUMNS, key=KEY)
    found = {"recipe": results.recipe, **summary(results.rows.values(), ways())}
    if options.json:
        print_json(found)
    else:
        show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
