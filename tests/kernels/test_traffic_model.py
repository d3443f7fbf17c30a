"""The model of time counts the bytes that the kernels move."""

import importlib.util

import pytest
import torch
from support.traffic import assert_predicted

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.mark.parametrize("name", ["one_each", "decode", "one_row"])
def test_bytes_are_those_that_the_counter_sees(name):
    from benchmarks.traffic import count, model, works

    work = {w.name: w for w in works.WORKS}.get(name)
    if work is None:
        work = works.Work(name, N=2, M=2, J=2, K=4, I=1024, O=1024, R=16, workload="distinct")
    problem = works.Problem(work)
    run = works.ours()["triton"](problem)
    with count() as counter:
        run()
    ids = problem.ids
    alone = len(counter.launches) == 1
    expected = [model.one(ids, work.R, work.I)] if alone else model.two(ids, work.R, work.I)
    assert alone == (name == "one_row")
    assert_predicted(counter.launches, expected)


def test_tables_are_printed():
    from benchmarks.traffic import model

    lines = [*model.tiles(), *model.one_or_two(1024)]
    assert sum("*" in line for line in lines) == len(lines) - 2, "all but two lines of headings"


def test_the_shorter_way_is_shipped():
    """At rank 16 and a width of 4096: or one that is at most 15 % longer."""
    from benchmarks.traffic import model
    from lora_fused.ops.mixture_lora import plan

    x, b = torch.empty(1, 4096), torch.empty(0, 4096, dtype=torch.bfloat16)
    for rows in (1, 2, 4, 8, 16):
        for per_row in (1, 2, 4):
            ids = torch.arange(rows * per_row).view(rows, per_row)
            one = model.microseconds([model.one(ids, 16, 4096)])
            two = model.microseconds(model.two(ids, 16, 4096))
            taken = one if plan.is_one_launch(x.expand(rows, -1), [b], per_row, 16) else two
            assert taken <= 1.15 * min(one, two), (rows, per_row, one, two)
