"""mixture_lora's Triton launches, compiled for GPUs that are not here, against a committed budget.

PYTHONPATH=tests python tests/kernels/test_mixture_lora_aot.py    # write the budget anew
"""

import importlib.util

import pytest
import torch
from support import ROOT, aot, budget

# What each way of the op launches, and the kernels that it must come to (stages of the names).
CASES = {
    "one_launch": ({"rows": 1, "per_row": 1}, ["decode"]),
    "few_rows": ({"rows": 64}, ["shrink", "expand"]),
    "many_rows": ({"rows": 512, "per_row": 3}, ["shrink", "expand"]),
    "by_mixture": ({"rows": 2048, "mixtures": 8, "per_row": 4}, ["shrink", "expand_shared"]),
    "by_mixture_many": ({"rows": 4096, "mixtures": 8, "per_row": 4}, ["shrink", "expand_shared"]),
    "group": ({"rows": 64, "group": 3}, ["shrink", "expand"]),
    "group_by_mixture": ({"rows": 2048, "mixtures": 8, "group": 3}, ["shrink", "expand_shared"]),
    "wide": ({"rows": 512, "width": 28672}, ["shrink", "expand"]),
    "wide_by_mixture": ({"rows": 2048, "mixtures": 8, "width": 14336}, ["shrink", "expand_shared"]),
    "rank_64": ({"rows": 64, "rank": 64}, ["shrink", "expand"]),
    "rank_64_by_mixture": (
        {"rows": 2048, "mixtures": 8, "per_row": 4, "rank": 64},
        ["shrink", "expand_shared"],
    ),
    "float32": ({"rows": 512, "per_row": 3, "dtype": "float32"}, ["shrink", "expand"]),
    "float32_by_mixture": (
        {"rows": 4096, "mixtures": 8, "per_row": 4, "dtype": "float32"},
        ["shrink", "expand_shared"],
    ),
    "float16": ({"rows": 64, "dtype": "float16"}, ["shrink", "expand"]),
    "backward": ({"rows": 64, "backward": True}, ["shrink", "expand", "outer", "sum"]),
    "overlapped": ({"rows": 64, "pdl": True}, ["shrink", "expand"]),
}
BUDGET = ROOT / "benchmarks" / "results" / "mixture_lora_aot.csv"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def launch(
    rows=8,
    per_row=2,
    mixtures=None,
    rank=16,
    width=4096,
    dtype="bfloat16",
    group=1,
    backward=False,
    pdl=False,
) -> None:
    from lora_fused import backends
    from lora_fused.ops.mixture_lora import triton_impl
    from lora_fused.testing import make_stack, sample_ids

    backends.PDL = pdl
    kind, adapters = getattr(torch, dtype), 16
    outs = [width, width // 4, width // 4][:group]
    stacks = [make_stack([rank] * adapters, width, out, dtype=kind) for out in outs]
    ids = sample_ids("uniform", mixtures or rows, per_row, adapters)
    x, weights = torch.empty(rows, width, dtype=kind), torch.empty(ids.shape)
    a, b, start, scale = (
        [getattr(s, name) for s in stacks] for name in ("lora_a", "lora_b", "row_start", "scale")
    )
    base = [torch.empty(rows, out, dtype=kind) for out in outs]
    if backward:
        one = (a[0], b[0], start[0], None, ids, weights, scale[0], None)
        triton_impl.backward(base[0], x, *one, 31, [], rank)
    else:
        triton_impl.forward(x, a, b, start, [], ids, weights, scale, None, base, [], rank)


def measured() -> list[dict]:
    return budget.measure(launch, {k: case for k, (case, _) in CASES.items()}, "mixture_lora")


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return measured()


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_what_is_launched_compiles_fits_and_does_not_spill(compiled, case, target):
    found = [c for c in compiled if c["target"] == target and c["case"] == case]
    assert [c["kernel"] for c in found] == CASES[case][1]
    for c in found:
        assert c["spills"] == 0 and c["atomics"] == 0, c
        assert c["occupancy"] > 0, f"more than a multiprocessor has: {c}"
        assert (c["mma"] > 0) == (c["kernel"] not in ("decode", "sum")), c


@pytest.mark.parametrize("target", aot.TARGETS)
def test_the_stack_is_read_16_bytes_at_a_time(compiled, target):
    for c in compiled:
        # 256 lanes share the small tile of few rows on AMD: 4 bytes of B each.
        small = target.startswith("gfx") and c["kernel"] == "expand"
        if c["target"] == target and c["kernel"] not in ("outer", "sum") and not small:
            assert c["wide_loads"] + c["bulk_loads"] > 0, c


def test_nothing_became_dearer(compiled):
    budget.compare(compiled, BUDGET)


if __name__ == "__main__":
    budget.write(measured(), BUDGET)
