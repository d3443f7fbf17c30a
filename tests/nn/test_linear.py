"""The layers: values, dtypes, rows that fit and rows that do not."""

import pytest
import torch
from support.models import Net, adapter, merged, row_by_row, tokens
from torch import nn

from lora_fused import Adapter, AdapterBank, LoraFactors, Mixture
from lora_fused.mixture import Route
from lora_fused.nn import MixtureLinear, attach
from lora_fused.testing import assert_within_budget, make_stack

ROWS = [{"a": 1.0, "b": -0.5}, {}, {"b": 2.0}]
ALL = ("embed", "up", "down")


def attached(adapters=None, dtype=None, model=None):
    model = Net() if model is None else model
    adapters = adapters or [adapter("a", 1, 2, ALL), adapter("b", 2, 3, ALL)]
    bank = AdapterBank(dtype=dtype)
    bank.add_many(adapters)
    return model, adapters, attach(model, bank)


def reference(model, adapters, rows, x):
    """The float32 run with merged weights, each row alone."""
    outs = [merged(model, adapters, row).float()(x[i : i + 1]) for i, row in enumerate(rows)]
    return torch.cat(outs).detach()


@pytest.mark.parametrize("modules", [ALL, ("up", "down"), ("embed",)], ids="-".join)
def test_each_row_has_its_own_mixture(modules):
    adapters = [adapter("a", 1, 2, modules), adapter("b", 2, 3, modules[:1])]
    model, adapters, handle = attached(adapters)
    x, plain = tokens(), Net()
    with handle.mix(Mixture.rows(ROWS)), torch.no_grad():
        y = model(x)
    truth = row_by_row(plain, adapters, ROWS, x)
    assert_within_budget(y, reference(plain, adapters, ROWS, x), truth)
    assert torch.equal(y[1], plain(x)[1])  # no adapter adds exactly nothing
    with handle.mix(Mixture.rows(ROWS[::-1])), torch.no_grad():
        wrong = model(x)
    with pytest.raises(AssertionError):  # the negative control
        assert_within_budget(wrong, reference(plain, adapters, ROWS, x), truth)


def test_per_token_mixtures():
    model, adapters, handle = attached()
    x, plain = tokens(1, 3), Net()
    with handle.mix(Mixture.rows(ROWS, per="token")), torch.no_grad():
        y = model(x)
    # Net treats tokens alone, so token n of one sample is sample n of length one.
    truth = row_by_row(plain, adapters, ROWS, x.T)
    assert_within_budget(
        y, reference(plain, adapters, ROWS, x.T).mT.reshape(1, 3, 6), truth.reshape(1, 3, 6)
    )


@pytest.mark.parametrize(
    "mixture, rows",
    [
        (Mixture.of({"a": 0.5, "b": 1.0}), [{"a": 0.5, "b": 1.0}] * 4),
        (Mixture.rows([{"a": 1.0}, {"b": 1.0}]).repeat(2), [{"a": 1.0}] * 2 + [{"b": 1.0}] * 2),
    ],
    ids=["one-row-fits-all", "repeated"],
)
def test_rows_of_a_mixture_spread_over_a_batch(mixture, rows):
    model, adapters, handle = attached()
    x, plain = tokens(4), Net()
    with handle.mix(mixture), torch.no_grad():
        y = model(x)
    truth = row_by_row(plain, adapters, rows, x)
    assert_within_budget(y, reference(plain, adapters, rows, x), truth)


def test_per_module_weights_reach_their_own_module():
    model, _, handle = attached()
    x, plain = tokens(), Net()
    values = torch.zeros(3, 2)
    values[list(handle.bank.modules).index("up")] = torch.tensor([1.0, -2.0])
    with handle.mix(Mixture.of(["a", "b"], values=values)), torch.no_grad():
        y = model(x)
    only = [adapter("a", 1, 2, ALL), adapter("b", 2, 3, ALL)]
    for one in only:
        one.modules = {"up": one.modules["up"]}
    rows = [{"a": 1.0, "b": -2.0}] * 3
    truth = row_by_row(plain, only, rows, x)
    assert_within_budget(y, reference(plain, only, rows, x), truth)


@pytest.mark.parametrize("per", ["sample", "token"])
def test_rows_that_do_not_fit_are_refused_by_module(per):
    model, _, handle = attached()
    rule = {"sample": r"samples \(x.shape\[0\]", "token": r"tokens \(rows of x"}[per]
    with (
        handle.mix(Mixture.rows(["a", "b"], per=per)),
        pytest.raises(ValueError, match=rf"mix: mixture must .*'embed' .*gets {rule}.*got 2"),
    ):
        model(tokens(3))
    with (
        handle.mix(Mixture.rows(["a"] * 5, per="sample")),
        pytest.raises(ValueError, match="got 5"),
    ):
        model(tokens(1, 5))  # five tokens are not five samples


def test_an_input_without_a_batch_dimension_is_one_sample():
    layer = MixtureLinear.from_linear(nn.Linear(4, 3), make_stack([2], 4, 3))
    ids, weights = torch.zeros(4, 1, dtype=torch.int32), torch.ones(4, 1)
    with pytest.raises(ValueError, match="must have one row"):
        layer(torch.randn(4), Route(ids, weights, None, "sample", 0))
    y = layer(torch.randn(4), Route(ids[:1], weights[:1], None, "sample", 0))
    assert y.shape == (3,)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_inputs(shape):
    model, _, handle = attached()
    x = torch.zeros(shape, dtype=torch.long)
    with handle.mix(Mixture.rows(["a"] * shape[0]) if shape[0] != 1 else Mixture.of({"a": 1.0})):
        assert model(x).shape == (*shape, 6)
    with handle.mix(Mixture.of({"a": 1.0})):
        assert model(x).shape == (*shape, 6)


def test_a_layer_of_its_own_shares_the_parameters():
    linear, stack = nn.Linear(6, 5), make_stack([3, 1], 6, 5)
    layer = MixtureLinear.from_linear(linear, stack)
    x = torch.randn(4, 6)
    assert layer.weight is linear.weight and layer.state_dict().keys() == {"weight", "bias"}
    assert torch.equal(layer(x), linear(x))
    route = Route(torch.tensor([[1]], dtype=torch.int32), torch.ones(1, 1), None, "sample", 0)
    assert not torch.equal(layer(x, route), linear(x))
    with pytest.raises(ValueError, match=r"MixtureLinear: stack must have .*\(6, 5\), got 5 and 6"):
        MixtureLinear.from_linear(linear, make_stack([3], 5, 6))


def test_autocast_keeps_the_layer_dtype_and_the_budget():
    model, adapters, handle = attached()
    x, plain = tokens(), Net()

    def run(net):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return net(x)

    with handle.mix(Mixture.rows(ROWS)):
        y = run(model)
    singles = [run(merged(plain, adapters, row).float())[i : i + 1] for i, row in enumerate(ROWS)]
    assert y.dtype == run(plain).dtype == torch.bfloat16
    assert_within_budget(y, torch.cat(singles), row_by_row(plain, adapters, ROWS, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_model_may_have_another_dtype_than_the_bank(dtype):
    plain = Net().to(dtype)
    model, adapters, handle = attached(model=Net().to(dtype))
    x = tokens()
    with handle.mix(Mixture.rows(ROWS)), torch.no_grad():
        y = model(x)
    assert handle.bank.dtype == torch.float32 and y.dtype == dtype
    singles = [merged(plain, adapters, row).to(dtype)(x[i : i + 1]) for i, row in enumerate(ROWS)]
    truth = row_by_row(plain, adapters, ROWS, x)
    assert_within_budget(y, torch.cat(singles).detach(), truth)


class Pooled(Net):
    """One more layer, which gets a single token of each sample."""

    def __init__(self):
        super().__init__()
        self.pooler = nn.Linear(6, 6)

    def forward(self, x):
        return self.pooler(super().forward(x)[:, 0])


def test_a_module_with_other_tokens_can_be_left_out():
    modules = {"up": (8, 12), "pooler": (6, 6)}
    parts = {
        name: LoraFactors(torch.randn(2, n_in), torch.randn(2, n_out), 1.0)
        for name, (n_in, n_out) in modules.items()
    }
    bank = AdapterBank()
    bank.add(Adapter("a", parts))
    model, mixture = Pooled(), Mixture.rows([{"a": 1.0}] * 6, per="token")
    handle = attach(model, bank)
    left_out = r"'pooler' \(attach\(\.\.\., modules=\.\.\.\) can leave it out\) gets .*, 2, got 6"
    with handle.mix(mixture), pytest.raises(ValueError, match=left_out):
        model(tokens(2, 3))
    handle.detach()
    with attach(model, bank, modules=lambda name: name != "pooler").mix(mixture):
        assert model(tokens(2, 3)).shape == (2, 6)


def test_a_router_is_asked_in_every_module():
    model, _, handle = attached()
    asked = {}

    def fn(name, x):
        asked[name] = tuple(x.shape)
        rows = x.numel() if name == "embed" else x.shape[:-1].numel()
        ids = torch.arange(rows)[:, None] % 2
        return ids, torch.full((rows, 1), 0.5)

    x = tokens(2, 3)
    with handle.route(fn):
        y = model(x)
    assert asked == {"embed": (2, 3), "up": (2, 3, 8), "down": (2, 3, 12)}
    rows = [{"ab"[n % 2]: 0.5} for n in range(6)]
    with handle.mix(Mixture.rows(rows, per="token")):
        assert torch.equal(model(x), y)


def test_a_router_that_does_not_fit_is_refused():
    model, _, handle = attached()
    x = tokens(2, 3)

    def two(name, x):
        return torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)

    with handle.route(two, per="sample"):
        model(x)
    with handle.route(two), pytest.raises(ValueError, match="tokens"):
        model(x)
    with pytest.raises(ValueError, match="per must be 'sample' or 'token'"):
        handle.route(two, per="row")
    for ids in (torch.full((1, 1), 7), torch.full((1, 1), -2)):
        with (
            handle.route(lambda name, x, ids=ids: (ids, torch.ones(1, 1))),
            pytest.raises(ValueError, match="adapter_ids must lie in"),
        ):
            model(x)
