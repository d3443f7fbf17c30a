"""Batches, chunks, factors, weights and centring give what the one matrix they stand for gives."""

import gc

import pytest
import torch
from support.stacked_svd import (
    DTYPES,
    METHODS,
    Again,
    assert_is_svd,
    excess,
    matrix,
    multiplied,
    product,
    stack_of,
    true_error,
)

from lora_fused import testing
from lora_fused.ops import FactoredStack, stacked_svd

FORMS = ("rows", "columns", "sum")


def assert_same(found, others, m):
    """As near to the best approximation as the worst of the others, within the budget."""
    u, s, vh = torch.linalg.svd(m.double(), full_matrices=False)
    count = found.s.shape[-1]
    best = (u[..., :count] * s[..., None, :count]) @ vh[..., :count, :]
    worst = max((product(o).float() for o in others), key=lambda o: testing.error(o, best))
    testing.assert_within_budget(product(found).float(), worst, best)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_layers(method):
    m = torch.stack([matrix("gap", 90, 130, seed=l).float() * 10.0 ** (9 * l) for l in range(3)])
    found = stacked_svd(m, rank=10, method=method)
    assert_is_svd(found)
    for l in range(3):
        alone = stacked_svd(m[l], rank=10, method=method)
        layer = type(found)(*(t[l] for t in found[:5]), found.method)
        assert_same(layer, [alone], m[l])
        assert true_error(m[l], layer) <= layer.residual


@pytest.mark.parametrize("energy", [0.6, 0.95])
def test_a_batch_takes_the_most_that_a_layer_needs(energy):
    m = torch.stack([matrix(kind, 90, 130).float() for kind in ("steep", "slow")])
    found = stacked_svd(m, energy=energy)
    assert found.s.shape == stacked_svd(m[1], energy=energy).s[None].expand(2, -1).shape
    assert torch.all(found.energy.sum(-1) >= energy * (1 - 1e-6))


def test_a_large_batch_is_cut_into_layers(monkeypatch):
    from lora_fused.ops.stacked_svd import solve

    m = torch.stack([matrix("gap", 60, 50, seed=l).float() for l in range(5)])
    weights = torch.rand(5, 60)
    whole = stacked_svd(m, rank=4, method="krylov", weights=weights)
    monkeypatch.setattr(solve, "LAYERS_BYTES", 2 * 60 * 50 * 4)
    cut = stacked_svd(m, rank=4, method="krylov", weights=weights)
    assert torch.allclose(cut.s, whole.s)
    assert cut.u.shape == whole.u.shape and cut.residual.shape == (5,)
    with pytest.raises(ValueError, match="got nan in row 0 of layer 4"):
        m[4, 0] = torch.nan
        stacked_svd(m, rank=4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cuts", [[300], [1] * 3 + [297], [97, 0, 97, 97, 9]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_are_the_whole(dtype, cuts, method):
    m = matrix("gap", 300, 120).to(dtype)
    weights = torch.rand(300, generator=torch.Generator().manual_seed(0)) + 0.5
    for options in ({}, {"weights": weights}):
        options = {"rank": 10, "method": method, **options}
        # Two roundings of the whole: a single one may by chance be far below the usual.
        whole = [stacked_svd(m, impl=impl, **options) for impl in ("auto", "reference")]
        found = stacked_svd(Again(m.split(cuts)), **options)
        assert found.method == method
        scaled = m if "weights" not in options else m.double() * weights[:, None].double()
        assert_same(found, whole, scaled)
        assert true_error(scaled, found) <= found.residual


def test_passes_over_chunks():
    """q + 1 for subspace iteration and q + 3 for Krylov, and one chunk looked at first."""
    m = matrix("slow", 200, 160).float()
    for method, passes in (("randomized", 4), ("krylov", 6)):
        chunks = Again(m.split(30))
        stacked_svd(chunks, rank=6, power_iterations=3, method=method)
        assert chunks.passes == passes + 1


def test_a_one_shot_iterator_is_read_once():
    m = matrix("inverse", 100, 60).float()
    found = stacked_svd(iter(m.split(30)), rank=20, power_iterations=0)
    again = stacked_svd(list(m.split(30)), rank=20, power_iterations=0)
    assert torch.equal(found.u, again.u)
    assert_is_svd(found)
    assert true_error(m, found) <= found.residual
    low = matrix("inverse", 100, 60, count=5).float()
    found = stacked_svd(iter(low.split(30)), rank=20, power_iterations=0)
    assert_is_svd(found)
    assert true_error(low, found) <= found.residual < 0.03 * torch.linalg.matrix_norm(low)


def test_chunks_need_little_memory():
    """Alive at any time: a chunk, and sketches of width Q. Counted in tensors that exist."""
    rows, columns, chunk, peak = 20_000, 64, 500, 0
    g = torch.Generator()

    class Counting:
        def __iter__(self):
            nonlocal peak
            for number in range(rows // chunk):
                alive = (o for o in gc.get_objects() if type(o) is torch.Tensor)
                held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}
                peak = max(peak, sum(held.values()))
                yield torch.randn(chunk, columns, generator=g.manual_seed(number))

    gc.collect()
    alive = (o for o in gc.get_objects() if type(o) is torch.Tensor)
    before = sum(t.untyped_storage().nbytes() for t in alive)
    stacked_svd(Counting(), rank=2, oversampling=2, method="randomized")
    width = 4
    assert peak - before <= 4 * (2 * chunk * columns + 3 * (rows + columns) * width)
    assert peak - before < rows * columns * 4 / 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("source", ["whole", "chunks"])
def test_weights_and_centre_are_those_of_the_formed_matrix(source, method):
    m = matrix("gap", 200, 120).float() + 0.5
    weights = torch.rand(200, generator=torch.Generator().manual_seed(0)) + 0.1
    weights[3] = 0
    for w in (None, weights):
        share = torch.ones(200).double() if w is None else w.double() ** 2
        mean = (share[:, None] * m.double()).sum(0) / share.sum()
        formed = (m.double() - mean) * share.sqrt()[:, None]
        stack = m if source == "whole" else Again(m.split(70))
        found = stacked_svd(stack, rank=9, weights=w, center=True, method=method)
        assert_is_svd(found)
        assert excess(formed, found) < 0.01
        assert true_error(formed, found) <= found.residual * (1 + 1e-3)
        left = stacked_svd(stack, rank=9, weights=w, method=method)
        assert excess(formed, left) > 0.1, "centring matters here"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_factors_are_what_they_multiply_to(dtype, form, method):
    stack, formed = stack_of(form, dtype=dtype)
    found = stacked_svd(stack, rank=9, method=method)
    assert found.u.shape == (formed.shape[0], 9) and found.vh.shape == (9, formed.shape[1])
    assert_is_svd(found)
    assert excess(formed, found) < 0.02
    error = true_error(formed, found)
    assert error <= found.residual * (1 + 1e-5) and found.residual <= 1.05 * error
    plain = stacked_svd(formed.float(), rank=9, method="exact")
    assert torch.allclose(found.s, plain.s, rtol=0.03)


@pytest.mark.parametrize("method", METHODS)
def test_a_sum_of_more_rank_rows_than_columns(method):
    stack, formed = stack_of("sum", ranks=(8,) * 12)
    found = stacked_svd(stack, rank=9, method=method)
    assert_is_svd(found)
    assert excess(formed, found) < 0.02
    assert true_error(formed, found) <= found.residual


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_adapters(form):
    """A weight of zero leaves an adapter out; the order of adapters changes nothing."""
    stack, _ = stack_of(form, ranks=(4,) * 6)
    weights = torch.tensor([1.0, -2.0, 0.0, 0.5, 1.0, 3.0])
    found = stacked_svd(stack, rank=5, weights=weights)
    scaled = FactoredStack(stack.lora_a, stack.lora_b, stack.row_start, stack.scale * weights, form)
    assert torch.allclose(found.s, stacked_svd(scaled, rank=5).s, rtol=1e-5)
    order = torch.tensor([5, 0, 3, 1, 4, 2])
    rows = (order[:, None] * 4 + torch.arange(4)).flatten()
    parts = (stack.lora_a[rows], stack.lora_b[rows], stack.row_start, stack.scale[order], form)
    moved = stacked_svd(FactoredStack(*parts), rank=5, weights=weights[order])
    assert torch.allclose(moved.s, found.s, rtol=1e-4)


def test_reads_an_adapter_stack_in_place():
    stack = testing.make_stack((4, 8, 2), 40, 56)
    args = (stack.lora_a, stack.lora_b, stack.row_start, stack.scale)
    deltas = torch.stack([delta(stack, k) for k in range(3)])
    found = stacked_svd(FactoredStack(*args), rank=14)
    assert true_error(multiplied(deltas, "rows"), found) <= found.residual * (1 + 1e-5)
    assert found.energy.sum() > 1 - 1e-5


def delta(stack, k: int) -> torch.Tensor:
    at = stack.rows(k)
    return stack.scale[k].double() * stack.lora_b[at].mT.double() @ stack.lora_a[at].double()
