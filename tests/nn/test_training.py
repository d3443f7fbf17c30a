"""Gradients through an attached model: adapters, shared weights and weights per module."""

import copy

import pytest
import torch
from support.models import Net, adapter, tokens

from lora_fused import AdapterBank, Mixture
from lora_fused.nn import attach
from lora_fused.testing import assert_within_budget

ALL = ("embed", "up", "down")
NAMES = ["a", "b"]


def attached(dtype=torch.float32):
    model = Net().to(dtype)
    bank = AdapterBank(dtype=dtype)
    bank.add_many([adapter("a", 1, 2, ALL), adapter("b", 2, 3, ALL)])
    return model, attach(model, bank)


def dense_gradients(values, dtype):
    """Autograd through weights that have the updates added: of values [J] or [L, J], and of the
    factors of adapter a."""
    model = Net().to(dtype)
    adapters = [adapter("a", 1, 2, ALL), adapter("b", 2, 3, ALL)]
    values = values.detach().to(dtype).requires_grad_()
    factors, weights = [], {}
    for i, module in enumerate(ALL):
        weight = model.get_submodule(module).weight
        for j, one in enumerate(adapters):
            part = one.modules[module]
            a, b = (t.to(dtype).requires_grad_(j == 0) for t in (part.lora_a, part.lora_b))
            update = a.T @ b if part.embedding else b.T @ a
            value = values[j] if values.dim() == 1 else values[i, j]
            weight = weight + value * part.scale * update
            factors += [a, b] if j == 0 else []
        weights[f"{module}.weight"] = weight
    y = torch.func.functional_call(model, weights, (tokens(),))
    return torch.autograd.grad(y.square().mean(), [values, *factors])


@pytest.mark.parametrize("shape", [(2,), (3, 2)], ids=["shared", "per-module"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_learned_weights_and_adapters(shape, dtype):
    model, handle = attached(dtype)
    assert handle.bank.modules == ALL
    generator = torch.Generator().manual_seed(3)
    values = torch.nn.Parameter(torch.randn(shape, generator=generator))
    parameters = handle.bank.trainable(["a"])
    with handle.mix(Mixture.of(NAMES, values=values)):
        model(tokens()).square().mean().backward()
    grads = [values.grad.to(dtype), *(p.grad for p in parameters)]
    truth = dense_gradients(values, torch.float64)
    # Weights are read in float32 whatever the model's dtype.
    reference = [g.to(dtype) for g in dense_gradients(values, torch.float32)]
    for ours, float32, exact in zip(grads, reference, truth, strict=True):
        assert_within_budget(ours, float32, exact)
    assert values.grad.abs().min() > 0 and all(s.trained for s in handle.bank.stacks.values())


def test_a_weight_of_zero_has_its_true_gradient():
    model, handle = attached()
    values = torch.zeros(2, requires_grad=True)
    with handle.mix(Mixture.of(NAMES, values=values)):
        model(tokens()).square().mean().backward()
    (truth, *_), (reference, *_) = (
        dense_gradients(values, d) for d in (torch.float64, torch.float32)
    )
    assert_within_budget(values.grad, reference, truth)
    assert truth.abs().min() > 0


def test_training_moves_the_trained_adapter_alone():
    model, handle = attached()
    bank, x = handle.bank, tokens()
    before = copy.deepcopy(bank)
    parameters = bank.trainable(["b"])
    assert all(any(p is q for q in model.parameters()) for p in parameters)
    assert not any("trained" in key for key in model.state_dict())
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)
    losses = []
    for _ in range(5):
        with handle.mix(Mixture.uniform(NAMES)):
            loss = (model(x) - 1).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with handle.mix(Mixture.uniform(NAMES)):
        y = model(x)
        bank.freeze()
        assert torch.equal(model(x), y)
    for module in ALL:
        old, new = (b.adapter("a").modules[module] for b in (before, bank))
        assert torch.equal(old.lora_a, new.lora_a) and torch.equal(old.lora_b, new.lora_b)
        assert not torch.equal(
            before.adapter("b").modules[module].lora_b, bank.adapter("b").modules[module].lora_b
        )


def test_rows_without_the_adapter_give_it_no_gradient():
    model, handle = attached()
    parameters = handle.bank.trainable(["a"])
    with handle.mix(Mixture.rows([{"a": 1.0}, {"b": 1.0}, None])):
        model(tokens())[1:].sum().backward()
    assert all(not p.grad.any() for p in parameters)
