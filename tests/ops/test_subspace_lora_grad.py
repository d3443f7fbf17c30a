"""Gradients of subspace_lora: gradcheck of the reference, the budget for every implementation."""

import pytest
import torch
from support.mixture_lora import double
from support.subspace_lora import FORMS, IMPLS, LEAVES, gradients, problem, require, run

from lora_fused import testing

ROUTES = {  # label: rows of x, mixtures, row_mixture
    "own": (12, 12, None),
    "shared": (12, 3, None),
    "one": (12, 1, None),
    "repeated": (12, 3, [2, 0, 2, 2, 1, 0]),
    "unused": (12, 3, [1, 1]),
    "empty": (0, 3, []),
}


def with_base(p: dict) -> dict:
    n, o = p["x"].shape[0], p["basis_b"].shape[1]
    g = torch.Generator().manual_seed(5)
    return {**p, "base": torch.randn(n, o, generator=g).to(p["x"].dtype)}


def leaves_of(p: dict) -> tuple:
    return tuple(k for k in LEAVES if p[k] is not None)


def routed(route: str, form: str, seed: int = 0) -> dict:
    n, mixtures, at = ROUTES[route]
    sizes = (n, 3, (1, 3, 8, 0, 2), 6, 5, 17, 9)
    p = problem(*sizes, form=form, mixtures=mixtures, row_mixture=at, seed=seed)
    p["adapter_ids"][0] = torch.tensor([1, -1, 1])  # twice in one row
    p["weights"][0] = torch.tensor([0.0, 2.0, -0.5])
    return with_base(p)


def check(impl: str, *problems: dict) -> list[dict]:
    """Hold gradients to the budget, those of several problems together.

    (The reference's error in three numbers may be next to nothing by luck.)
    """
    wanted = leaves_of(problems[0])
    actual = [gradients(p, impl, wanted) for p in problems]
    competitor = [gradients(p, "reference", wanted) for p in problems]
    exact = [gradients(double(p), "reference", wanted) for p in problems]
    for leaf in wanted:
        assert all(g[leaf].dtype == problems[0][leaf].dtype for g in actual)
        joined = [
            torch.cat([g[leaf].flatten() for g in all_]) for all_ in (actual, competitor, exact)
        ]
        testing.assert_within_budget(*joined, leaf)
    return actual


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("route", ROUTES)
def test_reference_passes_gradcheck(route, form):
    p = double(routed(route, form))
    names = leaves_of(p)

    def call(*values):
        return run({**p, **dict(zip(names, values, strict=True))}, "reference")

    assert torch.autograd.gradcheck(call, [p[k].detach().requires_grad_() for k in names])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("route", ROUTES)
def test_within_budget(route, form, impl):
    require(impl)
    check(impl, *(routed(route, form, seed) for seed in range(8)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_within_budget_at_awkward_sizes(form, impl):
    require(impl)
    for shape in (
        (65, 8, (1, 2, 5) * 40, 33, 65, 65, 127),
        (200, 4, (64, 33) * 8, 65, 24, 300, 65),
    ):
        check(impl, with_base(problem(*shape, form=form)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [12, 65])
def test_one_adapter_for_all_rows(rows, form, impl):
    """Its pairs have one factor, which torch repeats by a stride of zero."""
    require(impl)
    problems = []
    for seed in range(8):
        p = problem(rows, 1, (8, 3), 6, 5, 17, 9, form=form, mixtures=1, seed=seed)
        p["adapter_ids"][:], p["weights"][:] = 1, 0.7
        problems.append(with_base(p))
    check(impl, *problems)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_negative_control(form, impl):
    """The budget sees two adapter ids swapped in a single row, in every gradient but base's."""
    require(impl)
    p = problem(65, 2, (8,) * 4, 16, 16, 64, 48, form=form)
    p["adapter_ids"][40] = torch.tensor([0, 1])
    p["weights"][40] = torch.tensor([0.7, 0.3])
    swapped = p["adapter_ids"].clone()
    swapped[40] = torch.tensor([1, 0])
    wrong = gradients({**p, "adapter_ids": swapped}, impl)
    competitor, exact = gradients(p, "reference"), gradients(double(p), "reference")
    for leaf, grad in wrong.items():
        with pytest.raises(AssertionError, match="error"):
            testing.assert_within_budget(grad, competitor[leaf], exact[leaf], leaf)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_weight_zero_keeps_its_gradient(form, impl):
    require(impl)
    p = problem(12, 3, (1, 3, 8), 6, 5, 17, 9, form=form)
    p["adapter_ids"] = torch.randint(3, (12, 3)).int()
    p["adapter_ids"][3, 1] = -1
    p["weights"].zero_()
    (grads,) = check(impl, p)
    zero = grads["weights"] == 0
    assert zero.sum() == 1 and zero[3, 1], "only a weight without an adapter has no gradient"
    assert not any(grads[k].any() for k in grads if k != "weights")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_the_weight_of_no_adapter_is_not_read(form, impl):
    require(impl)
    p = problem(12, 2, (3, 8), 6, 5, 17, 9, form=form)
    p["adapter_ids"][:, 0], p["adapter_ids"][:, 1] = -1, 1
    y, clean = run(p, impl), gradients(p, impl, ("x", "weights"))
    p["weights"][:, 0] = torch.nan
    assert torch.equal(run(p, impl), y)
    for leaf, grad in gradients(p, impl, ("x", "weights")).items():
        assert torch.equal(grad, clean[leaf]), leaf


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_rows_without_adapter_pass_nothing_on(form, impl):
    """Rows of -1 have a zero gradient and give none, even where x is not finite."""
    require(impl)
    p = with_base(problem(12, 3, (1, 3, 8), 6, 5, 17, 9, form=form))
    p["adapter_ids"][::2] = -1
    p["x"][::2] = torch.nan
    grads = gradients(p, impl)
    clean = gradients({**p, "x": p["x"].nan_to_num(1.0)}, impl)
    for leaf, grad in grads.items():
        assert torch.equal(grad, clean[leaf]), leaf
    assert not grads["x"][::2].any() and not grads["weights"][::2].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_unused_adapters_have_zero_gradients(form, impl):
    require(impl)
    p = problem(12, 2, (1, 3, 8), 6, 5, 17, 9, form=form)
    p["adapter_ids"][:] = torch.tensor([0, 1])
    grads = gradients(p, impl, ("core_a", "scale"))
    unused = slice(4, 12) if form == "pairs" else 2
    assert not grads["core_a"][unused].any() and grads["core_a"][0].all()
    assert grads["scale"][2] == 0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_subsets(form, impl):
    """Each gradient is the same whatever else is asked for; nothing else gets one."""
    require(impl)
    p = routed("repeated", form)
    together = gradients(p, impl)
    for wanted in [(leaf,) for leaf in leaves_of(p)] + [("x", "weights"), ("core_a", "scale")]:
        for leaf, grad in gradients(p, impl, wanted).items():
            assert torch.equal(grad, together[leaf]), (wanted, leaf)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_any_layout(form, impl):
    """An incoming gradient may be expanded or transposed; a second backward gives the same."""
    require(impl)
    p = routed("shared", form)
    leaves = {k: p[k].detach().requires_grad_() for k in leaves_of(p)}
    y = run(p, impl, **leaves)
    for grad in (torch.ones(1, 1).expand(y.shape), torch.randn(y.shape[::-1]).T):
        got = torch.autograd.grad(y, list(leaves.values()), grad, retain_graph=True)
        plain = torch.autograd.grad(y, list(leaves.values()), grad.contiguous(), retain_graph=True)
        assert all(torch.equal(g, h) for g, h in zip(got, plain, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_backward_keeps_the_coordinates_of_x_and_not_x(form):
    """x may be overwritten once the result is there; what backward does read may not."""
    require("native")
    p = routed("own", form)
    wanted = gradients(p, "native", ("core_a", "weights"))
    leaves = {k: p[k].detach().requires_grad_() for k in wanted}
    x, scale = p["x"].clone(), p["scale"].clone()
    y = run(p, "native", **leaves, x=x, scale=scale)
    x.fill_(torch.nan)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).bfloat16().to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), g, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted.values(), strict=True))
    scale.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_bases_and_second_derivatives_have_no_gradient():
    require("native")
    p = routed("own", "pairs")
    with torch.no_grad():
        run(p, "native", basis_a=p["basis_a"].clone().requires_grad_())  # none is asked for
    leaves = [p[k].detach().requires_grad_() for k in ("x", "weights")]
    y = run(p, "native", x=leaves[0], weights=leaves[1])
    grad = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad[0].sum().backward()
