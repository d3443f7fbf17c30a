"""Gradient checkpointing: right while the mixture is open, loud once it is not."""

import pytest
import torch
from support.models import Net, adapter, tokens
from torch.utils.checkpoint import checkpoint

from lora_fused import AdapterBank, Mixture
from lora_fused.nn import attach

MODES = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


class Checkpointed(Net):
    reentrant = None  # None: no checkpointing

    def forward(self, x):
        h = self.embed(x)
        if self.reentrant is None:
            return self._block(h)
        return checkpoint(self._block, h, use_reentrant=self.reentrant)

    def _block(self, h):
        return self.down(torch.tanh(self.up(torch.sin(h))))


def attached(reentrant):
    model = Checkpointed()
    model.reentrant = reentrant
    bank = AdapterBank()
    bank.add_many([adapter("a", 1), adapter("b", 2)])
    return model, attach(model, bank), tokens()


def loss(model, x):
    return model(x).square().sum()


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@MODES
def test_backward_inside_the_mixture_is_the_plain_backward(reentrant):
    mixture = Mixture.rows([{"a": 1.0}, None, {"a": 0.5, "b": -1.0}])
    model, handle, x = attached(None)
    for _ in range(2):  # again: an earlier step must not disturb a later one
        with handle.mix(mixture):
            loss(model, x).backward()
        plain = gradients(model)
        model.reentrant = reentrant
        with handle.mix(mixture):
            loss(model, x).backward()
        assert same(gradients(model), plain)
        model.reentrant = None


@MODES
def test_recomputation_under_another_mixture_is_refused(reentrant):
    model, handle, x = attached(reentrant)
    a, b = Mixture.of({"a": 1.0}), Mixture.of({"b": 1.0})
    message = r"mix: the mixture must stay open until backward\(\) has recomputed '(up|down)'"

    with handle.mix(a):
        value = loss(model, x)
    with pytest.raises(RuntimeError, match=message):  # closed
        value.backward()

    with handle.mix(a):
        value = loss(model, x)
    with handle.mix(b), pytest.raises(RuntimeError, match=message):  # another
        value.backward()

    with handle.mix(a):
        value = loss(model, x)
    with handle.mix(b):
        value = value + loss(model, x)
        with pytest.raises(RuntimeError, match=message):  # another, after a forward of its own
            value.backward()

    value = loss(model, x)
    with handle.mix(b), pytest.raises(RuntimeError, match=message):  # none, then one
        value.backward()

    model.zero_grad()
    with handle.mix(b):
        loss(model, x).backward()  # an error leaves the next step alone
    assert gradients(model)


@MODES
@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_evaluation_in_between_neither_hides_nor_causes_an_error(reentrant, quiet):
    model, handle, x = attached(reentrant)
    a, b = Mixture.of({"a": 1.0}), Mixture.of({"b": 1.0})
    with handle.mix(a):
        value = loss(model, x)
    model.reentrant = None
    with quiet():
        model(x)
    with pytest.raises(RuntimeError, match="must stay open"):
        value.backward()
    with handle.mix(a):
        model.reentrant = reentrant
        value = loss(model, x)
        model.reentrant = None
        with handle.mix(b), quiet():
            model(x)
        value.backward()


@MODES
def test_the_same_mixture_may_be_opened_again_for_the_backward(reentrant):
    model, handle, x = attached(reentrant)
    mixture = Mixture.of({"a": 1.0})
    with handle.mix(mixture):
        value = loss(model, x)
        value.backward(retain_graph=True)
        inside = gradients(model)
    with handle.mix(mixture):
        loss(model, x)
        value.backward()
    assert same(gradients(model), inside)


def test_without_checkpointing_the_backward_may_come_later():
    model, handle, x = attached(None)
    with handle.mix(Mixture.of({"a": 1.0})):
        first = loss(model, x)
    with handle.mix(Mixture.of({"b": 1.0})):
        second = loss(model, x)
    (first + second).backward()


@MODES
def test_training_the_frozen_model_without_mixture(reentrant):
    model, handle, x = attached(reentrant)
    with handle.mix(Mixture.of({"a": 1.0})):
        loss(model, x).backward()
    model.zero_grad()
    loss(model, x).backward()
    idle = gradients(model)
    handle.detach()
    loss(model, x).backward()
    assert same(gradients(model), idle)
