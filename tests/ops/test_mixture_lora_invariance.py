"""Native results depend on a row alone: not on its batch, the threads, or the storage form."""

from pathlib import Path

import pytest
import torch
from support.isas import ISAS, assert_tests_pass, digests_of, in_process
from support.mixture_lora import DTYPES, FORMS, LEAVES, gradients, name, problem, require, run

TESTS = Path(__file__).resolve().parent.parent
RAGGED = (1, 3, 7, 8, 16, 33, 64, 0)


@pytest.fixture(autouse=True)
def native():
    require("native")


def rows_of(p: dict, rows: list) -> dict:
    per_row = ("x", "adapter_ids", "weights", "base")
    return {k: t[rows] if k in per_row and t is not None else t for k, t in p.items()}


def make(n: int, x_dtype=torch.float32, dtype=torch.float32, form="packed", **kwargs) -> dict:
    p = problem(n, 4, RAGGED, 127, 65, x_dtype=x_dtype, dtype=dtype, form=form, **kwargs)
    p["base"] = torch.randn(n, 65, generator=torch.Generator().manual_seed(9)).to(x_dtype)
    return p


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_row_alone_and_in_any_batch(dtype, x_dtype, form):
    p = make(200, x_dtype, dtype, form)
    whole = run(p, "native")
    for rows in ([0], [77], [199], [5, 6], list(range(40, 90)), list(range(199, -1, -1))):
        assert torch.equal(run(rows_of(p, rows), "native"), whole[rows]), rows
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1)).tolist()
    assert torch.equal(run(rows_of(p, order), "native"), whole[order])
    repeated = [13] * 70
    assert torch.equal(run(rows_of(p, repeated), "native"), whole[repeated])


def test_long_batches():
    """Past the rows that are planned at a time, and with one adapter that all rows share."""
    for ids in (None, torch.full((2500, 4), 6).int()):
        p = make(2500)
        p["adapter_ids"] = p["adapter_ids"] if ids is None else ids
        whole = run(p, "native")
        for rows in ([0], [1023], [1024], [2499], list(range(1000, 1100))):
            assert torch.equal(run(rows_of(p, rows), "native"), whole[rows])


def test_other_rows_do_not_matter():
    p = make(64)
    before = run(p, "native")
    q = {k: t.clone() if k in ("x", "adapter_ids", "weights", "base") else t for k, t in p.items()}
    q["x"][::2], q["base"][::2] = 1e30, torch.nan
    q["adapter_ids"][::2], q["weights"][::2] = 6, torch.inf
    assert torch.equal(run(q, "native")[1::2], before[1::2])


@pytest.mark.parametrize("n", (1, 3, 65, 300))
def test_threads(n):
    """Two, three and eight threads split the work differently and change nothing."""
    p = make(n)
    p["x"] = torch.randn(n, 2000, generator=torch.Generator().manual_seed(2))
    p["lora_a"] = torch.randn(132, 2000, generator=torch.Generator().manual_seed(3)) * 2000**-0.5
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append([run(p, "native"), *gradients(p, "native").values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_shared_mixtures_equal_their_rows():
    """row_mixture and M < N give what the same mixtures written out for every row give."""
    at = [2, 0, 2, 1, 3, 3]
    p = make(24, mixtures=4, row_mixture=at)
    index = torch.tensor(at).repeat_interleave(4)
    written_out = {k: p[k][index] for k in ("adapter_ids", "weights")}
    assert torch.equal(run(p, "native"), run({**p, **written_out, "row_mixture": None}, "native"))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_packed_equals_slotted(dtype):
    p = make(65, dtype, dtype)
    packed, grads = run(p, "native"), gradients(p, "native", ("x", "weights", "scale"))
    for form in ("plain", "vllm"):
        q = make(65, dtype, dtype, form)
        assert torch.equal(run(q, "native"), packed)
        for leaf, grad in gradients(q, "native", tuple(grads)).items():
            assert torch.equal(grad, grads[leaf]), (form, leaf)


def test_repeated_calls_are_equal():
    p = make(65)
    first, grads = run(p, "native"), gradients(p, "native")
    for _ in range(3):
        run(make(200, seed=4), "native")  # leaves something else in any scratch that is kept
        again = gradients(p, "native")
        assert torch.equal(run(p, "native"), first)
        assert all(torch.equal(again[leaf], grads[leaf]) for leaf in LEAVES)


@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_passes(isa):
    chosen = (
        "native and (negative_control or TestEdges or gradients_match or other_rows or alone"
        " or (matches_reference and float32-bfloat16 and not N1500))"
    )
    files = [str(TESTS / "ops" / f"test_mixture_lora{part}.py") for part in ("", "_invariance")]
    assert_tests_pass(isa, chosen, *files)


def test_isas_of_the_same_width_agree_bitwise():
    """The wide body computes the same with 16 lanes of AVX-512 as with two times 8 of AVX2."""
    found = digests_of(("avx2_w16", "avx512"), str(TESTS / "support" / "digest.py"))
    assert found["avx2_w16"]["digests"] == found["avx512"]["digests"]


def test_an_unknown_isa_is_an_error():
    from lora_fused import backends

    code = "from lora_fused import backends; print(backends.ERRORS['native'])"
    said = in_process("sse9", "-c", code)
    assert "LORA_FUSED_ISA must be one of" in said and "sse9" in said
    assert backends.ERRORS["native"] is None
