"""The contenders of bench_gpu, each a function of a problem that returns what is timed.

Whatever depends on the routing alone is made beforehand for everybody: a model makes it once for
all of its layers. Ours without that advantage is a contender of its own.
"""

import copy
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.traffic import works
from benchmarks.traffic.works import Contender, Problem, Work, arguments
from lora_fused.ops import mixture_lora
from lora_fused.ops.mixture_lora.plan import make_plan

WORKS = [  # of mixture_lora, and what the peers' kernels can hold
    *(work for work in works.WORKS if not work.form and work.K <= works.MANY),
    Work("decode_wide", N=64, M=64, J=4, K=64, I=4096, O=4096, R=16),
    Work("prefill_wide", N=2048, M=8, J=4, K=16, I=4096, O=4096, R=16),
]


@dataclass(frozen=True)
class Floor:
    """What is timed beside the contenders: less work than the problem asks for."""

    name: str
    run: Callable[[], Tensor]
    flops: float
    traffic: float


def moved(problem: Problem, device: torch.device, *, with_base: bool = True) -> Problem:
    """The problem with its tensors on the device; without its base that is zero."""
    there = copy.copy(problem)
    for name, value in vars(problem).items():
        if isinstance(value, Tensor):
            setattr(there, name, value.to(device))
    if not with_base:
        there.base = torch.zeros_like(there.base)
    return there


def rounded(problem: Problem) -> Tensor:
    """The update by the reference in the problem's dtype; its error sets the tolerance."""
    args, options = arguments(problem)
    return mixture_lora(*args, **options | {"base": None}, impl="reference")


def ours() -> dict[str, Contender]:
    """The Triton kernels with a plan made outside, as for all layers but the first, and inside."""

    def build(problem: Problem) -> Callable[[], Tensor]:
        args, options = arguments(problem)
        plan = make_plan(problem.ids, options["row_mixture"], problem.work.N)
        return lambda: mixture_lora(*args, **options, plan=plan, impl="triton")

    def build_plan_inside(problem: Problem) -> Callable[[], Tensor]:
        args, options = arguments(problem)
        return lambda: mixture_lora(*args, **options, impl="triton")

    return {"triton": build, "triton_plan_inside": build_plan_inside}


def peers(*, download: bool = True) -> tuple[dict[str, Contender], list[str]]:
    """vLLM's, SGLang's and FlashInfer's, and for each that is not to be had the reason."""
    found, reasons = works.peers(download=download)
    reason = _why_no_flashinfer()
    if reason is None:
        return found | {"flashinfer": _flashinfer}, reasons
    return found, [*reasons, f"flashinfer: {reason}"]


def floors(problem: Problem) -> list[Floor]:
    """cuBLAS where all rows share one adapter, or one mixture, and a copy of compulsory bytes."""
    work, x = problem.work, problem.x
    found = []
    shared = {"gemms_one_adapter": 1} | ({"gemms_one_mixture": work.J} if work.J > 1 else {})
    for name, adapters in shared.items():
        rank = adapters * work.R
        lora_a, lora_b = problem.lora_a[:rank], problem.lora_b[:rank]
        y = problem.base.clone()  # added to in place, as the peers do: two launches

        def run(a_ri: Tensor = lora_a, b_ro: Tensor = lora_b, y: Tensor = y) -> Tensor:
            return y.addmm_(x @ a_ri.T, b_ro)

        flops = 2 * work.N * rank * (work.I + work.O)
        values = work.N * (work.I + 2 * work.O) + rank * (work.I + work.O)
        found.append(Floor(name, run, flops, values * x.element_size()))
    traffic = compulsory(problem)
    source = torch.zeros(traffic // 2, dtype=torch.uint8, device=x.device)
    target = torch.empty_like(source)
    return [*found, Floor("copy", lambda: target.copy_(source), 0.0, traffic)]


def compulsory(problem: Problem) -> int:
    """Bytes that every way must move, read and written."""
    return problem.compulsory_read + problem.compulsory_written


def _why_no_flashinfer() -> str | None:
    if importlib.util.find_spec("flashinfer") is None:
        return "not installed; pip install flashinfer-python"
    try:
        kernels = importlib.import_module("flashinfer.fused_moe.bgmv_moe")
    except ImportError as error:
        return f"this version has no bgmv_moe: {error}"
    return None if kernels.has_bgmv_moe() else "its bgmv_moe extension does not build here"


def _flashinfer(problem: Problem) -> Callable[[], Tensor]:
    """Its LoRA kernels for experts, our adapters as the experts of one LoRA: J in one call.

    They are compiled for a list of widths and for ranks 8, 16, 32 and 64, and round the rank-wide
    intermediate to x's dtype. They add to a float32 buffer, so the base is widened into one first.
    """
    kernels = importlib.import_module("flashinfer.fused_moe.bgmv_moe")
    calls = problem.for_peers()
    (rows, per_row), count, device = calls.ids.shape, calls.lora_a.shape[0], calls.x.device
    tables = torch.zeros(2, 1, count, dtype=torch.int64, device=device)
    stride_a, stride_b = (
        kernels.fill_w_ptr(table, side[None], count, 0)
        for table, side in zip(tables, (calls.lora_a, calls.lora_b), strict=True)
    )
    row = torch.arange(rows, device=device).repeat_interleave(per_row)
    adapter = calls.ids.flatten().long()
    weights = torch.full((rows * per_row,), calls.weight, device=device)
    lora = torch.zeros(rows, dtype=torch.int64, device=device)
    starts, widths = torch.zeros(1, dtype=torch.int64, device=device), [calls.lora_b.shape[1]]

    def run() -> Tensor:
        h = calls.x.new_zeros(1, rows * per_row, calls.lora_a.shape[1])
        kernels.bgmv_moe_shrink(h, calls.x, tables[0], row, adapter, lora, stride_a)
        y = calls.y.float()
        pairs = (row, adapter, weights, lora)
        kernels.bgmv_moe_expand(y, h, tables[1], *pairs, starts, widths, stride_b)
        return y.to(calls.y.dtype)

    return run
