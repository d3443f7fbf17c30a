"""How good the components of stacked_svd are, and that its certificate tells the truth."""

import pytest
import torch
from support.stacked_svd import (
    DTYPES,
    METHODS,
    assert_is_svd,
    excess,
    matrix,
    product,
    spectrum,
    true_error,
)

from lora_fused.ops import stacked_svd

KINDS = ("inverse", "slow", "steep", "flat", "gap")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_near_the_best(dtype, kind, method):
    m = matrix(kind, 300, 200).to(dtype)
    found = stacked_svd(m, rank=16, method=method)
    assert_is_svd(found)
    limits = {"randomized": 0.05, "krylov": 0.005, "gram": 0.005, "exact": 1e-4}
    if kind != "steep":  # its best error is about the rounding of float32
        assert excess(m, found) < limits[method]


def test_power_iterations_are_needed():
    """Negative control: without them a flat spectrum fails the bound of the test above."""
    m = torch.randn(400, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bound = 0.01
    assert excess(m, stacked_svd(m.float(), rank=40, power_iterations=0)) > 2 * bound
    assert excess(m, stacked_svd(m.float(), rank=40, method="krylov")) < bound


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("method", ["randomized", "krylov"])
def test_expected_error_of_halko_martinsson_tropp(method, iterations):
    """E ||M - QQ^T M||_F^2 <= (1 + P / (p - 1)) * tail, theorem 10.5, over 20 test matrices."""
    m = matrix("slow", 200, 150)
    tail = spectrum("slow", 150)[12:].square().sum()
    squares = []
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        options = {"power_iterations": iterations, "method": method, "generator": g}
        found = stacked_svd(m.float(), rank=12, oversampling=8, **options)
        squares.append(true_error(m, found) ** 2)
    # The theorem is about all Q columns; what is cut off after them adds at most the tail.
    assert torch.stack(squares).mean() <= (1 + 12 / 7) * tail + tail


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [5, 8])
def test_recovers_a_low_rank_matrix_exactly(rank, method):
    g = torch.Generator().manual_seed(0)
    m = torch.randn(300, 5, generator=g) @ torch.randn(5, 200, generator=g)
    found = stacked_svd(m, rank=rank, method=method)
    assert_is_svd(found)
    assert true_error(m, found) < 1e-5 * torch.linalg.matrix_norm(m.double())
    assert found.energy.sum() > 1 - 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", [*KINDS, "low"])
@pytest.mark.parametrize("seed", range(6))
def test_certificate(seed, kind, method):
    """It covers the true error always, and by at most 5 %, down to the rounding of float32."""
    if kind == "low":
        m = matrix("slow", 150, 110, seed=seed, count=9).float()
    else:
        m = matrix(kind, 150, 110, seed=seed).float()
    g = torch.Generator().manual_seed(seed)
    for rank in (1, 9, 60):
        found = stacked_svd(m, rank=rank, method=method, generator=g)
        error = true_error(m, found)
        assert error <= found.residual <= 1.05 * error


def test_certificate_of_factors_that_were_tampered_with():
    """Negative control: a bound from ||M||^2 - ||s||^2 alone would miss small residuals."""
    m = matrix("slow", 150, 110, count=9).float()
    found = stacked_svd(m, rank=9, method="krylov")
    total, held = (t.double().square().sum() for t in (m, found.s))
    subtracted, error = (total - held).clamp_min(0).sqrt(), true_error(m, found)
    assert not error <= subtracted <= 1.05 * error


@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("kind", ["inverse", "slow"])
def test_energy_finds_the_rank(kind, method):
    for seed in range(20):
        m = matrix(kind, 260, 180, seed=seed)
        share = torch.linalg.svdvals(m).square().cumsum(0)
        rank = int((share < 0.95 * share[-1]).sum()) + 1
        g = torch.Generator().manual_seed(seed)
        found = stacked_svd(m.float(), energy=0.95, method=method, generator=g)
        assert rank <= len(found.s) <= rank + 2
        assert found.energy.sum() >= 0.95 * (1 - 1e-6)
        assert found.residual**2 <= 0.0501 * m.square().sum() * (1 + 1e-2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("energy", [1e-6, 0.5, 1.0])
def test_energy_at_its_ends(energy, method):
    m = matrix("slow", 80, 60).float()
    found = stacked_svd(m, energy=energy, method=method)
    assert_is_svd(found)
    assert found.energy.sum() >= energy * (1 - 1e-5)
    assert len(found.s) == 1 if energy < 0.1 else len(found.s) <= 60


def test_energy_is_the_share_of_each_component():
    m = matrix("inverse", 80, 60).float()
    found = stacked_svd(m, rank=6)
    squares = spectrum("inverse", 60).square()
    assert torch.allclose(found.energy.double(), squares[:6] / squares.sum(), rtol=1e-4)


@pytest.mark.parametrize("method", ["randomized", "krylov", "gram"])
def test_repeats_itself_and_follows_the_generator(method):
    m = matrix("slow", 300, 200).float()

    def run(seed=None):
        g = None if seed is None else torch.Generator().manual_seed(seed)
        return stacked_svd(m, rank=8, method=method, generator=g)

    for a, b in ((run(), run()), (run(3), run(3))):
        assert all(torch.equal(x, y) for x, y in zip(a[:5], b[:5], strict=True))
    if method == "randomized":
        assert not torch.equal(run(3).s, run(4).s)


@pytest.mark.parametrize("method", METHODS)
def test_thread_count_changes_rounding_at_most(method):
    m = matrix("gap", 600, 300).float()
    alone = stacked_svd(m, rank=10, method=method)
    torch.set_num_threads(2)
    found = stacked_svd(m, rank=10, method=method)
    assert torch.allclose(product(found), product(alone), atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_order_of_rows_does_not_matter(method):
    m = matrix("gap", 300, 200).float()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    found = stacked_svd(m, rank=10, method=method)
    moved = stacked_svd(m[order], rank=10, method=method)
    assert torch.allclose(product(moved), product(found)[order], atol=1e-6)
    assert torch.allclose(moved.vh, found.vh, atol=1e-4)


def test_small_singular_values_of_a_gram_matrix():
    """Squares in float32 lose what is below 3e-4 of the largest; the method then iterates."""
    m = matrix("steep", 300, 200).float()  # component 40 is 5e-5 of the first
    found = stacked_svd(m, rank=40, method="gram")
    truth = torch.linalg.svdvals(m.double())[:40]
    assert torch.allclose(found.s.double(), truth, rtol=1e-2)
    assert_is_svd(found)


def test_auto_says_what_it_took():
    assert stacked_svd(matrix("slow", 40, 30).float(), rank=3).method == "exact"
    assert stacked_svd(torch.randn(100, 2000), rank=12).method == "gram"
    assert stacked_svd(torch.randn(1500, 1200), rank=4).method == "krylov"
    assert stacked_svd(torch.randn(900, 700), rank=4, power_iterations=0).method == "randomized"
