"""The native pass of stacked_svd: every layout, every instruction set, any number of threads."""

import hashlib
import json

import pytest
import torch
from support.isas import ISAS, assert_tests_pass, digests_of, usable
from support.stacked_svd import DTYPES, missing

from lora_fused import testing
from lora_fused.ops.stacked_svd import reference, registration

pytestmark = pytest.mark.skipif(missing("native") is not None, reason=str(missing("native")))

# L, T, I, Q around the sizes of blocks (96 rows), panels (96 columns) and tiles (24 rows, 48 wide).
SHAPES = (
    (1, 1, 1, 1),
    (1, 95, 97, 15),
    (2, 97, 95, 17),
    (1, 193, 289, 33),
    (3, 121, 96, 64),
    (1, 25, 500, 74),
    (1, 300, 47, 130),
)


def problem(shape, dtype=torch.float32, *, weights=True, mean=True, basis=True, seed=0) -> tuple:
    layers, rows, columns, width = shape
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(layers, rows, columns, generator=g) * columns**-0.5).to(dtype)
    weights = torch.rand(layers, rows, generator=g) + 0.5 if weights else None
    mean = torch.randn(layers, columns, generator=g) * columns**-0.5 if mean else None
    basis = torch.randn(layers, columns, width, generator=g) if basis else None
    scale = 2.0 ** torch.arange(-1, layers - 1)
    return x, weights, mean, basis, scale, 2**61 + 12345, width, True, True


def native(*args) -> tuple[torch.Tensor, torch.Tensor]:
    return registration.forward("native", *args)


def assert_right(args: tuple) -> None:
    truth = reference.forward(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
    pairs = zip("yz", native(*args), reference.forward(*args), truth, strict=True)
    for label, found, competitor, exact in pairs:
        testing.assert_within_budget(found, competitor, exact, label)


def assert_same(a: tuple, b: tuple) -> None:
    assert all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("basis", [False, True], ids=["signs", "basis"])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_matches_reference(shape, dtype, basis, weights, mean):
    assert_right(problem(shape, dtype, weights=weights, mean=mean, basis=basis))


@pytest.mark.parametrize(("columns", "width"), [(1, 1), (97, 16), (300, 74), (130, 300)])
@pytest.mark.parametrize("seed", [0, 7, 2**62 - 1])
def test_signs_are_those_of_the_reference(columns, width, seed):
    eye = torch.eye(columns)[None]
    found, _ = native(eye, None, None, None, torch.ones(1), seed, width, True, False)
    assert torch.equal(found[0], reference.signs(seed, 0, columns, width, "cpu", torch.float32))


def layouts(x: torch.Tensor):
    """The same values [L, T, I], stored in other ways."""
    wide = x.new_full((x.shape[0], x.shape[1] + 1, 2 * x.shape[2] + 3), torch.nan)
    wide[:, 1:, 3::2] = x
    yield "every second column", wide[:, 1:, 3::2]
    padded = x.new_full((x.shape[0], x.shape[1], x.shape[2] + 5), torch.nan)
    padded[..., 1:-4] = x
    yield "padded rows", padded[..., 1:-4]
    yield "turned", x.mT.contiguous().mT
    yield "layers inside", x.permute(1, 2, 0).contiguous().permute(2, 0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype):
    args = problem((2, 100, 98, 17), dtype)
    expected = native(*args)
    for label, x in layouts(args[0]):
        assert torch.equal(x, args[0]), label
        assert_same(native(x, *args[1:]), expected)
    one = args[0][:1].expand(2, -1, -1)
    assert_same(native(one, *args[1:]), native(one.contiguous(), *args[1:]))
    turned = [None if t is None else t.mT.contiguous().mT for t in args[1:4]]
    assert_same(native(args[0], *turned, *args[4:]), expected)


def test_only_what_is_wanted():
    args = problem((2, 130, 97, 17))
    y, z = native(*args)
    assert_same(native(*args[:7], True, False), (y, torch.empty(0)))
    assert_same(native(*args[:7], False, True), (torch.empty(0), z))


def test_a_batch_is_its_layers():
    args = problem((3, 130, 97, 17))
    y, z = native(*args)
    for l in range(3):
        alone = native(*(t[l : l + 1] for t in args[:5]), *args[5:])
        assert_same(alone, (y[l : l + 1], z[l : l + 1]))


def test_chunks_change_only_the_rounding_of_z():
    args = problem((1, 500, 97, 17))
    truth = reference.forward(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
    whole, parts = native(*args), []
    for t in (slice(0, 70), slice(70, 71), slice(71, 500)):
        parts.append(native(args[0][:, t], args[1][:, t], *args[2:]))
    assert torch.equal(torch.cat([y for y, _ in parts], 1), whole[0])
    z = sum(z for _, z in parts)
    testing.assert_within_budget(z, whole[1], truth[1])


@pytest.mark.parametrize("shape", [(1, 1000, 300, 40), (5, 130, 97, 17)], ids=str)
def test_threads_change_nothing(shape):
    args = problem(shape)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(native(*args))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_same(other, found[0])


def test_repeated_calls_are_equal():
    args = problem((2, 97, 95, 17))
    first = native(*args)
    native(*problem((1, 193, 289, 74), seed=4))  # leaves something else in scratch that is kept
    assert_same(native(*args), first)


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        (0, torch.ones(2, 30, 20, dtype=torch.float64)),
        (0, torch.ones(30, 20)),
        (1, torch.ones(2, 29)),
        (2, torch.ones(2, 20, dtype=torch.float64)),
        (3, torch.ones(1, 20, 4)),
        (3, torch.ones(20, 4)),
        (4, torch.ones(1)),
    ],
)
def test_refuses_what_would_read_out_of_bounds(place, wrong):
    args = list(problem((2, 30, 20, 4)))
    args[place] = wrong
    with pytest.raises(RuntimeError, match="stacked_svd: "):
        native(*args)


@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_passes(isa):
    chosen = "matches_reference or signs or strides or wanted or layers or chunks or threads"
    assert_tests_pass(isa, chosen, __file__)


def test_vector_widths_agree_bitwise():
    """No two lanes are ever added, so 8 lanes and 16 compute the same."""
    wide = [isa for isa in ISAS[1:] if isa in usable()]
    if len(wide) < 2:
        pytest.skip("this CPU has a single vector width")
    found = digests_of(wide, __file__)
    assert all(found[isa] == found[wide[0]] for isa in wide)


def digests() -> dict[str, str]:
    found = {}
    for shape in SHAPES:
        for dtype in DTYPES:
            for label, t in zip("yz", native(*problem(shape, dtype)), strict=True):
                data = t.view(torch.uint8).numpy().tobytes()
                found[f"{shape} {dtype} {label}"] = hashlib.sha256(data).hexdigest()
    return found


if __name__ == "__main__":
    from lora_fused import _C

    torch.set_num_threads(1)
    print(json.dumps({"isa": _C.isa(), **digests()}))
