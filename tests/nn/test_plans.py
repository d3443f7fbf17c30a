"""One plan of the Triton kernels serves all layers of a forward, and nothing stale ever does."""

import copy
import pickle

import pytest
import torch
from support.mixture_lora import require
from support.models import Net, adapter, tiny_llama, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_fused import Adapter, AdapterBank, LoraFactors, Mixture
from lora_fused.nn import attach, plans, routing
from lora_fused.nn.plans import Plans
from lora_fused.ops.mixture_lora import plan as op_plans

ROWS = ["a", None, {"a": 0.5, "b": -1.0}]
DEPTH = 4


class Tower(nn.Module):
    """[S, N, 8] -> [S, N, 8] through four layers."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(DEPTH))
        self.through = lambda layer, h: layer(h)

    def forward(self, h):
        for layer in self.layers:
            h = torch.tanh(self.through(layer, h))
        return h


def random_adapter(name, seed, sizes):
    generator = torch.Generator().manual_seed(seed)
    parts = {
        module: LoraFactors(*(torch.randn(2, n, generator=generator) for n in size), 0.5)
        for module, size in sizes.items()
    }
    return Adapter(name, parts)


def attached(impl="triton"):
    require("triton")
    model, bank = Tower(), AdapterBank()
    sizes = {f"layers.{i}": (8, 8) for i in range(DEPTH)}
    bank.add_many([random_adapter("a", 1, sizes), random_adapter("b", 2, sizes)])
    return model, attach(model, bank, impl=impl)


def inputs(samples=3, length=5):
    return torch.randn(samples, length, 8, generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def plans_needed(monkeypatch):
    """Calls as small as these would run in one launch, which needs no plan."""
    monkeypatch.setattr(op_plans, "is_one_launch", lambda *args: False)


@pytest.fixture
def made(monkeypatch):
    return recorded(monkeypatch)


def recorded(monkeypatch):
    """The number of rows of each plan made, by whomever."""
    rows, make = [], op_plans.make_plan

    def record(adapter_ids, row_mixture, n, *rest, **options):
        rows.append(n)
        return make(adapter_ids, row_mixture, n, *rest, **options)

    monkeypatch.setattr(op_plans, "make_plan", record)
    return rows


def alone(model, *args):
    """What the model gives where every call makes its own plan."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routing, "takes_plan", lambda x, impl: False)
        return model(*args)


MIXTURES = {
    "one row": Mixture.of({"a": 0.5, "b": 2.0}),
    "per sample": Mixture.rows(ROWS),
    "per token": None,  # depends on the number of tokens
    "repeated": Mixture.rows(ROWS[:1] * 3).repeat(1),
    "row_mixture": Mixture(
        (("a", "b"), ("b", None)), torch.ones(2, 2), "sample", torch.tensor([1, 0, 1]).int()
    ),
    "per module": Mixture.of(["a", "b"], torch.arange(2.0 * DEPTH).reshape(DEPTH, 2)),
}


@pytest.mark.parametrize("length", [5, 20])
@pytest.mark.parametrize("kind", MIXTURES)
def test_one_plan_serves_every_layer_of_a_forward(kind, length, made):
    model, handle = attached()
    mixture = MIXTURES[kind] or Mixture.rows(ROWS * length, per="token")
    x, rows = inputs(3, length), 3 * length
    with handle.mix(mixture), torch.no_grad():
        own = alone(model, x)
        assert made == [rows] * DEPTH
        made.clear()
        for forwards in (1, 2):
            assert torch.equal(model(x), own)
            assert made == [rows] * forwards
    assert not torch.equal(own, Tower()(x))


def test_a_single_launch_needs_no_plan_but_its_backward_does(monkeypatch):
    model, handle = attached()
    monkeypatch.undo()  # of plans_needed
    made = recorded(monkeypatch)
    assert op_plans.is_one_launch(torch.empty(3, 8), [torch.empty(4, 8)], 2, 2)
    x = inputs(3, 1)
    with handle.mix(Mixture.rows(ROWS)):
        with torch.no_grad():
            y = model(x)
            assert made == [] and torch.equal(alone(model, x), y)
        assert torch.equal(model(x), y)
    assert made == [3]


@pytest.mark.parametrize("impl", ["auto", "native", "reference"])
def test_who_needs_no_plan_gets_none(impl, made):
    require(impl if impl != "auto" else "reference")
    model, handle = attached(impl)
    with handle.mix(Mixture.rows(ROWS)):
        model(inputs())
    assert made == []


def test_gradients(made):
    model, handle = attached()
    parameters = handle.bank.trainable(["a", "b"])
    found = []
    for run in (model, lambda x: alone(model, x)):
        x, values = inputs().requires_grad_(), torch.tensor([0.5, -1.0], requires_grad=True)
        with handle.mix(Mixture.of(["a", "b"], values)):
            loss = run(x).square().sum()
        found.append(torch.autograd.grad(loss, [x, values, *parameters]))
    assert made == [15] + [15] * DEPTH
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


def test_several_numbers_of_rows_in_one_forward(made):
    """As in an encoder with a decoder: a plan for each number, however they alternate."""
    model, handle = attached()
    first, second, third, fourth = model.layers
    with handle.mix(Mixture.rows(ROWS)), torch.no_grad():
        for _ in range(2):
            for layer, length in ((first, 5), (second, 2), (third, 5), (fourth, 2)):
                layer(inputs(3, length))
    assert made == [15, 6] * 2


def test_embeddings_need_no_plan(made):
    require("triton")
    model, bank = Net(), AdapterBank()
    bank.add(adapter("a", 1, 2, ("embed", "up", "down")))
    handle = attach(model, bank, impl="triton")
    with handle.mix("a"), torch.no_grad():
        model.embed(tokens())
        assert made == []
        model(tokens())
    assert made == [15]


def test_a_layer_used_twice_in_a_forward_opens_another(made):
    model, handle = attached()
    model.layers[2] = model.layers[1]
    with handle.mix(Mixture.rows(ROWS)), torch.no_grad():
        assert torch.equal(model(inputs()), alone(model, inputs()))
    assert made == [15] * 2 + [15] * DEPTH


def test_routers_share_where_they_return_the_same_ids(made):
    model, handle = attached()
    x = inputs()
    fixed = torch.tensor([[0, 1]] * 15)  # int64, as topk gives

    def share(name, x):
        return fixed, torch.full((15, 2), 0.1 * int(name[-1]))

    def differ(name, x):
        weights, ids = x.reshape(15, -1)[:, :2].softmax(-1).topk(2)
        return ids, weights

    for router, count in ((share, 1), (differ, DEPTH)):
        with handle.route(router), torch.no_grad():
            y = model(x)
            assert made == [15] * count
            assert torch.equal(alone(model, x), y)
            made.clear()


@pytest.mark.parametrize("inference", [False, True])
def test_a_router_may_use_its_ids_tensor_again_with_other_ids(inference):
    model, handle = attached()
    x = inputs()
    with torch.inference_mode(inference):
        ids, weights = torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)

    def router(name, x):
        return ids.fill_(int(name[-1]) % 2), weights

    def fresh(name, x):
        return torch.full((1, 1), int(name[-1]) % 2, dtype=torch.int32), weights

    with torch.inference_mode():
        with handle.route(fresh):
            wanted = model(x)
        with handle.route(router):
            assert torch.equal(model(x), wanted)


def test_rows_edited_in_place_between_forwards_are_seen():
    """Also where the second forward goes through other layers than the first."""
    model, handle = attached()
    x, rows = inputs(), torch.tensor([0, 1, 1]).int()
    mixture = Mixture((("a",), ("b",)), torch.ones(2, 1), "sample", rows)
    with handle.mix(mixture), torch.no_grad():
        first = model.layers[0](x)
        rows.copy_(torch.tensor([1, 0, 0]))
        assert torch.equal(model.layers[1](x), alone(model.layers[1], x))
        assert torch.equal(model.layers[0](x), alone(model.layers[0], x))
        assert not torch.equal(model.layers[0](x), first)


def test_nested_mixtures_and_those_left(made):
    model, handle = attached()
    x, (outer, inner) = inputs(), (Mixture.rows(ROWS), Mixture.rows(ROWS[::-1]))
    with handle.mix(outer), torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(x), alone(model, x))
            with handle.mix(inner):
                assert torch.equal(model(x), alone(model, x))
        half = model.layers[0](x)
        with handle.mix(inner):
            model.layers[1](x)
        assert torch.equal(model.layers[1](half), alone(model.layers[1], half))
    state = handle._routing._plans
    assert not state._made and not state._served


def test_an_error_in_the_middle_of_a_forward_leaves_nothing_behind(made):
    model, handle = attached()
    x, rows = inputs(), torch.tensor([0, 1, 1]).int()
    mixture = Mixture((("a",), ("b",)), torch.ones(2, 1), "sample", rows)
    with handle.mix(mixture), torch.no_grad():
        model.layers[0](x)
        with pytest.raises(ValueError, match="samples"):
            model.layers[1](inputs(4))
        made.clear()
        assert torch.equal(model(x), alone(model, x))
    assert made == [15] + [15] * DEPTH


def test_a_mixture_that_fits_no_row_is_refused_as_the_op_does():
    model, handle = attached()
    mixture = Mixture((("a",), ("b",)), torch.ones(2, 1), "sample", torch.tensor([0, 2, 1]).int())
    with handle.mix(mixture), pytest.raises(ValueError, match=r"row_mixture must lie in .*, got 2"):
        model(inputs())


def test_copies_carry_no_plan():
    model, handle = attached()
    model.through = None  # a lambda cannot be pickled
    with handle.mix(Mixture.rows(ROWS)), torch.no_grad():
        model.layers[0](inputs())
        assert handle._routing._plans._made
        for twin in (copy.deepcopy(handle._routing), pickle.loads(pickle.dumps(handle._routing))):
            assert not twin._plans._made and not twin._plans._served


def test_a_call_with_a_route_of_its_own_shares_nothing(made):
    model, handle = attached()
    layer, x = model.layers[0], inputs()
    other = Mixture.rows(ROWS[::-1]).resolve(handle.bank)
    with handle.mix(Mixture.rows(ROWS)), torch.no_grad():
        y = layer(x, other)
        assert torch.equal(model.layers[1](x), alone(model.layers[1], x))
    with handle.mix(Mixture.rows(ROWS[::-1])), torch.no_grad():
        assert torch.equal(layer(x), y)


def test_generate_makes_one_plan_a_forward(made):
    require("triton")
    pytest.importorskip("transformers")
    model, bank = tiny_llama(), AdapterBank()
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in ("q", "o")]
    bank.add_many(
        [random_adapter(n, s, dict.fromkeys(names, (32, 32))) for n, s in (("a", 1), ("b", 2))]
    )
    handle, x = attach(model, bank, impl="triton"), tokens(3, 5, 60) + 1
    options = {"attention_mask": torch.ones_like(x), "max_new_tokens": 3, "do_sample": False}
    with handle.mix(Mixture.rows(ROWS)):
        written = model.generate(input_ids=x, **options)
        assert made == [15, 3, 3]
        assert torch.equal(alone(lambda: model.generate(input_ids=x, **options)), written)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_layers_recomputed_in_a_backward_pass(reentrant, made):
    model, handle = attached()
    x, found = inputs().requires_grad_(), []
    parameters = handle.bank.trainable(["a"])
    for through in (model.through, lambda f, h: checkpoint(f, h, use_reentrant=reentrant)):
        model.through = through
        with handle.mix(Mixture.rows(ROWS)):
            model(x).square().sum().backward()
        found.append([p.grad.clone() for p in (x, *parameters)])
        x.grad = None
        for p in parameters:
            p.grad = None
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))
    assert made == [15, 15, 15]  # the plain run, then the checkpointed one twice


def test_compiled_code_makes_its_own_and_is_compiled_once():
    torch._dynamo.reset()
    model, handle = attached()
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for length in (5, 7, 5):
            for rows in (ROWS, ROWS[::-1]):
                with handle.mix(Mixture.rows(rows)):
                    x = inputs(3, length)
                    model.layers[0](x)  # what eager layers share must not show in a graph
                    assert torch.equal(compiled(x), alone(model, x))
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_what_one_stream_or_capture_makes_no_other_uses(monkeypatch):
    model, handle = attached()
    route, stack = Mixture.rows(ROWS).resolve(handle.bank), model.layers[0].lora_stack
    place, held, x = [0, False], Plans(), inputs()
    monkeypatch.setattr(plans, "_place", lambda x: tuple(place))
    eager, again = (held.of(name, x, route, route, stack) for name in ("first", "second"))
    assert again is eager
    place[1] = True  # in a capture
    captured, again = (held.of(name, x, route, route, stack) for name in ("third", "fourth"))
    assert again is captured is not eager
    place[:] = [1, False]  # on another stream
    other = held.of("fifth", x, route, route, stack)
    assert other is not eager and other is not captured


def test_layers_on_another_device_share_a_plan_there(made):
    """Where every layer moves the route anew, it is still one mixture."""
    model, handle = attached()
    route, stack = Mixture.rows(ROWS).resolve(handle.bank), model.layers[0].lora_stack
    held, x = Plans(), inputs()
    here = held.of("first", x, route, route, stack)
    x = x.to("meta")
    moved = [route.to("meta"), route.to("meta")]
    there = [held.of(f"layer {i}", x, each, route, stack) for i, each in enumerate(moved)]
    assert there[0] is there[1] is not here
    assert {t.device.type for t in there[0]} == {"meta"} and made == [15, 15]


def test_plans_of_inference_mode_stay_there(made):
    model, handle = attached()
    x = inputs()
    with handle.mix(Mixture.rows(ROWS)):
        with torch.inference_mode():
            model.layers[0](x)
        model.layers[1](x.requires_grad_()).sum().backward()
    assert made == [15, 15]
    with torch.inference_mode(), handle.mix(Mixture.rows(ROWS)):
        made.clear()
        model(x.detach())
    assert made == [15]
