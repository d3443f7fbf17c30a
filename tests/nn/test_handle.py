"""What a handle and a layer of its own take for a mixture, and what they refuse."""

import threading

import pytest
import torch
from support.models import Net, adapter, tokens
from torch import nn

from lora_fused import AdapterBank, Mixture
from lora_fused.nn import MixtureLinear, attach
from lora_fused.testing import make_stack

ALL = ("embed", "up", "down")


def attached():
    model, bank = Net(), AdapterBank()
    bank.add_many([adapter("a", 1, 2, ALL), adapter("b", 2, 3, ALL)])
    return model, attach(model, bank)


@pytest.mark.parametrize(
    "short, mixture",
    [
        ({"a": 0.5, "b": 1.0}, Mixture.of({"a": 0.5, "b": 1.0})),
        ("a", Mixture.of({"a": 1.0})),
        (["a", None, {"b": -1.0}], Mixture.rows(["a", None, {"b": -1.0}])),
        (("b", "a", "a"), Mixture.rows(["b", "a", "a"])),
        (None, Mixture.rows([None])),
    ],
    ids=["dict", "name", "list", "tuple", "none"],
)
def test_short_forms_of_a_mixture(short, mixture):
    model, handle = attached()
    with handle.mix(short), torch.no_grad():
        y = model(tokens())
    with handle.mix(mixture), torch.no_grad():
        assert torch.equal(model(tokens()), y)
    assert torch.equal(y, Net()(tokens())) == (short is None)


@pytest.mark.parametrize("wrong", [1, 0.5, torch.ones(2), {"a"}, object])
def test_what_is_no_mixture(wrong):
    _, handle = attached()
    with pytest.raises(ValueError, match=r"mix: mixture must be a Mixture, a dict .*, got "):
        handle.mix(wrong)


def test_a_with_block_is_entered_once():
    model, handle = attached()
    once = handle.mix("a")
    with once:
        y = model(tokens())
        with pytest.raises(RuntimeError, match=r"entered once.* call handle.mix again"), once:
            pass
        assert torch.equal(model(tokens()), y)
    with pytest.raises(RuntimeError, match=r"entered once.* call handle.mix again"), once:
        pass
    assert torch.equal(model(tokens()), Net()(tokens()))
    late = handle.mix("a")
    handle.detach()
    with pytest.raises(RuntimeError, match="must be attached, got a handle that was det"), late:
        pass


@pytest.mark.parametrize(
    "found, got",
    [
        (([[0]], [[1.0]]), r"\['list', 'list'\]"),
        ((torch.zeros(1, 1).int(), [[1.0]]), r"\['Tensor', 'list'\]"),
        (None, "NoneType"),
        (torch.zeros(2, 1), "Tensor"),
        ((torch.zeros(1, 1).int(),), r"\['Tensor'\]"),
        ((torch.zeros(1).int(), torch.ones(1)), r"\[1\] and \[1\]"),
        ((torch.zeros(1, 1).int(), torch.ones(3, 1, 1)), r"\[1, 1\] and \[3, 1, 1\]"),
    ],
    ids=["lists", "list", "none", "one", "short", "flat", "per-module"],
)
def test_a_router_returns_two_tensors(found, got):
    model, handle = attached()
    rule = r"route: the router's result for 'embed' must be a pair of tensors"
    with handle.route(lambda name, x: found), pytest.raises(ValueError, match=f"{rule}.*{got}"):
        model(tokens())


def test_a_router_names_loaded_adapters():
    model, handle = attached()
    handle.bank.remove("a")
    ids = torch.tensor([[0, -1]])
    with (
        handle.route(lambda name, x: (ids, torch.ones(1, 2))),
        pytest.raises(ValueError, match=r"route: ids for 'embed' must be -1 or ids .*got \[0\]"),
    ):
        model(tokens())
    with handle.route(lambda name, x: (torch.tensor([[1, -1]]), torch.ones(1, 2))), torch.no_grad():
        y = model(tokens())
    with handle.mix("b"):
        assert torch.equal(model(tokens()), y)


def test_a_layer_of_its_own_takes_a_route():
    layer = MixtureLinear.from_linear(nn.Linear(6, 5), make_stack([3], 6, 5))
    for wrong in (Mixture.of({"a": 1.0}), {"a": 1.0}, "a"):
        match = rf"MixtureLinear: route must be a Route \(mixture.* got {type(wrong).__name__}"
        with pytest.raises(ValueError, match=match):
            layer(torch.randn(2, 6), wrong)


def test_a_layer_without_adapters_is_a_plain_layer():
    layer, x = MixtureLinear(6, 5), torch.randn(2, 6)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    bank = AdapterBank()
    bank.add(adapter("a", 1))
    with pytest.raises(ValueError, match=r"MixtureLinear: layer must have adapters \(see from_l"):
        layer(x, Mixture.of({"a": 1.0}).resolve(bank))


def test_training_adapters_alone_is_two_lines():
    model, handle = attached()
    assert all(p.requires_grad for p in model.parameters())  # attach freezes nothing
    model.requires_grad_(False)
    trained = handle.bank.trainable(["a"])
    with handle.mix("a"):
        model(tokens()).sum().backward()
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in trained}


def test_an_open_mixture_is_the_model_s_in_every_thread():
    model, handle = attached()
    found = []
    with handle.mix("a"):
        thread = threading.Thread(target=lambda: found.append(model(tokens())))
        thread.start()
        thread.join()
        assert torch.equal(found[0], model(tokens()))
        past = nn.functional.linear(model.embed(tokens()), model.up.weight, model.up.bias)
        assert not torch.equal(past, model.up(model.embed(tokens())))  # no update past forward
