"""mixture_lora against the forms in peers/torch_forms.py, on packed stacks of one rank.

The grid is N x H x R x K x J with I = O = H, workload uniform, float32, forward; beside it the
other workloads, gradients, and low precision at the middle of the grid. Workload "identical" is one
mixture that all rows share (M = 1). The update alone is timed, without a base.
"""

import functools
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from benchmarks.harness import MEMORY_LIMIT, Case, Competitor, Gate, Problem
from benchmarks.peers import torch_forms
from lora_fused.backends import ERRORS
from lora_fused.ops import mixture_lora
from lora_fused.testing import make_stack, sample_ids

OP = "mixture_lora"
OURS = ("native", "reference")
ROW_MV_PAIRS = 256  # beyond, a product per row and adapter is far behind and slow to time

MIDDLE = Case(OP, "forward", "uniform", N=32, K=64, J=4, R=16, I=2048, O=2048)
GRID = [
    replace(MIDDLE, N=n, K=k, J=j, R=r, I=h, O=h)
    for k, r, h, n, j in product(
        (4, 64, 512), (8, 16, 64), (1024, 2048, 4096), (1, 8, 32, 128, 512), (1, 4, 8)
    )
]
WORKLOADS = [
    replace(MIDDLE, N=n, workload=workload)
    for n, workload in product((32, 512), ("identical", "distinct", "zipf", "skewed"))
]
BACKWARD = [
    replace(MIDDLE, direction="backward", N=n, workload=workload)
    for n, workload in product((8, 32, 512), ("uniform", "identical"))
]
LOW_PRECISION = [
    replace(MIDDLE, N=n, workload=workload, dtype=dtype)
    for dtype, (n, workload) in product(
        ("bfloat16", "float16"),
        [*((n, "uniform") for n in (1, 8, 32, 128, 512)), (512, "identical")],
    )
]
# The rows of the README, each with the torch form that was fastest when they were chosen.
CHOSEN = {
    replace(MIDDLE, N=1): "row_mv",
    replace(MIDDLE, N=8): "segments_bag",
    MIDDLE: "segments",
    replace(MIDDLE, N=128): "segments",
    replace(MIDDLE, N=512): "masked_loop",
    replace(MIDDLE, J=1): "segments_bag",
    replace(MIDDLE, K=512, I=4096, O=4096): "row_mv",
    replace(MIDDLE, N=128, K=4): "dense_active",
    replace(MIDDLE, N=512, workload="identical"): "dense_active",
    replace(MIDDLE, dtype="bfloat16"): "segments_f32copy",
    replace(MIDDLE, N=512, dtype="bfloat16"): "dense_active",
    replace(MIDDLE, direction="backward"): "dense_active",
}
_SMALL = replace(MIDDLE, N=8, K=8, R=4, I=64, O=96)
SMOKE = [
    _SMALL,
    replace(_SMALL, N=1, J=1),
    replace(_SMALL, workload="identical"),
    replace(_SMALL, direction="backward"),
    replace(_SMALL, dtype="bfloat16"),
]
SELECTIONS = {
    "grid": [*GRID, *WORKLOADS, *BACKWARD, *LOW_PRECISION],
    "chosen": list(CHOSEN),
    "smoke": SMOKE,
}


def inputs(case: Case) -> dict[str, Tensor]:
    """The arguments of mixture_lora; x and the update are O(1)."""
    stack = _stack(case.K, case.R, case.I, case.O, case.dtype)
    generator = torch.Generator().manual_seed(case.N)
    ids = _ids(case)
    return {
        "x": torch.randn(case.N, case.I, generator=generator).to(stack.lora_a.dtype),
        "lora_a": stack.lora_a,
        "lora_b": stack.lora_b,
        "row_start": stack.row_start,
        "adapter_ids": ids,
        "weights": (1 + torch.rand(ids.shape, generator=generator)) / case.J,
        "scale": stack.scale,
    }


def flops(case: Case) -> float:
    """Two products a use of an adapter forward, four backward (with the rank-wide part kept)."""
    products = 2 if case.direction == "forward" else 4
    return products * case.N * case.J * case.R * (case.I + case.O)


def traffic(case: Case) -> float:
    """Bytes read and written at least once: rows, the adapters in use, backward all gradients."""
    size = getattr(torch, case.dtype).itemsize
    row = case.R * (case.I + case.O) * size
    forward = case.N * (case.I + case.O) * size + len(_ids(case).unique()) * row
    return forward if case.direction == "forward" else 2 * forward + case.K * row


def oversized(case: Case) -> str:
    """Why the case is not tried; "" where it is."""
    adapters = _factor_bytes(case, case.K)
    copies = 1 if case.direction == "forward" else 2
    if copies * adapters > MEMORY_LIMIT:
        return f"adapters and their gradients take {copies * adapters / 2**30:.1f} GiB"
    return ""


def problem(case: Case, ours: tuple[str, ...] = OURS) -> Problem:
    """The race of a case: our usable implementations against every form that applies."""
    given = inputs(case)
    dtype = getattr(torch, case.dtype)
    usable = [name for name in ours if ERRORS[name] is None]
    loop = torch_forms.upcast_loop
    entrants = {
        name: functools.partial(_ours, given, name, case.direction == "backward") for name in usable
    }
    entrants |= {
        name: functools.partial(_form, given, torch_forms.FORMS[name], case, dtype)
        for name in applicable(case)
    }
    if dtype != torch.float32:
        entrants["upcast_loop"] = functools.partial(_form, given, loop, case, dtype)
        entrants |= {
            f"{name}_f32copy": functools.partial(
                _form, given, torch_forms.FORMS[name], case, torch.float32
            )
            for name in applicable(case)
        }
    return Problem(
        [Competitor(n, build, n in ours, extra_bytes(case, n)) for n, build in entrants.items()],
        truth=_truth(given, case),
        rounded=_form(given, loop, case, dtype),
        gradients=case.direction == "backward",
    )


def applicable(case: Case) -> list[str]:
    """The forms that compute this case in a way of their own."""
    names = list(torch_forms.FORMS)
    if case.direction == "backward":
        names = list(torch_forms.RECORDABLE)
    if case.workload == "identical":
        names = [n for n in names if n not in torch_forms.PER_ROW_ONLY]
    return [n for n in names if n != "row_mv" or case.N * case.J <= ROW_MV_PAIRS]


def extra_bytes(case: Case, name: str) -> int:
    """What an implementation allocates beyond inputs and outputs, by arithmetic."""
    size = 4 if name.endswith("_f32copy") else getattr(torch, case.dtype).itemsize
    mixtures = 1 if case.workload == "identical" else case.N
    pair_rows = case.N * case.J * (case.I + case.O) * size
    active = len(_ids(case).unique())
    held = {
        "reference": 3 * _factor_bytes(case, mixtures) * 4 // size,
        "gather_bmm": _factor_bytes(case, mixtures * case.J),
        "segments": pair_rows,
        "segments_bag": pair_rows // 2,
        "dense_active": _factor_bytes(case, active) + 2 * case.N * active * case.R * size,
    }
    if case.direction == "backward":
        held["reference"] *= case.J
    copy = _factor_bytes(case, case.K) * 4 // size if name.endswith("_f32copy") else 0
    return held.get(name.removesuffix("_f32copy"), 0) + copy


def _factor_bytes(case: Case, adapters: int) -> int:
    return adapters * case.R * (case.I + case.O) * getattr(torch, case.dtype).itemsize


@functools.lru_cache(maxsize=1)
def _stack(adapters: int, rank: int, width_in: int, width_out: int, dtype: str):
    return make_stack([rank] * adapters, width_in, width_out, dtype=getattr(torch, dtype))


@functools.lru_cache(maxsize=8)
def _ids(case: Case) -> Tensor:
    mixtures = 1 if case.workload == "identical" else case.N
    return sample_ids(case.workload, mixtures, case.J, case.K, seed=case.N)


def _leaves(given: dict[str, Tensor]) -> dict[str, Tensor]:
    named = ("x", "lora_a", "lora_b", "weights", "scale")
    return {name: given[name].detach().requires_grad_() for name in named}


def _gradient(y: Tensor, leaves: dict[str, Tensor]):
    # Not constant: a constant would not see swapped columns.
    grad = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    wanted = list(leaves.values())
    return lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)


def _ours(given: dict[str, Tensor], name: str, backward: bool):
    if backward:
        leaves = _leaves(given)
        return _gradient(mixture_lora(**{**given, **leaves}, impl=name), leaves)
    max_rank = int(given["row_start"][1])
    return lambda: (mixture_lora(**given, max_rank=max_rank, impl=name),)


def _form(given, form, case: Case, dtype: torch.dtype, round_to: torch.dtype | None = None):
    # dtype float32 on other storage: the form is given a float32 copy of the adapters.
    backward = case.direction == "backward"
    leaves = _leaves(given) if backward else given
    x, round_to = leaves["x"], round_to or given["x"].dtype
    ids = given["adapter_ids"].long()
    factor = leaves["weights"] * leaves["scale"][ids]
    lora_a, lora_b = (
        leaves[name].to(dtype).unflatten(0, (case.K, case.R)) for name in ("lora_a", "lora_b")
    )
    run = form(torch_forms.Call(lora_a, lora_b, ids, factor, case.N))
    if backward:
        return _gradient(run(x.to(dtype)).to(round_to), leaves)
    if dtype == round_to == torch.float32:
        return lambda: (run(x),)
    return lambda: (run(x.to(dtype)).to(round_to),)


def _truth(given, case: Case):
    # In float64 throughout; the adapters, which may be large, only as they are used, except where
    # they must be leaves.
    wide = case.direction == "backward"
    exact = {
        name: t.double() if t.is_floating_point() and (wide or "lora" not in name) else t
        for name, t in given.items()
    }
    form = functools.partial(torch_forms.upcast_loop, compute=torch.float64)
    return _form(exact, form, case, exact["lora_a"].dtype, round_to=torch.float64)


@pytest.mark.parametrize("case", CHOSEN, ids=str)
@pytest.mark.parametrize("impl", ["native", "torch"])
def test_mixture_lora(benchmark, case, impl):
    if impl == "native" and ERRORS["native"] is not None:
        pytest.skip(ERRORS["native"])
    entry = problem(case, ("native",))
    name = impl if impl == "native" else CHOSEN[case]
    (build,) = (c.build for c in entry.competitors if c.name == name)
    with torch.set_grad_enabled(entry.gradients):
        run = build()
        _, fault = Gate(entry.truth(), entry.rounded()).check(run(), impl == "native")
        assert not fault
        benchmark.group, benchmark.extra_info["form"] = str(case), name
        benchmark(run)
