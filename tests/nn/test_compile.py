"""torch.compile: whole graphs, and no new compilation for new weights or adapters."""

import pytest
import torch
from support.models import Net, adapter, row_by_row, tokens
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from lora_fused import AdapterBank, Mixture
from lora_fused.nn import attach
from lora_fused.testing import assert_within_budget

ALL = ("embed", "up", "down")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def attached():
    model = Net()
    bank = AdapterBank()
    bank.add_many([adapter("a", 1, 2, ALL), adapter("b", 2, 3, ALL)])
    return model, attach(model, bank)


def test_one_graph_serves_idle_and_every_mixture_of_a_shape():
    model, handle = attached()
    counter = CompileCounter()
    compiled, x = torch.compile(model, backend=counter, fullgraph=True), tokens()
    plain = Net()(x)
    assert torch.equal(compiled(x), plain)
    assert counter.frame_count == 1
    mixtures = [Mixture.of({"a": 1.0}), Mixture.of({"b": -0.5}), Mixture.of({"__base__": 1.0})]
    for mixture in mixtures:
        with handle.mix(mixture):
            assert torch.equal(compiled(x), model(x))
    assert torch.equal(compiled(x), plain)  # idle again
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_rows_weights_and_modules_change_without_recompilation(backend):
    model, handle = attached()
    compiled, x = torch.compile(model, backend=backend, fullgraph=True), tokens()
    rows = [{"a": 1.0, "b": 0.5}, {"b": 1.0, "a": 0.0}, {"a": -1.0, "b": 2.0}]
    layers = [torch.full((3, 2), float(n)) for n in range(3)]
    with handle.mix(Mixture.rows(rows)):
        compiled(x)
    with handle.mix(Mixture.of(["a", "b"], values=layers[0])):
        compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for turned in (rows[1:] + rows[:1], [None, *rows[:2]]):
            with handle.mix(Mixture.rows(turned)):
                assert torch.equal(compiled(x), model(x))
        for values in layers[1:]:
            with handle.mix(Mixture.of(["b", "a"], values=values)):
                assert torch.equal(compiled(x), model(x))


def test_gradients_through_a_compiled_model():
    model, handle = attached()
    compiled, x = torch.compile(model, backend="aot_eager", fullgraph=True), tokens()
    parameters = handle.bank.trainable(["a"])

    def run(net):
        values = torch.tensor([0.5, -1.0], requires_grad=True)
        with handle.mix(Mixture.of(["a", "b"], values=values)):
            loss = net(x).square().sum()
        return torch.autograd.grad(loss, [values, *parameters])

    for left, right in zip(run(model), run(compiled), strict=True):
        assert torch.equal(left, right)


def test_checkpointing_inside_a_compiled_model_keeps_its_mixture():
    model, handle = attached()
    x = tokens()

    def run(x):
        return checkpoint(model, x, use_reentrant=False)

    def gradient(net):
        with handle.mix(Mixture.rows(["a", None, {"a": 1.0, "b": 1.0}])):
            loss = net(x).square().sum()
        with handle.mix(Mixture.rows(["b", None, None])):  # the graph holds what it was given
            return torch.autograd.grad(loss, model.up.weight)[0]

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(gradient(compiled), gradient(model))


def test_a_router_is_traced():
    model, handle = attached()
    compiled, x = torch.compile(model, backend="eager", fullgraph=True), tokens()

    def fn(name, x):
        scores = torch.tensor([[0.25, 0.75]])
        weights, ids = scores.softmax(-1).topk(1)
        return ids.int(), weights

    with handle.route(fn):
        assert torch.equal(compiled(x), model(x))


def test_attach_and_detach_reach_a_model_compiled_before():
    model, x = Net(), tokens()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    plain = compiled(x)
    bank = AdapterBank()
    bank.add(adapter("a", 1, 2, ALL))
    handle = attach(model, bank)
    with handle.mix(Mixture.of({"a": 1.0})):
        y = compiled(x)
        assert torch.equal(y, model(x)) and not torch.equal(y, plain)
    handle.detach()
    assert torch.equal(compiled(x), plain)


def test_inductor():
    model, handle = attached()
    compiled, x = torch.compile(model, fullgraph=True), tokens()
    rows = [{"a": 1.0}, {}, {"a": 1.0, "b": 1.0}]
    with handle.mix(Mixture.rows(rows)), torch.no_grad():
        y, reference = compiled(x), model(x)
    adapters = [handle.bank.adapter(name) for name in "ab"]
    assert_within_budget(y, reference, row_by_row(Net(), adapters, rows, x))


@pytest.mark.filterwarnings("ignore:Dynamo does not know")  # it goes on eagerly after the error
def test_rows_that_do_not_fit_are_refused_while_tracing():
    model, handle = attached()
    compiled = torch.compile(model, backend="eager")
    with handle.mix(Mixture.rows(["a", "b"])), pytest.raises(ValueError, match="must have one row"):
        compiled(tokens(3))
