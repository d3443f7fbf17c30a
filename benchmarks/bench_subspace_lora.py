"""subspace_lora against torch in the same basis, and beside mixture_lora on adapters written out.

A workload is "<form>-<popularity>": pairs of rank R, diagonal or full cores in a basis of P = 128
directions on both sides. What a batch costs must not grow with the number of adapters in it:
compare "distinct" with "identical". Form "written" is the function of "pairs" without the basis:
mixture_lora on the adapters written out (lora_a @ basis_a, lora_b @ basis_b). It is a case of its
own: its floor is another, and what it reads would drive the cores of "pairs" from the caches
between turns. The update alone is timed.
"""

import functools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.harness import MEMORY_LIMIT, Case, Competitor, Gate, Problem
from lora_fused.backends import ERRORS
from lora_fused.ops import PairCores, mixture_lora, subspace_lora
from lora_fused.testing import make_stack, sample_ids

OP = "subspace_lora"
OURS = ("native", "reference")
P = 128
FORMS = ("diagonal", "pairs", "full")
WRITTEN = "written"

MIDDLE = Case(OP, "forward", "pairs-distinct", N=256, K=1000, J=1, R=16, I=2048, O=2048)
CHOSEN = [
    replace(MIDDLE, workload=f"{form}-{popularity}", J=per_row)
    for form in FORMS
    for popularity, per_row in (("distinct", 1), ("identical", 1), ("distinct", 4))
]
CHOSEN.append(replace(MIDDLE, workload=f"{WRITTEN}-distinct", J=4))
GRID = [
    replace(case, N=n, I=h, O=h, dtype=dtype)
    for case in CHOSEN
    for n in (1, 32, 256, 1024)
    for h in (1024, 2048, 4096)
    for dtype in ("float32", "bfloat16")
]
SMOKE = [
    replace(MIDDLE, workload=f"{form}-distinct", N=8, K=8, J=2, R=4, I=64, O=96) for form in FORMS
]
SELECTIONS = {"grid": GRID, "chosen": CHOSEN, "smoke": SMOKE}


def inputs(case: Case) -> dict:
    """The arguments of subspace_lora; x, z and the update are O(1)."""
    form, popularity = case.workload.split("-")
    dtype = getattr(torch, case.dtype)
    g = torch.Generator().manual_seed(case.N)
    ids = sample_ids(popularity, case.N, case.J, case.K, seed=case.N)
    return {
        "x": torch.randn(case.N, case.I, generator=g).to(dtype),
        "basis_a": (torch.randn(P, case.I, generator=g) * case.I**-0.5).to(dtype),
        "basis_b": (torch.randn(P, case.O, generator=g) * P**-0.5).to(dtype),
        "cores": _cores(form, case.K, case.R, dtype),
        "adapter_ids": ids,
        "weights": (1 + torch.rand(ids.shape, generator=g)) / case.J,
    }


def flops(case: Case) -> float:
    """Two products with a basis a row, and J cores between them."""
    return 2.0 * case.N * (_directions(case) * (case.I + case.O) + case.J * _core_values(case))


def traffic(case: Case) -> float:
    """Bytes read and written at least once: rows, both bases, the cores in use."""
    size = getattr(torch, case.dtype).itemsize
    used = 1 if case.workload.endswith("identical") else min(case.N * case.J, case.K)
    values = (case.N + _directions(case)) * (case.I + case.O) + used * _core_values(case)
    return float(values * size)


def oversized(case: Case) -> str:
    """Why the case is not tried; "" where it is."""
    written_out = case.K * case.R * (case.I + case.O) * getattr(torch, case.dtype).itemsize
    return "" if written_out <= MEMORY_LIMIT else "adapters written out take more than 2 GiB"


def problem(case: Case, ours: tuple[str, ...] = OURS) -> Problem:
    """The race of a case: our usable implementations, and torch in the basis."""
    given = inputs(case)
    build = _written_out if _written(case) else _ours
    usable = [name for name in ours if ERRORS[name] is None]
    entrants = {name: functools.partial(build, given, name) for name in usable}
    if not _written(case):
        entrants["torch_gather"] = functools.partial(_gather, given, given["x"].dtype)
    return Problem(
        [Competitor(name, build, name in ours) for name, build in entrants.items()],
        truth=_gather(given, torch.float64),
        rounded=_gather(given, torch.float32, given["x"].dtype),
    )


@functools.lru_cache(maxsize=2)
def _cores(form: str, adapters: int, rank: int, dtype: torch.dtype) -> PairCores | Tensor:
    g = torch.Generator().manual_seed(1)
    if form == "diagonal":
        return torch.randn(adapters, P, generator=g).to(dtype)
    if form == "full":
        return (torch.randn(adapters, P, P, generator=g) * P**-0.5).to(dtype)
    stack = make_stack([rank] * adapters, P, P, dtype=dtype)
    return PairCores(stack.lora_a, stack.lora_b, stack.row_start)


def _written(case: Case) -> bool:
    return case.workload.startswith(WRITTEN)


def _directions(case: Case) -> int:
    return 0 if _written(case) else P


def _core_values(case: Case) -> int:
    written = case.R * (case.I + case.O)
    return {"d": P, "p": 2 * case.R * P, "f": P * P, "w": written}[case.workload[0]]


def _ours(given: dict, name: str):
    cores = given["cores"]
    rank = int(cores.row_start[1]) if isinstance(cores, PairCores) else None
    return lambda: (subspace_lora(**given, max_rank=rank, impl=name),)


def _gather(given: dict, dtype: torch.dtype, round_to: torch.dtype | None = None):
    # Two products with the bases, and between them the cores of every row gathered.
    x, basis_a, basis_b = (given[k].to(dtype) for k in ("x", "basis_a", "basis_b"))
    cores, ids, weights = given["cores"], given["adapter_ids"].long(), given["weights"].to(dtype)
    pairs = isinstance(cores, PairCores)
    rank = int(cores.row_start[1]) if pairs else 0
    tables = [t.unflatten(0, (-1, rank)) for t in cores[:2]] if pairs else [cores]

    def run() -> tuple[Tensor]:
        z = x @ basis_a.T
        if pairs:
            a, b = (t[ids].flatten(1, 2).to(dtype) for t in tables)
            h = torch.bmm(a, z[..., None])[..., 0] * weights.repeat_interleave(rank, 1)
            t = torch.bmm(h[:, None], b)[:, 0]
        else:
            core = tables[0][ids].to(dtype)
            mixed = torch.einsum("nj,nj...->n...", weights, core)
            t = z * mixed if mixed.dim() == 2 else torch.bmm(mixed, z[..., None])[..., 0]
        y = t @ basis_b
        return (y if round_to is None else y.to(round_to),)

    return run


def _written_out(given: dict, name: str):
    cores = given["cores"]
    lora_a = (cores.lora_a.float() @ given["basis_a"].float()).to(given["x"].dtype)
    lora_b = (cores.lora_b.float() @ given["basis_b"].float()).to(given["x"].dtype)
    route = (cores.row_start, given["adapter_ids"], given["weights"])
    return lambda: (mixture_lora(given["x"], lora_a, lora_b, *route, impl=name),)


@pytest.mark.parametrize("case", CHOSEN, ids=str)
@pytest.mark.parametrize("impl", ["native", "torch_gather"])
def test_subspace_lora(benchmark, case, impl):
    if impl == "native" and ERRORS["native"] is not None:
        pytest.skip(ERRORS["native"])
    entry = problem(case, ("native",))
    builds = {c.name: c.build for c in entry.competitors}
    if impl not in builds:
        pytest.skip(f"{impl} does not race {case.workload}")
    run = builds[impl]()
    _, fault = Gate(entry.truth(), entry.rounded()).check(run(), impl == "native")
    assert not fault
    benchmark.group, benchmark.extra_info["form"] = str(case), impl
    benchmark(run)
