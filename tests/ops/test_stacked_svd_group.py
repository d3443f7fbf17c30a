"""Rows over the ranks of a process group: the same components as in one process."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.stacked_svd import METHODS, Again, assert_is_svd, matrix, product, stack_of, true_error

from lora_fused import testing
from lora_fused.ops import FactoredStack, StackedSvd, stacked_svd

CUT = 57  # rows of the first rank; the second has the other 93
CASES = {
    "tensor": {},
    "chunks": {},
    "centred": {"center": True, "weights": torch.linspace(0.5, 1.5, 150)},
    "energy": {"rank": None, "energy": 0.9},
    "no-iterations": {"power_iterations": 0},
    "batch": {},
    "scales": {},
}


def problem(case: str) -> torch.Tensor:
    m = matrix("gap", 150, 90).float()
    if case == "batch":
        return torch.stack([m, 3 * m.flip(0)])
    # Ranks whose rows differ by 1e12 must agree on one scale.
    return m * torch.where(torch.arange(150) < CUT, 1e-6, 1e6)[:, None] if case == "scales" else m


def solve(case: str, m: torch.Tensor, part: slice, method: str, group) -> StackedSvd:
    options = {"rank": 10, **CASES[case]}
    if "weights" in options:
        options["weights"] = options["weights"][part]
    x = m[..., part, :]
    x = Again(x.split(40)) if case == "chunks" else x
    g = torch.Generator().manual_seed(7)
    return stacked_svd(x, method=method, generator=g, group=group, **options)


def methods(case: str) -> tuple:
    return ("randomized",) if case == "no-iterations" else METHODS[:3]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    group, found = dist.group.WORLD, {}
    for case in CASES:
        for method in methods(case):
            part = slice(0, CUT) if rank == 0 else slice(CUT, None)
            found[case, method] = tuple(solve(case, problem(case), part, method, group))
    found["factors"] = tuple(stacked_svd(half_of_stack(rank), rank=8, group=group))
    bad = problem("tensor")[:CUT].clone()
    bad[5, 5] = torch.nan if rank else 0.0
    try:
        stacked_svd(bad, rank=3, group=group)
    except ValueError as error:
        found["error"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def half_of_stack(rank: int) -> FactoredStack:
    stack, _ = stack_of("rows", ranks=(4, 3, 5, 2))
    at, of = (slice(0, 7), slice(0, 2)) if rank == 0 else (slice(7, None), slice(2, None))
    start = stack.row_start[of.start : (of.stop or 4) + 1]
    return FactoredStack(stack.lora_a[at], stack.lora_b[at], start - start[0], stack.scale[of])


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("group")
    mp.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def joined(ranks: list[dict], key) -> StackedSvd:
    first, second = (StackedSvd(*found[key]) for found in ranks)
    for a, b in zip(first[1:5], second[1:5], strict=True):
        assert torch.equal(a, b), "what is not sharded is the same on both ranks"
    return first._replace(u=torch.cat([first.u, second.u], -2))


@pytest.mark.parametrize("case, method", [(c, m) for c in CASES for m in methods(c)])
def test_two_ranks_are_one(ranks, case, method):
    m = problem(case)
    found, alone = joined(ranks, (case, method)), solve(case, m, slice(None), method, None)
    assert found.method == alone.method and found.s.shape == alone.s.shape
    assert_is_svd(found)
    if case in ("no-iterations", "energy"):  # a cut without a gap: no one best to hold them to
        assert torch.allclose(found.s, alone.s, rtol=1e-3)
        return
    m = m.double()
    if case == "centred":
        w = CASES[case]["weights"].double()[:, None]
        m = (m - (w**2 * m).sum(0) / (w**2).sum()) * w
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    best = (u[..., :10] * s[..., None, :10]) @ vh[..., :10, :]
    testing.assert_within_budget(product(found).float(), product(alone).float(), best)
    assert torch.all(true_error(m, found) <= found.residual * (1 + 1e-3))


def test_adapters_over_ranks(ranks):
    whole, formed = stack_of("rows", ranks=(4, 3, 5, 2))
    found = joined(ranks, "factors")
    assert_is_svd(found)
    assert torch.allclose(found.s, stacked_svd(whole, rank=8).s, rtol=1e-4)
    assert true_error(formed, found) <= found.residual * (1 + 1e-5)


def test_an_error_on_one_rank_is_an_error_on_all(ranks):
    assert ranks[1]["error"] == "stacked_svd: stack must be finite, got nan in row 5"
    assert "stack must be sound on every rank" in ranks[0]["error"]


@pytest.mark.parametrize("form", ["columns", "sum"])
def test_other_forms_are_not_sharded(form):
    with pytest.raises(ValueError, match="group must be None unless form is 'rows'"):
        contract_group(form)


def contract_group(form: str) -> None:
    from lora_fused.ops.stacked_svd.contract import check_factors

    check_factors(stack_of(form)[0], False, object(), ("rows", "columns", "sum"))
