"""subspace_lora against its definition: the seven tests that every op has, in the same order."""

import itertools

import pytest
import torch
from support.mixture_lora import double
from support.subspace_lora import (
    DTYPES,
    FORMS,
    IMPLS,
    LEAVES,
    call,
    dense,
    gradients,
    problem,
    require,
    run,
    triple,
    truth,
)
from torch._dynamo.testing import CompileCounterWithBackend

from lora_fused import backends, testing
from lora_fused.ops import mixture_lora, subspace_lora
from lora_fused.ops.subspace_lora import dispatch

RAGGED = (1, 3, 7, 8, 16, 33, 64, 0)
SHAPES = (  # N, J, ranks, P of basis_a, P of basis_b, I, O
    (0, 3, (8, 16), 8, 8, 64, 48),
    (1, 1, (8,), 16, 16, 64, 48),
    (1, 8, RAGGED, 33, 17, 127, 65),
    (64, 3, (4,) * 5, 1, 3, 63, 1),
    (65, 3, RAGGED, 65, 33, 127, 33),
    (65, 8, (1, 2, 5) * 40, 24, 40, 65, 127),
    (1500, 3, (8, 3, 0, 16, 1), 12, 16, 40, 24),
    (33, 2, (64, 33), 128, 100, 1000, 65),
    (7, 1, (3,), 5, 5, 1, 1000),
    (5, 0, (8,), 4, 4, 16, 8),
    (4, 3, (), 4, 4, 16, 8),
)
SMALL = (12, 3, (3, 8), 6, 5, 17, 9)


def sizes(shape) -> str:
    n, j, ranks, p, q, i, o = shape
    return f"N{n}-J{j}-K{len(ranks)}-R{max(ranks, default=0)}-P{p}-P{q}-I{i}-O{o}"


def by_impl():
    """Each shape with each implementation; of many rows, Triton's interpreter gets a tenth."""
    for (n, *rest), impl in itertools.product(SHAPES, IMPLS):
        shape = (n // 10 if impl == "triton" and n > 1000 else n, *rest)
        yield pytest.param(shape, impl, id=f"{sizes(shape)}-{impl}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=triple)
@pytest.mark.parametrize("shape, impl", list(by_impl()))
def test_matches_reference(shape, dtypes, form, impl):
    """The reference is held to the dense loop, every other implementation to the reference."""
    require(impl)
    p = problem(*shape, form=form, dtypes=dtypes)
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
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=triple)
def test_negative_control(dtypes, form, impl):
    """The budget sees two adapter ids swapped in a single row."""
    require(impl)
    p = problem(65, 3, (8,) * 4, 16, 16, 64, 48, form=form, dtypes=dtypes)
    p["adapter_ids"][40] = torch.tensor([0, 1, -1])
    p["weights"][40] = torch.tensor([0.7, 0.3, 0.0])
    swapped = p["adapter_ids"].clone()
    swapped[40] = torch.tensor([1, 0, -1])
    wrong = run(p, impl, adapter_ids=swapped)
    with pytest.raises(AssertionError, match="error"):
        testing.assert_within_budget(wrong, run(p, "reference"), truth(p))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=triple)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_match_reference(form, dtypes, impl):
    """gradcheck of the reference is in test_subspace_lora_grad.py."""
    require(impl)
    p = problem(65, 3, RAGGED, 33, 24, 127, 33, form=form, dtypes=dtypes)
    wanted = tuple(k for k in LEAVES if p[k] is not None)
    actual, competitor = gradients(p, impl, wanted), gradients(p, "reference", wanted)
    exact = gradients(double(p), "reference", wanted)
    for leaf in wanted:
        testing.assert_within_budget(actual[leaf], competitor[leaf], exact[leaf], leaf)


@pytest.mark.parametrize("impl", IMPLS[1:])
@pytest.mark.parametrize("dtypes", DTYPES[:3], ids=triple)
@pytest.mark.parametrize("form", FORMS)
def test_registration(form, dtypes, impl):
    require(impl)
    p = problem(12, 2, (1, 3, 8), 6, 5, 17, 9, form=form, dtypes=dtypes)
    ops, plan = torch.ops.lora_fused, ()
    fwd, bwd = (getattr(ops, f"subspace_lora_{way}_{impl}").default for way in ("fwd", "bwd"))
    middle = [p[k] for k in ("basis_a", "basis_b", "core_a", "core_b", "row_start")]
    options = itertools.product((None, torch.randn(12, 9)), (None, [0, 2, 2, 1]))
    if impl == "triton":
        plan = ([], 8 if form == "pairs" else 0)
        options = [(torch.randn(12, 9), [0, 2, 2, 1])]  # the interpreter takes its time
    for base, at in options:
        at = at if at is None else torch.tensor(at).int()
        route = (p["adapter_ids"], p["weights"], p["scale"], at)
        torch.library.opcheck(fwd, (p["x"], *middle, *route, base, *plan))
        z = torch.randn(12, p["basis_a"].shape[0])
        for needs in (0, 1, 0b11000, 0b11111 if form == "pairs" else 0b11011):
            backward = (torch.randn(12, 9), z, *middle, *route, dtypes[0], needs, *plan)
            torch.library.opcheck(bwd, backward)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "backend, form", [("aot_eager", form) for form in FORMS] + [("inductor", "pairs")]
)
def test_compiles(backend, form, impl):
    require(impl)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(subspace_lora, fullgraph=True, dynamic=True, backend=counter)
    for n in (12, 20):
        p = problem(n, 3, (1, 3, 8), 6, 5, 24, 16, form=form)
        p["base"] = torch.randn(n, 16)
        p["max_rank"] = 8  # a traced row_start cannot be read
        leaves = {k: p[k].detach().requires_grad_() for k in ("x", "core_a", "weights", "base")}
        eager = gradients(p, impl, tuple(leaves))
        y = call(compiled, p, impl, **leaves)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).bfloat16()
        y.backward(g.to(y.dtype))
        testing.assert_within_budget(y - p["base"], run(p, impl) - p["base"], truth(p, base=None))
        exact = gradients(double(p), "reference", tuple(leaves))
        for k, leaf in leaves.items():
            testing.assert_within_budget(leaf.grad, eager[k], exact[k], k)
    graphs = counter.frame_count
    changed = {**p, "weights": torch.randn_like(p["weights"]), "base": None}
    call(compiled, changed, impl)  # no base: another graph, whatever the weights
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            changed["weights"] = torch.full_like(p["weights"], seed - 1.0)
            y = call(compiled, changed, impl)
            testing.assert_within_budget(y, run(changed, "reference"), truth(changed))
    assert graphs <= 2, "dynamic sizes must not compile one graph per size"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("impl", IMPLS)
class TestEdges:
    def test_ids_none(self, impl, form):
        """-1 adds exactly nothing, even to a row that is not finite, and whatever its weight."""
        require(impl)
        p = problem(*SMALL, form=form)
        p["adapter_ids"][::2] = -1
        p["x"][::2] = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(2)[:, None]
        p["weights"][0] = torch.inf
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
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
        nan = torch.full_like(p["basis_b"], torch.nan)
        assert torch.equal(run(p, impl, basis_b=nan), torch.zeros(12, 9))

    def test_nan_stays_where_it_is_used(self, impl, form):
        require(impl)
        p = problem(12, 2, (3, 8, 5), 6, 5, 17, 9, form=form)
        p["adapter_ids"][:] = torch.tensor([0, 2])
        clean = run(p, impl)
        p["adapter_ids"][5] = torch.tensor([0, 1])
        core, x = p["core_a"].clone(), p["x"].clone()
        core[slice(3, 11) if form == "pairs" else 1] = torch.nan
        x[7] = torch.inf
        y = run(p, impl, core_a=core, x=x)
        others = [n for n in range(12) if n not in (5, 7)]
        assert torch.equal(y[others], clean[others])
        assert y[5].isnan().all() and not y[7].isfinite().any()

    @pytest.mark.parametrize("shape", SHAPES[::4], ids=sizes)
    def test_base_is_added_in_float32_and_rounded_once(self, shape, impl, form):
        require(impl)
        p = problem(*shape, form=form, dtypes=DTYPES[1])
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            base = torch.randn(shape[0], shape[-1]).to(dtype)
            exact = truth(p, base=None) + base.double()
            once = run(p, "reference", x=p["x"].float()) + base.float()
            testing.assert_within_budget(run(p, impl, base=base), once.to(dtype), exact)

    def test_routes(self, impl, form):
        """M = N, M divides N, M = 1, row_mixture; duplicates within a row add up."""
        require(impl)
        p = problem(12, 3, RAGGED, 6, 5, 17, 9, form=form, mixtures=4, seed=3)
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
        assert torch.equal(run(p, impl, adapter_ids=p["adapter_ids"].long()), run(p, impl))

    def test_views(self, impl, form):
        """Strided and transposed inputs, more than two dimensions, no scale."""
        require(impl)
        p = problem(12, 3, RAGGED, 6, 5, 17, 9, form=form)
        p["base"] = torch.randn(12, 9)
        plain, exact = run(p, impl), truth(p)
        for label, t in p.items():
            if t is None:
                continue
            turned = t.mT.contiguous().mT if t.dim() > 1 else t
            for view in (torch.stack([t] * 2, -1)[..., 0], turned):
                y = run(p, impl, **{label: view})
                if impl == "reference":  # torch's products may depend on the layout
                    testing.assert_within_budget(y, plain, exact, label)
                else:
                    assert torch.equal(y, plain), label
        cube = {"x": p["x"].reshape(3, 4, 17), "base": p["base"].reshape(3, 4, 9)}
        assert torch.equal(run(p, impl, **cube), plain.reshape(3, 4, 9))
        flat = {"adapter_ids": p["adapter_ids"][:1], "weights": p["weights"][:1]}
        assert run({**p, **flat, "x": p["x"][0], "base": p["base"][0]}, impl).shape == (9,)
        ones = torch.ones(len(RAGGED))
        assert torch.equal(run(p, impl, scale=None), run(p, impl, scale=ones))

    def test_reads_weights_and_scale_as_float32(self, impl, form):
        require(impl)
        p = problem(*SMALL, form=form)
        for dtype in (torch.bfloat16, torch.float64):
            given = {"weights": p["weights"].to(dtype), "scale": p["scale"].to(dtype)}
            y = run(p, impl, **given)
            assert y.dtype == torch.float32
            assert torch.equal(y, run(p, impl, **{k: t.float() for k, t in given.items()}))

    def test_autocast_casts_x_and_nothing_else(self, impl, form):
        require(impl)
        p = problem(12, 3, RAGGED, 33, 17, 127, 33, form=form)
        with torch.autocast("cpu", torch.bfloat16):
            y = run(p, impl)
        assert torch.equal(y, run(p, impl, x=p["x"].bfloat16()))

    def test_empty_batches(self, impl, form):
        require(impl)
        p = problem(0, *SMALL[1:], form=form)
        for shape in ((0,), (2, 0), (0, 4)):
            x = torch.randn(*shape, 17, dtype=torch.bfloat16)
            assert run(p, impl, x=x).shape == (*shape, 9)
            assert run(p, impl, x=x, base=torch.randn(*shape, 9)).dtype == torch.float32
        assert run(problem(0, 3, (3, 8), 6, 5, 17, 9, form=form, mixtures=2), impl).shape == (0, 9)

    def test_no_directions_or_no_columns(self, impl, form):
        """Nothing is added to base, and base alone has a gradient that is not zero."""
        require(impl)
        whole = problem(12, 3, (3, 8), 6, 6, 17, 9, form=form, mixtures=2)
        cores = [k for k in ("core_a", "core_b") if whole[k] is not None]
        none = {k: whole[k][..., :0] for k in cores}
        if form == "full":
            none = {"core_a": whole["core_a"][:, :0, :0]}
        for cut in (
            {"basis_a": whole["basis_a"][:0], "basis_b": whole["basis_b"][:0], **none},
            {"x": whole["x"][:, :0], "basis_a": whole["basis_a"][:, :0]},
            {"basis_b": whole["basis_b"][:, :0]},
        ):
            p = {**whole, **cut}
            p["base"] = torch.randn(12, p["basis_b"].shape[1])
            assert torch.equal(run(p, impl), p["base"])
            wanted = tuple(k for k in LEAVES if p[k] is not None)
            for leaf, grad in gradients(p, impl, wanted).items():
                assert grad.shape == p[leaf].shape and (leaf == "base" or not grad.any()), leaf


@pytest.mark.parametrize("impl", IMPLS)
def test_pairs_are_an_adapter_stack_in_basis_coordinates(impl):
    """mixture_lora on the adapters written out: the same function, not through the basis."""
    require(impl)
    p = problem(33, 3, RAGGED, 24, 20, 127, 65)
    full = {"lora_a": p["core_a"] @ p["basis_a"], "lora_b": p["core_b"] @ p["basis_b"]}
    shared = {k: p[k] for k in ("x", "row_start", "adapter_ids", "weights", "scale")}
    written_out = mixture_lora(**shared, **full, impl="reference")
    testing.assert_within_budget(run(p, impl), written_out, truth(p))


META = {"device": "meta"}
FAULTS = {  # label: (what changes in a good call, the text of the error)
    "x-dtype": ({"x": torch.ones(12, 17).int()}, "x must .*float32.*, got torch.int32"),
    "x-dim": ({"x": torch.tensor(1.0)}, r"x must be \[\.\.\., I\] of .*, got torch.float32 \[\]"),
    "a-size": ({"basis_a": torch.ones(6, 16)}, r"basis_a must be \[P, I\] with I = 17, got"),
    "b-dim": ({"basis_b": torch.ones(5)}, r"basis_b must be \[P, O\], got \[5\]"),
    "bases": ({"basis_b": torch.ones(5, 9).half()}, "basis_a and basis_b must share one of"),
    "a-grad": ({"basis_a": torch.ones(6, 17, requires_grad=True)}, "basis_a must be frozen"),
    "b-grad": ({"basis_b": torch.ones(5, 9, requires_grad=True)}, "basis_b must be frozen"),
    "a-device": ({"basis_a": torch.ones(6, 17, **META)}, "basis_a must be on cpu like x, got meta"),
    "pair-a": ({"core_a": torch.ones(11, 5)}, r"lora_a must be \[T, P\] with P = 6, got \[11, 5\]"),
    "pair-b": ({"core_b": torch.ones(11, 6)}, r"lora_b must be \[T, P\] with P = 5, got \[11, 6\]"),
    "pair-rows": ({"core_b": torch.ones(10, 5)}, r"lora_b must have the rows of lora_a, \[11\]"),
    "pair-dtypes": ({"core_b": torch.ones(11, 5).half()}, "lora_a and lora_b must share one of"),
    "start": ({"row_start": torch.tensor([0, 3, 11])}, r"row_start must be int32 \[3\], got"),
    "start-cover": ({"row_start": torch.tensor([0, 3, 9]).int()}, "row_start must rise from 0 to"),
    "start-none": ({"row_start": None}, r"row_start must be int32 .* for PairCores, got None"),
    "cores-dim": ({"core_a": torch.ones(3), "core_b": None}, r"cores must be PairCores.*got \[3\]"),
    "cores-type": ({"core_a": [1.0], "core_b": None}, "cores must be PairCores.*got list"),
    "diagonal": ({"core_a": torch.ones(2, 6), "core_b": None, "row_start": None},
                 r"cores must be \[K, 5, 6\], for the bases differ in P, got \[2, 6\]"),
    "full": ({"core_a": torch.ones(2, 6, 5), "core_b": None, "row_start": None},
             r"cores must be \[K, 5, 6\] like the bases, got \[2, 6, 5\]"),
    "full-dtype": ({"core_a": torch.ones(2, 5, 6).int(), "core_b": None, "row_start": None},
                   "cores must be float32.*, got torch.int32"),
    "full-scale": ({"core_a": torch.ones(3, 5, 6), "core_b": None, "row_start": None},
                   r"scale must be floating point \[3\], got .* \[2\]"),
    "scale": ({"scale": torch.ones(3)}, r"scale must be floating point \[2\], got .* \[3\]"),
    "ids-high": ({"adapter_ids": torch.full((12, 3), 2)}, r"adapter_ids must lie in \[-1, 1\]"),
    "ids-low": ({"adapter_ids": torch.full((12, 3), -2)}, r"adapter_ids must lie in .*, got -2"),
    "ids-wrap": ({"adapter_ids": torch.full((12, 3), 2**32)}, "adapter_ids must lie .*4294967296"),
    "weights": ({"weights": torch.ones(12, 2)}, r"weights must be floating point \[12, 3\] like"),
    "rows": ({"x": torch.ones(13, 17)}, "adapter_ids must have .* divides the 13 rows"),
    "at-rows": ({"row_mixture": torch.zeros(5).int()}, "row_mixture must have .* rows of x, got 5"),
    "at-high": ({"row_mixture": torch.full((12,), 12).int()}, r"row_mixture must lie in \[0, 11\]"),
    "base": ({"base": torch.ones(12, 8)}, r"base must be \[12, 9\] of .*, got .*\[12, 8\]"),
    "device": ({"weights": torch.ones(12, 3, **META)}, "weights must be on cpu like x, got meta"),
}  # fmt: skip


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("label", FAULTS)
def test_rejects(label, impl):
    require(impl)
    changes, message = FAULTS[label]
    with pytest.raises(ValueError, match="^subspace_lora: " + message):
        run(problem(*SMALL), impl, **changes)


def test_rejects_a_max_rank_too_small():
    match = "^subspace_lora: max_rank must be at least the largest rank, 8, got 7"
    with pytest.raises(ValueError, match=match):
        run(problem(*SMALL), "reference", max_rank=7)


def test_impl_choice(monkeypatch):
    p = problem(*SMALL)
    with pytest.raises(
        ValueError, match="impl must be one of auto, reference, native, triton, got"
    ):
        run(p, "cuda")
    built = backends.ERRORS["native"] is None
    assert torch.equal(run(p, "auto"), run(p, "native" if built else "reference"))
    for name in ("native", "triton"):
        monkeypatch.setitem(backends.ERRORS, name, None)
        monkeypatch.setitem(dispatch.HAS_KERNEL, name, False)
        with pytest.raises(RuntimeError, match=f"^subspace_lora: impl .*got '{name}'"):
            run(p, name)
    assert torch.equal(run(p, "auto"), run(p, "reference"))
    monkeypatch.setitem(backends.ERRORS, "native", "no compiler was here")
    with pytest.raises(RuntimeError, match="got 'native': no compiler was here"):
        run(p, "native")


def test_float64_is_for_the_reference():
    require("native")
    p = problem(*SMALL)
    bases = {k: p[k].double() for k in ("basis_a", "basis_b")}
    cores = {k: p[k].double() for k in ("core_a", "core_b")}
    base = {"base": torch.randn(12, 9).double()}
    for changes in ({"x": p["x"].double()}, bases, cores, base, double(p)):
        assert torch.equal(run(p, "auto", **changes), run(p, "reference", **changes))
        with pytest.raises(ValueError, match=r"must .*float16"):
            run(p, "native", **changes)
