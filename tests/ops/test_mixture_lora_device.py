"""What a device asks of the Triton launcher: no host reads, static shapes, 64-bit offsets.

Kernels are replaced by recorders where the launcher is looked at, and run in the interpreter where
numbers are.
"""

import contextlib
import math

import numpy as np
import pytest
import torch
from support.mixture_lora import LEAVES, double, gradients, problem, require, run, truth
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from lora_fused import testing
from lora_fused.ops import mixture_lora, mixture_lora_group
from lora_fused.ops.mixture_lora import plan as plans

RANKS = (1, 3, 8, 16)
FORMS = ("packed", "vllm")
ROWS = (4, 200)  # of a decode step, of a prefill
CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


@pytest.fixture(autouse=True)
def triton():
    require("triton")


@pytest.fixture
def launches(monkeypatch):
    """Each launch's kernel, grid and arguments (of tensors their form); nothing runs.

    Values cannot be read, as on a device, where the checks that read them are left out.
    """
    from triton.runtime.interpreter import InterpretedFunction

    made = []

    def record(kernel, *args, grid, warmup=False, **options):
        grid = grid(options) if callable(grid) else grid
        made.append((kernel.__name__, grid, *map(_form, args), *map(_form, options.items())))

    monkeypatch.setattr(InterpretedFunction, "run", record)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    return made


def _form(value: object) -> object:
    """A value, of a tensor in it what is known without reading it."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype
    return tuple(map(_form, value)) if isinstance(value, (tuple, list)) else value


class Inside(TorchDispatchMode):
    """Runs the operators' launchers, also on fake tensors, and records what they call."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "lora_fused":
            with self:
                return func.redispatch(CPU, *args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        self.calls.append((str(func), _form(out)))
        return out


def arguments(form: str, rows: int, **options) -> dict:
    p = problem(rows, 3, RANKS, 40, 24, form=form, **options)
    return {**p, "base": torch.randn(rows, 24), "max_rank": max(RANKS)}


def step(p: dict, shared: bool = False) -> None:
    """Calls without gradients, then one with all of them and its backward pass."""
    if shared:
        n = p["x"].shape[0]
        p = {**p, "plan": plans.make_plan(p["adapter_ids"], p["row_mixture"], n)}
    with torch.no_grad():
        mixture_lora(**p, impl="triton")
        mixture_lora(**p, out=torch.empty_like(p["base"]), impl="triton")
        twice = ("lora_a", "lora_b", "row_start", "ranks", "scale", "base")
        group = {k: None if p[k] is None else [p[k]] * 2 for k in twice}
        mixture_lora_group(**{**p, **group}, impl="triton")
    leaves = {k: p[k].detach().requires_grad_() for k in LEAVES}
    mixture_lora(**{**p, **leaves}, impl="triton").sum().backward()
    assert all(leaf.grad.shape == p[k].shape for k, leaf in leaves.items())


def fake(p: dict) -> dict:
    """Tensors of the same form without values."""
    return {
        k: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) if isinstance(t, Tensor) else t
        for k, t in p.items()
    }


ROUTES = pytest.mark.parametrize(
    "route", [{}, {"mixtures": 2}, {"mixtures": 3, "row_mixture": [0, 2]}], ids=str
)


@ROUTES
@pytest.mark.parametrize("shared", [False, True], ids=["own plan", "shared plan"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_read_by_the_host(form, rows, shared, route, launches):
    p = arguments(form, rows, **route)
    with FakeTensorMode(), Inside():
        step(fake(p), shared)
    assert len(launches) >= 5, "shrink and expand forward; these and the outer products backward"


def test_nothing_grows_with_the_square_of_the_rows(launches):
    """Each row its own mixture, as in the prefill of a router."""
    p, rows = arguments("packed", 4), 4096
    many = {k: p[k].new_empty(rows, *p[k].shape[1:]) for k in ("x", "base")}
    many |= {k: p[k].new_empty(rows, 3) for k in ("adapter_ids", "weights")}
    with FakeTensorMode(), Inside() as inside:
        step(fake({**p, **many}))
    made = [form for _, form in inside.calls if isinstance(form, tuple) and len(form) == 3]
    sizes = [shape for shape, _, dtype in made if isinstance(dtype, torch.dtype)]
    assert (rows, 3) in sizes and max(map(math.prod, sizes)) < rows * rows


def test_launches_are_made_on_the_device_of_x(launches, monkeypatch):
    """Triton launches on the current device, which may be another."""
    from triton.runtime.interpreter import InterpretedFunction

    current, record = [], InterpretedFunction.run

    @contextlib.contextmanager
    def device_of(t: Tensor):
        current.append(t.device)
        yield
        current.pop()

    def checked(*args, **options):
        assert current == [torch.device("cpu")]
        record(*args, **options)

    monkeypatch.setattr(InterpretedFunction, "run", checked)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    step(arguments("packed", 4))
    assert launches and not current


@pytest.mark.parametrize(
    "read, error",
    [
        (lambda t: t.max().item(), DataDependentOutputException),
        (lambda t: t.tolist(), DataDependentOutputException),
        (lambda t: bool((t > 0).any()), DataDependentOutputException),
        (lambda t: t.nonzero(), DynamicOutputShapeException),
        (lambda t: t.unique(), DynamicOutputShapeException),
        (lambda t: t[t > 0], DynamicOutputShapeException),
        (lambda t: t.numpy(), RuntimeError),
    ],
    ids=["item", "tolist", "bool", "nonzero", "unique", "mask", "numpy"],
)
@pytest.mark.parametrize("where", ["plan", "forward", "backward"])
def test_a_read_would_be_seen(where, read, error, launches, monkeypatch):
    """Negative control: the same step with one read added."""
    from triton.runtime.interpreter import InterpretedFunction

    make, launch = plans.make_plan, InterpretedFunction.run

    def read_in_plan(adapter_ids, *rest):
        read(adapter_ids)
        return make(adapter_ids, *rest)

    def read_in_launch(kernel, *args, **options):
        if (where == "backward") == (torch._C._current_graph_task_id() != -1):
            read(next(a for a in args if isinstance(a, Tensor)))
        return launch(kernel, *args, **options)

    p = arguments("packed", 4)
    if where == "plan":
        monkeypatch.setattr(plans, "make_plan", read_in_plan)
    else:
        monkeypatch.setattr(InterpretedFunction, "run", read_in_launch)
    with FakeTensorMode(), Inside(), pytest.raises(error):
        step(fake(p), shared=where == "plan")


def contents(p: dict) -> list[dict]:
    """The same shapes with other ids and weights."""
    g = torch.Generator().manual_seed(5)
    ids, weights = p["adapter_ids"], p["weights"]
    last = len(RANKS) - 1
    changes = [
        {"adapter_ids": torch.full_like(ids, -1)},
        {"adapter_ids": torch.full_like(ids, last), "weights": torch.zeros_like(weights)},
        {"adapter_ids": torch.randint(0, last + 1, ids.shape, generator=g).int()},
        {"adapter_ids": ids.flip(0), "weights": weights * -2},
    ]
    if p["row_mixture"] is not None:
        changes.append({"row_mixture": p["row_mixture"].flip(0)})
    return [{**p, **change} for change in changes]


def footprint(p: dict, launches: list) -> tuple[list, list]:
    launches.clear()
    with Inside() as inside:
        step(p)
    return inside.calls, list(launches)


@ROUTES
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("form", FORMS)
def test_shapes_and_launches_do_not_depend_on_values(form, rows, route, launches):
    """What a CUDA graph asks: the same calls, sizes, grids and constants whatever the ids."""
    p = arguments(form, rows, **route)
    calls, made = footprint(p, launches)
    assert made and any("new_empty" in name or "aten.empty" in name for name, _ in calls)
    for other in contents(p):
        again, launched = footprint(other, launches)
        assert again == calls
        assert launched == made


def test_a_dependence_on_values_would_be_seen(launches, monkeypatch):
    """Negative control: scratch sized by the distinct ids, a constant read from them."""
    make = plans.make_plan

    def sized(adapter_ids, *rest):
        adapter_ids.new_empty(len(set(adapter_ids.flatten().tolist())))
        return make(adapter_ids, *rest)

    p = arguments("packed", 4)
    before = footprint(p, launches)
    monkeypatch.setattr(plans, "make_plan", sized)
    with Inside() as first:
        plans.make_plan(p["adapter_ids"], None, 4)
    with Inside() as second:
        plans.make_plan(torch.full_like(p["adapter_ids"], -1), None, 4)
    assert first.calls != second.calls
    more = footprint({**p, "max_rank": 2 * max(RANKS)}, launches)
    assert more[1] != before[1], "another constant is another launch"


def check(p: dict, small: dict | None = None) -> None:
    """Triton against the reference, on a small problem of the same numbers where p is vast."""
    small = p if small is None else small
    y = run(p, "triton")
    assert y.abs().max() > 0
    testing.assert_within_budget(y, run(small, "reference"), truth(small))


@pytest.mark.parametrize("form", ["packed", "plain", "vllm"])
def test_a_hundred_thousand_adapters(form):
    """The last, the first and a few between them; gradients of what is not per adapter."""
    count = 100_000
    p = problem(6, 3, tuple(1 + k % 2 for k in range(count)), 24, 16, form=form)
    p["adapter_ids"][:, 0] = torch.tensor([count - 1, 0, 1, count - 2, 65536, 32768])
    check(p)
    wanted = ("x", "weights")
    actual, competitor = gradients(p, "triton", wanted), gradients(p, "reference", wanted)
    exact = gradients(double(p), "reference", wanted)
    for leaf in wanted:
        testing.assert_within_budget(actual[leaf], competitor[leaf], exact[leaf], leaf)


@pytest.mark.parametrize("sizes", [(33, 65), (1, 1), (3, 515), (515, 3), (127, 129)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_ranks_from_1_to_512_in_one_call(form, sizes):
    ranks = (1, 512, 3, 100, 17, 256, 64, 511, 0)
    p = problem(5, len(ranks), ranks, *sizes, form=form)
    p["adapter_ids"][:] = torch.arange(len(ranks))
    check(p)
    one = torch.tensor([[0], [1], [3], [7], [8]]).int()
    check({**p, "adapter_ids": one, "weights": torch.full((5, 1), 1.5)})


@pytest.fixture
def vast(monkeypatch):
    """``vast(t, axis)``: t's numbers with a stride on that axis that takes offsets past 2^31.

    The memory is never touched but where the numbers lie, so it is not there. As much lies before
    the first number: an offset that wrapped around finds zeros, not a fault.
    """
    from triton.runtime.interpreter import GridExecutor

    # The interpreter ends a launch with copying each tensor's memory onto itself, all of it.
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)

    def spread(t: Tensor, axis: int) -> Tensor:
        stride = list(torch.empty(t.shape, device="meta").stride())
        stride[axis] = 2**30 + 64
        return untouched(t.shape, stride, t.dtype).copy_(t)

    return spread


def untouched(shape: tuple, stride: list, dtype: torch.dtype) -> Tensor:
    """Zeros of bfloat16 or float16 in memory that the system hands out when it is touched."""
    reach = sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    assert reach >= 2**31, "an offset of 32 bits would do"
    try:
        memory = np.zeros(2**31 + reach + 1, np.int16)
    except MemoryError:
        pytest.skip("no address space for untouched memory")
    return torch.from_numpy(memory).view(dtype).as_strided(shape, stride, 2**31)


AXES = [("x", 0), ("x", 1), ("base", 0), ("base", 1)]
AXES += [(side, axis) for side in ("lora_a", "lora_b") for axis in (0, 1, 2)]


@pytest.mark.parametrize("launches_forward", [1, 2])
@pytest.mark.parametrize("label, axis", AXES)
def test_offsets_of_64_bits(label, axis, launches_forward, vast, monkeypatch):
    """Three rows, adapters, ranks and columns; whatever axis lies far apart."""
    monkeypatch.setattr(plans, "is_one_launch", lambda *args: launches_forward == 1)
    options = {"x_dtype": torch.bfloat16, "dtype": torch.bfloat16, "form": "plain"}
    p = problem(3, 3, (3, 3, 3), 3, 3, **options)
    p["adapter_ids"][:] = torch.tensor([[0, 1, 2], [2, 0, -1], [1, 2, 0]])
    p["weights"][:] = torch.tensor([[1.0, -2.0, 0.5], [2.0, 1.0, 1.0], [0.5, 3.0, -1.0]])
    p["base"] = torch.randn(3, 3).bfloat16()
    far = {**p, label: vast(p[label], axis)}
    assert torch.equal(run(far, "triton"), run(p, "triton"))
    near, away = gradients(p, "triton"), gradients(far, "triton")
    assert all(torch.equal(away[leaf], near[leaf]) for leaf in near)


@pytest.mark.parametrize("label, axis", AXES[4:])
def test_offsets_of_64_bits_where_rows_share_a_mixture(label, axis, vast, monkeypatch):
    monkeypatch.setattr(plans, "is_one_launch", lambda *args: False)
    options = {"dtype": torch.bfloat16, "form": "plain", "mixtures": 3}
    p = problem(48, 3, (3, 3, 3), 3, 3, **options)
    p["adapter_ids"][:] = torch.tensor([[0, 1, 2], [2, 0, -1], [1, 2, 0]])
    far = {**p, label: vast(p[label], axis)}
    check(far, p)
    assert torch.equal(run(far, "triton"), run(p, "triton"))


def test_a_packed_stack_of_more_than_2_to_the_31_numbers(vast):
    count, rank, inner, outer = 40_000, 64, 1024, 16
    used = [0, 123, count - 1]
    small = problem(3, 3, (rank,) * 3, inner, outer, dtype=torch.bfloat16)
    small["adapter_ids"][:] = torch.tensor([[0, 1, 2], [2, -1, 0], [2, 2, 1]])
    big = {**small, "row_start": (torch.arange(count + 1) * rank).int(), "max_rank": rank}
    big["scale"] = torch.ones(count)
    big["lora_a"] = untouched((count * rank, inner), [inner, 1], torch.bfloat16)
    big["lora_b"] = torch.zeros(count * rank, outer, dtype=torch.bfloat16)
    ids = small["adapter_ids"]
    big["adapter_ids"] = torch.where(ids < 0, ids, torch.tensor(used)[ids]).int()
    for position, k in enumerate(used):
        here, there = slice(position * rank, (position + 1) * rank), slice(k * rank, (k + 1) * rank)
        big["scale"][k] = small["scale"][position]
        for side in ("lora_a", "lora_b"):
            big[side][there] = small[side][here]
    check(big, small)
    wanted = ("x", "weights")
    near, away = gradients(small, "triton", wanted), gradients(big, "triton", wanted)
    assert all(torch.equal(away[leaf], near[leaf]) for leaf in wanted)
