"""stacked_svd against torch, scikit-learn and Gram + eigh: time at equal excess error.

    python -m benchmarks.run stacked_svd --clock cpu --csv benchmarks/results/stacked_svd.csv

excess = ||M - u diag(s) vh|| / ||M - M_R|| - 1, M_R the best of rank R (float64). Each contender is
timed at the fastest setting of its own knobs whose excess is at most 0.35 % (the worst member's of
a batch, 28 of 448 judged); the rows name it. On a flat spectrum any R directions have a small
excess: "held" is what they capture, sum ||M v_j||^2, relative to the R best, and "weakest" the
least of ||M v_j||^2 / sigma_j^2.

In the rows N is the rows T of a stack, K the stacks of a batch, R the rank (0: asked by energy),
max_error the excess. Works "chunks" and "energy" have ours alone: max_error is there the distance
from the result in memory relative to ||M||, and the components more or fewer than needed. Memory is
the peak in a fresh process (VmHWM, Linux) over what was resident with the input; blocks of 256 KiB
and more go back to the system when freed, so that it is of what is held, not of holes.
"""

import argparse
import functools
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine, memory, table
from benchmarks.harness import CLOCKS, Case, Result
from benchmarks.peers import svd
from lora_fused.io import read_adapter
from lora_fused.ops import stacked_svd

OP = "stacked_svd"
LIMIT = 0.0035
SLOW = 8.0  # seconds: from there on the run that settled the setting is the only one
CHUNKS = 100
SEEDS, ENERGY, RANKS_OFF = 20, 0.95, 2
ROUNDING = 1e-5  # of a float32 result, relative to ||M||: chunks must not cost more
DATA = Path(os.environ.get("LORA_FUSED_DATA", machine.ROOT.parent / "shared" / "data"))
FAMILIES = {"distilbert": ("distilbert-base", 768), "vit": ("vit-base", 768), "gemma": ("gemma", 0)}

LARGE = Case(OP, "rank", "decaying", N=8000, K=1, J=1, R=64, I=4096, O=0)
MODEL = replace(LARGE, N=320, K=448, R=32, I=2048)
JUDGED = 28  # members of a batch that are judged, evenly spread
# A full SVD of the largest inputs takes a minute, as long on any values: raced once for each size.
FULL_SVD, FULL_SIZE = ("linalg_svd", "linalg_svd_f32copy", "exact"), 1 << 24
WORKS = [
    LARGE,
    replace(LARGE, dtype="bfloat16"),
    MODEL,
    replace(LARGE, direction="chunks"),
    replace(LARGE, workload="flat"),
    replace(MODEL, workload="flat"),
    Case(OP, "energy", "decaying", N=2000, K=1, J=1, R=0, I=1000, O=0),
]
_SMALL, _BATCH = {"N": 600, "I": 256, "R": 16}, {"N": 80, "K": 12, "I": 160, "R": 8}
QUICK = [replace(c, **(_SMALL if c.K == 1 else _BATCH)) for c in WORKS[:-1]]
QUICK += [replace(WORKS[-1], N=300, I=200)]


@dataclass(frozen=True)
class Verdict:
    """What a result is worth; for a batch, its worst member."""

    excess: float
    held: float
    weakest: float

    def __str__(self) -> str:
        return f"held {self.held:.4f} weakest {self.weakest:.3f}"


class Problem:
    """A matrix or a batch with the facts that a result is judged by, in float64."""

    def __init__(self, x: Tensor, rank: int):
        self.x, self.rank = x, rank
        self.step = max(len(x) // JUDGED, 1) if x.dim() == 3 else 1
        self.members = list(x[:: self.step]) if x.dim() == 3 else [x]
        squares = [torch.linalg.eigvalsh(_gram64(m)).flip(-1) for m in self.members]
        self.top = [s[:rank].clamp_min(0) for s in squares]
        self.rest = [s[rank:].clamp_min(0).sum() for s in squares]

    def judge(self, found: svd.Factors) -> Verdict:
        parts = [found]
        if self.x.dim() == 3:
            parts = zip(*(t[:: self.step] for t in found), strict=True)
        each = [self._judge(i, *part) for i, part in enumerate(parts)]
        worst = [max(e.excess for e in each), min(e.held for e in each)]
        return Verdict(*worst, min(e.weakest for e in each))

    def _judge(self, i: int, u: Tensor, s: Tensor, vh: Tensor) -> Verdict:
        left, right = u.double() * s.double(), vh.double()
        captured = torch.zeros(self.rank, dtype=torch.float64)
        crossed = 0.0
        for at in _row_blocks(self.members[i]):
            y = self.members[i][at].double() @ right.mT
            captured += y.square().sum(0)
            crossed += float((left[at] * y).sum())
        # ||M - left right||^2, of which float64 loses a part in 1e13.
        found = float(((left.mT @ left) * (right @ right.mT)).sum())
        error = float(self.top[i].sum() + self.rest[i]) - 2 * crossed + found
        excess = (error / float(self.rest[i])) ** 0.5 - 1
        shares = captured / self.top[i]
        return Verdict(excess, float(captured.sum() / self.top[i].sum()), float(shares.min()))


def matrix(case: Case) -> Tensor:
    """The input of a case: [T, I], or [L, T, I] for a batch."""
    family, _, side = case.workload.partition("-")
    if family in FAMILIES:
        return real_stack(family, side)
    generator = torch.Generator().manual_seed(0)
    size = (case.K, case.N, case.I)
    if case.workload == "flat":
        x = torch.randn(size, generator=generator)
    else:
        x = torch.stack([_decaying(case.N, case.I, generator) for _ in range(case.K)])
    return (x if case.K > 1 else x[0]).to(getattr(torch, case.dtype))


def real_stack(family: str, side: str) -> Tensor:
    """The rows of lora_a, or of lora_b, of all public adapters of a base model."""
    base, width = FAMILIES[family]
    rows = []
    for config in sorted((DATA / "adapters").rglob("adapter_config.json")):
        if base not in str(json.loads(config.read_text()).get("base_model_name_or_path")):
            continue
        try:
            modules = read_adapter(config.parent).modules.values()
        except (ValueError, OSError):  # odd ones, which are there for other tests
            continue
        rows += [(m.lora_a if side == "a" else m.lora_b).float() for m in modules]
    widths = [width] if width else sorted({r.shape[1] for r in rows})
    total = {w: sum(len(r) for r in rows if r.shape[1] == w) for w in widths}
    width = max(total, key=total.get)
    x = torch.cat([r for r in rows if r.shape[1] == width])
    return x[torch.linalg.vector_norm(x, dim=1) > 0]


def real_cases() -> list[Case]:
    found = []
    for workload in (f"{family}-{side}" for family in FAMILIES for side in "ab"):
        rows, columns = real_stack(*workload.split("-")).shape
        found.append(replace(LARGE, workload=workload, N=rows, I=columns))
    return found


def settle(contender: svd.Contender, problem: Problem, now: Callable[[], float]):
    """The fastest good setting: (result with one time, setting or None where there is none)."""
    result = Result(contender.name, contender.ours)
    if contender.missing:
        result.status, result.reason = "skipped", contender.missing
        return result, None
    passed, closest, x = [], None, contender.prepare(problem.x)
    for ladder in contender.ladders:
        for setting in ladder:
            start = now()
            try:
                found = contender.solve(x, problem.rank, **setting)
            except (RuntimeError, TypeError) as error:
                if contender.ours:
                    raise
                result.status = "skipped"
                result.reason = f"refused: {str(error).splitlines()[0]}"
                return result, None
            took, verdict = now() - start, problem.judge(found)
            closest = min(closest or verdict, verdict, key=lambda v: v.excess)
            if verdict.excess <= LIMIT:
                passed.append((took, setting, verdict))
            if passed and took >= min(p[0] for p in passed):
                break  # the rest of this ladder takes longer still
    if not passed:
        # A named method may be unfit for a spectrum; what auto picks may not.
        result.status = "wrong" if contender.name == "auto" else "missed"
        result.max_error, result.reason = closest.excess, f"excess {closest.excess:.2%} at best"
        return result, None
    took, setting, verdict = min(passed, key=lambda p: p[0])
    result.seconds.append(took)
    result.max_error = verdict.excess
    result.reason = "; ".join([*(f"{k}={v}" for k, v in setting.items()), str(verdict)])
    return result, setting


def race(case: Case, x: Tensor, options) -> list[Result]:
    """Settle everyone's setting, then time them in turns; memory in processes of their own."""
    now, problem = CLOCKS[options.clock], Problem(x, case.R)
    oversampling = (10,) if options.quick else (10, 0) if x.dim() == 3 else (10, 0, 32, 64, 96)
    results, runs = [], []
    for contender in svd.contenders(x.dim() == 3, case.dtype, oversampling):
        if options.impl and contender.name not in options.impl:
            continue
        raced = contender.name == "linalg_svd" and case in (LARGE, MODEL)
        if contender.name in FULL_SVD and x.numel() >= FULL_SIZE and not raced:
            contender = replace(contender, missing="a full SVD: see linalg_svd on decaying")
        result, setting = settle(contender, problem, now)
        results.append(result)
        if setting is None:
            continue
        if options.memory and result.seconds[0] < SLOW:
            result.memory = peak(case, contender.name, setting)
        if result.seconds[0] < SLOW:
            result.seconds.clear()
            run = functools.partial(contender.solve, contender.prepare(x), case.R, **setting)
            runs.append((result, run))
    chance = random.Random(0)
    for _ in range(options.rounds):
        for result, run in chance.sample(runs, len(runs)):
            start = now()
            run()
            result.seconds.append(now() - start)
    return results


class MadeAnew:
    """Chunks of a decaying stack that are made at each iteration, as if read from files."""

    def __init__(self, count: int, rows: int, columns: int):
        self.count, self.size = count, (rows, columns)
        self.scale = torch.arange(1, columns + 1) ** -1.0

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(self.count):
            generator = torch.Generator().manual_seed(i)
            yield torch.randn(self.size, generator=generator) * self.scale


def race_chunks(case: Case, x: Tensor, options) -> list[Result]:
    """The same stack in memory and in chunks; memory of chunks that are made as they are read."""
    now, results = CLOCKS[options.clock], []
    for method in ("krylov", "randomized", "gram"):
        forms = {method: x, f"{method}_chunks": list(x.chunk(CHUNKS))}
        found = {name: stacked_svd(f, rank=case.R, method=method) for name, f in forms.items()}
        whole, cut = (f.u.double() * f.s.double() @ f.vh.double() for f in found.values())
        mine = [Result(name, ours=name != method) for name in forms]  # in memory: the baseline
        mine[0].max_error, mine[1].max_error = 0.0, float((whole - cut).norm() / x.norm())
        if mine[1].max_error > ROUNDING:
            mine[1].status, mine[1].reason = "wrong", "differs from the result in memory"
        for _ in range(options.rounds):
            for result, form in zip(mine, forms.values(), strict=True):
                start = now()
                stacked_svd(form, rank=case.R, method=method)
                result.seconds.append(now() - start)
        if options.memory:
            for result, count in zip(mine, (CHUNKS // 4, CHUNKS), strict=True):
                result.memory = peak(case, method, {"count": count})
            mine[0].reason = f"memory: of {CHUNKS // 4} chunks, a quarter of the rows"
        results += mine
    return results


def race_energy(case: Case, _: Tensor, options) -> list[Result]:
    """Ranks that hold 95 % of the energy, for many seeds, beside those that are needed."""
    now, results = CLOCKS[options.clock], [Result(m, ours=True) for m in svd.METHODS]
    needed, off = [], {r.name: [] for r in results}
    for seed in range(3 if options.quick else SEEDS):
        generator = torch.Generator().manual_seed(seed)
        x = _decaying(case.N, case.I, generator, power=0.5 + 0.05 * seed)
        held = torch.linalg.eigvalsh(_gram64(x)).flip(-1).cumsum(0)
        needed.append(int((held < ENERGY * held[-1]).sum()) + 1)
        for result in random.Random(seed).sample(results, len(results)):
            start = now()
            found = stacked_svd(x, energy=ENERGY, method=result.name, generator=generator)
            result.seconds.append(now() - start)
            off[result.name].append(len(found.s) - needed[-1])
    for result in results:
        result.max_error = max(map(abs, off[result.name]))
        result.reason = (
            f"{len(needed)} seeds, ranks {min(needed)} to {max(needed)} needed; "
            f"found {min(off[result.name]):+d} to {max(off[result.name]):+d}"
        )
        if result.max_error > RANKS_OFF:
            result.status = "wrong" if result.name == "auto" else "missed"
    return results


RACES = {"rank": race, "chunks": race_chunks, "energy": race_energy}


def peak(case: Case, name: str, setting: dict) -> int:
    """Peak bytes beside the input, of one contender at one setting, in a fresh process."""
    asked = json.dumps([vars(case), name, setting])
    command = [sys.executable, "-m", "benchmarks.bench_stacked_svd", "--peak", asked]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}  # no holes of freed chunks
    done = subprocess.run(command, cwd=machine.ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case}: memory of {name}: {done.stderr}")
    return int(done.stdout.splitlines()[-1])


def _peak_here(asked: str) -> int:
    fields, name, setting = json.loads(asked)
    case = Case(**fields)
    if "count" in setting:
        x, solve, setting = MadeAnew(setting["count"], case.N // CHUNKS, case.I), svd.ours(name), {}
    else:
        # The values do not matter for memory at a given setting, and these take no time.
        x = matrix(case if "-" in case.workload else replace(case, workload="flat"))
        all_of_them = svd.contenders(x.dim() == 3, case.dtype, (10,))
        solve, prepare = next((c.solve, c.prepare) for c in all_of_them if c.name == name)
        x = prepare(x)
    tiny = torch.randn(64, 32)
    # Libraries load and buffers are made at the first call; they are no part of the work's memory.
    solve(tiny.expand(2, 64, 32) if case.K > 1 else tiny, 4, **_clamped(setting))
    return memory.extra(lambda: solve(x, case.R, **setting))


def words(case: Case) -> set[str]:
    """What --only may name: rank, flat, N8000, bfloat16 and so on."""
    return set(str(case).split())


def _clamped(setting: dict) -> dict:
    return {name: min(value, 8) for name, value in setting.items()}


def _decaying(rows: int, columns: int, generator, power: float = 1.0) -> Tensor:
    """Singular values j^-power between two orthogonal matrices that take n log n to apply."""
    x = torch.zeros(rows, columns)
    x.diagonal().copy_(torch.arange(1, min(rows, columns) + 1) ** -power)
    for dim, size in ((0, rows), (1, columns)):
        for _ in range(2):
            signs = torch.randint(2, (size,), generator=generator) * 2.0 - 1
            x = x * (signs[:, None] if dim == 0 else signs)
            f = torch.fft.fft(x, dim=dim, norm="ortho")
            x = f.real - f.imag  # Hartley's transform is its own inverse
    return x.contiguous()


def _row_blocks(m: Tensor) -> Iterator[slice]:
    for t in range(0, len(m), 1000):
        yield slice(t, t + 1000)


def _gram64(m: Tensor) -> Tensor:
    m = m if len(m) >= m.shape[1] else m.mT
    found = torch.zeros(m.shape[1], m.shape[1], dtype=torch.float64)
    for at in _row_blocks(m):
        part = m[at].double()
        found.addmm_(part.mT, part)
    return found


def _print(case: Case, results: list[Result]) -> None:
    best = min((r.quantile(0.5) for r in results if r.seconds and not r.ours), default=None)
    for result in sorted(results, key=lambda r: r.quantile(0.5) if r.seconds else 1e9):
        name = f"* {result.name}" if result.ours else f"  {result.name}"
        if not result.seconds:
            print(f"  {name:28s} {result.status}: {result.reason}", flush=True)
            continue
        p50 = result.quantile(0.5)
        ratio = f"{best / p50:6.2f}x" if best else ""
        mib = f"{result.memory / 2**20:8.1f} MiB" if result.memory else ""
        text = f"error {result.max_error:.2e} {mib} {result.reason}"
        flag = "" if result.status == "timed" else f" {result.status.upper()}"
        print(f"  {name:28s} {p50 * 1e3:10.1f} ms {ratio:>8s}  {text}{flag}", flush=True)


def _run(case: Case, options, rates, results: table.Table | None) -> list[str]:
    x = matrix(case) if case.R else torch.empty(0)
    start = time.perf_counter()
    raced = RACES[case.direction](case, x, options)
    print(f"{case} ({time.perf_counter() - start:.0f} s, input {x.nbytes / 2**20:.0f} MiB)")
    _print(case, raced)
    wrong = [f"{case}: {r.name}: {r.reason}" for r in raced if r.status == "wrong"]
    if results is not None and not wrong:
        # The least that a rank needs: a sketch and a projection, the input read once.
        flops = 4.0 * case.K * case.N * case.I * max(case.R, 1)
        traffic = float(case.K * case.N * case.I * getattr(torch, case.dtype).itemsize)
        facts = {"flops": flops, "traffic": traffic, "clock": options.clock}
        floor = rates.floor(flops, traffic, case.dtype)
        results.put(case, table.rows_of(case, raced, floor=floor, **facts))
    return wrong


def main(argv: list[str] | None = None) -> int:
    options = _parse(argv)
    if options.peak:
        with _one_thread():
            print(_peak_here(options.peak))
        return 0
    options.memory = options.memory and not options.quick and not memory.missing()
    options.rounds = 2 if options.quick else options.rounds
    results = table.Table(options.csv) if options.csv else None
    works = QUICK if options.quick else WORKS
    if (DATA / "adapters").is_dir():
        works = works + (real_cases()[:1] if options.quick else real_cases())
    else:
        print(f"real adapters: skipped, {DATA / 'adapters'} is absent")
    print(f"{machine.cpu_model()}, commit {machine.commit()}, torch {torch.__version__}")
    print(f"one thread, {options.clock} clock, excess at most {LIMIT:.2%}; * ours")
    wrong = []
    with _one_thread():
        rates = machine.Rates()
        for case in works:
            if not options.only or any(set(w.split(",")) <= words(case) for w in options.only):
                wrong += _run(case, options, rates, results)
    for fault in wrong:
        print(f"NOT RECORDED {fault}", file=sys.stderr)
    return 1 if wrong else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run stacked_svd")
    parser.add_argument("--quick", action="store_true", help="small stacks, under a minute")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD[,WORD]", help="such as chunks flat,K448"
    )
    parser.add_argument("--impl", nargs="+", help="which contenders to race; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: on a busy machine")
    parser.add_argument("--csv", type=Path, help="where rows go; nothing is written without it")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _one_thread() -> AbstractContextManager:
    """Torch's threads and, where scikit-learn brought the means, those of numpy's BLAS."""
    torch.set_num_threads(1)
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return nullcontext()
    import numpy  # noqa: F401  (the limit holds for what is loaded)
    import scipy.linalg  # noqa: F401

    return threadpool_limits(1)


if __name__ == "__main__":
    sys.exit(main())
