"""stacked_svd against its definition: the seven tests that every op has, in the same order."""

import pytest
import torch
from support.stacked_svd import (
    DTYPES,
    IMPLS,
    METHODS,
    assert_is_svd,
    excess,
    matrix,
    missing,
    product,
    stack_of,
    true_error,
)

from lora_fused import backends, testing
from lora_fused.ops import stacked_svd
from lora_fused.ops.stacked_svd import reference, registration

SHAPES = ((1, 1, 1, 1), (1, 63, 65, 8), (1, 130, 7, 7), (3, 40, 127, 16), (1, 700, 33, 40))


def sizes(shape) -> str:
    return "L{}-T{}-I{}-Q{}".format(*shape)


def require(impl: str) -> None:
    why = missing(impl)
    if why is not None:
        pytest.skip(why)


def arguments(shape, dtype=torch.float32, *, weighted=False, sketch=False, seed=0) -> tuple:
    """Arguments of one pass, as reference.forward takes them."""
    layers, rows, columns, width = shape
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(layers, rows, columns, generator=g) * columns**-0.5).to(dtype)
    weights = torch.rand(layers, rows, generator=g) + 0.5 if weighted else None
    mean = torch.randn(layers, columns, generator=g) * columns**-0.5 if weighted else None
    basis = None if sketch else torch.randn(layers, columns, width, generator=g)
    scale = 2.0 ** torch.arange(-1, layers - 1)
    return x, weights, mean, basis, scale, 5, width, True, True


def double(args: tuple) -> tuple:
    return tuple(a.double() if isinstance(a, torch.Tensor) else a for a in args)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sketch", [False, True], ids=["project", "sketch"])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=sizes)
def test_matches_reference(shape, dtype, weighted, sketch, impl):
    """One pass. The reference is held to M formed densely, the others to the reference."""
    require(impl)
    args = arguments(shape, dtype, weighted=weighted, sketch=sketch)
    actual = registration.forward(impl, *args)
    dense = [one_pass(*args), one_pass(*double(args))]
    competitor = dense[0] if impl == "reference" else reference.forward(*args)
    for label, a, c, t in zip("yz", actual, competitor, dense[1], strict=True):
        testing.assert_within_budget(a, c, t, label)


def one_pass(x, weights, mean, basis, scale, seed, width, *_) -> tuple:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    m = x.to(compute) if mean is None else x.to(compute) - mean[:, None]
    m = m if weights is None else m * weights[..., None]
    if basis is None:
        basis = reference.signs(seed, 0, x.shape[2], width, x.device, compute)
    y = (m * scale[:, None, None]) @ basis
    return y, y.mT @ m


@pytest.mark.parametrize("impl", IMPLS)
def test_negative_control(impl):
    """The budget sees one sign of the test matrix, and one row of the weights, gone wrong."""
    require(impl)
    args = arguments((1, 130, 65, 16), weighted=True, sketch=True)
    basis = reference.signs(5, 0, 65, 16, "cpu", torch.float32)
    basis[40, 3] *= -1
    weights = args[1].clone()
    weights[0, 100] *= 1.01
    for wrong in ((*args[:3], basis[None], *args[4:]), (args[0], weights, *args[2:])):
        bad, good = registration.forward(impl, *wrong), reference.forward(*args)
        truth = reference.forward(*double(args))
        with pytest.raises(AssertionError, match="error"):
            testing.assert_within_budget(bad[0], good[0], truth[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_matches_the_dense_svd(dtype, method, impl):
    """Across a gap in the spectrum the components are those of float64, as near as torch's own."""
    require(impl)
    m = matrix("gap", 200, 120).to(dtype)
    found = stacked_svd(m, rank=10, method=method, impl=impl)
    assert found.method == method
    assert_is_svd(found)
    u, s, vh = torch.linalg.svd(m.double(), full_matrices=False)
    best = (u[:, :10] * s[:10]) @ vh[:10]
    torch.manual_seed(0)
    u, s, v = (t.double() for t in torch.svd_lowrank(m.float(), q=20, niter=2))
    competitor = (u[:, :10] * s[:10]) @ v[:, :10].mT
    testing.assert_within_budget(product(found).float(), competitor.float(), best)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_match_reference(impl):
    """There are none to match: results are constants, whatever wants a gradient."""
    require(impl)
    m = matrix("inverse", 60, 40).float().requires_grad_()
    found = stacked_svd(m, rank=4, weights=torch.ones(60, requires_grad=True), impl=impl)
    assert not any(t.requires_grad for t in found[:5])


@pytest.mark.parametrize("impl", ["native", "triton"])
@pytest.mark.parametrize("weighted", [False, True])
def test_registration(impl, weighted):
    require(impl)
    operator = getattr(torch.ops.lora_fused, f"stacked_svd_fwd_{impl}").default
    for sketch in (False, True):
        for dtype in DTYPES:
            args = arguments((2, 40, 33, 8), dtype, weighted=weighted, sketch=sketch)
            for wants in ((True, True), (True, False), (False, True)):
                torch.library.opcheck(operator, (*args[:7], *wants))


@pytest.mark.parametrize("impl", IMPLS)
def test_compiles(impl):
    """One pass is one graph. The op itself decides by values, and breaks a caller's graph."""
    require(impl)
    torch._dynamo.reset()
    one = torch.compile(registration.forward, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (40, 72):
        args = arguments((1, rows, 33, 8), weighted=True)
        truth = reference.forward(*double(args))
        for a, c, t in zip(one(impl, *args), reference.forward(*args), truth, strict=True):
            testing.assert_within_budget(a, c, t)
    m = matrix("inverse", 60, 40).float()
    compiled = torch.compile(lambda x: stacked_svd(x * 2, rank=4, impl=impl).s / 2, backend="eager")
    assert torch.equal(compiled(m), stacked_svd(m, rank=4, impl=impl).s)


@pytest.mark.parametrize("impl", IMPLS)
class TestEdges:
    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5, 8), (63, 65), (128, 127)])
    def test_every_rank_up_to_the_smaller_side(self, shape, method, impl):
        require(impl)
        m = matrix("inverse", *shape, seed=1).float()
        for rank in sorted({1, (min(shape) + 1) // 2, min(shape)}):
            found = stacked_svd(m, rank=rank, method=method, impl=impl)
            assert found.u.shape == (shape[0], rank) and found.vh.shape == (rank, shape[1])
            assert_is_svd(found)
            assert true_error(m, found) <= found.residual

    @pytest.mark.parametrize("method", METHODS)
    def test_zeros(self, method, impl):
        require(impl)
        found = stacked_svd(torch.zeros(30, 20), rank=5, method=method, impl=impl)
        assert_is_svd(found)
        assert not found.s.any() and found.residual == 0 and not found.energy.any()

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("size", [1e-25, 1e-6, 1e6, 1e25])
    def test_sizes_that_float32_cannot_square(self, size, method, impl):
        require(impl)
        m = matrix("inverse", 90, 70).float()
        found = stacked_svd(m * size, rank=6, method=method, impl=impl)
        assert_is_svd(found)
        assert excess(m.double() * size, found) < 0.02
        assert true_error(m * size, found) <= found.residual

    @pytest.mark.parametrize("method", METHODS)
    def test_views(self, method, impl):
        require(impl)
        m = matrix("inverse", 90, 70).float()
        plain = stacked_svd(m, rank=6, method=method, impl=impl)
        for view in (m.T.contiguous().T, torch.stack([m, m], -1)[..., 0], torch.cat([m, m])[:90]):
            assert torch.allclose(stacked_svd(view, rank=6, method=method, impl=impl).s, plain.s)

    @pytest.mark.parametrize("method", METHODS)
    def test_a_row_much_larger_than_those_before(self, method, impl):
        """The scale changes while rows come in; nothing of the first ones is lost or too large."""
        require(impl)
        m = matrix("inverse", 90, 70).float()
        m[:30] *= 1e-20
        m[60:] *= 1e20
        found = stacked_svd(list(m.split(30)), rank=6, method=method, impl=impl)
        assert_is_svd(found)
        truth = torch.linalg.svdvals(m.double())[:6]
        assert torch.allclose(found.s.double(), truth, rtol=2e-2)


NAN = torch.ones(30, 20)
NAN[17, 3] = torch.nan
GOOD = {"stack": torch.ones(30, 20), "rank": 4}
FAULTS = {  # label: (what changes in a good call, the text of the error)
    "none": ({"rank": None}, "rank and energy must be given one of the two, got None and None"),
    "both": ({"energy": 0.5}, "rank and energy must be given one of the two, got 4 and 0.5"),
    "rank-0": ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
    "rank-type": ({"rank": 2.0}, "rank must be an integer of at least 1, got 2.0"),
    "rank-high": ({"rank": 21}, r"rank must be at most 20, the smaller side of \[30, 20\], got 21"),
    "energy": ({"rank": None, "energy": 1.5}, r"energy must lie in \(0, 1\], got 1.5"),
    "oversampling": ({"oversampling": -1}, "oversampling must be an integer of at least 0, got -1"),
    "iterations": ({"power_iterations": 0.5}, "power_iterations must be an integer"),
    "method": ({"method": "lanczos"}, "method must be one of auto, .*, got 'lanczos'"),
    "dim": ({"stack": torch.ones(4)}, r"stack must be \[T, I\] or \[L, T, I\], got \[4\]"),
    "dtype": ({"stack": torch.ones(30, 20).int()}, "stack must be of float32, .*, got torch.int32"),
    "empty": ({"stack": torch.ones(0, 20)}, r"stack must have no empty dimension, got \[0, 20\]"),
    "nan": ({"stack": NAN}, "stack must be finite, got nan in row 17"),
    "inf": ({"stack": NAN.nan_to_num(torch.inf)}, "stack must be finite, got inf in row 17"),
    "layer": (
        {"stack": torch.stack([torch.ones(30, 20), NAN])},
        "stack must be finite, got nan in row 17 of layer 1",
    ),
    "weights": ({"weights": torch.ones(29)}, r"weights must be \[30\], got \[29\]"),
    "weights-type": ({"weights": [1.0]}, "weights must be a floating point tensor, got list"),
    "weights-nan": ({"weights": NAN[:, 3]}, r"weights must be finite, got not, at \[17\]"),
    "weights-device": (
        {"weights": torch.ones(30, device="meta")},
        "weights must be on cpu like stack, got meta",
    ),
    "group": ({"method": "exact", "group": object()}, "method must not be 'exact' under a group"),
    "type": ({"stack": 3}, "stack must be a tensor, an iterable of chunks or .*, got int"),
    "once": ({"stack": iter([NAN])}, "stack must be re-iterable unless power_iterations=0"),
    "no-chunks": ({"stack": []}, "stack must have at least one chunk, got none"),
    "no-rows": ({"stack": [torch.ones(0, 20)]}, "stack must have at least one row, got none"),
    "chunk-nan": (
        {"stack": [torch.ones(5, 20), NAN]},
        "stack must be finite, got nan in row 17 of chunk 1",
    ),
    "chunk-width": (
        {"stack": [torch.ones(5, 20), torch.ones(5, 19)]},
        r"stack \(chunk 1\) must have 20 columns like chunk 0, got 19",
    ),
    "chunk-dtype": (
        {"stack": [torch.ones(5, 20), torch.ones(5, 20).half()]},
        r"stack \(chunk 1\) must be torch.float32 on cpu like chunk 0, got torch.float16 on cpu",
    ),
    "chunk-device": (
        {"stack": [torch.ones(5, 20), torch.ones(5, 20, device="meta")]},
        r"stack \(chunk 1\) must be .* on cpu like chunk 0, got torch.float32 on meta",
    ),
    "chunk-type": ({"stack": [[1.0]]}, r"stack \(chunk 0\) must be a tensor \[T, I\], got list"),
    "chunk-rank": ({"stack": [torch.ones(3, 20)]}, r"rank must be at most 3, .*\[3, 20\], got 4"),
    "chunk-weights": (
        {"stack": [torch.ones(5, 20)] * 2, "weights": torch.ones(11)},
        r"weights must be \[10\], one for each row of stack, got \[11\]",
    ),
}


@pytest.mark.parametrize("label", FAULTS)
def test_rejects(label):
    changes, message = FAULTS[label]
    with pytest.raises(ValueError, match="^stacked_svd: " + message):
        stacked_svd(**{**GOOD, **changes})


def bad(field: str, value) -> tuple:
    stack, _ = stack_of("rows")
    setattr(stack, field, value(getattr(stack, field)))
    return stack


FACTOR_FAULTS = {
    "form": (lambda: stack_of("rows")[0].__class__(*[None] * 4, "wide"), "form must be one of"),
    "a": (lambda: bad("lora_a", lambda t: t[0]), r"lora_a must be \[T, I\] and not empty"),
    "b": (lambda: bad("lora_b", lambda t: t[1:]), r"lora_b must be \[T, O\] with T = 22"),
    "dtype": (lambda: bad("lora_b", lambda t: t.half()), "lora_a and lora_b must share"),
    "start": (lambda: bad("row_start", lambda t: t - 1), "row_start must rise from 0 to the 22"),
    "scale": (lambda: bad("scale", lambda t: t[1:]), r"scale must be \[7\], got \[6\]"),
    "scale-nan": (lambda: bad("scale", lambda t: t / 0), "scale must be finite, got .* adapter 0"),
    "nan": (
        lambda: bad("lora_b", lambda t: t.index_fill(0, torch.tensor([6]), torch.nan)),
        "lora_b must be finite, got a value that is not in adapter 2",
    ),
}


@pytest.mark.parametrize("label", FACTOR_FAULTS)
def test_rejects_factors(label):
    make, message = FACTOR_FAULTS[label]
    with pytest.raises(ValueError, match="^stacked_svd: " + message):
        stacked_svd(make(), rank=2)


def test_rejects_options_that_factors_do_not_have():
    stack, _ = stack_of("sum")
    with pytest.raises(ValueError, match="center must be False for a FactoredStack"):
        stacked_svd(stack, rank=2, center=True)
    with pytest.raises(ValueError, match=r"weights must be \[7\], got \[3\]"):
        stacked_svd(stack, rank=2, weights=torch.ones(3))
    with pytest.raises(ValueError, match="rank must be at most 22"):
        stacked_svd(stack, rank=41)


def test_rejects_chunks_that_change():
    class Shrinking:
        rows = 40

        def __iter__(self):
            self.rows -= 1
            yield matrix("inverse", self.rows, 20).float()

    with pytest.raises(ValueError, match=r"stack must give the same 38 rows each time.*, got 37"):
        stacked_svd(Shrinking(), rank=3, method="randomized")


def test_impl_choice(monkeypatch):
    m = matrix("inverse", 60, 40).float()
    with pytest.raises(ValueError, match=r"impl must be one of auto, reference, .*, got 'cuda'"):
        stacked_svd(m, rank=4, impl="cuda")
    seen = []
    real = registration.forward
    monkeypatch.setattr(
        registration, "forward", lambda impl, *args: seen.append(impl) or real(impl, *args)
    )
    stacked_svd(m, rank=4, method="krylov")
    assert set(seen) == {"reference" if missing("native") else "native"}
    monkeypatch.setattr(registration, "has_kernel", lambda impl, device: impl == "reference")
    monkeypatch.setitem(backends.ERRORS, "native", None)
    with pytest.raises(RuntimeError, match="got 'native': this build has no such kernel"):
        stacked_svd(m, rank=4, impl="native")
    monkeypatch.setitem(backends.ERRORS, "native", "no compiler was here")
    with pytest.raises(RuntimeError, match="got 'native': no compiler was here"):
        stacked_svd(m, rank=4, impl="native")
    seen.clear()
    stacked_svd(m, rank=4, method="krylov")
    assert set(seen) == {"reference"}


def test_float64_is_for_the_reference():
    m = matrix("inverse", 60, 40)
    for method in METHODS:
        found = stacked_svd(m, rank=40, method=method)
        assert found.s.dtype == torch.float64
        assert torch.allclose(found.s, torch.linalg.svdvals(m), rtol=1e-9)


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_kernels_refuse_float64(impl, monkeypatch):
    monkeypatch.setitem(backends.ERRORS, impl, None)
    monkeypatch.setattr(registration, "has_kernel", lambda *_: True)
    monkeypatch.setattr(backends, "INTERPRETING", True)
    m = matrix("inverse", 60, 40)
    wide = stack_of("rows")[0]
    wide.lora_a, wide.lora_b = wide.lora_a.double(), wide.lora_b.double()
    for stack in (m, [m], wide):
        with pytest.raises(
            ValueError, match="stack must be of float32, float16, bfloat16 for impl"
        ):
            stacked_svd(stack, rank=4, impl=impl)
