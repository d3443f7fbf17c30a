"""mixture_lora in Triton takes one of a few ways by shape alone; each is held to the budget."""

import pytest
import torch
from support.mixture_lora import double, gradients, problem, require, run, truth
from support.traffic import launched

from lora_fused import backends
from lora_fused.ops import mixture_lora, mixture_lora_group
from lora_fused.ops.mixture_lora import plan as plans
from lora_fused.testing import assert_within_budget

RANKS = (16, 3, 8, 1)
DECODE, SHRINK, EXPAND, SHARED = (
    f"_mixture_lora_{stage}_kernel" for stage in ("decode", "shrink", "expand", "expand_shared")
)
# Rows, mixtures, adapters a row, ranks, I, O, and the kernels that must run.
REGIMES = {
    "one_launch": (5, 5, 2, RANKS, 70, 1100, [DECODE]),
    "one_launch_by_group": (8, 2, 2, RANKS, 64, 40, [DECODE]),
    "ranks_too_wide_for_one_launch": (4, 4, 2, (80, 3), 70, 90, [SHRINK, EXPAND]),
    "few_rows": (40, 40, 3, RANKS, 70, 100, [SHRINK, EXPAND]),
    "few_rows_in_slices": (20, 20, 2, (100, 5), 1300, 40, [SHRINK, EXPAND]),
    "many_rows": (150, 75, 2, RANKS, 70, 300, [SHRINK, EXPAND]),
    "by_mixture": (200, 4, 3, RANKS, 70, 600, [SHRINK, SHARED]),
    "by_mixture_wide": (64, 2, 3, (70, 16, 33), 600, 70, [SHRINK, SHARED]),
    "one_mixture": (130, 1, 1, (16,), 40, 70, [SHRINK, SHARED]),
    "by_mixture_many_rows": (4096, 3, 2, RANKS, 16, 48, [SHRINK, SHARED]),
}
NAMES = list(REGIMES)


@pytest.fixture(autouse=True)
def _triton():
    require("triton")


def case(name: str, form: str = "packed", dtype: torch.dtype = torch.float32) -> dict:
    rows, mixtures, per_row, ranks, i, o, _ = REGIMES[name]
    options = {"mixtures": mixtures, "form": form, "x_dtype": dtype, "dtype": dtype}
    if rows % mixtures:  # mixtures named by rows, in no order
        options["row_mixture"] = torch.randint(mixtures, (rows,)).tolist()
    p = problem(rows, per_row, ranks, i, o, **options)
    return p | {"base": torch.randn(rows, o).to(dtype)}


@pytest.mark.parametrize("name", NAMES)
def test_the_regime_follows_from_the_shape(name):
    p = case(name)
    y, kernels = launched(lambda: run(p, "triton"))
    assert kernels == REGIMES[name][-1]
    no_base = {"base": None}
    assert_within_budget(
        run(p, "triton", **no_base), run(p, "reference", **no_base), truth(p, **no_base)
    )
    assert_within_budget(y, run(p, "reference"), truth(p))


@pytest.mark.parametrize("form", ["plain", "vllm"])
@pytest.mark.parametrize("name", NAMES)
def test_slots(name, form):
    p = case(name, form)
    assert_within_budget(run(p, "triton"), run(p, "reference"), truth(p))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name, dtype):
    p = case(name, dtype=dtype) | {"base": None}
    assert_within_budget(run(p, "triton"), run(p, "reference"), truth(p))
    mixed = {"x": p["x"].float()}  # adapters in half precision, exact in three terms
    assert_within_budget(run(p, "triton", **mixed), run(p, "reference", **mixed), truth(p, **mixed))


@pytest.mark.parametrize("name", ["few_rows", "many_rows", "by_mixture", "one_launch_by_group"])
def test_gradients(name):
    p = case(name)
    actual, reference = gradients(p, "triton"), gradients(p, "reference")
    exact = gradients(double(p), "reference")
    for leaf, grad in actual.items():
        assert_within_budget(grad, reference[leaf], exact[leaf])


@pytest.mark.parametrize("name", NAMES)
def test_what_a_row_does_not_use_cannot_reach_it(name):
    p = case(name)
    clean = run(p, "triton")
    p["x"][0] = torch.inf
    p["lora_a"][-1], p["lora_b"][-1] = torch.nan, torch.inf  # the last adapter
    last = len(REGIMES[name][3]) - 1
    at = p["row_mixture"]
    group = torch.arange(p["x"].shape[0]) * p["adapter_ids"].shape[0] // p["x"].shape[0]
    ids = p["adapter_ids"][group if at is None else at.long()]
    untouched = (ids != last).all(1)
    untouched[0] = False
    assert torch.equal(run(p, "triton")[untouched], clean[untouched])
    if (ids[1:] == last).any():
        assert not torch.equal(run(p, "triton")[1:], clean[1:]), "the poison must be live"


@pytest.mark.parametrize("name", ["one_launch_by_group", "few_rows", "many_rows", "by_mixture"])
def test_ranks_above_max_rank_are_cut_not_written_past_the_scratch(name, monkeypatch):
    """On a device max_rank is believed; the next pair's h lies behind each pair's."""
    monkeypatch.setattr(plans, "rank_bound", lambda row_start, max_rank: max_rank)
    p = case(name) | {"max_rank": 9}  # of 16
    y, _ = launched(lambda: run(p, "triton"))
    assert_within_budget(y, run(p, "reference"), truth(p))
    actual, reference = gradients(p, "triton"), gradients(p, "reference")
    exact = gradients(double(p), "reference")
    for leaf, grad in actual.items():
        assert_within_budget(grad, reference[leaf], exact[leaf])


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_named_twice_adds_up(name):
    p = case(name)
    ids = p["adapter_ids"][:, :1].expand(-1, 2).contiguous()
    p |= {"adapter_ids": ids, "weights": torch.randn(ids.shape)}
    assert_within_budget(run(p, "triton"), run(p, "reference"), truth(p))


@pytest.mark.parametrize("name", ["one_launch_by_group", "few_rows", "by_mixture"])
def test_a_mixture_out_of_range_is_none(name, monkeypatch):
    """On a device it is not looked at; here the check is taken away."""
    from lora_fused.ops.mixture_lora import contract

    monkeypatch.setattr(contract, "_check_range", lambda *_: None)
    p = case(name)
    rows, mixtures = p["x"].shape[0], p["adapter_ids"].shape[0]
    p["row_mixture"] = torch.arange(rows).int() % (mixtures + 3) - 1
    y, _ = launched(lambda: run(p, "triton"))
    known = (p["row_mixture"] >= 0) & (p["row_mixture"] < mixtures)
    assert torch.equal(y[~known], p["base"][~known]) and (~known).any()
    p["row_mixture"] = p["row_mixture"].clamp(0, mixtures - 1)
    assert torch.equal(y[known], run(p, "triton")[known])


@pytest.mark.parametrize("name", ["one_launch_by_group", "few_rows", "by_mixture"])
def test_a_mixture_out_of_range_has_no_gradient(name, monkeypatch):
    from lora_fused.ops.mixture_lora import contract

    monkeypatch.setattr(contract, "_check_range", lambda *_: None)
    p = case(name)
    mixtures = p["adapter_ids"].shape[0]
    p["adapter_ids"][0], p["adapter_ids"][1] = -1, 1
    at = torch.arange(p["x"].shape[0]).int() % (mixtures + 1) - 1
    actual = gradients(p | {"row_mixture": at}, "triton")
    expected = gradients(p | {"row_mixture": at.clamp_min(0)}, "triton")
    assert not actual["x"][at < 0].any() and actual["weights"].any()
    for leaf, grad in actual.items():
        assert torch.equal(grad, expected[leaf]), leaf


def test_a_plan_of_the_other_kind_is_refused():
    p = problem(16, 1, RANKS, 32, 32)
    plan = plans.make_plan(p["adapter_ids"][:1], None, 16)
    with pytest.raises(ValueError, match="plan must be made for the 16 rows of this call"):
        run(p, "triton", plan=plan)


class TestBatchInvariance:
    @pytest.fixture(autouse=True)
    def _on(self, monkeypatch):
        monkeypatch.setattr(backends, "BATCH_INVARIANT", True)

    @pytest.mark.parametrize("rows", [2, 40, 150])
    def test_a_row_alone_is_the_row_in_any_batch(self, rows):
        p = problem(1, 3, RANKS, 600, 130, dtype=torch.bfloat16, x_dtype=torch.bfloat16)
        alone, kernels = launched(lambda: run(p, "triton"))
        assert kernels == [SHRINK, EXPAND]
        others = problem(rows, 3, RANKS, 600, 130, seed=5)
        batch = {k: torch.cat([others[k], p[k]]) for k in ("adapter_ids", "weights")}
        x = torch.cat([others["x"].bfloat16(), p["x"]])
        assert torch.equal(run(p, "triton", x=x, **batch)[-1:], alone)

    def test_one_mixture_for_all(self):
        p = case("by_mixture")
        whole, kernels = launched(lambda: run(p, "triton"))
        assert kernels == [SHRINK, EXPAND]
        rows = p["x"].shape[0] // p["adapter_ids"].shape[0]
        first = {k: p[k][:1] for k in ("adapter_ids", "weights")}
        part = run(p, "triton", x=p["x"][:rows], base=p["base"][:rows], **first)
        assert torch.equal(whole[:rows], part)


class TestGroup:
    OUTS = (70, 33, 130)

    def parts(self, name: str, form: str = "packed") -> tuple[dict, dict]:
        rows, mixtures, per_row, ranks, i, _, _ = REGIMES[name]
        all_ = [
            problem(rows, per_row, ranks, i, o, mixtures=mixtures, form=form, seed=s)
            for s, o in enumerate(self.OUTS)
        ]
        shared = {k: all_[0][k] for k in ("x", "adapter_ids", "weights", "row_mixture")}
        each = {k: [p[k] for p in all_] for k in ("lora_a", "lora_b", "row_start", "ranks")}
        each = {k: None if v[0] is None else v for k, v in each.items()}
        each["scale"] = [all_[0]["scale"], None, all_[2]["scale"]]
        each["base"] = [torch.randn(rows, o) for o in self.OUTS]
        return shared, each

    def one_by_one(self, shared: dict, each: dict, impl: str) -> list[torch.Tensor]:
        pick = [{k: None if v is None else v[g] for k, v in each.items()} for g in range(3)]
        return [mixture_lora(**shared, **own, impl=impl) for own in pick]

    @pytest.mark.parametrize("form", ["packed", "plain"])
    @pytest.mark.parametrize("name", ["one_launch", "few_rows", "many_rows", "by_mixture"])
    def test_one_launch_a_stage(self, name, form):
        shared, each = self.parts(name, form)
        ys, kernels = launched(lambda: mixture_lora_group(**shared, **each, impl="triton"))
        assert kernels == REGIMES[name][-1]
        for y, own in zip(ys, self.one_by_one(shared, each, "triton"), strict=True):
            assert torch.equal(y, own)

    @pytest.mark.parametrize("impl", ["reference", "native"])
    def test_other_implementations_go_one_by_one(self, impl):
        require(impl)
        shared, each = self.parts("few_rows")
        ys = mixture_lora_group(**shared, **each, impl=impl)
        for y, own in zip(ys, self.one_by_one(shared, each, impl), strict=True):
            assert torch.equal(y, own)

    def test_gradients(self):
        shared, each = self.parts("few_rows")
        x = shared["x"].clone().requires_grad_()
        sum(
            y.sum() for y in mixture_lora_group(**shared | {"x": x}, **each, impl="triton")
        ).backward()
        own = shared["x"].clone().requires_grad_()
        sum(y.sum() for y in self.one_by_one(shared | {"x": own}, each, "triton")).backward()
        assert torch.equal(x.grad, own.grad)

    def test_rejects(self):
        shared, each = self.parts("few_rows")
        with pytest.raises(
            ValueError, match=r"lora_b must have one entry for each of 3 proj.*got 2"
        ):
            mixture_lora_group(**shared, **each | {"lora_b": each["lora_b"][:2]}, impl="triton")
        mixed = [each["base"][0].bfloat16(), *each["base"][1:]]
        with pytest.raises(ValueError, match="must agree in dtype, form and number of adapters"):
            mixture_lora_group(**shared, **each | {"base": mixed}, impl="triton")
        assert mixture_lora_group(**shared, **{k: [] for k in each}, impl="triton") == ()


class TestOut:
    @pytest.mark.parametrize("impl", ["reference", "native", "triton"])
    @pytest.mark.parametrize("name", ["one_launch", "few_rows", "by_mixture"])
    def test_may_be_base(self, name, impl):
        require(impl)
        p = case(name)
        expected = run(p, impl)
        base = p["base"].clone()
        y = run(p, impl, base=base, out=base)
        assert y is base and torch.equal(base, expected)

    @pytest.mark.parametrize("impl", ["reference", "native", "triton"])
    def test_keeps_its_memory_and_shape(self, impl):
        require(impl)
        p = case("few_rows") | {"base": None}
        x = p["x"].view(4, 10, -1)
        wide = torch.full((4, 10, 200), 7.0)
        out = wide[..., :100]  # not contiguous
        assert torch.equal(run(p, impl, x=x, out=out), run(p, impl, x=x))
        assert (wide[..., 100:] == 7.0).all()
        flat = torch.empty(4, 10, 100)
        assert run(p, impl, x=x, out=flat) is flat and torch.equal(flat, out)
        for none in (p["x"][:0], p["x"].new_empty(0, 3, 70)):
            out = none.new_empty(*none.shape[:-1], 100)
            assert run(p, impl, x=none, out=out) is out

    @pytest.mark.parametrize("impl", ["reference", "triton"])
    def test_rejects(self, impl):
        p = case("few_rows")
        with pytest.raises(ValueError, match=r"out must be torch.float32 \[40, 100\] on cpu, got"):
            run(p, impl, out=torch.empty(40, 99))
        with pytest.raises(ValueError, match=r"out must be torch.float32 .*got torch.bfloat16"):
            run(p, impl, out=torch.empty(40, 100, dtype=torch.bfloat16))
        with pytest.raises(ValueError, match="out must be used without gradients"):
            run(p, impl, x=p["x"].requires_grad_(), out=torch.empty(40, 100))

    def test_operator(self):
        p = case("one_launch")
        args = [p["x"], [p["lora_a"]], [p["lora_b"]], [p["row_start"]], [], p["adapter_ids"]]
        args += [p["weights"], [p["scale"]], None, [p["base"]], [], 16, [p["base"].clone()]]
        torch.library.opcheck(torch.ops.lora_fused.mixture_lora_out_triton, args)
