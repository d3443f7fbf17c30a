"""The budget and the samplers that every other test relies on."""

import pytest
import torch

from lora_fused import testing
from lora_fused.testing import assert_within_budget, error, make_stack, sample_ids, slotted

EPS = torch.finfo(torch.float32).eps


def budget(off: float, *, reference: float = 0.0, dtype=torch.float32) -> None:
    truth = torch.tensor([1.0, -2.0], dtype=torch.float64)
    moved = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert_within_budget(
        (truth + off * moved).to(dtype), (truth + reference * moved).to(dtype), truth
    )


@pytest.mark.parametrize("reference", (0.0, 2.0**-10))
def test_budget_is_twice_reference_plus_one_rounding(reference):
    limit = 2 * (reference + EPS * 2.0)
    budget(limit, reference=reference)
    budget(-limit, reference=reference)
    with pytest.raises(AssertionError, match="error"):
        budget(limit + 2 * EPS, reference=reference)


def test_budget_follows_the_dtype():
    budget(2.0**-7, dtype=torch.bfloat16)
    with pytest.raises(AssertionError):
        budget(2.0**-7, dtype=torch.float16)


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_budget_never_accepts_what_is_not_finite(bad):
    good, broken = torch.ones(2), torch.tensor([1.0, bad])
    for actual, reference, truth in (
        (broken, good, good),
        (broken, broken, good),
        (good, broken, good),
        (broken, broken, broken),
        (good, good, broken),
    ):
        with pytest.raises(AssertionError):
            assert_within_budget(actual, reference, truth.double())


def test_budget_refuses_other_shapes_and_dtypes():
    one = torch.ones(2)
    with pytest.raises(AssertionError):
        assert_within_budget(one[:1], one, one.double())
    with pytest.raises(AssertionError):
        assert_within_budget(one, one.half(), one.double())
    assert_within_budget(one[:0], one[:0], one[:0].double())


def test_error_is_the_largest_difference():
    assert error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0])) == 0.5
    assert error(torch.empty(0), torch.empty(0)) == 0.0
    assert error(torch.tensor([torch.nan]), torch.tensor([torch.nan])) == float("inf")


@pytest.mark.parametrize("workload", testing.WORKLOADS)
@pytest.mark.parametrize("mixtures, per_row, adapters", [(50, 3, 8), (5, 8, 3), (1, 1, 1)])
def test_samplers(workload, mixtures, per_row, adapters):
    ids = sample_ids(workload, mixtures, per_row, adapters, seed=3)
    assert ids.shape == (mixtures, per_row) and ids.dtype == torch.int32
    assert ids.min() >= 0 and ids.max() < adapters
    if per_row <= adapters:
        assert all(len(set(row)) == per_row for row in ids.tolist()), "no repeats within a row"
    assert torch.equal(ids, sample_ids(workload, mixtures, per_row, adapters, seed=3))


def test_samplers_have_their_pattern():
    share = {w: (sample_ids(w, 4000, 1, 16) == 0).float().mean() for w in testing.WORKLOADS}
    assert share["identical"] == 1.0 and share["distinct"] == share["distinct"].new_tensor(1 / 16)
    assert 0.04 < share["uniform"] < 0.09 and 0.45 < share["skewed"] < 0.55
    assert 0.40 < share["zipf"] < 0.55
    with pytest.raises(ValueError, match=r"workload must be one of .*, got 'heavy'"):
        sample_ids("heavy", 1, 1, 1)


def test_make_stack_gives_updates_of_order_one():
    stack = make_stack((8,) * 4, 256, 128, seed=5)
    x = torch.randn(200, 256, generator=torch.Generator().manual_seed(6))
    for k in range(4):
        update = stack.scale[k] * (x @ stack.lora_a[stack.rows(k)].T) @ stack.lora_b[stack.rows(k)]
        assert 0.5 < update.std() < 3.0
    assert torch.equal(stack.lora_a, make_stack((8,) * 4, 256, 128, seed=5).lora_a)
    assert not torch.equal(stack.lora_a, make_stack((8,) * 4, 256, 128, seed=6).lora_a)
    assert ((stack.scale >= 1) & (stack.scale <= 2)).all()


@pytest.mark.parametrize("layout", ("plain", "vllm"))
def test_slots_hold_the_same_adapters_and_nan(layout):
    stack = make_stack((2, 0, 3), 5, 4)
    slots = slotted(stack, layout=layout)
    assert slots.lora_a.shape == (3, 3, 5) and slots.lora_b.shape == (3, 3, 4)
    assert slots.slot_ranks.tolist() == [2, 0, 3] and slots.row_start is None
    for k, rank in enumerate(stack.ranks):
        for side in ("lora_a", "lora_b"):
            slot = getattr(slots, side)[k]
            assert torch.equal(slot[:rank], getattr(stack, side)[stack.rows(k)])
            assert slot[rank:].isnan().all()
    assert slots.lora_b.is_contiguous() == (layout == "plain")
    assert layout == "plain" or slots.lora_b.stride() == (12, 1, 3)
