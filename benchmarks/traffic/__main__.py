"""Traffic of our kernels and of vLLM's and SGLang's on the same works.

    python -m benchmarks.traffic --peers --csv benchmarks/results/traffic.csv

A result that is wrong is not counted. Peers are downloaded into .cache/peers on first use.
"""

import argparse
import csv
import sys
import time
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.traffic import LaunchCounter, count, report, works
from lora_fused.testing import error
from tests.support import interpreter

FIELDS = (
    *("work", "N", "M", "J", "K", "I", "O", "R", "workload", "dtype", "impl", "launches"),
    *("torch_ops", "programs", "storing_programs", "compulsory_read", "compulsory_written"),
    *("read_dram", "read_l2", "read_sectors", "written_dram", "written_l2", "atomic_l2"),
    *("read_dram_ratio", "read_l2_ratio", "dram_ratio", "l2_ratio", "largest_program"),
    *("dot_flops", "out_of_bounds", "races", "max_error", "torch", "triton", "version", "commit"),
)
SHOWN = (
    *("impl", "launches", "torch_ops", "programs", "storing_programs", "read_dram", "read_l2"),
    *("written_dram", "atomic_l2", "read_dram_ratio", "read_l2_ratio", "dram_ratio", "l2_ratio"),
    *("largest_program", "out_of_bounds", "races"),
)


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    interpreter.install()
    torch.set_num_threads(1)
    ours, peers = works.ours(), {}
    if not ours:
        print("ours: skipped, no Triton implementation")
    if options.peers:
        peers, reasons = works.peers()
        print(*(f"skipped {reason}" for reason in reasons), sep="\n", end="\n" * bool(reasons))
    rows, wrong = [], 0
    for work in works.WORKS:
        if options.work and work.name not in options.work:
            continue
        problem = works.problem_of(work)
        print(f"\n{work}: compulsory {problem.compulsory_read} read")
        print(_line({field: field for field in SHOWN}))
        known = work.K <= works.MANY and not work.form
        for name, build in (ours | (peers if known else {})).items():
            row = _measure(problem, name, build, options)
            wrong += row is None
            rows += [row] if row else []
    if options.csv:
        _write(rows, options.csv)
    return 1 if wrong else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__)
    parser.add_argument("--peers", action="store_true", help="count vLLM's and SGLang's as well")
    names = [work.name for work in works.WORKS]
    parser.add_argument("--work", action="append", choices=names, help="only this; repeatable")
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    parser.add_argument("--verbose", action="store_true", help="split by launch and argument")
    return parser.parse_args(argv)


def _measure(problem: works.Problem | works.BasisProblem, name: str, build, options) -> dict | None:
    run = build(problem)
    start = time.perf_counter()
    with count() as counter:
        y = run()
    seconds = time.perf_counter() - start
    truth = problem.truth()
    # A sum of J terms added to y in y's dtype rounds J times.
    budget = (problem.work.J + 1) * torch.finfo(y.dtype).eps * float(truth.abs().max())
    if not error(y, truth) <= budget:
        print(f"{name}: WRONG, error {error(y, truth):.3g} > {budget:.3g}", file=sys.stderr)
        return None
    row = _row(problem, name, counter, error(y, truth))
    print(_line(row), f" ({seconds:.0f} s)", flush=True)
    if options.verbose:
        print(report.launches(counter), report.arguments(counter), sep="\n")
    return row


def _row(
    problem: works.Problem | works.BasisProblem,
    name: str,
    counter: LaunchCounter,
    max_error: float,
) -> dict:
    total, work = counter.total, problem.work
    read, written = problem.compulsory_read, problem.compulsory_written
    ratios = {
        "read_dram_ratio": total.read.launch / read,
        "read_l2_ratio": total.read.program / read,
        "dram_ratio": total.dram_bytes / (read + written),
        "l2_ratio": total.l2_bytes / (read + written),
    }
    return {
        **{field: getattr(work, field) for field in (*"NMJKIOR", "workload")},
        "work": work.name,
        "dtype": str(works.DTYPE).removeprefix("torch."),
        "impl": name,
        "launches": total.launches,
        "torch_ops": sum(counter.torch_ops.values()),
        "programs": total.programs,
        "storing_programs": total.storing_programs,
        "compulsory_read": read,
        "compulsory_written": written,
        "read_dram": total.read.launch,
        "read_l2": total.read.program,
        "read_sectors": total.read.sector,
        "written_dram": total.written.launch,
        "written_l2": total.written.program,
        "atomic_l2": total.atomic.program,
        "largest_program": total.largest_program,
        "dot_flops": total.dot_flops,
        "out_of_bounds": total.out_of_bounds,
        "races": total.races,
        "max_error": f"{max_error:.3g}",
        **{field: f"{ratio:.3f}" for field, ratio in ratios.items()},
        **machine.versions(),
    }


def _line(row: dict) -> str:
    titles = {"storing_programs": "storing", "out_of_bounds": "oob", "largest_program": "largest"}
    cells = [str(titles.get(row[f], row[f])) for f in SHOWN]
    widths = [max(len(titles.get(f, f)) + 1, 10) for f in SHOWN[1:]]
    return f"{cells[0]:<16s}" + "".join(
        f"{c:>{w}s}" for c, w in zip(cells[1:], widths, strict=True)
    )


def _write(rows: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    raise SystemExit(main())
