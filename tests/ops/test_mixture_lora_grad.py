"""Gradients of mixture_lora: gradcheck of the reference, the budget for every implementation."""

import pytest
import torch
from support.mixture_lora import FORMS, IMPLS, LEAVES, double, gradients, problem, require, run

from lora_fused import testing
from lora_fused.ops import mixture_lora

ROUTES = {  # label: rows of x, mixtures, row_mixture
    "own": (12, 12, None),
    "shared": (12, 3, None),
    "one": (12, 1, None),
    "repeated": (12, 3, [2, 0, 2, 2, 1, 0]),
    "unused": (12, 3, [1, 1]),
    "empty": (0, 3, []),
}


def with_base(p: dict) -> dict:
    n, o = p["x"].shape[0], p["lora_b"].shape[-1]
    g = torch.Generator().manual_seed(5)
    return {**p, "base": torch.randn(n, o, generator=g).to(p["x"].dtype)}


def routed(route: str, form: str = "packed", ranks: tuple = (1, 3, 8, 0, 2), **kwargs) -> dict:
    n, mixtures, at = ROUTES[route]
    p = problem(n, 3, ranks, 17, 9, form=form, mixtures=mixtures, row_mixture=at, **kwargs)
    p["adapter_ids"][0] = torch.tensor([1, -1, 1])  # twice in one row
    p["weights"][0] = torch.tensor([0.0, 2.0, -0.5])
    return with_base(p)


def check(p: dict, impl: str, wanted: tuple = LEAVES) -> dict:
    actual, competitor = gradients(p, impl, wanted), gradients(p, "reference", wanted)
    exact = gradients(double(p), "reference", wanted)
    for leaf in wanted:
        assert actual[leaf].dtype == p[leaf].dtype
        testing.assert_within_budget(actual[leaf], competitor[leaf], exact[leaf], leaf)
    return actual


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("route", ROUTES)
def test_reference_passes_gradcheck(route, form):
    p = double(routed(route, form))
    if form != "packed":  # finite differences cannot step from the NaN of the padding
        p = {k: t.nan_to_num(0.5) if k in ("lora_a", "lora_b") else t for k, t in p.items()}
    leaves = [p[k].detach().requires_grad_() for k in LEAVES]

    def call(*values):
        return run({**p, **dict(zip(LEAVES, values, strict=True))}, "reference")

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("route", ROUTES)
def test_within_budget(route, form, impl):
    require(impl)
    check(routed(route, form), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "shape", [(65, 8, (1, 2, 5) * 100, 65, 127), (65, 4, (64, 33) * 8, 300, 65)]
)
def test_within_budget_at_awkward_sizes(shape, impl):
    require(impl)
    check(with_base(problem(*shape)), impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [12, 65])
def test_one_adapter_for_all_rows(rows, impl):
    """Its pairs have one factor, which torch repeats by a stride of zero."""
    require(impl)
    p = with_base(problem(rows, 1, (8, 3), 17, 9, mixtures=1))
    p["adapter_ids"][:], p["weights"][:] = 1, 0.7
    check(p, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_negative_control(impl):
    """The budget sees two adapter ids swapped in a single row, in every gradient but base's."""
    require(impl)
    p = problem(65, 2, (8,) * 4, 64, 48)
    p["adapter_ids"][40] = torch.tensor([0, 1])
    p["weights"][40] = torch.tensor([0.7, 0.3])
    swapped = p["adapter_ids"].clone()
    swapped[40] = torch.tensor([1, 0])
    wrong = gradients({**p, "adapter_ids": swapped}, impl, LEAVES[:-1])
    competitor, exact = gradients(p, "reference"), gradients(double(p), "reference")
    for leaf, grad in wrong.items():
        with pytest.raises(AssertionError, match="error"):
            testing.assert_within_budget(grad, competitor[leaf], exact[leaf], leaf)


@pytest.mark.parametrize("impl", IMPLS)
def test_weight_zero_keeps_its_gradient(impl):
    require(impl)
    p = problem(12, 3, (1, 3, 8), 17, 9)
    p["adapter_ids"] = torch.randint(3, (12, 3)).int()
    p["adapter_ids"][3, 1] = -1
    p["weights"].zero_()
    grads = check(p, impl, LEAVES[:-1])
    zero = grads["weights"] == 0
    assert zero.sum() == 1 and zero[3, 1], "only a weight without an adapter has no gradient"
    assert not grads["x"].any() and not grads["lora_a"].any() and not grads["scale"].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_weight_of_no_adapter_is_not_read(impl):
    require(impl)
    p = problem(12, 2, (3, 8), 17, 9)
    p["adapter_ids"][:, 0], p["adapter_ids"][:, 1] = -1, 1
    y, clean = run(p, impl), gradients(p, impl, ("x", "weights"))
    p["weights"][:, 0] = torch.nan
    assert torch.equal(run(p, impl), y)
    for leaf, grad in gradients(p, impl, ("x", "weights")).items():
        assert torch.equal(grad, clean[leaf]), leaf


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_without_adapter_pass_nothing_on(impl):
    """Rows of -1 have a zero gradient and give none, even where x is not finite."""
    require(impl)
    p = with_base(problem(12, 3, (1, 3, 8), 17, 9))
    p["adapter_ids"][::2] = -1
    p["x"][::2] = torch.nan
    grads = gradients(p, impl)
    clean = gradients({**p, "x": p["x"].nan_to_num(1.0)}, impl)
    for leaf, grad in grads.items():
        assert torch.equal(grad, clean[leaf]), leaf
    assert not grads["x"][::2].any() and not grads["weights"][::2].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ("plain", "vllm"))
def test_padding_and_unused_adapters_have_zero_gradients(form, impl):
    require(impl)
    p = problem(12, 2, (1, 3, 8), 17, 9, form=form)
    p["adapter_ids"][:] = torch.tensor([0, 1])
    grads = gradients(p, impl, ("lora_a", "lora_b", "scale"))
    for side in ("lora_a", "lora_b"):
        assert not grads[side][0, 1:].any() and not grads[side][1, 3:].any()
        assert not grads[side][2].any() and grads[side][1, :3].all()
    assert grads["scale"][2] == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", ("packed", "vllm"))
def test_subsets(form, impl):
    """Each gradient is the same whatever else is asked for; nothing else gets one."""
    require(impl)
    p = routed("repeated", form)
    together = gradients(p, impl)
    for wanted in [(leaf,) for leaf in LEAVES] + [("x", "weights"), ("lora_b", "scale", "base")]:
        for leaf, grad in gradients(p, impl, wanted).items():
            assert torch.equal(grad, together[leaf]), (wanted, leaf)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_grad_and_defaults(impl):
    require(impl)
    p = routed("own")
    x = p["x"].requires_grad_()
    with torch.no_grad():
        assert not run(p, impl, x=x).requires_grad
    with torch.inference_mode():
        assert torch.equal(run(p, impl), run(p, impl))
    y = run({**p, "scale": None, "base": None}, impl, x=x)
    y.sum().backward()  # an expanded gradient
    exact = run(double({**p, "scale": None, "base": None}), "reference", x=x.detach().double())
    assert exact.shape == y.shape and x.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_any_layout(impl):
    """An incoming gradient may be expanded or transposed."""
    require(impl)
    p = routed("shared")
    leaves = {k: p[k].detach().requires_grad_() for k in LEAVES}
    y = run(leaves | {k: t for k, t in p.items() if k not in LEAVES}, impl)
    for grad in (torch.ones(1, 1).expand(y.shape), torch.randn(y.shape[::-1]).T):
        got = torch.autograd.grad(y, list(leaves.values()), grad, retain_graph=True)
        plain = torch.autograd.grad(y, list(leaves.values()), grad.contiguous(), retain_graph=True)
        assert all(torch.equal(g, h) for g, h in zip(got, plain, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_backward_gives_the_same(impl):
    require(impl)
    p = routed("repeated")
    leaves = {k: p[k].detach().requires_grad_() for k in LEAVES}
    y = mixture_lora(**{**p, **leaves}, impl=impl)
    once, twice = (torch.autograd.grad(y.sum(), leaves.values(), retain_graph=True) for _ in "ab")
    assert all(torch.equal(g, h) for g, h in zip(once, twice, strict=True))


def test_double_backward_is_an_error():
    require("native")
    p = routed("own")
    leaves = [p[k].detach().requires_grad_() for k in ("x", "weights")]
    y = run(p, "native", x=leaves[0], weights=leaves[1])
    grad = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad[0].sum().backward()


def test_inputs_changed_in_place_are_noticed():
    """A saved input that was overwritten is an error, not a wrong gradient."""
    require("native")
    p = routed("own")
    leaf = p["x"].detach().requires_grad_()
    weights = p["weights"].clone()
    y = run(p, "native", x=leaf, weights=weights)
    weights.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
