"""mixture_lora's Triton kernels on a GPU: `pytest -m gpu` compiles them, all other runs interpret.

Held to the same budget as everywhere, with float64 on the CPU as the truth.
"""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from support import ROOT
from support.mixture_lora import DTYPES, FORMS, LEAVES, dense, double, name, problem, run, truth

from lora_fused import backends
from lora_fused.ops import mixture_lora
from lora_fused.ops.mixture_lora.plan import make_plan
from lora_fused.testing import assert_within_budget

CUDA = "cuda"
RAGGED = (1, 3, 7, 8, 16, 33, 64, 0)
SHAPES = {  # N, J, ranks, I, O and the rest of problem()
    "decode": ((8, 2, (16,) * 8, 1024, 1024), {}),
    "decode_ragged": ((65, 4, RAGGED, 127, 65), {}),
    "one_row": ((1, 8, RAGGED, 1000, 1), {}),
    "prefill": ((512, 4, (16,) * 16, 512, 256), {"mixtures": 8}),
    "prefill_shared": ((96, 3, RAGGED, 200, 129), {"mixtures": 2, "row_mixture": [1, 0, 0, 1]}),
    "top_three": ((256, 3, (8,) * 64, 256, 128), {}),
    "high_rank": ((33, 2, (512, 100), 160, 96), {}),
    "no_rows": ((0, 2, (8,), 64, 48), {}),
}
PER_ROW = ("x", "adapter_ids", "weights", "base")


def why_not() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if backends.INTERPRETING:
        return "this run interprets Triton's kernels; pytest -m gpu compiles them"
    return backends.ERRORS["triton"]


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


def on_gpu(p: dict) -> dict:
    return {k: t.to(CUDA) if isinstance(t, torch.Tensor) else t for k, t in p.items()}


def make(shape: str, x_dtype=torch.float32, dtype=torch.float32, form="packed", **changes) -> dict:
    """A problem on the CPU; max_rank is given, so that nothing needs to be read back."""
    sizes, rest = SHAPES[shape]
    p = problem(*sizes, x_dtype=x_dtype, dtype=dtype, form=form, **rest | changes)
    return p | {"max_rank": max(sizes[2])}


def with_base(p: dict) -> dict:
    g = torch.Generator().manual_seed(9)
    base = torch.randn(p["x"].shape[0], p["lora_b"].shape[-1], generator=g)
    return p | {"base": base.to(p["x"].dtype)}


def gradients(p: dict, impl: str, wanted=LEAVES, op=mixture_lora) -> dict:
    """Gradients of <y, g> for a fixed g, drawn on the CPU whatever p's device."""
    leaves = {k: p[k].detach().requires_grad_() for k in wanted if p[k] is not None}
    y = op(**{**p, **leaves}, impl=impl)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).bfloat16()
    found = torch.autograd.grad(y, list(leaves.values()), g.to(y))
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("x_dtype", DTYPES, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype, x_dtype, form):
    p = make(shape, x_dtype, dtype, form)
    actual = run(on_gpu(p), "triton")
    assert actual.device.type == CUDA
    assert_within_budget(actual.cpu(), run(p, "reference"), truth(p))


def test_auto_takes_these_kernels():
    p = on_gpu(make("decode"))
    assert torch.equal(run(p, "auto"), run(p, "triton"))


def test_negative_control():
    """The budget sees two adapter ids swapped in a single row."""
    p = make("decode", torch.bfloat16, torch.bfloat16)
    p["adapter_ids"][3], p["weights"][3] = torch.tensor([0, 1]), torch.tensor([0.7, 0.3])
    swapped = p["adapter_ids"].clone()
    swapped[3] = torch.tensor([1, 0])
    wrong = run(on_gpu(p | {"adapter_ids": swapped}), "triton")
    with pytest.raises(AssertionError, match="error"):
        assert_within_budget(wrong.cpu(), run(p, "reference"), truth(p))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_match_reference(shape, dtype, form):
    p = make(shape, dtype, dtype, form)
    actual, competitor = gradients(on_gpu(p), "triton"), gradients(p, "reference")
    exact = gradients(double(p), "reference")
    assert set(actual) == set(LEAVES) - {"base"}
    for leaf, grad in actual.items():
        assert_within_budget(grad.cpu(), competitor[leaf], exact[leaf], leaf)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", ["decode", "prefill", "top_three"])
def test_base_is_added_in_float32_and_rounded_once(shape, dtype):
    p = with_base(make(shape, dtype, torch.bfloat16))
    update = p | {"base": None}
    once = run(update | {"x": p["x"].float()}, "reference") + p["base"].float()
    exact = truth(update) + p["base"].double()
    assert_within_budget(run(on_gpu(p), "triton").cpu(), once.to(dtype), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("shape", SHAPES)
def test_repeated_calls_are_equal(shape, dtype):
    p = on_gpu(with_base(make(shape, dtype, dtype)))
    first, grads = run(p, "triton"), gradients(p, "triton")
    for _ in range(3):
        assert torch.equal(run(p, "triton"), first)
        again = gradients(p, "triton")
        assert all(torch.equal(again[leaf], grad) for leaf, grad in grads.items())


def test_a_plan_made_outside_changes_nothing():
    for shape in SHAPES:
        p = on_gpu(with_base(make(shape)))
        plan = make_plan(p["adapter_ids"], p["row_mixture"], p["x"].shape[0])
        assert torch.equal(run(p, "triton", plan=plan), run(p, "triton")), shape


def rows_of(p: dict, rows) -> dict:
    return {k: t[rows] if k in PER_ROW and t is not None else t for k, t in p.items()}


def other_rows(n: int) -> list[list[int]]:
    """Single rows, parts and orders of a batch of n."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1)).tolist()
    return [[0], [n // 2], [n - 1], order[: n // 2], order, [n // 3] * min(n, 7)]


def differing_rows(n: int, shape: str, dtype: torch.dtype) -> list:
    """Which choices of rows of one batch of n give other bits than the batch; on the device."""
    (_, *sizes), _ = SHAPES[shape]
    p = problem(n, *sizes, x_dtype=dtype, dtype=dtype) | {"max_rank": max(sizes[1])}
    p = on_gpu(with_base(p))
    whole = run(p, "triton")
    return [r for r in other_rows(n) if not torch.equal(run(rows_of(p, r), "triton"), whole[r])]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("n, shape", [(8, "decode"), (16, "decode_ragged"), (60, "decode_ragged")])
def test_a_row_does_not_depend_on_its_batch_within_a_regime(n, shape, dtype):
    """One launch where ranks are few and 16 bits wide; else two, with tiles for up to 64 rows."""
    assert differing_rows(n, shape, dtype) == []


INVARIANT = """
import json, sys, torch
sys.path[:0] = json.loads(sys.argv[1])
from gpu.test_mixture_lora_gpu import DTYPES, differing_rows
cases = [(8, "decode"), (60, "decode_ragged"), (300, "decode_ragged"), (4200, "top_three")]
found = {str((*c, d)): differing_rows(*c, d) for c in cases for d in DTYPES}
print(json.dumps({case: rows for case, rows in found.items() if rows}))
"""


def test_one_regime_for_all_batches_where_invariance_is_asked_for():
    env = os.environ | {"LORA_FUSED_BATCH_INVARIANT": "1"}
    command = [sys.executable, "-c", INVARIANT, json.dumps([str(ROOT), str(ROOT / "tests")])]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {}


def another(p: dict, seed: int) -> dict:
    """Other values of the same shapes: x, ids (with -1), weights and base."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, p["scale"].shape[0], p["adapter_ids"].shape, generator=g)
    drawn = {k: torch.randn(p[k].shape, generator=g).to(p[k]) for k in ("x", "weights", "base")}
    return drawn | {"adapter_ids": ids.to(p["adapter_ids"])}


@pytest.mark.parametrize("plan_outside", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", ["decode", "decode_ragged", "prefill", "top_three"])
def test_a_captured_graph_follows_its_inputs(shape, form, plan_outside):
    p = on_gpu(with_base(make(shape, torch.bfloat16, torch.bfloat16, form)))

    def call():
        ids, at, n = p["adapter_ids"], p["row_mixture"], p["x"].shape[0]
        return run(p, "triton", plan=make_plan(ids, at, n) if plan_outside else None)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiles, which a capture may not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for seed in range(3):
        for k, t in another(p, seed).items():
            p[k].copy_(t)
        graph.replay()
        replayed = y.clone()
        assert torch.equal(replayed, call()), seed


@pytest.mark.parametrize("shape", ["decode", "prefill"])
def test_compiles_with_reduced_overhead(shape):
    """CUDA graphs under torch.compile: forward and backward follow changed inputs."""
    torch._dynamo.reset()
    compiled = torch.compile(mixture_lora, fullgraph=True, mode="reduce-overhead")
    p, wanted = with_base(make(shape)), ("x", "weights", "base")
    for seed in range(4):  # the first calls warm up and record
        p = p | another(p, seed)
        update, given = p | {"base": torch.zeros_like(p["base"])}, on_gpu(p)
        torch.compiler.cudagraph_mark_step_begin()
        y = compiled(**on_gpu(update), impl="triton").clone()
        assert_within_budget(y.cpu(), run(update, "reference"), truth(update))
        torch.compiler.cudagraph_mark_step_begin()
        found = gradients(given, "triton", wanted, compiled)
        eager, exact = gradients(given, "triton", wanted), gradients(double(p), "reference", wanted)
        for leaf, grad in found.items():
            assert_within_budget(grad.cpu(), eager[leaf].cpu(), exact[leaf], leaf)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", ["decode", "prefill", "top_three"])
def test_ids_out_of_range_count_as_none(shape, form):
    """On a device they cannot be refused without a read; they are masked, in both directions."""
    p = with_base(make(shape, form=form))
    count = p["scale"].shape[0]
    wild = p["adapter_ids"].clone()
    wild[:, 0] = torch.tensor([count, count + 7, 2**31 - 1, -2]).repeat(len(wild))[: len(wild)]
    none = torch.where((wild < 0) | (wild >= count), -1, wild)
    given, masked = on_gpu(p | {"adapter_ids": wild}), on_gpu(p | {"adapter_ids": none})
    assert torch.equal(run(given, "triton"), run(masked, "triton"))
    mine, theirs = gradients(given, "triton"), gradients(masked, "triton")
    assert all(torch.equal(mine[leaf], theirs[leaf]) for leaf in mine)
    assert_within_budget(
        run(given | {"base": None}, "triton").cpu(),
        run(p | {"adapter_ids": none, "base": None}, "reference"),
        truth(p | {"adapter_ids": none, "base": None}),
    )


def test_nothing_is_read_back():
    """A call queues its kernels and returns: no value on the device decides what is launched."""
    for shape, form in itertools.product(("decode", "prefill", "top_three"), FORMS):
        p = on_gpu(with_base(make(shape, form=form)))
        gradients(p, "triton")  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(p, "triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_offsets_past_two_to_the_31():
    """The last adapter of a stack of more than 2^31 values is found."""
    ranks, width = 17_000, 1 << 17  # 2.2e9 values a side, 4.5 GB each in bfloat16
    free, _ = torch.cuda.mem_get_info()
    if free < 12 * 2**30:
        pytest.skip(f"needs 12 GiB of GPU memory, {free / 2**30:.0f} are free")
    lora_a = torch.zeros(ranks, width, dtype=torch.bfloat16, device=CUDA)
    lora_b = torch.zeros(ranks, width, dtype=torch.bfloat16, device=CUDA)
    lora_a[-8:, ::64], lora_b[-8:, 5] = 1.0, 1.0
    row_start = (torch.arange(ranks // 8 + 1, device=CUDA) * 8).int()
    ids = torch.tensor([[ranks // 8 - 1], [0]], device=CUDA).int()
    x, weights = torch.ones(2, width, dtype=torch.bfloat16, device=CUDA), torch.ones(2, 1).to(CUDA)
    args = (x, lora_a, lora_b, row_start, ids, weights)
    y = mixture_lora(*args, max_rank=8, impl="triton")
    expected = torch.zeros_like(y)
    expected[0, 5] = 8 * (width // 64)
    assert torch.equal(y, expected)


def test_the_dense_loop_agrees_on_a_small_case():
    """An oracle that shares no code with the reference."""
    p = make("decode_ragged")
    exact = dense(double(p), torch.float64)
    assert_within_budget(run(on_gpu(p), "triton").cpu(), dense(p, torch.float32), exact)
