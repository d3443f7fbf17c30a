"""Races an op against its competitors, prints a table and keeps a CSV.

    python -m benchmarks.run mixture_lora --chosen --csv benchmarks/results/mixture_lora.csv

A run that was stopped goes on where it was when started again with the same --csv: cases measured
on this machine, at this commit and thread count are not measured twice.
"""

import argparse
import importlib
import math
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks import bench_stacked_svd, machine, table
from benchmarks.harness import CLOCKS, Case, best_baseline, race
from lora_fused.backends import ERRORS

COLUMNS = "{:56s} {:>20s} {:>10s} {:>10s} {:>10s} {:>8s} {:>8s}"
HEADER = ("case", "implementation", "ms p50", "p20", "p80", "x best", "x floor")


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["stacked_svd"]:  # raced at equal error, not at equal work: its own options
        return bench_stacked_svd.main(argv[1:])
    options = _parse(argv)
    bench = importlib.import_module(f"benchmarks.bench_{options.op}")
    selection = bench.SELECTIONS[options.selection]
    cases = sorted((c for c in selection if _matches(c, options.filter)), key=_by_stack)
    results = table.Table(options.csv) if options.csv else None
    print(f"{machine.cpu_model()}, commit {machine.commit()}, torch {torch.__version__}")
    for name in options.impl or bench.OURS:
        print(f"{name}: {ERRORS[name] or 'raced'}")
    wrong, speedups = 0, {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        left = [c for c in cases if not (results and results.has(c, any_commit=options.resume))]
        rates = machine.Rates(CLOCKS[options.clock])
        clock = _Countdown([_estimate(bench, c, rates, options.budget) for c in left])
        print(f"\n{threads} threads, {options.clock} clock; {rates}")
        print(f"{len(left)} cases, {len(cases) - len(left)} already in the CSV; {clock}\n")
        print(COLUMNS.format(*HEADER))
        for case in left:
            try:
                speedups |= _run(bench, case, rates, options, results)
            except table.WrongResult as error:
                print(f"NOT RECORDED {error}", file=sys.stderr)
                wrong += 1
            clock.tick()
        clock.clear()
    _summarise(speedups)
    return 1 if wrong else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    names = sorted(p.stem.removeprefix("bench_") for p in Path(__file__).parent.glob("bench_*.py"))
    ops = [name for name in names if (machine.ROOT / "lora_fused" / "ops" / name).is_dir()]
    parser.add_argument("op", choices=ops)
    which = parser.add_mutually_exclusive_group()
    for name in ("grid", "chosen", "smoke"):
        which.add_argument(f"--{name}", dest="selection", action="store_const", const=name)
    parser.set_defaults(selection="chosen")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument(
        "--filter", nargs="+", default=[], metavar="FIELD=VALUE[,VALUE]", help="such as N=1,8 J=4"
    )
    parser.add_argument("--impl", nargs="+", help="which of ours to race; default: all")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timing for a case")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on a busy machine")
    parser.add_argument("--csv", type=Path, help="where rows go; nothing is written without it")
    parser.add_argument("--resume", action="store_true", help="keep rows of other commits too")
    options = parser.parse_args(argv)
    if options.clock == "cpu" and max(options.threads) > 1:
        parser.error("--clock cpu measures one thread")
    for part in options.filter:
        field = part.partition("=")[0]
        if "=" not in part or field not in table.CASE_FIELDS:
            parser.error(f"--filter takes FIELD=VALUE of {', '.join(table.CASE_FIELDS)}: {part}")
    return options


def _run(bench, case: Case, rates, options, results: table.Table | None) -> dict[tuple, float]:
    # Race one case, print and record it; the speedups of ours by (name, threads, case).
    reason = bench.oversized(case)
    if reason:
        print(f"{case} skipped: {reason}")
        rows = table.skipped(case, reason)
        raced = []
    else:
        problem = bench.problem(case, tuple(options.impl or bench.OURS))
        raced = race(problem, options.budget, options.clock)
        flops, traffic = bench.flops(case), bench.traffic(case)
        floor = rates.floor(flops, traffic, case.dtype)
        _print(case, raced, floor)
        facts = {"flops": flops, "traffic": traffic, "floor": floor, "clock": options.clock}
        rows = table.rows_of(case, raced, **facts)
    if results is not None:
        results.put(case, rows)
    best = best_baseline(raced)
    return {
        (r.name, torch.get_num_threads(), case): best.quantile(0.5) / r.quantile(0.5)
        for r in raced
        if r.ours and r.seconds and best
    }


def _print(case: Case, raced: list, floor: float) -> None:
    best = best_baseline(raced)
    for i, result in enumerate(sorted(raced, key=lambda r: r.quantile(0.5))):
        label = str(case).removeprefix(f"{case.op} ") if i == 0 else ""
        name = f"* {result.name}" if result.ours else result.name
        if result.status != "timed":
            print(f"{label:56s} {name:>20s} {result.status}: {result.reason}")
            continue
        p20, p50, p80 = (result.quantile(q) for q in (0.2, 0.5, 0.8))
        ratio = f"{best.quantile(0.5) / p50:.2f}" if best else ""
        times = (f"{t * 1e3:.4g}" for t in (p50, p20, p80))
        print(COLUMNS.format(label, name, *times, ratio, f"{p50 / floor:.1f}"), flush=True)


def _summarise(speedups: dict[tuple, float]) -> None:
    for name, threads in sorted({key[:2] for key in speedups}):
        mine = {case: s for (n, t, case), s in speedups.items() if (n, t) == (name, threads)}
        middle = math.exp(statistics.fmean(map(math.log, mine.values())))
        slowest = min(mine, key=mine.get)
        print(
            f"\n{name} at {threads} threads against the best torch form of each case: "
            f"geometric mean {middle:.2f}x, faster in {sum(s >= 1 for s in mine.values())} of "
            f"{len(mine)}, lowest {mine[slowest]:.2f}x ({slowest})"
        )


def _estimate(bench, case: Case, rates, budget: float) -> float:
    # Gate, warm-up and the least number of rounds: some ten runs each of forms near the floor and
    # of forms that copy every factor they use (four bytes moved several times a value).
    if bench.oversized(case):
        return 0.0
    copied = 40.0 * case.N * case.J * case.R * (case.I + case.O)
    slow = copied / min(rates.bandwidth.values())
    floor = rates.floor(bench.flops(case), bench.traffic(case), case.dtype)
    return budget + 100 * floor + 10 * slow


def _matches(case: Case, filters: list[str]) -> bool:
    wanted = (part.partition("=")[::2] for part in filters)
    return all(str(getattr(case, field)) in values.split(",") for field, values in wanted)


def _by_stack(case: Case) -> tuple:
    # Cases that share their adapters follow one another: making those takes seconds.
    return (case.dtype, case.K, case.R, case.I, case.O, case.direction, case.workload, case.N)


class _Countdown:
    """Time left, from estimates corrected by the time that was really taken."""

    def __init__(self, estimates: list[float]):
        self._estimates, self._done, self._start = estimates, 0, time.monotonic()

    def __str__(self) -> str:
        return f"about {_span(sum(self._estimates))} in all"

    def tick(self) -> None:
        self._done += 1
        spent, expected = time.monotonic() - self._start, sum(self._estimates[: self._done])
        left = sum(self._estimates[self._done :]) * spent / max(expected, 1e-9)
        if sys.stderr.isatty():
            text = f"[{self._done}/{len(self._estimates)}] about {_span(left)} left"
            print(f"\r{text:40s}", end="\r", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if sys.stderr.isatty():
            print(f"\r{'':40s}", end="\r", file=sys.stderr, flush=True)


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; cases measured so far are in the --csv", file=sys.stderr)
        sys.exit(130)
