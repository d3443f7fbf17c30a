"""Retrieval ensembles on real text tasks: what do other tasks' adapters give without a label?

    python examples/rpe_leave_one_out.py --csv results.csv --minutes 50
    python examples/rpe_leave_one_out.py --csv results.csv --table

The experiment of RPE (Jin et al., arXiv 2410.09908) on all-MiniLM-L6-v2: every task of a library is
left out in turn; some of its texts, without labels, are embedded by the frozen model, and find the
nearest of the other tasks' adapters and the weights of their ensemble. Each finished cell is a row
of the CSV; a second run does what is missing. docs/rpe.md says what came out.
"""

import argparse
import sys

from resumable import Results, unknown
from rpe_ensembles import METHODS, RETRIEVED, LeaveOneOut, Settings, Way, ensemble_key, way
from rpe_tables import tables
from text_command import experiment_of, parser_of, resumed

from lora_fused.cli.console import Reporter

KS = (1, 2, 4, 8)  # and all
# Of squared features, and of the median squared distance to a neighbour.
TEMPERATURES = {"raw": (0.1, 0.3, 1.0, 3.0), "median": (0.1, 0.3)}
STRENGTHS = {"raw": (0.03, 0.1, 0.3, 1.0, 10.0), "median": (0.01, 0.03, 0.1, 1.0)}
COLUMNS = [
    "recipe",
    "task",
    "seed",
    *Way._fields,
    "accuracy",
    "adapters",
    "negative_mass",
    "ensemble",
    "nearest",
    "distance",
    "unit_distance",
    "hull",
    "place",
    "outside",
    "warned",
    "cpu_seconds",
    "torch",
    "threads",
    "machine",
    "commit",
    "date",
]
KEY = ("task", "seed", *Way._fields)


def groups(names: list[str], k: int) -> dict[str, list[Way]]:
    """What is run for each task, the most wanted first; a way may be in several groups."""
    main = [Way("base")]
    for pool, count in (("others", len(names) - 1), ("all", len(names))):
        main += [way(m, k, pool) for m in ("nearest", *RETRIEVED)]
        main += [way("uniform", count, pool), Way("explain", pool, k, features="raw")]
    ks = [*KS, len(names) - 1]
    return {
        "main": main,
        "single": [Way("single", adapter=name) for name in names],
        "null": [way("null-uniform", len(names) - 1), way("null-simplex", k)],
        "input": [
            *(way(m, k, of="input") for m in ("nearest", *RETRIEVED)),
            way("uniform", 4, of="input"),
            *(way(m, k, "all", "input") for m in ("nearest", "similarity", "simplex")),
        ],
        "features": [way(m, k, features="unit") for m in ("nearest", "linear", "simplex")],
        "k": [way(m, count) for count in ks for m in RETRIEVED],
        "strength": [
            way(m, k, units=units, value=value)
            for m, scales in (("similarity", TEMPERATURES), ("l1", STRENGTHS))
            for units, values in scales.items()
            for value in values
        ],
    }


def run(experiment: LeaveOneOut, results: Results, options, reporter: Reporter) -> None:
    """All cells that are missing, group by group: what a budget cuts off is sensitivity."""
    experiment.known = {
        ensemble_key(row["task"], row["method"], row["ensemble"]): float(row["accuracy"])
        for row in results.rows.values()
        if row["of"] != "input" and row["accuracy"]
    }
    cells = {
        # Without retrieval, nothing is drawn.
        (task, seed if how.pool else "", how): None
        for ways in groups(list(experiment.tasks), experiment.settings.k).values()
        for seed in range(options.seeds)
        for task in options.tasks
        for how in ways
        if how.method in options.methods
    }
    with reporter.task(f"{len(cells)} cells", len(cells)) as advance:
        for task, seed, how in cells:

            def make(key=(task, seed, how)) -> dict:
                return experiment.run(*key)

            results.cell(make, task=task, seed=seed, **how._asdict())
            advance(1)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    common = {"seeds": 1, "methods": METHODS, "cache": ".cache/text_adapters"}
    return parser_of(__doc__.splitlines()[0], Settings, **common).parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    experiment = experiment_of(LeaveOneOut, Settings, options)
    tasks = list(experiment.tasks)
    if error := unknown(task=(options.tasks, tasks), method=(options.methods, METHODS)):
        print(error, file=sys.stderr)
        return 2
    results = resumed(run, experiment, options, rates=(), columns=COLUMNS, key=KEY)
    print(tables(results.rows.values(), tasks, experiment.settings.k))
    return 0


if __name__ == "__main__":
    sys.exit(main())
