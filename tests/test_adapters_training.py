"""Training adapters that lie in a bank: exactly those asked for move."""

import copy
import time

import pytest
import torch
from test_adapters import adapter, holds, same, snapshot

from lora_fused import Adapter, AdapterBank, LoraFactors, Mixture
from lora_fused.ops import mixture_lora


@pytest.fixture
def bank() -> AdapterBank:
    bank = AdapterBank()
    bank.add_many([adapter("math"), adapter("code", ("q",), 3), adapter("art", ("v",), 1)])
    return bank


def output(bank: AdapterBank, module: str = "q") -> torch.Tensor:
    stack = bank.stacks[module]
    x = torch.randn(4, stack.in_features, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 1, 2]] * 4).int()
    lora_a, lora_b = stack.factors()
    weights = torch.ones(4, 3)
    return mixture_lora(x, lora_a, lora_b, stack.row_start, ids, weights, scale=stack.scale)


def train(bank: AdapterBank, names, steps: int = 3) -> None:
    params = bank.trainable(names)
    optimiser = torch.optim.AdamW(params, lr=0.1, weight_decay=0.5)
    for _ in range(steps):
        optimiser.zero_grad()
        sum(output(bank, m).square().sum() for m in bank.modules).backward()
        optimiser.step()


def test_weight_decay_leaves_frozen_adapters_alone(bank):
    frozen = [bank.adapter(name) for name in ("math", "art")]
    frozen = copy.deepcopy(frozen)
    before = bank.adapter("code").modules["q"].lora_a.clone()
    train(bank, ["code"])
    for expected in frozen:
        holds(bank, expected)
    assert (bank.adapter("code").modules["q"].lora_a != before).all()
    trained = output(bank)
    bank.freeze()
    assert torch.equal(output(bank), trained), "freezing writes back exactly"
    for expected in frozen:
        holds(bank, expected)


def test_exactly_the_asked_are_parameters(bank):
    params = bank.trainable(["math", "art"])
    shapes = sorted(tuple(p.shape) for p in params)
    assert shapes == sorted([(2, 5), (2, 3), (2, 4), (2, 6), (1, 4), (1, 6)])
    assert all(p.requires_grad and p.is_leaf for p in params)
    names = dict(bank.stacks["v"].named_parameters())
    assert list(names) == ["trained_a_0", "trained_b_0", "trained_a_2", "trained_b_2"]
    assert len(bank.trainable()) == 8, "by default all; asking again replaces what was asked before"
    assert bank.trainable([]) == []
    bank.freeze()
    assert not any(list(stack.parameters()) for stack in bank.stacks.values())


def test_asking_again_keeps_what_was_trained(bank):
    train(bank, ["code"])
    trained = output(bank)
    bank.trainable(["math"])
    assert torch.equal(output(bank), trained)


def test_every_trained_factor_gets_its_gradient(bank):
    params = bank.trainable()
    sum(output(bank, m).square().sum() for m in bank.modules).backward()
    assert all(p.grad is not None and p.grad.any() for p in params)


def test_the_bank_does_not_change_while_it_trains(bank):
    bank.trainable(["code"])
    before = snapshot(bank)
    for change in (
        lambda: bank.add(adapter("new")),
        lambda: bank.remove("math"),
        bank.compact,
    ):
        with pytest.raises(ValueError, match="bank must be frozen while its adapters change"):
            change()
        assert same(before, snapshot(bank))
    with pytest.raises(ValueError, match="be a loaded adapter"):
        bank.trainable(["math", "none"])
    assert len(list(bank.stacks["q"].parameters())) == 2, "a failed call leaves training as it was"
    bank.freeze()
    assert bank.add(adapter("new")) == 3


def test_read_and_copy_while_training(bank):
    train(bank, ["code"])
    trained = bank.stacks["q"].trained_a_1.detach()
    assert torch.equal(bank.adapter("code").modules["q"].lora_a, trained)
    assert torch.equal(bank.subset(["code"]).stacks["q"].lora_a, trained)
    twin = copy.deepcopy(bank)
    assert twin.stacks["q"].trained_a_1 is not bank.stacks["q"].trained_a_1
    twin.stacks["q"].trained_a_1.data.zero_()
    assert torch.equal(bank.stacks["q"].trained_a_1, trained) and trained.any()


def test_half_while_training(bank):
    bank.trainable(["code"])
    bank.to(dtype=torch.bfloat16)
    assert {p.dtype for p in bank.stacks["q"].parameters()} == {torch.bfloat16}
    assert {t.dtype for t in bank.stacks["q"].factors()} == {torch.bfloat16}


def test_a_hundred_thousand_adapters_are_quick():
    """Nothing may be quadratic in the adapters: at this number it would take minutes."""
    begin, count = time.perf_counter(), 100_000
    one = LoraFactors(torch.ones(1, 4), torch.ones(1, 2), 1.0)
    bank = AdapterBank()
    bank.add_many([Adapter(f"a{k}", {"q" if k % 2 else "v": one}) for k in range(count)])
    mixture = Mixture.rows([{f"a{k}": 1.0, f"a{count - 1 - k}": 1.0} for k in range(512)])
    assert mixture.resolve(bank).adapter_ids[3].tolist() == [3, count - 4]
    assert output(bank).shape == (4, 2)
    bank.remove("a7")
    bank.compact()
    assert bank.id("a8") == 7 and bank.subset(["a9", "a99999"]).count == 2
    assert time.perf_counter() - begin < 60


def test_an_adapter_that_stays_trainable_keeps_its_parameters(bank):
    first, second = bank.names[:2]
    before = bank.trainable([first])
    both = bank.trainable([first, second])
    assert {id(p) for p in before} < {id(p) for p in both}
    assert [id(p) for p in bank.trainable([first])] == [id(p) for p in before]
