"""Native results depend on a row alone: not on its batch, the threads, or the storage."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.subspace_lora import DTYPES, FORMS, gradients, problem, require, run, triple

TESTS = Path(__file__).resolve().parent.parent
RAGGED = (1, 3, 7, 8, 16, 33, 64, 0)


@pytest.fixture(autouse=True)
def native():
    require("native")


def rows_of(p: dict, rows: list) -> dict:
    per_row = ("x", "adapter_ids", "weights", "base")
    return {k: t[rows] if k in per_row and t is not None else t for k, t in p.items()}


def make(n: int, form: str, dtypes=DTYPES[0], width: int = 127, **kwargs) -> dict:
    p = problem(n, 4, RAGGED, 33, 24, width, 65, form=form, dtypes=dtypes, **kwargs)
    p["base"] = torch.randn(n, 65, generator=torch.Generator().manual_seed(9)).to(dtypes[0])
    p["adapter_ids"][3::7] = -1  # rows that are left out of the products
    return p


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=triple)
def test_row_alone_and_in_any_batch(dtypes, form):
    p = make(200, form, dtypes)
    whole = run(p, "native")
    for rows in ([0], [77], [199], [5, 6], list(range(40, 90)), list(range(199, -1, -1))):
        assert torch.equal(run(rows_of(p, rows), "native"), whole[rows]), rows
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1)).tolist()
    assert torch.equal(run(rows_of(p, order), "native"), whole[order])
    repeated = [13] * 70
    assert torch.equal(run(rows_of(p, repeated), "native"), whole[repeated])


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_a_row_alone_and_in_any_batch(form):
    p = make(100, form)
    whole = gradients(p, "native", ("x", "weights"), seed=3)
    g = torch.randn(100, 65, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    for rows in ([0], [77], list(range(20, 60))):
        q = rows_of(p, rows)
        leaves = {k: q[k].detach().requires_grad_() for k in whole}
        run(q, "native", **leaves).backward(g[rows])
        assert all(torch.equal(leaves[k].grad, whole[k][rows]) for k in whole)


@pytest.mark.parametrize("form", FORMS)
def test_long_batches(form):
    """Past the rows that are planned at a time, and with one adapter that all rows share."""
    for ids in (None, torch.full((2500, 4), 6).int()):
        p = make(2500, form)
        p["adapter_ids"] = p["adapter_ids"] if ids is None else ids
        whole = run(p, "native")
        for rows in ([0], [1023], [1024], [2499], list(range(1000, 1100))):
            assert torch.equal(run(rows_of(p, rows), "native"), whole[rows])


@pytest.mark.parametrize("form", FORMS)
def test_other_rows_do_not_matter(form):
    p = make(64, form)
    before = run(p, "native")
    q = {k: t.clone() if k in ("x", "adapter_ids", "weights", "base") else t for k, t in p.items()}
    q["x"][::2], q["base"][::2] = 1e30, torch.nan
    q["adapter_ids"][::2], q["weights"][::2] = 6, torch.inf
    assert torch.equal(run(q, "native")[1::2], before[1::2])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", (1, 3, 65, 300))
def test_threads(n, form):
    """Two, three and eight threads split the work differently and change nothing."""
    p, results = make(n, form, width=2000), []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append([run(p, "native"), *gradients(p, "native").values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_shared_mixtures_equal_their_rows(form):
    """row_mixture and M < N give what the same mixtures written out for every row give."""
    at = [2, 0, 2, 1, 3, 3]
    p = problem(24, 4, RAGGED, 33, 24, 127, 65, form=form, mixtures=4, row_mixture=at)
    index = torch.tensor(at).repeat_interleave(4)
    written_out = {k: p[k][index] for k in ("adapter_ids", "weights")}
    assert torch.equal(run(p, "native"), run({**p, **written_out, "row_mixture": None}, "native"))


@pytest.mark.parametrize("form", FORMS)
def test_repeated_calls_are_equal(form):
    p = make(65, form)
    first, grads = run(p, "native"), gradients(p, "native")
    for _ in range(3):
        run(make(200, form, seed=4), "native")  # leaves something else in scratch that is kept
        again = gradients(p, "native")
        assert torch.equal(run(p, "native"), first)
        assert all(torch.equal(again[leaf], grads[leaf]) for leaf in grads)


@pytest.mark.parametrize("isa", ("generic", "avx2", "avx2_w16", "avx512"))
def test_every_isa_passes(isa):
    from lora_fused import _C

    if isa not in _C.isas():
        pytest.skip(f"{isa}: this CPU does not have it")
    chosen = (
        "native and (negative_control or ids_none or gradients_match or other_rows or alone"
        " or (matches_reference and float32-bfloat16 and not N1500))"
    )
    files = [str(TESTS / "ops" / f"test_subspace_lora{part}.py") for part in ("", "_invariance")]
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *files]
    env = {**os.environ, "LORA_FUSED_ISA": isa}
    done = subprocess.run(
        [sys.executable, *command], env=env, cwd=TESTS.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
