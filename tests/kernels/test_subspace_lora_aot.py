"""subspace_lora's Triton launches, compiled for GPUs that are not here, against a committed budget.

PYTHONPATH=tests python tests/kernels/test_subspace_lora_aot.py    # write the budget anew
"""

import importlib.util

import pytest
import torch
from support import ROOT, aot, budget

SHRINK, EXPAND, DECODE, OUTER, SUM_RUNS = (
    f"mixture_lora_{stage}" for stage in ("shrink", "expand", "decode", "outer", "sum")
)
# What each way of the op launches, and the kernels that it must come to (mixture_lora's by name).
CASES = {
    "decode": ({"rows": 8}, ["project", "lift"]),
    "rows_256": ({}, ["project", "lift"]),
    "rows_512": ({"rows": 512}, ["project", "lift"]),
    "rows_1024": ({"rows": 1024}, ["project", "lift"]),
    "rows_4096": ({"rows": 4096}, ["project", "lift"]),
    "wide": ({"rows": 64, "width": 14336}, ["project", "sum", "lift"]),
    "pairs": ({"form": "pairs"}, ["project", DECODE, "lift"]),
    "pairs_in_two": ({"form": "pairs", "rows": 2048}, ["project", SHRINK, EXPAND, "lift"]),
    "full": ({"form": "full"}, ["project", EXPAND, "lift"]),
    "float32_few": ({"rows": 8, "dtype": "float32"}, ["project", "lift"]),
    "float32": ({"dtype": "float32"}, ["project", "lift"]),
    "float32_512": ({"rows": 512, "dtype": "float32"}, ["project", "lift"]),
    "float32_1024": ({"rows": 1024, "dtype": "float32"}, ["project", "lift"]),
    "float32_4096": ({"rows": 4096, "dtype": "float32"}, ["project", "lift"]),
    "float16": ({"dtype": "float16"}, ["project", "lift"]),
    "backward": ({"backward": True}, ["project", "diagonal", SUM_RUNS, "lift"]),
    "backward_pairs": (
        {"backward": True, "form": "pairs"},
        ["project", SHRINK, EXPAND, OUTER, SUM_RUNS, "lift"],
    ),
}
BUDGET = ROOT / "benchmarks" / "results" / "subspace_lora_aot.csv"
NO_PRODUCT = {"sum", "diagonal", DECODE, SUM_RUNS}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def launch(
    rows=256, per_row=4, rank=16, width=4096, dtype="bfloat16", form="diagonal", backward=False
) -> None:
    from lora_fused.ops.subspace_lora import triton_impl
    from lora_fused.testing import make_stack, sample_ids

    kind, adapters, directions = getattr(torch, dtype), 16, 128
    stack = make_stack([rank] * adapters, directions, directions, dtype=kind)
    cores = {
        "pairs": (stack.lora_a, stack.lora_b, stack.row_start),
        "full": (torch.empty(adapters, directions, directions, dtype=kind), None, None),
        "diagonal": (torch.empty(adapters, directions, dtype=kind), None, None),
    }[form]
    ids = sample_ids("uniform", rows, per_row, adapters)
    weights, scale = torch.empty(ids.shape), torch.empty(adapters)
    x, basis = torch.empty(rows, width, dtype=kind), torch.empty(directions, width, dtype=kind)
    args = (basis, basis, *cores, ids, weights, scale, None)
    max_rank = rank if form == "pairs" else 0
    if backward:
        z = torch.empty(rows, directions)
        triton_impl.backward(x, z, *args, kind, 0b11111, [], max_rank)
    else:
        triton_impl.forward(x, *args, x, [], max_rank)


def measured() -> list[dict]:
    return budget.measure(launch, {k: case for k, (case, _) in CASES.items()}, "subspace_lora")


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    return measured()


def name(row: dict) -> str:
    return row["kernel"].removeprefix("_")


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_what_is_launched_compiles_fits_and_does_not_spill(compiled, case, target):
    found = [c for c in compiled if c["target"] == target and c["case"] == case]
    assert [name(c) for c in found] == CASES[case][1]
    for c in found:
        assert c["spills"] == 0 and c["atomics"] == 0, c
        assert c["occupancy"] > 0, f"more than a multiprocessor has: {c}"
        assert (c["mma"] > 0) == (name(c) not in NO_PRODUCT), c


@pytest.mark.parametrize("target", aot.TARGETS)
def test_bases_and_cores_are_read_16_bytes_at_a_time(compiled, target):
    for c in compiled:
        # 512 lanes share a tile of expand on AMD: 8 bytes of B each.
        small = target.startswith("gfx") and name(c) == EXPAND
        if c["target"] == target and name(c) not in ("sum", OUTER, SUM_RUNS) and not small:
            assert c["wide_loads"] + c["bulk_loads"] > 0, c


def test_nothing_became_dearer(compiled):
    budget.compare(compiled, BUDGET)


if __name__ == "__main__":
    budget.write(measured(), BUDGET)
