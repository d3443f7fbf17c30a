"""Batched quadratic problems against a QP solver that many use, and where they degenerate."""

import pytest
import torch

from lora_fused.methods import quadratic as quadratic_module
from lora_fused.methods.quadratic import affine, lasso, simplex

SIZES = [(2, 5), (3, 8), (5, 5), (8, 64), (16, 24)]  # N points in E dimensions
PER_SIZE = 200  # 1000 problems in all


def problems(points: int, size: int, count: int = PER_SIZE, seed: int = 0):
    """G, c, l1 of random points and queries, some inside the hull's plane, some far outside."""
    generator = torch.Generator().manual_seed(1000 * points + size + seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    z, target = normal(count, points, size), normal(count, size)
    target *= 3 * torch.rand(count, 1, generator=generator, dtype=torch.float64)
    l1 = size * torch.rand(count, generator=generator, dtype=torch.float64) ** 2
    return *quadratic(z, target), l1


def quadratic(z, target):
    z, target = z - z[:, :1], target - z[:, 0]
    centre = z.mean(1)
    z, target = z - centre[:, None], target - centre
    return z @ z.mT, -2 * (z @ target[..., None])[..., 0]


def value(gram, linear, w, l1=0.0):
    return (w * ((gram @ w[..., None])[..., 0] + linear)).sum(-1) + l1 * w.abs().sum(-1)


def oracle(gram, linear, l1=None):
    """Weights by clarabel: w >= 0 without l1, else differences of nonnegative parts."""
    clarabel = pytest.importorskip("clarabel")
    np, sparse = pytest.importorskip("numpy"), pytest.importorskip("scipy.sparse")
    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.tol_gap_abs = settings.tol_gap_rel = settings.tol_feas = 1e-12
    count = linear.shape[-1]
    parts = np.eye(count) if l1 is None else np.hstack([np.eye(count), -np.eye(count)])
    width = parts.shape[1]
    rows = sparse.csc_matrix(np.vstack([parts.sum(0)[None], -np.eye(width)]))
    cones = [clarabel.ZeroConeT(1), clarabel.NonnegativeConeT(width)]
    found = []
    for i in range(len(linear)):
        square = sparse.csc_matrix(np.triu(2 * parts.T @ gram[i].numpy() @ parts))
        cost = parts.T @ linear[i].numpy() + (0.0 if l1 is None else float(l1[i]))
        right = np.r_[1.0, np.zeros(width)]
        solver = clarabel.DefaultSolver(square, cost, rows, right, cones, settings)
        found.append(torch.tensor(parts @ np.array(solver.solve().x)))
    return torch.stack(found)


def largest_gap(actual, expected):
    return float((actual - expected).abs().max())


@pytest.mark.parametrize("points, size", SIZES, ids=lambda n: str(n))
def test_weights_are_those_of_the_oracle(points, size):
    gram, linear, l1 = problems(points, size)
    on_simplex, with_l1 = simplex(gram, linear), lasso(gram, linear, l1)
    assert largest_gap(on_simplex, oracle(gram, linear)) < 1e-5
    expected = oracle(gram, linear, l1)
    assert largest_gap(with_l1, expected) < 1e-5
    # The comparison can fail: another l1, or the linear weights cut off at zero, are seen.
    assert largest_gap(lasso(gram, linear, 1.05 * l1 + 0.05), expected) > 1e-3
    cut = affine(gram, linear).clamp_min(0)
    cut_off = largest_gap(cut / cut.sum(-1, keepdim=True), on_simplex)
    assert cut_off > 1e-2 if points > 2 else cut_off < 1e-9
    assert (with_l1 < 0).any() and (with_l1 == 0).any() and (on_simplex == 0).any()


@pytest.mark.parametrize("points, size", [(6, 2), (20, 3), (40, 20)], ids=lambda n: str(n))
def test_more_points_than_dimensions_reach_the_oracles_value(points, size):
    """Weights are not unique then; what they minimise is."""
    gram, linear, l1 = problems(points, size, 60)
    scale = gram.diagonal(0, -2, -1).amax(-1) + linear.abs().amax(-1)
    for actual, expected, cost in (
        (simplex(gram, linear), oracle(gram, linear), 0.0),
        (lasso(gram, linear, l1), oracle(gram, linear, l1), l1),
    ):
        gap = value(gram, linear, actual, cost) - value(gram, linear, expected, cost)
        assert (gap.abs() / scale).max() < 1e-9
        worse = (actual + 1e-3 * torch.eye(points)[0]) / (1 + 1e-3)
        gap = value(gram, linear, worse, cost) - value(gram, linear, expected, cost)
        assert (gap / scale).max() > 1e-7  # a slightly different w is told from the best


def test_affine_is_the_bordered_system():
    gram, linear, _ = problems(6, 9)
    one = torch.ones(len(gram), 6, 1, dtype=torch.float64)
    zero = torch.zeros(len(gram), 1, 1, dtype=torch.float64)
    system = torch.cat((torch.cat((2 * gram, one), 2), torch.cat((one.mT, zero), 2)), 1)
    right = torch.cat((-linear, torch.ones(len(gram), 1, dtype=torch.float64)), 1)
    expected = torch.linalg.solve(system, right)[:, :6]
    assert largest_gap(affine(gram, linear), expected) < 1e-9


def test_l1_goes_from_linear_to_simplex():
    gram, linear, _ = problems(6, 9)
    on_simplex, between = simplex(gram, linear), []
    for l1 in (0.0, 1e-9, 1.0, 1e9):
        between.append(lasso(gram, linear, torch.full((len(gram),), l1, dtype=torch.float64)))
    assert largest_gap(between[0], affine(gram, linear)) < 1e-9
    assert largest_gap(between[1], affine(gram, linear)) < 1e-7
    assert torch.equal(between[3], on_simplex)
    mass = [float(w.clamp_max(0).sum()) for w in between]
    assert mass[0] < mass[2] < mass[3] == 0


def degenerate():
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    z, far = normal(40, 8, 30), normal(40, 30)
    twice = z.clone()
    twice[:, 1], twice[:, 3] = twice[:, 0], twice[:, 2]
    between = z.clone()
    between[:, 3] = (between[:, 0] + between[:, 1]) / 2
    close = z.clone()
    close[:, 1] = close[:, 0] + 1e-5 * normal(40, 30)
    return {
        "one": (z[:, :1], far),
        "two_alike": (z[:, :1].expand(40, 2, 30), far),
        "all_alike": (z[:, :1].expand(40, 6, 30), far),
        "all_alike_and_the_query": (z[:, :1].expand(40, 6, 30), z[:, 0]),
        "duplicates": (twice, far),
        "nearly_duplicates": (close, far),
        "affinely_dependent": (between, far),
        "query_is_a_point": (z, z[:, 2]),
        "query_is_a_duplicate": (twice, twice[:, 2]),
        "query_is_the_mean": (z, z.mean(1)),
        "more_than_dimensions": (normal(40, 64, 3), normal(40, 3)),
        "one_dimension": (normal(40, 16, 1), normal(40, 1)),
        "far_away": (z, 1e6 * far),
        "far_and_close_together": (z * 1e-3 + 5, far),
        "huge": (z * 1e12, far),
        "tiny": (z * 1e-12, far * 1e-12),
    }


@pytest.mark.parametrize("name", degenerate())
def test_degenerate_problems_have_finite_weights_that_sum_to_one(name):
    gram, linear = quadratic(*degenerate()[name])
    scale = gram.diagonal(0, -2, -1).amax(-1) + linear.abs().amax(-1) + 1e-300
    best = simplex(gram, linear)
    found = {"affine": affine(gram, linear), "simplex": best}
    for l1 in (0.0, 1e-6, 1.0, 10.0, 1e12):
        weights = lasso(gram, linear, torch.full((40,), l1, dtype=torch.float64))
        found[f"l1 {l1}"] = weights
        gain = value(gram, linear, best, l1) - value(gram, linear, weights, l1)
        assert (gain / (scale + l1)).min() > -1e-9, l1  # never worse than w >= 0
    for label, weights in found.items():
        assert weights.isfinite().all(), label
        # Sums of large weights of both signs are exact to their own rounding.
        assert ((weights.sum(-1) - 1).abs() <= 1e-15 * 64 * weights.abs().sum(-1)).all(), label
    assert (best >= 0).all()
    if "alike" in name:
        assert largest_gap(best, torch.full_like(best, 1 / best.shape[1])) < 1e-12


def test_equals_are_treated_alike():
    gram, linear = quadratic(*degenerate()["duplicates"])
    l1 = torch.full((40,), 5.0, dtype=torch.float64)
    for weights in (affine(gram, linear), simplex(gram, linear), lasso(gram, linear, l1)):
        assert largest_gap(weights[:, 0], weights[:, 1]) < 1e-9
        assert largest_gap(weights[:, 0], weights[:, 4]) > 0.01
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    turned = lasso(gram[:, order][:, :, order], linear[:, order], l1)
    assert largest_gap(turned, lasso(gram, linear, l1)[:, order]) < 1e-9


def test_a_query_that_is_a_point_gets_that_point_alone():
    gram, linear = quadratic(*degenerate()["query_is_a_point"])
    expected = torch.eye(8, dtype=torch.float64)[2].expand(40, 8)
    assert torch.equal(simplex(gram, linear), expected)
    assert largest_gap(affine(gram, linear), expected) < 1e-12


def test_a_problem_does_not_depend_on_its_batch():
    gram, linear, l1 = problems(8, 64, 30)
    together = lasso(gram, linear, l1)
    alone = [lasso(gram[i : i + 1], linear[i : i + 1], l1[i : i + 1]) for i in range(30)]
    assert largest_gap(together, torch.cat(alone)) < 1e-12


@pytest.mark.parametrize("name", ["duplicates", "far_away", "more_than_dimensions"])
def test_some_thirty_steps_are_enough(name, monkeypatch):
    """On the simplex and with l1 together; where rounding is let grow, steps go on in vain."""
    steps, step = [], quadratic_module._step
    monkeypatch.setattr(quadratic_module, "_step", lambda *a: steps.append(1) or step(*a))
    gram, linear = quadratic(*degenerate()[name])
    lasso(gram, linear, torch.ones(40, dtype=torch.float64))
    assert 8 < len(steps) < 40


def test_what_cannot_be_solved_is_refused():
    gram, linear, _ = problems(5, 8, 4)
    linear[2] = torch.nan
    with pytest.raises(RuntimeError, match="weights: the gap must close"):
        simplex(gram, linear)
