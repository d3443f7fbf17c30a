"""Calls that fit in size but not in meaning: each must be refused, none may return numbers."""

import pytest
import torch
from support.mixture_lora import IMPLS, problem, require, run
from torch.autograd import forward_ad

from lora_fused import testing
from lora_fused.ops import mixture_lora


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("start", ([0, 3, 12], [-1, 3, 11], [0, 12, 11], [1, 3, 11], [0, 3, 10]))
def test_a_row_start_that_does_not_cover_the_stack(start, impl):
    require(impl)
    p = problem(12, 3, (3, 8), 17, 9)
    with pytest.raises(ValueError, match="row_start must rise from 0 to the 11 rows of lora_a"):
        run(p, impl, row_start=torch.tensor(start).int())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ranks", ([9, 3, 1], [4, -3, 1]))
def test_ranks_beyond_the_slots(ranks, impl):
    require(impl)
    stack = testing.slotted(testing.make_stack([4, 3, 1], 8, 6))
    ids, weights = testing.sample_ids("uniform", 5, 2, 3), torch.ones(5, 2)
    with pytest.raises(ValueError, match=r"ranks must lie in \[0, 4\], got"):
        mixture_lora(
            torch.randn(5, 8),
            *stack.factors(),
            None,
            ids,
            weights,
            ranks=torch.tensor(ranks).int(),
            impl=impl,
        )


@pytest.mark.parametrize("impl", IMPLS)
def test_a_base_whose_rows_lie_otherwise(impl):
    require(impl)
    p = problem(6, 2, (3, 8), 17, 9)
    cube = {"x": p["x"].reshape(2, 3, 17)}
    for shape in ((3, 2, 9), (6, 9), (1, 6, 9)):
        with pytest.raises(ValueError, match=r"base must be \[2, 3, 9\]"):
            run(p, impl, **cube, base=torch.randn(shape))


def test_forward_mode_is_refused_not_zero():
    require("native")
    p = problem(6, 2, (3, 8), 17, 9)
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
        run(p, "native", x=forward_ad.make_dual(p["x"], torch.ones_like(p["x"])))


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_autocast_leaves_float64_alone(impl):
    p = problem(6, 2, (3, 8), 17, 9)
    double = {k: p[k].double() for k in ("x", "lora_a", "lora_b")}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if impl in ("native", "triton"):
            require(impl)
            with pytest.raises(ValueError, match="x must be"):
                run(p, impl, **double)
        else:
            assert run(p, impl, **double).dtype == torch.float64
