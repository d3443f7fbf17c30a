"""Gram matrices of stacked_svd: the native operator, measuring by the diagonal, accuracy."""

import hashlib
import itertools
import json

import pytest
import torch
from support.isas import ISAS, assert_tests_pass, digests_of, usable
from support.stacked_svd import DTYPES, excess, matrix, missing, true_error

from lora_fused import testing
from lora_fused.ops import stacked_svd
from lora_fused.ops.stacked_svd import gram_matrix, plan, registration, sources

native_only = pytest.mark.skipif(missing("native") is not None, reason=str(missing("native")))
IMPLS = ("native", "reference")
# L, T, I around the sizes of blocks (96 rows), panels (96), strips (48) and tiles (8 by 16).
SHAPES = ((1, 1, 1), (2, 95, 97), (1, 97, 48), (3, 200, 17), (1, 193, 305), (2, 30, 96), (1, 5, 63))


def problem(shape, dtype=torch.float32, *, weights=True, mean=True, seed=0) -> tuple:
    layers, rows, columns = shape
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g).to(dtype)
    weights = torch.rand(layers, rows, generator=g) + 0.5 if weights else None
    mean = torch.randn(layers, columns, generator=g) if mean else None
    return x, weights, mean, 2.0 ** torch.arange(-1, layers - 1)


def dense(x, weights, mean, scale, dtype=torch.float64) -> torch.Tensor:
    m = x.to(dtype) if mean is None else x.to(dtype) - mean[:, None].to(dtype)
    m = m if weights is None else m * weights[..., None].to(dtype)
    m = m * scale[:, None, None].to(dtype)
    return m.mT @ m


def run(impl: str, *args, mirror: bool = True) -> torch.Tensor:
    x = args[0]
    g = torch.zeros(len(x), x.shape[2], x.shape[2])
    registration.gram(impl, g, *args, mirror)
    return g


def require(impl: str) -> None:
    if missing(impl) is not None:
        pytest.skip(missing(impl))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_product(shape, dtype, mean, weights, impl):
    require(impl)
    args = problem(shape, dtype, weights=weights, mean=mean)
    found = run(impl, *args)
    testing.assert_within_budget(found, dense(*args, torch.float32), dense(*args))
    assert torch.equal(found, found.mT)


@native_only
def test_negative_control():
    """The budget sees one row left out, and one column of one row."""
    args = problem((1, 193, 97))
    for at in ((0, 96), (0, 192, 96)):
        less = args[0].clone()
        less[at] = 0
        found = run("native", less, *args[1:])
        with pytest.raises(AssertionError, match="error"):
            testing.assert_within_budget(found, dense(*args, torch.float32), dense(*args))


@native_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype):
    x, *rest = problem((2, 130, 98), dtype)
    expected = run("native", x, *rest)
    wide = x.new_full((2, 131, 199), torch.nan)
    wide[:, 1:, 3::2] = x
    inside = x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for view in (wide[:, 1:, 3::2], x.mT.contiguous().mT, inside):
        assert torch.equal(run("native", view, *rest), expected)
    one = x[:1].expand(2, -1, -1)
    assert torch.equal(run("native", one, *rest), run("native", one.contiguous(), *rest))


@pytest.mark.parametrize("impl", IMPLS)
def test_adds_and_mirrors_at_the_end(impl):
    """Chunks are added to one triangle; no rows at all still mirror."""
    require(impl)
    x, weights, mean, scale = args = problem((2, 300, 97))
    g = torch.zeros(2, 97, 97)
    for t in (slice(0, 96), slice(96, 97), slice(97, 300)):
        registration.gram(impl, g, x[:, t], weights[:, t], mean, scale, False)
    upper = g.triu()
    registration.gram(impl, g, x[:, :0], None, None, scale, True)
    assert torch.equal(g.triu(), upper) and torch.equal(g, g.mT)
    testing.assert_within_budget(g, run("reference", *args), dense(*args))


@native_only
@pytest.mark.parametrize("shape", [(1, 1000, 300), (5, 130, 97), (1, 4, 700)], ids=str)
def test_threads_change_nothing(shape):
    args, before, found = problem(shape), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(run("native", *args))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(other, found[0]) for other in found[1:])


@native_only
def test_a_batch_is_its_layers():
    args = problem((3, 130, 97))
    whole = run("native", *args)
    for l in range(3):
        assert torch.equal(run("native", *(t[l : l + 1] for t in args)), whole[l : l + 1])


@native_only
@pytest.mark.parametrize("weights", [False, True])
def test_registration(weights):
    operator = torch.ops.lora_fused.stacked_svd_gram_native.default
    for dtype in DTYPES:
        args = problem((2, 40, 33), dtype, weights=weights, mean=weights)
        for mirror in (False, True):
            torch.library.opcheck(operator, (torch.zeros(2, 33, 33), *args, mirror))


@native_only
@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (0, torch.zeros(2, 20, 19)),
        (0, torch.zeros(2, 20, 20, dtype=torch.float64)),
        (0, torch.zeros(2, 20, 40)[..., ::2]),
        (1, torch.ones(2, 30, 20, dtype=torch.float64)),
        (1, torch.ones(30, 20)),
        (2, torch.ones(2, 29)),
        (3, torch.ones(2, 19)),
        (4, torch.ones(1)),
    ],
)
def test_refuses_what_would_read_out_of_bounds(place, wrong):
    args = [torch.zeros(2, 20, 20), *problem((2, 30, 20))]
    args[place] = wrong
    with pytest.raises(RuntimeError, match="stacked_svd: "):
        torch.ops.lora_fused.stacked_svd_gram_native(*args, True)


@native_only
@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_passes(isa):
    chosen = "matches or strides or adds or threads or layers"
    assert_tests_pass(isa, chosen, __file__)


@native_only
def test_vector_widths_agree_bitwise():
    wide = [isa for isa in ISAS[1:] if isa in usable()]
    if len(wide) < 2:
        pytest.skip("this CPU has a single vector width")
    found = digests_of(wide, __file__)
    assert all(found[isa] == found[wide[0]] for isa in wide)


@pytest.mark.parametrize("kind", ["slow", "inverse", "steep", "flat"])
def test_measures_by_the_diagonal(kind, monkeypatch):
    """The same total and certificate as from reading the rows once more."""
    m = matrix(kind, 330, 210).float()
    traced = stacked_svd(m, rank=12, method="gram")
    monkeypatch.setattr(sources, "TRACED", 0)
    read = stacked_svd(m, rank=12, method="gram")
    assert torch.equal(traced.s, read.s)
    assert torch.allclose(traced.residual, read.residual, rtol=1e-5)
    assert true_error(m, traced) <= traced.residual


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e9, 1e30])
def test_scales_what_a_diagonal_cannot_measure(size):
    m = torch.stack([matrix("slow", 90, 70).float() * s for s in (1.0, size)])
    found = stacked_svd(m, rank=6, method="gram")
    assert torch.allclose(found.s[1] / size, found.s[0], rtol=1e-5)
    assert torch.all(true_error(m, found) <= found.residual)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_sees_what_is_not_finite(bad):
    m = torch.ones(2, 40, 90)
    m[1, 7, 3] = bad
    for stack in (m, m.mT.contiguous(), list(m)):
        with pytest.raises(ValueError, match=r"^stacked_svd: stack must be finite, got (nan|inf)"):
            stacked_svd(stack, rank=3, method="gram", weights=None)


@pytest.mark.parametrize("method", ["krylov", "gram", "randomized"])
@pytest.mark.parametrize("kind", ["slow", "flat"])
def test_each_power_iteration_lowers_the_error(kind, method):
    g = torch.Generator().manual_seed(0)
    m = matrix("slow", 400, 300) if kind == "slow" else torch.randn(400, 300, generator=g).double()
    found = [
        excess(m, stacked_svd(m.float(), rank=24, method=method, power_iterations=q))
        for q in range(4)
    ]
    assert all(b < a for a, b in itertools.pairwise(found)), found
    # Slow spectra converge; a flat one has nothing to converge to, and loses little.
    assert found[2] < {"randomized": 0.03}.get(method, 2e-4 if kind == "slow" else 5e-3)


def test_steps_grow_by_what_the_docstring_says():
    assert [plan.krylov_steps(q) for q in range(4)] == [2, 3, 4, 5]
    assert [plan.gram_steps(q) for q in range(4)] == [3, 5, 7, 9]


def test_leading_vectors_of_a_matrix_of_low_rank():
    """Krylov runs out of directions, and what it adds is still orthonormal."""
    a = torch.randn(2, 400, 9, generator=torch.Generator().manual_seed(0))
    found = gram_matrix.leading_vectors(a @ a.mT, 24, 7, seed=0)
    assert found.shape == (2, 400, 24)
    assert (found.mT @ found - torch.eye(24)).abs().max() < 1e-5
    kept = found[..., :9]
    assert (kept @ (kept.mT @ a) - a).abs().max() < 1e-4 * a.abs().max()


def test_progress_counts_layers():
    calls = []
    x = torch.randn(5, 40, 70)
    stacked_svd(x, rank=3, progress=lambda *at: calls.append(at))
    assert calls == [(5, 5)]
    calls.clear()
    stacked_svd(torch.randn(7, 1500, 1000), rank=3, progress=lambda *at: calls.append(at))
    assert calls == [(5, 7), (7, 7)]
    calls.clear()
    stacked_svd(list(x[0].split(9)), rank=3, progress=lambda *at: calls.append(at))
    assert not calls


if __name__ == "__main__":
    from lora_fused import _C

    torch.set_num_threads(1)
    digests = {}
    for shape, dtype in itertools.product(SHAPES, DTYPES):
        data = run("native", *problem(shape, dtype)).numpy().tobytes()
        digests[f"{shape} {dtype}"] = hashlib.sha256(data).hexdigest()
    print(json.dumps({"isa": _C.isa(), **digests}))
