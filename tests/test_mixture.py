"""Mixture: names to ids, what a row is, and every way to get it wrong."""

import dataclasses

import pytest
import torch

from lora_fused import BASE, Adapter, AdapterBank, LoraFactors, Mixture
from lora_fused.ops import mixture_lora


def adapter(name: str, modules=("q",), rank: int = 2) -> Adapter:
    g = torch.Generator().manual_seed(len(name))
    a, b = torch.randn(rank, 5, generator=g), torch.randn(rank, 3, generator=g)
    return Adapter(name, {m: LoraFactors(a, b, 2.0) for m in modules})


@pytest.fixture
def bank() -> AdapterBank:
    bank = AdapterBank()
    bank.add_many([adapter(n, ("q", "v")) for n in ("math", "code", "poetry", "maths")])
    return bank


def resolved(mixture: Mixture, bank: AdapterBank) -> tuple:
    route = mixture.resolve(bank)
    assert route.adapter_ids.dtype == torch.int32 and route.weights.dtype == torch.float32
    assert route.version == bank.version
    return route.adapter_ids.tolist(), route.weights.tolist()


def test_uniform(bank):
    assert resolved(Mixture.uniform(["code", "math"]), bank) == ([[1, 0]], [[0.5, 0.5]])
    assert resolved(Mixture.uniform(("code",)), bank) == ([[1]], [[1.0]])
    assert resolved(Mixture.uniform([BASE, "math"]), bank) == ([[-1, 0]], [[0.5, 0.5]])


@pytest.mark.parametrize("names", [[], (), "math"])
def test_uniform_rejects(names):
    with pytest.raises(ValueError, match=r"Mixture.uniform: names must be a list of at least one"):
        Mixture.uniform(names)


def test_of(bank):
    assert resolved(Mixture.of({"math": 0.75, "code": -0.5}), bank) == ([[0, 1]], [[0.75, -0.5]])
    assert resolved(Mixture.of({}), bank) == ([[]], [[]])


def test_of_values(bank):
    assert resolved(Mixture.of(["code", "math"], torch.tensor([2.0, 3.0])), bank) == (
        [[1, 0]],
        [[2.0, 3.0]],
    )
    per_module = torch.tensor([[2.0, 3.0], [4.0, 5.0]])
    ids, weights = resolved(Mixture.of(["code", BASE], per_module), bank)
    assert ids == [[1, -1]] and weights == [[[2.0, 3.0]], [[4.0, 5.0]]]


@pytest.mark.parametrize("size", [(1,), (3,), (2, 3), (2, 2, 2), ()])
def test_of_rejects_values_of_the_wrong_length(size):
    with pytest.raises(ValueError, match=r"values must be \[2\] or \[L, 2\] for 2 names, got"):
        Mixture.of(["code", "math"], torch.ones(size))


def test_names_must_be_distinct():
    with pytest.raises(ValueError, match="names must be distinct, got"):
        Mixture.uniform(["code", "code"])
    with pytest.raises(ValueError, match="names must be distinct, got"):
        Mixture.of(["code", "code"], torch.ones(2))


def test_rows_pad_to_the_widest(bank):
    rows = [{"math": 1.5}, None, {"math": 0.5, "code": -0.25}, "poetry", BASE, {BASE: 3.0}, {}]
    ids, weights = resolved(Mixture.rows(rows), bank)
    assert ids == [[0, -1], [-1, -1], [0, 1], [2, -1], [-1, -1], [-1, -1], [-1, -1]]
    assert weights[0] == [1.5, 0.0] and weights[2] == [0.5, -0.25] and weights[3] == [1.0, 0.0]
    assert len(Mixture.rows(rows)) == 7
    assert resolved(Mixture.rows([]), bank) == ([], [])
    assert resolved(Mixture.rows([None, None]), bank) == ([[-1], [-1]], [[1.0], [1.0]])


@pytest.mark.parametrize("row", [3, ["math"], ("math", 1.0), 0.5])
def test_rows_reject_what_is_not_a_row(row):
    with pytest.raises(ValueError, match=r"Mixture.rows: row 1 must be a dict of weights, a name"):
        Mixture.rows([None, row])


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_weights_must_be_finite(weight):
    with pytest.raises(ValueError, match="row 1, weight of 'math' must be finite"):
        Mixture.rows([None, {"math": weight}])
    values = torch.tensor([weight, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="weights must be finite"):
        Mixture.of(["math", "code"], values)
    with pytest.raises(ValueError, match="weights must be finite"):
        Mixture.top_k(torch.zeros(1, 2).int(), values[None])


def test_top_k(bank):
    ids = torch.tensor([[0, -1], [3, 2]])
    weights = torch.tensor([[0.5, 9.0], [-1.0, 0.25]])
    assert resolved(Mixture.top_k(ids, weights), bank) == (ids.tolist(), weights.tolist())
    assert resolved(Mixture.top_k(ids.int(), weights.half()), bank)[1] == weights.tolist()
    per_module = torch.stack([weights, -weights])
    assert resolved(Mixture.top_k(ids, per_module), bank)[1] == per_module.tolist()


def test_top_k_rejects(bank):
    ones = torch.ones(2, 2)
    for ids in (torch.zeros(2).int(), ones, torch.zeros(2, 2, 2).int(), torch.zeros(2, 2).short()):
        with pytest.raises(ValueError, match=r"ids must be int32 or int64 \[M, J\], got torch\."):
            Mixture.top_k(ids, ones)
    for weights in (torch.ones(2, 3), torch.ones(2), torch.ones(1, 1, 2, 2)):
        with pytest.raises(ValueError, match=r"weights must be \[2, 2\] like ids"):
            Mixture.top_k(torch.zeros(2, 2).int(), weights)
    with pytest.raises(ValueError, match="weights must be a floating point tensor, got"):
        Mixture.top_k(torch.zeros(2, 2).int(), ones.int())
    bank.remove("code")
    for dead in (1, 4, -2, 2**32):
        mixture = Mixture.top_k(torch.tensor([[0, dead]]), torch.ones(1, 2))
        with pytest.raises(ValueError, match=rf"ids must be -1 or ids of loaded.*\[{dead}\]"):
            mixture.resolve(bank)


@pytest.mark.parametrize("per", ["Sample", "row", "", None])
def test_per_is_declared(per):
    for make in (
        lambda: Mixture.rows([None], per=per),
        lambda: Mixture.top_k(torch.zeros(1, 1).int(), torch.ones(1, 1), per=per),
    ):
        with pytest.raises(ValueError, match="per must be 'sample' or 'token', got"):
            make()


def test_per_reaches_the_route(bank):
    assert Mixture.rows([None]).resolve(bank).per == "sample"
    assert Mixture.rows([None], per="token").repeat(2).resolve(bank).per == "token"


def test_repeat_orders_rows_as_generate_does(bank):
    mixture = Mixture.rows(["math", "code", None])
    route = mixture.repeat(2).resolve(bank)
    assert route.row_mixture.tolist() == [0, 0, 1, 1, 2, 2]
    assert route.row_mixture.dtype == torch.int32
    assert route.groups == 6 == len(mixture.repeat(2)) and len(mixture) == 3
    assert mixture.row_mixture is None, "repeat returns a new mixture"
    again = mixture.repeat(2).repeat(2).resolve(bank)
    assert again.row_mixture.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert mixture.repeat(1).resolve(bank).row_mixture.tolist() == [0, 1, 2]
    assert mixture.resolve(bank).groups == 3


@pytest.mark.parametrize("times", [0, -1])
def test_repeat_rejects(times):
    with pytest.raises(ValueError, match=f"times must be at least 1, got {times}"):
        Mixture.rows([None]).repeat(times)


def test_unknown_names_list_the_close_ones(bank):
    with pytest.raises(ValueError, match=r"close: 'math', 'maths'\), got 'mathe'"):
        Mixture.of({"mathe": 1.0}).resolve(bank)
    with pytest.raises(ValueError, match=r"\(known: 'math', 'code', 'poetry' and 1 more\), got ''"):
        Mixture.rows([""]).resolve(bank)
    with pytest.raises(ValueError, match=r"none; the bank is empty\), got 'math'"):
        Mixture.of({"math": 1.0}).resolve(AdapterBank())


def test_per_module_weights_must_fit_the_bank(bank):
    mixture = Mixture.of(["math"], torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"weights must have one slice per module of the bank, 2"):
        mixture.resolve(bank)


def test_the_base_alone_needs_no_adapters():
    assert resolved(Mixture.rows([None, BASE]), AdapterBank())[0] == [[-1], [-1]]


def test_ids_survive_rename_and_follow_compact(bank):
    bank.rename("poetry", "verse")
    assert resolved(Mixture.of({"verse": 1.0}), bank)[0] == [[2]]
    before = Mixture.of({"verse": 1.0}).resolve(bank)
    bank.remove("math")
    bank.compact()
    assert before.version != bank.version, "what was resolved before must be refused"
    assert resolved(Mixture.of({"verse": 1.0}), bank)[0] == [[1]]


def test_a_mixture_is_frozen(bank):
    with pytest.raises(dataclasses.FrozenInstanceError):
        Mixture.of({"math": 1.0}).per = "token"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_reach_the_values(bank, dtype):
    values = torch.tensor([0.5, 0.0], dtype=dtype, requires_grad=True)
    route = Mixture.of(["math", "code"], values).repeat(3).resolve(bank)
    stack = bank.stacks["q"]
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    y = mixture_lora(
        x,
        stack.lora_a,
        stack.lora_b,
        stack.row_start,
        route.adapter_ids,
        route.weights,
        scale=stack.scale,
        row_mixture=route.row_mixture,
    )
    y.sum().backward()
    assert values.grad.dtype == dtype and values.grad.all(), "a weight of 0 has a gradient too"


def test_resolve_on_another_device(bank):
    route = Mixture.rows(["math", None]).repeat(2).resolve(bank, "meta")
    assert {t.device.type for t in (route.adapter_ids, route.weights, route.row_mixture)} == {
        "meta"
    }
    assert Mixture.rows(["math"]).resolve(bank).to(torch.device("meta")).version == bank.version


def test_resolve_reads_no_weights(bank):
    """Resolving is in the hot path: weights on a device must not be read back."""
    meta = Mixture.top_k(torch.zeros(1, 2).int(), torch.ones(1, 2, device="meta"))
    assert meta.resolve(bank, "meta").weights.device.type == "meta"


@pytest.mark.parametrize("rows", [{"math": 0.5}, "math", None, torch.ones(2)])
def test_rows_takes_a_list_and_nothing_that_iterates_like_one(rows):
    with pytest.raises(ValueError, match="rows must be a list with one entry per row"):
        Mixture.rows(rows)


def test_a_weight_that_would_lose_its_gradient_is_refused():
    with pytest.raises(ValueError, match=r"a gradient would be lost; use Mixture\.of"):
        Mixture.of({"math": torch.nn.Parameter(torch.ones(()))})
    for weight in ("x", None):
        with pytest.raises(ValueError, match="weight of 'math' must be a number"):
            Mixture.of({"math": weight})


def test_the_plain_constructor_checks_what_the_factories_do():
    table, ones = (("math",),), torch.ones(1, 1)
    assert Mixture(table, ones).per == "sample"
    faults = [
        ((table, ones, "foo"), "per must be 'sample' or 'token'"),
        ((table, torch.full((1, 1), torch.nan)), "weights must be finite"),
        ((table, torch.ones(1, 2)), r"weights must be \[1, 1\]"),
        ((table, ones, "sample", torch.zeros(2)), r"row_mixture must be int32 \[S\]"),
    ]
    for arguments, message in faults:
        with pytest.raises(ValueError, match=message):
            Mixture(*arguments)
