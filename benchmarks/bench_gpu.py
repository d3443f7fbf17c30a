"""mixture_lora on a GPU against vLLM's, SGLang's and FlashInfer's kernels: `make bench-gpu`.

    python -m benchmarks.bench_gpu --csv benchmarks/results/gpu.csv

Every contender is held to float64 before it is timed, on the update alone (a base would hide it).
Peers that know one adapter per row are timed with all of their J calls. Two clocks: do_bench, which
empties the L2 cache before every run and sees launches wait for the host, and cudagraph, which does
neither. Beside them, as floors: two cuBLAS products where all rows share one adapter (or one
mixture), and a copy of the compulsory bytes, which the column "x floor" is counted in.

Without a GPU it says so and measures nothing.
"""

import argparse
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from benchmarks import machine, run, table
from benchmarks.harness import Case, Gate, Result
from lora_fused.backends import ERRORS, INTERPRETING

ROUNDS = 3  # turns that each contender gets at each clock
# Rows of ours under a variable that is read at import: each takes a process of its own.
VARIANTS = {
    "triton_batch_invariant": "LORA_FUSED_BATCH_INVARIANT",
    "triton_pdl": "LORA_FUSED_PDL",
}
OURS = ("triton", "triton_plan_inside", *VARIANTS)

Timer = Callable[[Callable[[], object]], list[float]]  # seconds of each run
Raced = dict[str, list[Result]]  # by clock


def _do_bench(call: Callable[[], object]) -> list[float]:
    from triton import testing

    return [ms / 1e3 for ms in testing.do_bench(call, return_mode="all")]


def _cudagraph(call: Callable[[], object]) -> list[float]:
    from triton import testing

    return [ms / 1e3 for ms in testing.do_bench_cudagraph(call, return_mode="all")]


TIMERS: dict[str, Timer] = {"do_bench": _do_bench, "cudagraph": _cudagraph}


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    reason = why_not()
    if reason is not None:
        print(f"bench-gpu: skipped, {reason}")
        return 0
    return bench(options, torch.device("cuda"), TIMERS)


def why_not() -> str | None:
    """Why nothing can be measured here; None where it can."""
    if not torch.cuda.is_available():
        return ERRORS["triton"] or "no CUDA device"
    if INTERPRETING:
        return "TRITON_INTERPRET=1 interprets the kernels; unset it"
    return ERRORS["triton"]


def bench(
    options: argparse.Namespace,
    device: torch.device,
    timers: Mapping[str, Timer],
    elsewhere: Callable[[str, argparse.Namespace], dict[str, Raced]] | None = None,
) -> int:
    """Race the chosen works; 1 where one of ours is wrong, else 0.

    Args:
        options: of the command line.
        device: where the tensors lie; on the CPU the kernels are interpreted, for tests.
        timers: clocks by name.
        elsewhere: runs one of VARIANTS; its results by work. Default: in a process of its own.
    """
    os.environ.setdefault("TRITON_INTERPRET", "0")  # benchmarks.traffic wants it to be 1
    from benchmarks.gpu import contenders as field

    works = _chosen(field.WORKS, options.work)
    if options.results:
        own = {"triton": field.ours()["triton"]}
        found = {name: _race(field, work, own, device, timers) for name, work in works.items()}
        options.results.write_text(json.dumps(found, default=dataclasses.asdict))
        return 0
    peers, reasons = field.peers(download=not options.offline)
    variants = [(elsewhere or _in_fresh_process)(name, options) for name in VARIANTS]
    results = table.Table(options.csv) if options.csv else None
    print(f"{device_name(device)}, commit {machine.commit()}, torch {torch.__version__}")
    print(*(f"skipped {reason}" for reason in reasons), sep="\n", end="\n" * bool(reasons))
    wrong = 0
    for name, work in works.items():
        raced = _race(field, work, field.ours() | peers, device, timers)
        for variant in variants:
            for clock, more in variant.get(name, {}).items():
                raced[clock] += more
        try:
            rows = _report(field, work, raced, device, timers)
        except table.WrongResult as error:
            print(f"NOT RECORDED {error}", file=sys.stderr)
            wrong += 1
            continue
        if results is not None:
            results.put(case_of(work), rows)
    return 1 if wrong else 0


def case_of(work) -> Case:
    sizes = {letter: getattr(work, letter) for letter in "NKJRIO"}
    return Case("mixture_lora", "forward", work.name, **sizes, dtype="bfloat16")


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, interpreted"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_gpu", description=__doc__)
    parser.add_argument("--work", action="append", help="only this work; repeatable")
    parser.add_argument("--csv", type=Path, help="where rows go; nothing is written without it")
    parser.add_argument("--offline", action="store_true", help="download no wheels of peers")
    parser.add_argument("--results", type=Path, help=argparse.SUPPRESS)  # of a second process
    return parser.parse_args(argv)


def _chosen(works: list, names: list[str] | None) -> dict:
    known = {work.name: work for work in works}
    for name in names or ():
        if name not in known:
            raise SystemExit(f"bench-gpu: --work must be one of {', '.join(known)}, got {name!r}")
    return {name: known[name] for name in names or known}


@torch.no_grad()
def _race(field, work, contenders: Mapping, device, timers: Mapping[str, Timer]) -> Raced:
    # Results of all contenders at each clock. The gate sees a base of zero, the clocks a real one.
    problem = field.works.Problem(work)
    bare = field.moved(problem, device, with_base=False)
    gate = Gate((bare.truth(),), (field.rounded(bare),))
    problem = field.moved(problem, device)
    admitted, calls = [], {}
    for name, build in contenders.items():
        result = Result(name, name in OURS)
        try:
            result.max_error, fault = gate.check((build(bare)(),), result.ours)
            if fault:
                result.status, result.reason = "wrong", fault
            else:
                calls[name] = build(problem)
        except Exception as error:  # third-party kernels fail in ways of their own
            result.status = "wrong" if result.ours else "skipped"
            result.reason = _first_line(error)
        admitted.append(result)
    return {clock: _time(admitted, calls, timer) for clock, timer in timers.items()}


def _time(admitted: list[Result], calls: Mapping, timer: Timer) -> list[Result]:
    # In turns, in an order that changes, so that the GPU's clock drifts for all alike.
    results = [dataclasses.replace(result, seconds=[]) for result in admitted]
    entrants, chance = [r for r in results if r.status == "timed"], random.Random(0)
    for _ in range(ROUNDS):
        for result in chance.sample(entrants, len(entrants)):
            if result.status != "timed":
                continue
            try:
                result.seconds += timer(calls[result.name])
            except Exception as error:  # such as one that cannot be captured in a graph
                result.status, result.reason, result.seconds = "skipped", _first_line(error), []
    return results


def _report(field, work, raced: Raced, device, timers: Mapping[str, Timer]) -> list[dict]:
    # Print the work's tables and return its rows; WrongResult where one of ours is wrong.
    problem = field.moved(field.works.Problem(work), device)
    floors, case = {floor.name: floor for floor in field.floors(problem)}, case_of(work)
    facts = {"flops": 2 * work.N * work.J * work.R * (work.I + work.O)}
    facts["traffic"] = field.compulsory(problem)
    here = {"device": device_name(device), "isa": _isa(device)}
    rows = []
    for clock, results in raced.items():
        calls = {name: floor.run for name, floor in floors.items()}
        below = _time([Result(name, False) for name in floors], calls, timers[clock])
        bound = below[-1].quantile(0.5)  # the copy
        new = table.rows_of(case, results, **facts, floor=bound, clock=clock)
        print(f"\n{clock}: the copy moves {facts['traffic'] / bound / 1e9:.0f} GB/s")
        print(run.COLUMNS.format(*run.HEADER))
        run._print(case, results, bound)
        for result in below:
            floor = floors[result.name]
            times = [result.quantile(q) for q in (0.5, 0.2, 0.8)]
            shown = (*(f"{t * 1e3:.4g}" for t in times), "", f"{times[0] / bound:.1f}")
            print(run.COLUMNS.format("", f"floor: {floor.name}", *shown), flush=True)
            own = {"flops": floor.flops, "traffic": floor.traffic, "floor": bound, "clock": clock}
            # No baseline: these do less than the case asks for, or none of it.
            (row,) = table.rows_of(case, [result], **own)
            new.append(row | {"baseline": "", "speedup": ""})
        rows += [row | here for row in new]
    return rows


def _in_fresh_process(name: str, options: argparse.Namespace) -> dict[str, Raced]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        command = [sys.executable, "-m", "benchmarks.bench_gpu", "--results", str(path)]
        command += [part for work in options.work or () for part in ("--work", work)]
        done = subprocess.run(command, env=os.environ | {VARIANTS[name]: "1"}, cwd=machine.ROOT)
        if done.returncode != 0:
            print(f"skipped {name}: its process ended with {done.returncode}")
            return {}
        return read_results(path, name)


def read_results(path: Path, name: str) -> dict[str, Raced]:
    """What a run with --results wrote, under the name of their own row."""
    renamed = {"name": name}
    return {
        work: {clock: [Result(**r | renamed) for r in results] for clock, results in raced.items()}
        for work, raced in json.loads(path.read_text()).items()
    }


def _first_line(error: Exception) -> str:
    lines = [*str(error).strip().splitlines(), ""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def _isa(device: torch.device) -> str:
    if device.type != "cuda":
        return machine.torch_isa()
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


if __name__ == "__main__":
    sys.exit(main())
