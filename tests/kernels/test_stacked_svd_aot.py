"""stacked_svd's Triton launches, compiled for GPUs that are not here: every tile of the tables."""

import importlib.util

import pytest
import torch
from support import aot

SIGNS, PROJECT, BACK, SUM = (
    f"_stacked_svd_{stage}_kernel" for stage in ("signs", "project", "backproject", "sum")
)
# dtype, width, a basis, weights and a mean, z as well; and the kernels that it must come to.
CASES = {
    "sketch": ("bfloat16", 74, False, False, True, [SIGNS, PROJECT, BACK]),
    "sketch_narrow": ("bfloat16", 48, False, False, False, [SIGNS, PROJECT]),
    "sketch_float32": ("float32", 74, False, False, True, [SIGNS, PROJECT, BACK]),
    "sketch_float32_narrow": ("float32", 48, False, False, False, [SIGNS, PROJECT]),
    "project": ("bfloat16", 74, True, False, False, [PROJECT]),
    "project_narrow": ("bfloat16", 48, True, True, True, [PROJECT, SUM, PROJECT, BACK]),
    "project_float32": ("float32", 74, True, False, False, [PROJECT]),
    "project_float32_narrow": ("float32", 48, True, True, True, [PROJECT, SUM, PROJECT, BACK]),
    "project_float16": ("float16", 48, True, False, False, [PROJECT]),
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def launch(dtype, width, has_basis, weighted, want_z) -> None:
    from lora_fused.ops.stacked_svd import triton_impl

    layers, rows, columns = 16, 2048, 4096
    x = torch.empty(layers, rows, columns, dtype=getattr(torch, dtype))
    basis = torch.empty(layers, width, columns).mT if has_basis else None
    weights, mean = torch.empty(layers, rows), torch.empty(layers, columns)
    row_wise = (weights, mean) if weighted else (None, None)
    triton_impl.forward(x, *row_wise, basis, torch.ones(layers), 0, width, not want_z, want_z)


@pytest.fixture(scope="module")
def compiled() -> list[aot.Compiled]:
    names = ("dtype", "width", "has_basis", "weighted", "want_z")
    cases = [dict(zip(names, case, strict=False)) for case in CASES.values()]
    return aot.compile_launches(launch, cases)


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_what_is_launched_compiles_fits_and_does_not_spill(compiled, case, target):
    number = list(CASES).index(case)
    found = [c for c in compiled if c.target == target and c.case == number]
    assert [c.kernel for c in found] == CASES[case][-1]
    for c in found:
        assert c.spills == 0, c
        assert c.occupancy > 0, f"more than a multiprocessor has: {c}"
        assert (c.mma > 0) == (c.kernel in (PROJECT, BACK)), c


@pytest.mark.parametrize("target", aot.TARGETS)
def test_rows_are_read_16_bytes_at_a_time(compiled, target):
    """AMD reads 8 where a program's 512 threads have no more to share out."""
    for c in compiled:
        if c.target == target and c.kernel != SIGNS and c.threads < 512:
            assert c.wide_loads > 0, c
