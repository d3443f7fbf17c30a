"""Compiling ahead of time sees what it is there to see: width of loads, tensor cores, spills."""

import pytest
import torch
from support import aot

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


@triton.jit
def _matmul_kernel(
    a_ptr, b_ptr, c_ptr, K, stride_a, stride_b, stride_c, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inner = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + rows[:, None] * stride_a + start + inner[None, :])
        b = tl.load(b_ptr + (start + inner)[:, None] * stride_b + cols[None, :])
        acc = tl.dot(a, b, acc)
    out = acc.to(c_ptr.dtype.element_ty)
    tl.store(c_ptr + rows[:, None] * stride_c + cols[None, :], out)


def launch_matmul(offset: int = 0, stride: int = 512, block: int = 32, **options) -> None:
    a, b = (torch.empty(64 * stride + offset, dtype=torch.bfloat16)[offset:] for _ in range(2))
    c = torch.empty(64 * 64, dtype=torch.bfloat16)
    _matmul_kernel[(1, 1)](a, b, c, 64, stride, stride, 64, BLOCK=block, BLOCK_K=64, **options)


def launch_that_fails() -> None:
    raise ValueError("no such launch")


@pytest.fixture(scope="module")
def matmuls() -> dict[tuple[int, str], aot.Compiled]:
    cases = [{}, {"offset": 1}, {"stride": 511}]
    compiled = aot.compile_launches(launch_matmul, cases)
    assert len(compiled) == len(cases) * len(aot.TARGETS)
    return {(c.case, c.target): c for c in compiled}


@pytest.mark.parametrize("target", aot.TARGETS)
def test_an_aligned_matmul_is_compiled_well(matmuls, target):
    found = matmuls[0, target]
    assert found.kernel == "_matmul_kernel"
    assert found.spills == 0
    assert found.wide_loads + found.bulk_loads > 0
    assert found.mma > 0
    assert 16 <= found.registers <= 255 and found.shared > 0
    assert found.threads == 4 * (64 if target.startswith("gfx") else 32)
    assert 0 < found.occupancy <= 1


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("case", [1, 2], ids=["offset", "stride"])
def test_loads_of_16_bytes_are_lost_without_alignment(matmuls, case, target):
    """Negative control: a pointer or a stride that is no multiple of 16 bytes."""
    assert matmuls[case, target].wide_loads + matmuls[case, target].bulk_loads == 0


def test_spills_are_seen():
    """Negative control: a tile of sums in fewer registers than it has."""
    (compiled,) = aot.compile_launches(
        launch_matmul, [{"block": 64, "maxnreg": 32}], targets=["sm_80"]
    )
    assert compiled.spills > 0


def test_a_launcher_that_fails_says_so():
    with pytest.raises(RuntimeError, match="no such launch"):
        aot.compile_launches(launch_that_fails, targets=["sm_80"])


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "expected"),
    [(4, 32, 0, 1.0), (4, 128, 0, 0.25), (4, 32, 100_000, 4 / 64), (8, 255, 0, 8 / 64)],
)
def test_occupancy_by_hand(warps, registers, shared, expected):
    limits = aot.LIMITS["sm_80"]
    assert limits.occupancy(warps=warps, registers=registers, shared=shared) == expected
