"""FedEx: averaged factors and the residual, which together are the exact average."""

import pytest
import torch
from test_merging import WEIGHTS, dense, make_bank, product, same_rank_bank, truncated

from lora_fused.methods import fedex
from lora_fused.testing import assert_within_budget

UNIFORM = dict.fromkeys(WEIGHTS, 1 / 3)


@pytest.mark.parametrize("weights", [UNIFORM, WEIGHTS], ids=["uniform", "weighted"])
def test_average_and_residual_are_the_exact_average(weights):
    """Scales differ between modules and adapters, a weight is negative, modules lack."""
    bank = same_rank_bank()
    found = fedex(bank, weights)
    for module, part in found.adapter.modules.items():
        whole = product(part) + product(found.residual.modules[module])
        truth, reference = (dense(bank, weights, module, d) for d in (torch.float64, torch.float32))
        assert_within_budget(whole.float(), reference, truth, module)
        alone = float((product(part) - truth).norm() / truth.norm())
        assert found.without_residual.modules[module].error_to_exact == pytest.approx(alone)
        assert alone > 0.1, "the negative control: without the residual it is another update"
    assert found.report.error_to_exact < 1e-6 < found.without_residual.error_to_exact
    assert (found.adapter.name, found.residual.name) == ("merged", "merged_residual")


def test_the_average_is_that_of_the_factors():
    bank = same_rank_bank()
    part = fedex(bank, UNIFORM).adapter.modules["q"]
    held = [bank.adapter(name).modules["q"] for name in UNIFORM]
    scale = max(one.scale for one in held)
    lora_a = sum(one.lora_a.double() for one in held) / 3
    lora_b = sum(one.lora_b.double() * one.scale for one in held) / 3 / scale
    assert part.scale == scale
    assert_within_budget(part.lora_a, lora_a.float(), lora_a)
    assert_within_budget(part.lora_b, lora_b.float(), lora_b)


def test_a_residual_of_a_rank_is_the_best_of_it():
    bank = same_rank_bank()
    found = fedex(bank, UNIFORM, residual_rank=3)
    for module, part in found.residual.modules.items():
        exact = dense(bank, UNIFORM, module) - product(found.adapter.modules[module])
        best = truncated(exact, 3)
        assert len(part.lora_a) == 3
        assert_within_budget(product(part).float(), truncated(exact.float(), 3), best, module)
        gap = (best - exact).norm() / dense(bank, UNIFORM, module).norm()
        assert found.report.modules[module].error_to_exact == pytest.approx(float(gap), rel=1e-6)


def test_narrow_dtypes_round_the_average_and_the_residual_takes_it_up():
    bank = same_rank_bank(torch.bfloat16)
    found = fedex(bank, UNIFORM)
    assert found.adapter.modules["q"].lora_a.dtype == torch.bfloat16
    assert found.report.error_to_exact < 5e-3


def test_rejects():
    for change, text in (
        ({}, "combination_type must be 'cat' or 'svd' where ranks differ"),
        ({"residual_rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"name": "math"}, "name must be new to the bank"),
    ):
        bank = make_bank() if not change else same_rank_bank()
        with pytest.raises(ValueError, match=text):
            fedex(bank, UNIFORM, **change)
