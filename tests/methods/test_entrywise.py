"""The entrywise rules against their plain formulas on all tensors at once."""

import pytest
import torch
from torch import Tensor

from lora_fused.methods import entrywise
from lora_fused.methods.entrywise import RULES, Entrywise, drawn, spans
from lora_fused.testing import assert_within_budget

SHAPE, SEED = (33, 65), 5
WEIGHTS = [0.5, -0.25, 1.5, 0.0]
KEYS = [f"layer\0{k}" for k in range(len(WEIGHTS))]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(entrywise, "BLOCK", 4 * SHAPE[1] + 3)


def tensors(dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(WEIGHTS), *SHAPE, generator=generator, dtype=torch.float64).to(dtype)


def combined(rule: Entrywise, stack: Tensor, weights=WEIGHTS, keys=KEYS) -> Tensor:
    return rule.combine(lambda k, span: stack[k, span].clone(), stack.shape[1:], weights, keys)


def plain(rule: Entrywise, stack: Tensor, weights=WEIGHTS) -> Tensor:
    """The same, of all at once and in as many words as PEFT's documentation."""
    stack = stack.clone()
    if rule.density < 1:
        for k, values in enumerate(stack):
            if rule.draws:
                kept = drawn(KEYS[k], rule.seed, values.shape, rule.density)
                stack[k] = values * kept / rule.density
            else:
                order = values.abs().flatten().argsort(descending=True, stable=True)
                values.view(-1)[order[int(rule.density * values.numel()) :]] = 0
    weighted = stack * torch.tensor(weights, dtype=stack.dtype)[:, None, None]
    if not rule.elects:
        return weighted.sum(0)
    votes = stack.sign() if rule.majority_sign_method == "frequency" else stack
    agree = stack.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    return (weighted * agree).sum(0) / agree.sum(0).clamp_min(1)


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.03, 0.5, 0.99, 1])
@pytest.mark.parametrize("rule", RULES)
def test_matches_the_plain_formula(rule, density, method):
    rule = Entrywise(rule, density, method, SEED)
    truth = plain(rule, tensors())
    rounded = plain(rule, tensors().float())
    assert_within_budget(combined(rule, tensors().float()), rounded, truth)
    other = Entrywise(rule.rule, density * 0.6, method, SEED)  # the negative control
    with pytest.raises(AssertionError):
        assert_within_budget(combined(other, tensors().float()), rounded, truth)


@pytest.mark.parametrize("method", ["total", "frequency"])
def test_every_tensor_has_a_vote_whatever_its_weight(method):
    rule, weights = Entrywise("ties", 0.5, method), [1.0, 0.0, 0.0, 0.0]
    with_votes = combined(rule, tensors(), weights)
    assert_within_budget(with_votes, plain(rule, tensors(), weights), with_votes)
    assert not with_votes.equal(combined(rule, tensors()[:1], weights[:1], KEYS[:1]))


@pytest.mark.parametrize("rule", RULES)
def test_many_tensors_are_asked_for_again_and_give_the_same(rule, monkeypatch):
    rule = Entrywise(rule, 0.4, seed=SEED)
    held = combined(rule, tensors())
    monkeypatch.setattr(entrywise, "_HELD", 0)
    assert combined(rule, tensors()).equal(held)


@pytest.mark.parametrize("rule", ["ties", "magnitude_prune"])
def test_blocks_change_nothing_where_nothing_is_drawn(rule, monkeypatch):
    rule = Entrywise(rule, 0.4)
    parts = combined(rule, tensors())
    assert len(list(spans(SHAPE))) > 2
    monkeypatch.setattr(entrywise, "BLOCK", 2**30)
    assert len(list(spans(SHAPE))) == 1 and combined(rule, tensors()).equal(parts)


def kept(values: Tensor, density: float) -> Tensor:
    rule = Entrywise("magnitude_prune", density)
    return rule.combine(lambda k, span: values[span].clone(), values.shape, [1.0], ["x"])


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_of_equal_magnitudes_the_first_are_kept(density):
    """Seven sizes, each hundreds of times: exactly as many are kept as asked for."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-3, 4, SHAPE, generator=generator).double()
    found = kept(values, density)
    count = int(density * values.numel())
    order = values.abs().flatten().argsort(descending=True, stable=True)[:count]
    expected = torch.zeros_like(values).view(-1)
    expected[order] = values.view(-1)[order]
    assert found.equal(expected.view(SHAPE))


@pytest.mark.parametrize("kind", ["normal", "equal", "few sizes", "one large", "zeros"])
def test_the_sampled_threshold_is_the_exact_one(kind, monkeypatch):
    monkeypatch.setattr(entrywise, "BLOCK", 2**14)
    shape, generator = (1024, 1024), torch.Generator().manual_seed(2)
    assert shape[0] * shape[1] >= entrywise._SAMPLED
    sizes = {
        "normal": torch.randn(shape, generator=generator),
        "equal": torch.full(shape, -2.0),
        "few sizes": torch.randint(0, 3, shape, generator=generator).float(),
        "one large": torch.eye(1024) * 5,
        "zeros": torch.zeros(shape),
    }[kind].abs().view(-1)  # fmt: skip
    for count in (1, 1000, 2**19, 2**20 - 1, 2**20):
        least, held = entrywise._least_kept(sizes, count)
        expected = sizes.sort(descending=True).values[count - 1]
        assert least == expected and held == int((sizes >= expected).sum()), count


def test_draws_depend_on_seed_and_key_alone():
    shape = (300, 65)
    one = drawn("a", 0, shape, 0.3)
    assert one.equal(drawn("a", 0, shape, 0.3))
    others = [drawn("b", 0, shape, 0.3), drawn("a", 1, shape, 0.3)]
    for other in others:
        both = (one & other).double().mean()
        assert abs(both - 0.09) < 5 * (0.09 / one.numel()) ** 0.5
    rows = one.double().mean(1)
    assert abs(one.double().mean() - 0.3) < 5 * (0.21 / one.numel()) ** 0.5
    assert rows.std() == pytest.approx((0.21 / 65) ** 0.5, rel=0.2), "rows are not alike"
    alike = (one & one).double().mean()  # the negative control of independence
    assert abs(alike - 0.09) > 0.1


@pytest.mark.parametrize("density", [1 - 1e-9, 1 - 1e-12, 1 - 2**-53])
def test_a_density_of_almost_one_drops_almost_nothing(density):
    assert drawn("a", 0, (300, 65), density).all()


def test_dare_keeps_the_mean():
    """Over seeds the average is the plain weighted sum; without the rescaling it is not."""
    stack, density = tensors(), 0.25
    runs = torch.stack(
        [combined(Entrywise("dare_linear", density, seed=s), stack) for s in range(400)]
    )
    exact = (stack * torch.tensor(WEIGHTS, dtype=stack.dtype)[:, None, None]).sum(0)
    spread = runs.std(0) / 400**0.5
    off = (runs.mean(0) - exact) / spread
    assert off.square().mean() == pytest.approx(1, abs=0.15)
    assert ((density * runs.mean(0) - exact) / spread).square().mean() > 2


def test_a_density_that_keeps_nothing_is_refused():
    text = "merge: density must keep at least one value of each matrix, got 0.0001 of 2145 values"
    with pytest.raises(ValueError, match=text):
        kept(torch.ones(SHAPE), 1e-4)
