"""Uniform and learned composition: outputs, gradients, training, and what is exported."""

import copy

import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from support.models import Net, adapter, merged, tokens

from lora_fused import AdapterBank
from lora_fused.methods import LearnedComposition, uniform
from lora_fused.methods.composition import CONSTRAINTS
from lora_fused.nn import attach
from lora_fused.testing import assert_within_budget

ALL = ("embed", "up", "down")
CONSTRAINT = pytest.mark.parametrize("constraint", CONSTRAINTS)


def adapters(dtype=torch.float32):
    """Mixed ranks and scales; one adapter lacks a layer, one has a negative scale."""
    found = [adapter("a", 1, 2, ALL), adapter("b", 2, 5, ALL), adapter("c", 3, 1)]
    found[1].modules["up"].scale *= -1
    for one in found:
        for part in one.modules.values():
            part.lora_a, part.lora_b = part.lora_a.to(dtype), part.lora_b.to(dtype)
    return found


def attached(dtype=torch.float32):
    model, bank = Net().to(dtype).requires_grad_(False), AdapterBank(dtype=dtype)
    bank.add_many(adapters(dtype))
    return model, attach(model, bank)


def drawn(handle, constraint="softmax", seed=0) -> LearnedComposition:
    """A composition away from its start."""
    composition = LearnedComposition(handle.bank, constraint=constraint)
    generator = torch.Generator().manual_seed(seed)
    logits = composition.logits
    logits.data += 0.3 * torch.randn(logits.shape, generator=generator).to(logits)
    return composition


def dense(weights, x, dtype=torch.float64):
    """The model with sum_k p_k s_k B_k A_k added to its weights; p per layer."""
    model = Net().to(dtype)
    for one in adapters():
        for layer, part in one.modules.items():
            update = (part.lora_b.to(dtype).T @ part.lora_a.to(dtype)) * part.scale
            factor = weights[layer][one.name]
            weight = model.get_submodule(layer).weight
            weight.data += factor * (update.T if part.embedding else update)
    return model(x).detach()


def test_uniform_is_the_mean_of_all_updates():
    model, handle = attached()
    x = tokens()
    with torch.no_grad(), handle.mix(uniform(handle.bank)):
        y = model(x)
    third = dict.fromkeys("abc", 1 / 3)
    truth = merged(Net(), adapters(), third)(x).detach()
    base = Net().double()(x).detach()
    reference = dense(dict.fromkeys(ALL, third), x, torch.float32)
    assert_within_budget(y - base.float(), reference - base.float(), truth - base)


def test_uniform_needs_adapters():
    with pytest.raises(ValueError, match="uniform: bank must be an AdapterBank with adapters"):
        uniform(AdapterBank())


@CONSTRAINT
def test_starts_as_the_uniform_composition(constraint):
    model, handle = attached()
    composition = LearnedComposition(handle.bank, constraint=constraint)
    x = tokens()
    with torch.no_grad(), handle.mix(uniform(handle.bank)):
        wanted = model(x)
    with torch.no_grad(), handle.mix(composition.mixture()):
        assert torch.equal(model(x), wanted)
    assert composition.logits.shape == (3, 3)
    assert [*composition.state_dict()] == ["logits", "_extra_state"]


@CONSTRAINT
def test_outputs_are_sums_of_weighted_products(constraint):
    model, handle = attached()
    composition = drawn(handle, constraint)
    x, weights = tokens(), composition.weights()
    with torch.no_grad(), handle.mix(composition.mixture()):
        y = model(x)
    assert_within_budget(y, dense(weights, x, torch.float32), dense(weights, x))


def loss_of(model, handle, weights):
    """The loss as a function of weights [L, J] in float64 (a Mixture reads them as float32)."""
    layers, ids = handle.bank.modules, torch.arange(3, dtype=torch.int32)[None]
    with handle.route(lambda layer, _: (ids, weights[layers.index(layer)][None])):
        return model(tokens()).square().mean()


@CONSTRAINT
def test_the_gradient_is_that_of_finite_differences(constraint):
    model, handle = attached(torch.float64)
    composition = drawn(handle, constraint).double()

    def loss(logits):
        weights = torch.func.functional_call(composition, {"logits": logits}, ())
        return loss_of(model, handle, weights)

    assert torch.autograd.gradcheck(loss, composition.logits)


def test_a_detached_denominator_gives_another_gradient():
    """The public code's softmax: the control of the test above."""
    model, handle = attached(torch.float64)
    composition = drawn(handle).double()

    def theirs(logits):
        power = logits.exp()
        return loss_of(model, handle, power / power.sum(-1, keepdim=True).detach())

    assert not torch.autograd.gradcheck(theirs, composition.logits, raise_exception=False)
    gradients = [
        torch.autograd.grad(loss, composition.logits)[0]
        for loss in (loss_of(model, handle, composition()), theirs(composition.logits))
    ]
    # A shift of all logits of a layer changes nothing, which only the true gradient knows.
    ours, detached = (g.sum(-1).abs().max() / g.abs().max() for g in gradients)
    assert ours < 1e-12 and detached > 0.1


def test_gradients_through_a_mixture_meet_the_budget():
    def gradient(dtype):
        model, handle = attached(dtype)
        composition = drawn(handle)
        if dtype == torch.float64:
            loss = loss_of(model, handle, composition.double()())
        else:
            with handle.mix(composition.mixture()):
                loss = model(tokens()).square().mean()
        return torch.autograd.grad(loss, composition.logits)[0]

    def reference():
        model, handle = attached()
        composition = drawn(handle)
        weights = {}
        for i, layer in enumerate(ALL):
            weight = model.get_submodule(layer).weight
            for p, one in zip(composition()[i], adapters(), strict=True):
                part = one.modules.get(layer)
                if part is not None:
                    update = p * part.scale * (part.lora_b.T @ part.lora_a)
                    weight = weight + (update.T if part.embedding else update)
            weights[f"{layer}.weight"] = weight
        loss = torch.func.functional_call(model, weights, (tokens(),)).square().mean()
        return torch.autograd.grad(loss, composition.logits)[0]

    assert_within_budget(gradient(torch.float32), reference(), gradient(torch.float64))


def test_the_simplex_reaches_exact_zeros_and_stays_put_on_itself():
    _, handle = attached()
    composition = LearnedComposition(handle.bank, constraint="simplex")
    rows = torch.tensor([[0.25, 0.25, 0.5], [2.0, 0.0, -1.0], [1.0, 0.5, -3.0]])
    composition.logits.data.copy_(rows)
    wanted = torch.tensor([[0.25, 0.25, 0.5], [1.0, 0.0, 0.0], [0.75, 0.25, 0.0]])
    assert torch.equal(composition(), wanted)
    composition.entropy().backward()
    assert composition.logits.grad.isfinite().all()


def test_entropy_and_l1():
    _, handle = attached()
    start = LearnedComposition(handle.bank)
    three = torch.tensor(3.0)
    assert_within_budget(start.entropy(), three.log(), three.double().log())
    free = LearnedComposition(handle.bank, constraint="none")
    free.logits.data.copy_(torch.tensor([[1.0, -2.0, 0.5]]).expand(3, 3))
    assert free.l1() == 3.5
    with pytest.raises(ValueError, match=r"constraint must be 'softmax' or 'simplex'.*got 'none'"):
        free.entropy()
    with pytest.raises(ValueError, match=r"constraint must be 'none'.*got 'softmax'"):
        start.l1()


@CONSTRAINT
def test_a_state_dict_comes_back(constraint):
    _, handle = attached()
    one, other = drawn(handle, constraint), LearnedComposition(handle.bank, constraint=constraint)
    other.load_state_dict(load_bytes(save_bytes(one.state_dict())))
    assert torch.equal(one.logits, other.logits) and one.weights() == other.weights()
    copied = copy.deepcopy(one)
    copied.load_state_dict(one.state_dict())
    assert copied.names == ("a", "b", "c") and copied.weights() == one.weights()


@pytest.mark.parametrize(
    "options, what",
    [
        ({"names": ["b", "a", "c"]}, r"names \['b', 'a', 'c'\], got \['a', 'b', 'c'\]"),
        ({"constraint": "simplex"}, "constraint 'simplex', got 'softmax'"),
    ],
)
def test_a_state_dict_of_something_else_is_refused(options, what):
    _, handle = attached()
    state = drawn(handle).state_dict()
    other = LearnedComposition(handle.bank, **options)
    before = other.logits.detach().clone()
    with pytest.raises(ValueError, match=f"state_dict must have this composition's {what}"):
        other.load_state_dict(state)
    assert torch.equal(other.logits, before)


@CONSTRAINT
@pytest.mark.parametrize("options", [{}, {"combination_type": "svd", "energy": 1.0}], ids=str)
def test_merged_does_what_the_composition_does(constraint, options):
    model, handle = attached()
    composition = drawn(handle, constraint)
    found, report = composition.merged(**options)
    assert report.error_to_exact < 1e-6 and found.metadata["merge"]["weights"]["up"].keys() == set(
        "abc"
    )
    x, weights = tokens(), composition.weights()
    handle.detach()
    bank = AdapterBank()
    bank.add(found)
    with torch.no_grad(), attach(model, bank).mix("composition"):
        assert_within_budget(model(x), dense(weights, x, torch.float32), dense(weights, x))


def test_merged_leaves_out_what_has_no_weight():
    _, handle = attached()
    composition = LearnedComposition(handle.bank, constraint="none")
    composition.logits.data.zero_()
    composition.logits.data[1, 1] = -0.5
    found, _ = composition.merged(name="one")
    (layer,) = found.modules
    assert layer == "up" and found.modules[layer].lora_a.shape[0] == 5
    composition.logits.data.zero_()
    with pytest.raises(ValueError, match=r"merged: weights must hold one other than 0 .* got none"):
        composition.merged()


@pytest.mark.parametrize(
    "options, what",
    [
        ({"names": ["a", "x"]}, "name must be a loaded adapter"),
        ({"names": "a"}, "names must be a list of names, got 'a'"),
        ({"names": ["a", "a"]}, "names must be distinct, and at least one"),
        ({"names": []}, "names must be distinct, and at least one"),
        ({"constraint": "convex"}, "constraint must be one of .*'simplex'.* got 'convex'"),
    ],
    ids=str,
)
def test_rejects(options, what):
    _, handle = attached()
    with pytest.raises(ValueError, match=what):
        LearnedComposition(handle.bank, **options)


def test_a_bank_with_other_modules_is_refused():
    _, handle = attached()
    composition = LearnedComposition(handle.bank)
    handle.detach()
    handle.bank.remove("a"), handle.bank.remove("b")
    handle.bank.compact()
    with pytest.raises(RuntimeError, match="the modules it had, 3, got 2"):
        composition.mixture()
