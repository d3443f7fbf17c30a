"""stacked_svd's pass in Triton against the definition: signs, shapes, layouts, and its traffic."""

import itertools

import pytest
import torch
from support.stacked_svd import DTYPES, missing

from lora_fused.ops import stacked_svd
from lora_fused.ops.stacked_svd import reference, registration
from lora_fused.testing import assert_within_budget

pytestmark = pytest.mark.skipif(missing("triton") is not None, reason=str(missing("triton")))
STAGES = SIGNS, PROJECT, BACK, SUM = [
    f"_stacked_svd_{stage}_kernel" for stage in ("signs", "project", "backproject", "sum")
]
# Layers, rows, columns, sketch columns: one of each; no multiples; slices of columns; of rows; two
# tiles of every kind.
SIZES = [(1, 1, 1, 1), (3, 37, 83, 5), (2, 9, 1300, 20), (1, 1100, 40, 42), (1, 130, 150, 140)]


def problem(size, dtype=torch.float32, *, has_basis=True, weighted=True, seed=0) -> tuple:
    g = torch.Generator().manual_seed(seed)
    layers, rows, columns, width = size
    x = torch.randn(layers, rows, columns, generator=g).to(dtype)
    weights = torch.rand(layers, rows, generator=g) if weighted else None
    mean = torch.randn(layers, columns, generator=g) + 3 if weighted else None
    basis = torch.randn(layers, columns, width, generator=g) if has_basis else None
    return x, weights, mean, basis, 2.0 ** torch.arange(layers), 7, width


def check(args: tuple, want_y=True, want_z=True) -> tuple:
    args = (*args, want_y, want_z)
    exact = [t.double() if isinstance(t, torch.Tensor) else t for t in args]
    found = registration.forward("triton", *args)
    parts = zip(found, reference.forward(*args), reference.forward(*exact), strict=True)
    for actual, ours, truth in parts:
        assert_within_budget(actual, ours, truth)
    return found


@pytest.mark.parametrize("seed", [0, 1, (1 << 61) + 12345])
@pytest.mark.parametrize("width", [1, 33, 128, 200])
def test_the_signs_are_the_references_bit_for_bit(seed, width):
    identity = torch.eye(150)[None]
    args = (identity, None, None, None, torch.ones(1), seed, width, True, False)
    y, _ = registration.forward("triton", *args)
    wanted = reference.signs(seed, 0, 150, width, "cpu", torch.float32)
    assert torch.equal(y[0], wanted)


def test_another_seed_gives_other_signs():
    args = problem((1, 40, 40, 40), has_basis=False, weighted=False)
    y, _ = registration.forward("triton", *args, True, False)
    other, _ = registration.forward("triton", *args[:5], 8, 40, True, False)
    assert not torch.equal(y, other)


@pytest.mark.parametrize("weighted", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("has_basis", [True, False], ids=["basis", "signs"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_pass_is_within_the_budget(size, dtype, has_basis, weighted):
    check(problem(size, dtype, has_basis=has_basis, weighted=weighted))


@pytest.mark.parametrize("has_basis", [True, False], ids=["basis", "signs"])
def test_only_what_is_wanted_comes_back(has_basis):
    args = problem((2, 37, 83, 5), has_basis=has_basis)
    both = check(args)
    for want_y, want_z in itertools.product((True, False), repeat=2):
        y, z = check(args, want_y, want_z)
        assert torch.equal(y, both[0] if want_y else torch.empty(0))
        assert torch.equal(z, both[1] if want_z else torch.empty(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_change_nothing(dtype):
    x, weights, mean, basis, *rest = problem((2, 37, 83, 20), dtype)
    plain = registration.forward("triton", x, weights, mean, basis, *rest, True, True)
    spaced = torch.full((2, 74, 166), torch.nan, dtype=dtype)[:, ::2, 1::2].copy_(x)
    layouts = {
        "turned": (x.mT.contiguous().mT, weights, mean, basis.mT.contiguous().mT),
        "spaced": (spaced, weights, mean, basis),
        "layers within": (x.permute(1, 2, 0).contiguous().permute(2, 0, 1), weights, mean, basis),
        "turned rows": (x, weights.mT.contiguous().mT, mean.mT.contiguous().mT, basis),
    }
    for name, tensors in layouts.items():
        y, z = registration.forward("triton", *tensors, *rest, True, True)
        assert torch.equal(y, plain[0]) and torch.equal(z, plain[1]), name


def test_one_basis_may_serve_all_layers():
    x, weights, mean, basis, *rest = problem((3, 20, 30, 5))
    check((x, weights, mean, basis[:1].expand(3, -1, -1), *rest))


@pytest.mark.parametrize("size", [(2, 0, 30, 5), (0, 20, 30, 5)])
def test_nothing_to_read(size):
    check(problem(size))


def test_large_and_small_numbers():
    x, *_, width = problem((2, 40, 50, 8), weighted=False)
    x = x * torch.tensor([1e25, 1e-25])[:, None, None]
    scale = 2.0 ** torch.tensor([-83.0, 83.0])
    for layer in range(2):
        one = slice(layer, layer + 1)
        check((x[one], None, None, None, scale[one], 7, width))


@pytest.mark.parametrize("has_basis", [True, False], ids=["basis", "signs"])
@pytest.mark.parametrize("size", SIZES[1:], ids=str)
def test_each_launch_reads_the_rows_once_and_none_races(size, has_basis):
    from benchmarks.traffic import count

    x, *_ = args = problem(size, torch.bfloat16, has_basis=has_basis, weighted=False)
    with count() as counter:
        registration.forward("triton", *args, True, True)
    total = counter.total
    assert total.out_of_bounds == total.races == total.atomics == 0
    names = [launch.kernel for launch in counter.launches]
    assert [n for n in names if n != SUM] == ([] if has_basis else [SIGNS]) + [PROJECT, BACK]
    assert (SUM in names) == (max(size[1:3]) > 1024), "slices where terms are many"
    for launch in counter.launches:
        if launch.kernel in (PROJECT, BACK):
            assert launch.arguments["x_ptr"]["read"].launch == x.nbytes


def test_a_batch_takes_as_many_launches_as_one_layer():
    from benchmarks.traffic import count

    kernels = []
    for layers in (1, 9):
        args = problem((layers, 30, 40, 8), torch.bfloat16, has_basis=False)
        with count() as counter:
            registration.forward("triton", *args, True, True)
        kernels.append([launch.kernel for launch in counter.launches])
    assert kernels[0] == kernels[1] == [SIGNS, PROJECT, PROJECT, BACK]  # the mean's sketch first


def test_the_work_of_the_table_reads_little_beyond_the_rows():
    """A quarter of a layer of 320 rows, sketched: signs as bits and y are small beside x."""
    from benchmarks.traffic import count

    x, *_ = args = problem((4, 320, 512, 42), torch.bfloat16, has_basis=False, weighted=False)
    with count() as counter:
        y, _ = registration.forward("triton", *args, True, False)
    sketch = next(launch for launch in counter.launches if launch.kernel == PROJECT)
    assert sketch.dram_bytes <= 1.05 * (x.nbytes + y.nbytes)
    assert sketch.l2_bytes <= 1.2 * (x.nbytes + y.nbytes)


@pytest.mark.parametrize("has_basis", [True, False], ids=["basis", "signs"])
def test_nothing_is_read_back_from_the_device(has_basis, monkeypatch):
    """Addresses and shapes alone decide what is launched, so meta tensors will do."""
    from lora_fused.ops.stacked_svd import triton_impl

    launched = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((self.name, grid))

    for name in STAGES:
        monkeypatch.setattr(triton_impl, name, Recorder(name))
    args = problem((2, 37, 1100, 5), torch.bfloat16, has_basis=has_basis)
    real = triton_impl.forward(*args, True, True)
    on_host, launched[:] = list(launched), []
    meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in args]
    for ours, fake in zip(real, triton_impl.forward(*meta, True, True), strict=True):
        assert (ours.shape, ours.dtype) == (fake.shape, fake.dtype)
    assert launched == on_host and launched


@pytest.mark.parametrize("method", ["randomized", "krylov"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_equals_the_reference(dtype, method):
    g = torch.Generator().manual_seed(3)
    decay = torch.exp(-torch.arange(50) / 6.0)
    x = (torch.randn(2, 90, 50, generator=g) * decay).to(dtype)
    options = {"rank": 6, "method": method, "center": True}
    found = stacked_svd(x, impl="triton", **options)
    ours = stacked_svd(x, impl="reference", **options)
    exact = stacked_svd(x.double(), impl="reference", **options)
    for name in ("s", "energy"):
        assert_within_budget(*(getattr(r, name) for r in (found, ours)), getattr(exact, name), name)
    product = [r.u.double() * r.s[:, None].double() @ r.vh.double() for r in (found, ours, exact)]
    assert_within_budget(product[0].float(), product[1].float(), product[2])
