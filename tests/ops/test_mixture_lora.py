"""mixture_lora against its definition: the seven tests that every op has, in the same order."""

import itertools

import pytest
import torch
from support.mixture_lora import (
    DTYPES,
    FORMS,
    IMPLS,
    LEAVES,
    dense,
    double,
    gradients,
    name,
    problem,
    require,
    run,
    truth,
)
from torch._dynamo.testing import CompileCounterWithBackend

from lora_fused import backends, testing
from lora_fused.ops import mixture_lora

RAGGED = (1, 3, 7, 8, 16, 33, 64, 0)
SHAPES = (  # N, J, ranks, I, O
    (0, 3, (8, 16), 64, 48),
    (1, 1, (8,), 64, 48),
    (1, 8, RAGGED, 127, 65),
    (64, 3, (4,) * 5, 63, 1),
    (65, 3, RAGGED, 127, 33),
    (65, 8, (1, 2, 5) * 100, 65, 127),
    (1500, 3, (8, 3, 0, 16, 1), 40, 24),
    (33, 2, (64, 33), 1000, 65),
    (7, 1, (3,), 1, 1000),
    (5, 0, (8,), 16, 8),
    (4, 3, (), 16, 8),
)
MIXED_DTYPES = tuple(itertools.product(DTYPES, DTYPES))


def sizes(shape) -> str:
    n, j, ranks, i, o = shape
    return f"N{n}-J{j}-K{len(ranks)}-R{max(ranks, default=0)}-I{i}-O{o}"


def pair(dtypes) -> str:
    return "-".join(map(name, dtypes))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", MIXED_DTYPES, ids=pair)
@pytest.mark.parametrize("shape", SHAPES, ids=sizes)
def test_matches_reference(shape, dtypes, form, impl):
    """The reference is held to the dense loop, every other implementation to the reference."""
    require(impl)
    p = problem(*shape, x_dtype=dtypes[0], dtype=dtypes[1], form=form)
    actual = run(p, impl)
    if impl == "reference":
        competitor, exact = dense(p, torch.float32).to(dtypes[0]), dense(p, torch.float64)
    else:
        competitor, exact = run(p, "reference"), truth(p)
    testing.assert_within_budget(actual, competitor, exact)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=sizes)
def test_truth_matches_dense_loop(shape, form):
    p = problem(*shape, form=form)
    single = dense(p, torch.float32).double()
    testing.assert_within_budget(truth(p), single, dense(double(p), torch.float64))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", MIXED_DTYPES, ids=pair)
def test_negative_control(dtypes, impl):
    """The budget sees two adapter ids swapped in a single row."""
    require(impl)
    p = problem(65, 3, (8,) * 4, 64, 48, x_dtype=dtypes[0], dtype=dtypes[1])
    p["adapter_ids"][40] = torch.tensor([0, 1, -1])
    p["weights"][40] = torch.tensor([0.7, 0.3, 0.0])
    swapped = p["adapter_ids"].clone()
    swapped[40] = torch.tensor([1, 0, -1])
    wrong = run(p, impl, adapter_ids=swapped)
    with pytest.raises(AssertionError, match="error"):
        testing.assert_within_budget(wrong, run(p, "reference"), truth(p))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", MIXED_DTYPES, ids=pair)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_match_reference(form, dtypes, impl):
    """gradcheck of the reference is in test_mixture_lora_grad.py."""
    require(impl)
    p = problem(65, 3, RAGGED, 127, 33, x_dtype=dtypes[0], dtype=dtypes[1], form=form)
    wanted = LEAVES[:-1]
    actual, competitor = gradients(p, impl, wanted), gradients(p, "reference", wanted)
    exact = gradients(double(p), "reference", wanted)
    for leaf in wanted:
        testing.assert_within_budget(actual[leaf], competitor[leaf], exact[leaf], leaf)


@pytest.mark.parametrize("dtypes", MIXED_DTYPES[::4], ids=pair)
@pytest.mark.parametrize("form", FORMS)
def test_registration(form, dtypes):
    require("native")
    p = problem(12, 2, (1, 3, 8), 17, 9, x_dtype=dtypes[0], dtype=dtypes[1], form=form)
    for base, at in itertools.product((None, torch.randn(12, 9)), (None, [0, 2, 2, 1])):
        stack = (p["x"], p["lora_a"], p["lora_b"], p["row_start"], p["ranks"])
        at = at if at is None else torch.tensor(at).int()
        route = (p["adapter_ids"], p["weights"], p["scale"], at)
        ops = torch.ops.lora_fused
        torch.library.opcheck(ops.mixture_lora_fwd_native.default, (*stack, *route, base))
        grad = torch.randn(12, 9).to(dtypes[0])
        for needs in (0, 1, 0b11000, 0b11111):
            args = (grad, *stack, *route, needs)
            torch.library.opcheck(ops.mixture_lora_bwd_native.default, args)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "backend, form", [("aot_eager", "packed"), ("aot_eager", "vllm"), ("inductor", "packed")]
)
def test_compiles(backend, form, impl):
    require(impl)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(mixture_lora, fullgraph=True, dynamic=True, backend=counter)
    for n in (12, 20):
        p = problem(n, 3, (1, 3, 8), 24, 16, form=form)
        p["base"] = torch.randn(n, 16)
        # Triton sizes scratch by it, and a traced row_start cannot be read.
        p["max_rank"] = 8
        leaves = {k: p[k].detach().requires_grad_() for k in ("x", "weights", "base")}
        eager = gradients(p, impl, tuple(leaves))
        y = compiled(**{**p, **leaves}, impl=impl)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).bfloat16()
        y.backward(g.to(y.dtype))
        testing.assert_within_budget(y - p["base"], run(p, impl) - p["base"], truth(p, base=None))
        exact = gradients(double(p), "reference", tuple(leaves))
        for k, leaf in leaves.items():
            testing.assert_within_budget(leaf.grad, eager[k], exact[k], k)
    graphs = counter.frame_count
    changed = {**p, "weights": torch.randn_like(p["weights"]), "base": None}
    compiled(**changed, impl=impl)  # no base: another graph, whatever the weights
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            changed["weights"] = torch.full_like(p["weights"], seed - 1.0)
            y = compiled(**changed, impl=impl)
            testing.assert_within_budget(y, run(changed, "reference"), truth(changed))
    assert graphs <= 2, "dynamic sizes must not compile one graph per size"


@pytest.mark.parametrize("impl", IMPLS)
class TestEdges:
    def test_ids_none(self, impl):
        """-1 adds exactly nothing, even to a row that is not finite, and whatever its weight."""
        require(impl)
        p = problem(12, 3, (3, 8), 17, 9)
        p["adapter_ids"][::2] = -1
        p["x"][::2] = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(2)[:, None]
        for dtype in DTYPES:
            base = torch.randn(12, 9).to(dtype)
            kept = base.clone()
            y = run(p, impl, base=base)
            assert torch.equal(y[::2], kept[::2]) and y.dtype == dtype and y is not base
            assert torch.equal(base, kept), "base is never written"
            assert y.isfinite().all()
        assert torch.equal(run(p, impl)[::2], torch.zeros(6, 9))
        p["adapter_ids"].fill_(-1)
        assert torch.equal(run(p, impl, x=torch.full((12, 17), torch.nan)), torch.zeros(12, 9))
        y = run(p, impl, base=base)
        assert torch.equal(y, base) and y.data_ptr() != base.data_ptr()

    def test_nan_stays_where_it_is_used(self, impl):
        require(impl)
        for form in FORMS:
            p = problem(12, 2, (3, 8, 5), 17, 9, form=form)
            p["adapter_ids"][:] = torch.tensor([0, 2])
            clean = run(p, impl)
            p["adapter_ids"][5] = torch.tensor([0, 1])
            factors = {k: p[k].clone() for k in ("lora_a", "lora_b")}
            for t in factors.values():
                t[slice(3, 11) if form == "packed" else (1, slice(0, 8))] = torch.nan
            x = p["x"].clone()
            x[7] = torch.inf
            y = run({**p, **factors, "x": x}, impl)
            others = [n for n in range(12) if n not in (5, 7)]
            assert torch.equal(y[others], clean[others])
            assert y[5].isnan().all() and not y[7].isfinite().any()

    @pytest.mark.parametrize("shape", SHAPES, ids=sizes)
    def test_base_is_added_in_float32_and_rounded_once(self, shape, impl):
        require(impl)
        p = problem(*shape, x_dtype=torch.bfloat16, dtype=torch.float16)
        for dtype in DTYPES:
            base = torch.randn(shape[0], shape[-1]).to(dtype)
            exact = truth(p, base=None) + base.double()
            once = run(p, "reference", x=p["x"].float()) + base.float()
            testing.assert_within_budget(run(p, impl, base=base), once.to(dtype), exact)

    def test_routes(self, impl):
        """M = N, M divides N, M = 1, row_mixture; duplicates within a row add up."""
        require(impl)
        p = problem(12, 3, RAGGED, 17, 9, mixtures=4, seed=3)
        for ids, weights in (
            (p["adapter_ids"], p["weights"]),
            (p["adapter_ids"][:1], p["weights"][:1]),
            (torch.tensor([[2, 2, 5]]).int(), torch.tensor([[0.5, -2.0, 0.25]])),
        ):
            for at in (None, [3], [0, 0, 3], list(range(4)) * 3):
                if at is not None:
                    at = torch.tensor(at).int() % len(ids)
                q = {**p, "adapter_ids": ids, "weights": weights, "row_mixture": at}
                exact = dense(double(q), torch.float64)
                testing.assert_within_budget(run(q, impl), dense(q, torch.float32), exact)
        wide = run(p, impl, adapter_ids=p["adapter_ids"].long())
        assert torch.equal(wide, run(p, impl))

    @pytest.mark.parametrize("dtypes", MIXED_DTYPES, ids=pair)
    def test_views(self, dtypes, impl):
        """Strided, transposed and expanded inputs, more than two dimensions, no scale."""
        require(impl)
        p = problem(12, 3, RAGGED, 17, 9, x_dtype=dtypes[0], dtype=dtypes[1])
        p["base"] = torch.randn(12, 9).to(dtypes[0])
        plain = run(p, impl)
        views = {
            "x": p["x"].T.contiguous().T,
            "base": p["base"].T.contiguous().T,
            "lora_a": torch.stack([p["lora_a"]] * 2, -1)[..., 0],
            "lora_b": torch.cat([p["lora_b"]] * 2, 1)[:, :9],
            "weights": p["weights"].T.contiguous().T,
            "adapter_ids": torch.stack([p["adapter_ids"]] * 2, -1)[..., 1],
            "scale": torch.stack([p["scale"]] * 2, -1)[:, 0],
        }
        for label, view in views.items():
            assert torch.equal(run(p, impl, **{label: view}), plain), label
        cube = {"x": p["x"].reshape(3, 4, 17), "base": p["base"].reshape(3, 4, 9)}
        assert torch.equal(run({**p, **cube}, impl), plain.reshape(3, 4, 9))
        flat = {"adapter_ids": p["adapter_ids"][:1], "weights": p["weights"][:1]}
        one = run({**p, **flat, "x": p["x"][0], "base": p["base"][0]}, impl)
        assert one.shape == (9,)
        spread = {**p, **flat, "x": p["x"][:1].expand(12, 17), "base": p["base"][:1].expand(12, 9)}
        assert torch.equal(run(spread, impl), run(spread, impl)[:1].expand(12, 9))
        ones = torch.ones(len(RAGGED))
        assert torch.equal(run(p, impl, scale=None), run(p, impl, scale=ones))

    def test_reads_weights_and_scale_as_float32(self, impl):
        require(impl)
        p = problem(12, 3, RAGGED, 17, 9)
        for dtype in (torch.bfloat16, torch.float64):
            given = {"weights": p["weights"].to(dtype), "scale": p["scale"].to(dtype)}
            y = run(p, impl, **given)
            assert y.dtype == torch.float32
            assert torch.equal(y, run(p, impl, **{k: t.float() for k, t in given.items()}))

    def test_autocast_casts_x_and_nothing_else(self, impl):
        require(impl)
        p = problem(12, 3, RAGGED, 127, 33)
        with torch.autocast("cpu", torch.bfloat16):
            y = run(p, impl)
        assert torch.equal(y, run(p, impl, x=p["x"].bfloat16()))

    def test_slots_without_ranks_are_full(self, impl):
        require(impl)
        p = problem(12, 2, (4, 4, 4), 17, 9, form="plain")
        assert torch.equal(run(p, impl, ranks=None), run(p, impl))

    def test_empty_batches(self, impl):
        require(impl)
        p = problem(0, 3, (3, 8), 17, 9)
        for shape in ((0,), (2, 0), (0, 4)):
            x = torch.randn(*shape, 17, dtype=torch.bfloat16)
            assert run(p, impl, x=x).shape == (*shape, 9)
            assert run(p, impl, x=x, base=torch.randn(*shape, 9)).dtype == torch.float32
        assert run(problem(0, 3, (3, 8), 17, 9, mixtures=2), impl).shape == (0, 9)
        assert run(problem(0, 3, (), 17, 9), impl).shape == (0, 9)


META = {"device": "meta"}
FAULTS = {  # label: (what changes in a good call, the text of the error)
    "x-dim": ({"x": torch.tensor(1.0)}, r"x must be \[\.\.\., I\] of .*, got torch.float32 \[\]"),
    "x-dtype": ({"x": torch.ones(12, 17).int()}, "x must .*float32.*, got torch.int32"),
    "a-dim": ({"lora_a": torch.ones(3, 4, 17)}, r"lora_a must be \[T, I\] with I = 17, got"),
    "a-size": ({"lora_a": torch.ones(11, 16)}, r"lora_a must be .*I = 17, got \[11, 16\]"),
    "b-rows": ({"lora_b": torch.ones(10, 9)}, r"lora_b must have the rows .*\[11\], got \[10, 9\]"),
    "dtypes": (
        {"lora_b": torch.ones(11, 9).half()},
        "lora_a and lora_b must share one of",
    ),
    "slots": ({"row_start": None}, r"lora_a must be \[K, R, I\] with I = 17, got \[11, 17\]"),
    "start": (
        {"row_start": torch.tensor([0, 3, 11])},
        r"row_start must be int32 \[3\], got",
    ),
    "start-empty": ({"row_start": torch.zeros(0).int()}, r"row_start must be int32 \[1\], got"),
    "ranks": ({"ranks": torch.tensor([3, 8]).int()}, "ranks must be None for a packed stack"),
    "scale-size": ({"scale": torch.ones(3)}, r"scale must be floating point \[2\], got .* \[3\]"),
    "scale-dtype": (
        {"scale": torch.ones(2).int()},
        r"scale must be floating point .*int32",
    ),
    "ids-dim": ({"adapter_ids": torch.zeros(12).int()}, r"adapter_ids must be .*\[M, J\], got"),
    "ids-dtype": ({"adapter_ids": torch.zeros(12, 3)}, "adapter_ids must be int32 or int64"),
    "ids-high": (
        {"adapter_ids": torch.full((12, 3), 2)},
        r"adapter_ids must lie in \[-1, 1\]",
    ),
    "ids-low": ({"adapter_ids": torch.full((12, 3), -2)}, r"adapter_ids must lie in .*, got -2"),
    "ids-wrap": (
        {"adapter_ids": torch.full((12, 3), 2**32)},
        "adapter_ids must lie .*4294967296",
    ),
    "weights": ({"weights": torch.ones(12, 2)}, r"weights must be floating point \[12, 3\] like"),
    "weights-dtype": ({"weights": torch.ones(12, 3).int()}, "weights must be floating point"),
    "rows": (
        {"x": torch.ones(13, 17)},
        "adapter_ids must have .* divides the 13 rows",
    ),
    "at-rows": (
        {"row_mixture": torch.zeros(5).int()},
        "row_mixture must have a first size that divides the 12 rows of x, got 5",
    ),
    "at-dtype": ({"row_mixture": torch.zeros(12)}, r"row_mixture must be int32 \[S\], got"),
    "at-high": ({"row_mixture": torch.full((12,), 12).int()}, r"row_mixture must lie in \[0, 11\]"),
    "at-low": ({"row_mixture": torch.full((12,), -1).int()}, r"row_mixture must lie in .*, got -1"),
    "base": (
        {"base": torch.ones(12, 8)},
        r"base must be \[12, 9\] of .*, got .*\[12, 8\]",
    ),
    "base-dtype": ({"base": torch.ones(12, 9).int()}, "base must be .*, got torch.int32"),
    "device": (
        {"weights": torch.ones(12, 3, **META)},
        "weights must be on cpu like x, got meta",
    ),
    "b-device": (
        {"lora_b": torch.ones(11, 9, **META)},
        "lora_b must be on cpu like x, got meta",
    ),
    "base-device": (
        {"base": torch.ones(12, 9, **META)},
        "base must be on cpu like x, got meta",
    ),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("label", FAULTS)
def test_rejects(label, impl):
    require(impl)
    changes, message = FAULTS[label]
    with pytest.raises(ValueError, match="^mixture_lora: " + message):
        run(problem(12, 3, (3, 8), 17, 9), impl, **changes)


def test_rejects_a_max_rank_too_small():
    with pytest.raises(ValueError, match="max_rank must be at least the largest rank, 8, got 7"):
        run(problem(12, 3, (3, 8), 17, 9), "reference", max_rank=7)


def test_impl_choice(monkeypatch):
    p = problem(12, 3, (3, 8), 17, 9)
    with pytest.raises(
        ValueError, match="impl must be one of auto, reference, native, triton, got 'cuda'"
    ):
        run(p, "cuda")
    built = backends.ERRORS["native"] is None
    assert torch.equal(run(p, "auto"), run(p, "native" if built else "reference"))
    monkeypatch.setitem(backends.ERRORS, "native", "no compiler was here")
    monkeypatch.setattr(backends, "NATIVE_ERROR", "no compiler was here")
    with pytest.raises(RuntimeError, match="got 'native': no compiler was here"):
        run(p, "native")
    assert torch.equal(run(p, "auto"), run(p, "reference"))


def test_float64_is_for_the_reference(monkeypatch):
    monkeypatch.setitem(backends.ERRORS, "native", None)
    monkeypatch.setattr(backends, "NATIVE_ERROR", None)
    p = problem(12, 3, (3, 8), 17, 9)
    wide = {k: p[k].double() for k in ("lora_a", "lora_b")}
    base = {"base": torch.randn(12, 9).double()}
    for changes in ({"x": p["x"].double()}, wide, base, double(p)):
        assert torch.equal(run(p, "auto", **changes), run(p, "reference", **changes))
        with pytest.raises(ValueError, match=r"(x|lora_b|base) must .*float16"):
            run(p, "native", **changes)
