"""subspace_lora in Triton takes one of a few ways by shape alone; each is held to the budget."""

import pytest
import torch
from support.mixture_lora import double
from support.subspace_lora import DTYPES, gradients, problem, require, run, triple, truth
from support.traffic import launched

from lora_fused import backends
from lora_fused.ops.mixture_lora import contract
from lora_fused.ops.mixture_lora import plan as plans
from lora_fused.ops.subspace_lora import dispatch
from lora_fused.testing import assert_within_budget

PROJECT, SUM, LIFT = (f"_subspace_lora_{stage}_kernel" for stage in ("project", "sum", "lift"))
DECODE, SHRINK, EXPAND, SHARED = (
    f"_mixture_lora_{stage}_kernel" for stage in ("decode", "shrink", "expand", "expand_shared")
)
RANKS = (16, 3, 0, 8)
# Form, rows, mixtures, adapters a row, ranks, P, P, I, O, and the kernels that must run.
REGIMES = {
    "diagonal": ("diagonal", 20, 20, 3, RANKS, 140, 140, 70, 100, [PROJECT, LIFT]),
    "diagonal_256": ("diagonal", 256, 256, 5, RANKS, 40, 40, 70, 150, [PROJECT, LIFT]),
    "diagonal_1024": ("diagonal", 1030, 103, 2, RANKS, 70, 70, 40, 150, [PROJECT, LIFT]),
    "diagonal_many": ("diagonal", 2050, 41, 2, RANKS, 70, 70, 40, 50, [PROJECT, LIFT]),
    "diagonal_wide": ("diagonal", 20, 10, 6, RANKS, 20, 20, 8200, 40, [PROJECT, SUM, LIFT]),
    "pairs": ("pairs", 40, 20, 3, RANKS, 40, 24, 70, 100, [PROJECT, DECODE, LIFT]),
    "pairs_wide": ("pairs", 12, 12, 2, RANKS, 40, 24, 8200, 40, [PROJECT, SUM, DECODE, LIFT]),
    "pairs_in_two": ("pairs", 20, 20, 2, (70,), 40, 24, 70, 60, [PROJECT, SHRINK, EXPAND, LIFT]),
    "pairs_by_mixture": ("pairs", 48, 3, 9, RANKS, 40, 24, 70, 60, [PROJECT, SHRINK, SHARED, LIFT]),
    "full": ("full", 20, 20, 2, RANKS, 40, 24, 70, 60, [PROJECT, EXPAND, LIFT]),
    "full_by_mixture": ("full", 48, 3, 2, RANKS, 40, 24, 70, 60, [PROJECT, SHARED, LIFT]),
    "full_wide": ("full", 12, 12, 2, RANKS, 20, 24, 8200, 60, [PROJECT, SUM, EXPAND, LIFT]),
}  # fmt: skip
NAMES = list(REGIMES)
FEW = ["diagonal", "diagonal_wide", "pairs", "pairs_in_two", "pairs_by_mixture", "full"]


@pytest.fixture(autouse=True)
def _triton():
    require("triton")


def case(name: str, dtypes=DTYPES[0]) -> dict:
    form, rows, mixtures, per_row, *sizes, _ = REGIMES[name]
    p = problem(rows, per_row, *sizes, form=form, mixtures=mixtures, dtypes=dtypes)
    return p | {"base": torch.randn(rows, sizes[-1]).to(dtypes[0])}


@pytest.mark.parametrize("name", NAMES)
def test_the_regime_follows_from_the_shape(name):
    p = case(name)
    y, kernels = launched(lambda: run(p, "triton"))
    assert kernels == REGIMES[name][-1]
    assert_within_budget(y, run(p, "reference"), truth(p))
    alone = {"base": None}
    assert_within_budget(run(p, "triton", **alone), run(p, "reference", **alone), truth(p, **alone))


@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=triple)
@pytest.mark.parametrize("name", ["diagonal_256", "diagonal_wide", "pairs_wide", "full_wide"])
def test_storage(name, dtypes):
    p = case(name, dtypes) | {"base": None}
    assert_within_budget(run(p, "triton"), run(p, "reference"), truth(p))


@pytest.mark.parametrize("name", ["diagonal_256", *FEW[1:]])
def test_gradients(name):
    p = case(name)
    actual, launches = launched(lambda: gradients(p, "triton"))
    assert any("outer" in k or "diagonal" in k for k in launches)
    reference, exact = gradients(p, "reference"), gradients(double(p), "reference")
    for leaf, grad in actual.items():
        assert_within_budget(grad, reference[leaf], exact[leaf], leaf)


@pytest.mark.parametrize("name", FEW)
def test_what_a_row_does_not_use_cannot_reach_it(name):
    """Neither another row, nor an adapter that it does not name."""
    p = case(name)
    clean = run(p, "triton")
    p["x"][0] = torch.inf
    last = len(REGIMES[name][4]) - 1
    at = slice(int(p["row_start"][last]), None) if p["row_start"] is not None else last
    p["core_a"][at] = torch.nan
    rows = p["x"].shape[0]
    ids = p["adapter_ids"].repeat_interleave(rows // p["adapter_ids"].shape[0], 0)
    untouched = (ids != last).all(1)
    untouched[0] = False
    y = run(p, "triton")
    assert torch.equal(y[untouched], clean[untouched])
    assert y[1:][~untouched[1:]].isnan().all(), "the poison must be live"


@pytest.mark.parametrize("name", FEW)
def test_what_is_out_of_range_is_none(name, monkeypatch):
    """On a device neither ids nor mixtures are looked at; here the check is taken away."""
    monkeypatch.setattr(contract, "_check_range", lambda *_: None)
    p = case(name)
    count, mixtures = len(REGIMES[name][4]), p["adapter_ids"].shape[0]
    p["adapter_ids"][::2] = torch.where(p["adapter_ids"][::2] == 0, count, -7)
    p["row_mixture"] = torch.arange(p["x"].shape[0]).int() % (mixtures + 3) - 1
    y, _ = launched(lambda: run(p, "triton"))
    known = (p["row_mixture"] >= 0) & (p["row_mixture"] < mixtures)
    assert torch.equal(y[~known], p["base"][~known]) and (~known).any()
    p["row_mixture"] = p["row_mixture"].clamp(0, mixtures - 1)
    p["adapter_ids"][p["adapter_ids"] == count] = -1
    assert torch.equal(y[known], run(p, "triton")[known])


@pytest.mark.parametrize("name", FEW)
def test_what_is_out_of_range_has_no_gradient(name, monkeypatch):
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


def test_ranks_above_max_rank_are_cut(monkeypatch):
    """On a device max_rank is believed; nothing past its scratch is touched."""
    monkeypatch.setattr(dispatch, "rank_bound", lambda row_start, max_rank, op: max_rank)
    p = case("pairs_in_two") | {"max_rank": 65}  # of 70
    y, _ = launched(lambda: run(p, "triton"))
    assert_within_budget(y, run(p, "reference"), truth(p))


@pytest.mark.parametrize("form", ["pairs", "full"])
def test_a_plan_serves_all_layers_and_one_of_the_other_kind_is_refused(form, monkeypatch):
    p = problem(20, 2, (70, 3), 12, 8, 30, 20, form=form)
    plan = plans.make_plan(p["adapter_ids"], None, 20)
    y = run(p, "triton")
    monkeypatch.setattr(plans, "make_plan", None)
    assert torch.equal(run(p, "triton", plan=plan), y)
    other = plan._replace(row_order=plan.row_order[:0])
    with pytest.raises(ValueError, match=r"^subspace_lora: plan must be made for the 20 rows"):
        run(p, "triton", plan=other)


@pytest.mark.parametrize("name", ["diagonal_256", "diagonal_wide", "pairs", "full"])
def test_batch_invariant(name, monkeypatch):
    """One regime for every N: a row's bits depend on nothing but the row."""
    monkeypatch.setattr(backends, "BATCH_INVARIANT", True)
    p = case(name)
    rows = p["x"].shape[0]
    each = rows // p["adapter_ids"].shape[0]
    p |= {k: p[k].repeat_interleave(each, 0) for k in ("adapter_ids", "weights")}
    whole = run(p, "triton")
    for some in ([0], [rows - 1], list(range(3, 9))):
        q = {k: p[k][some] for k in ("x", "adapter_ids", "weights", "base")}
        assert torch.equal(run(p | q, "triton"), whole[some]), some
