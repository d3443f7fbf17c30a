"""mixture_lora's Triton launches, compiled for GPUs that are not here."""

import importlib.util

import pytest
import torch
from support import aot

CASES = {
    "decode": {},
    "prefill": {"rows": 2048, "per_row": 4},
    "float32": {"dtype": "float32"},
    "backward": {"rows": 64, "adapters": 4, "backward": True},
}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def launch(rows=8, per_row=2, adapters=64, dtype="bfloat16", backward=False) -> None:
    from lora_fused.ops.mixture_lora import plan, triton_impl
    from lora_fused.testing import make_stack, sample_ids

    kind = getattr(torch, dtype)
    stack = make_stack([16] * adapters, 4096, 4096, dtype=kind)
    ids = sample_ids("uniform", rows, per_row, adapters)
    x = torch.empty(rows, 4096, dtype=kind)
    weights = torch.empty(rows, per_row)
    order = plan.make_plan(ids, None, rows)
    call = (x, *stack.factors(), stack.row_start, None, ids, weights, stack.scale, None)
    if backward:
        triton_impl.backward(x, *call, 31, order, stack.max_rank)
    else:
        triton_impl.forward(*call, x, order, stack.max_rank)


@pytest.fixture(scope="module")
def compiled() -> list[aot.Compiled]:
    return aot.compile_launches(launch, list(CASES.values()))


@pytest.mark.parametrize("target", aot.TARGETS)
def test_nothing_spills(compiled, target):
    found = [c for c in compiled if c.target == target]
    # shrink and expand in each case, outer and sum in backward
    assert len(found) == 2 * len(CASES) + 2
    for c in found:
        assert c.spills == 0, c
        assert c.mma > 0 or c.kernel == "_mixture_lora_sum_kernel", c


@pytest.mark.parametrize("target", aot.TARGETS)
def test_the_stack_is_read_16_bytes_at_a_time(compiled, target):
    for c in compiled:
        if c.target == target and c.kernel == "_mixture_lora_shrink_kernel":
            assert c.wide_loads + c.bulk_loads > 0, c
