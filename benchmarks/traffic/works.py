"""The works whose traffic is compared, and who does them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers import triton_wheels
from lora_fused.backends import ERRORS
from lora_fused.ops import PairCores, mixture_lora, subspace_lora
from lora_fused.testing import make_stack, sample_ids

DTYPE, BYTES = torch.bfloat16, 2
P = 128  # directions of each basis


@dataclass(frozen=True)
class Work:
    """N rows in M equal groups, each group with its own J of K adapters of rank R, bfloat16.

    ``form``: that of the cores, pairs of rank R or diagonal, where the adapters lie in one basis.
    """

    name: str
    N: int
    M: int
    J: int
    K: int
    I: int
    O: int
    R: int
    workload: str = "uniform"
    form: str = ""

    def __str__(self) -> str:
        sizes = " ".join(f"{letter}{getattr(self, letter)}" for letter in "NMJKIOR")
        return f"{self.name} {sizes} {self.workload}"


WORKS = [
    Work("one_each", N=64, M=64, J=1, K=4, I=1024, O=1024, R=16),
    Work("four_each", N=64, M=64, J=4, K=16, I=1024, O=1024, R=16),
    Work("decode", N=8, M=8, J=2, K=8, I=4096, O=4096, R=16, workload="distinct"),
    Work("prefill", N=2048, M=8, J=4, K=16, I=1024, O=1024, R=16),
    Work("top_three", N=512, M=512, J=3, K=64, I=1024, O=1024, R=16),
    # In one basis: what a batch moves must not grow with the adapters in it. "written_out" is what
    # the last two would be without the basis.
    *(
        Work(f"{form}_{name}", 256, 256, J, 1000, 2048, 2048, R, workload, form)
        for form, R in (("diagonal", 0), ("pairs", 16))
        for name, J, workload in (
            ("distinct", 1, "distinct"), ("one", 1, "identical"), ("four", 4, "distinct"),
        )
    ),
    Work("written_out", N=256, M=256, J=4, K=1000, I=2048, O=2048, R=16, workload="distinct"),
]  # fmt: skip


class Problem:
    """A work with its data; all weights are 1 / J and all scales 1, which the peers can do too."""

    def __init__(self, work: Work):
        self.work = work
        stack = make_stack([work.R] * work.K, work.I, work.O, dtype=DTYPE)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(work.N, work.I, generator=generator).to(DTYPE)
        self.base = torch.randn(work.N, work.O, generator=generator).to(DTYPE)
        self.ids = sample_ids(work.workload, work.M, work.J, work.K)
        self.lora_a, self.lora_b, self.row_start = stack.lora_a, stack.lora_b, stack.row_start
        self.used = self.ids.unique().numel()

    @property
    def compulsory_read(self) -> int:
        """Bytes that every way must read: x, the base and each adapter in use, once."""
        work = self.work
        adapters = self.used * work.R * (work.I + work.O)
        return BYTES * (work.N * (work.I + work.O) + adapters)

    @property
    def compulsory_written(self) -> int:
        return BYTES * self.work.N * self.work.O

    def truth(self) -> Tensor:
        """The float64 result."""
        y, x = self.base.double(), self.x.double()
        rows = self._row_ids()
        for k, (a, b) in enumerate(zip(*self._factors(), strict=True)):
            times = (rows == k).sum(dim=1, keepdim=True)
            y += times / self.work.J * (x @ a.double().T @ b.double())
        return y

    def for_peers(self) -> triton_wheels.Calls:
        lora_a, lora_b = self._factors()
        return triton_wheels.Calls(
            x=self.x,
            lora_a=lora_a.contiguous(),
            lora_b=lora_b.mT.contiguous(),
            ids=self._row_ids(),
            weight=1 / self.work.J,
            y=self.base.clone(),
        )

    def _row_ids(self) -> Tensor:
        return self.ids.repeat_interleave(self.work.N // self.work.M, dim=0)

    def _factors(self) -> tuple[Tensor, Tensor]:
        work = self.work
        return self.lora_a.view(work.K, work.R, work.I), self.lora_b.view(work.K, work.R, work.O)


class BasisProblem:
    """A work in one basis with its data."""

    def __init__(self, work: Work):
        self.work = work
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.x = normal(work.N, work.I).to(DTYPE)
        self.base = normal(work.N, work.O).to(DTYPE)
        self.basis_a = (normal(P, work.I) * work.I**-0.5).to(DTYPE)
        self.basis_b = (normal(P, work.O) * P**-0.5).to(DTYPE)
        self.ids = sample_ids(work.workload, work.M, work.J, work.K)
        if work.form == "pairs":
            stack = make_stack([work.R] * work.K, P, P, dtype=DTYPE)
            self.cores = PairCores(stack.lora_a, stack.lora_b, stack.row_start)
        else:
            self.cores = normal(work.K, P).to(DTYPE)

    @property
    def core_bytes(self) -> int:
        """Of the cores in use, each once."""
        used = self.ids.unique().numel()
        return BYTES * used * P * (2 * self.work.R if self.work.form == "pairs" else 1)

    @property
    def compulsory_read(self) -> int:
        """Bytes that every way must read: x, the base, both bases and each core in use, once."""
        work = self.work
        return BYTES * (work.N + P) * (work.I + work.O) + self.core_bytes

    @property
    def compulsory_written(self) -> int:
        return BYTES * self.work.N * self.work.O

    def truth(self) -> Tensor:
        """The float64 result."""
        work, rows = self.work, self.ids.repeat_interleave(self.work.N // self.work.M, dim=0)
        z = (self.x.double() @ self.basis_a.double().T)[:, None]  # [N, 1, P]
        if work.form == "pairs":
            a, b = (t.view(work.K, work.R, P)[rows].double() for t in self.cores[:2])
            t = ((z[:, :, None] * a).sum(-1, keepdim=True) * b).sum(2)
        else:
            t = z * self.cores[rows].double()
        return self.base.double() + t.sum(1) / work.J @ self.basis_b.double()


def problem_of(work: Work) -> "Problem | BasisProblem":
    return BasisProblem(work) if work.form else Problem(work)


def arguments(problem: Problem) -> tuple[tuple, dict]:
    """What mixture_lora is called with for a problem, on the problem's device."""
    work, device = problem.work, problem.x.device
    weights = torch.full(problem.ids.shape, 1 / work.J, device=device)
    args = (problem.x, problem.lora_a, problem.lora_b, problem.row_start, problem.ids, weights)
    groups = torch.arange(work.M, dtype=torch.int32, device=device)
    return args, {"row_mixture": groups, "max_rank": work.R, "base": problem.base}


Contender = Callable[["Problem | BasisProblem"], Callable[[], Tensor]]
MANY = 64  # adapters: the peers are counted up to here


def ours() -> dict[str, Contender]:
    """Our own kernels, where this version has them and Triton is installed."""
    if ERRORS.get("triton", "not in this version") is not None:
        return {}

    def build(problem: Problem | BasisProblem) -> Callable[[], Tensor]:
        if isinstance(problem, BasisProblem):
            return _in_basis(problem)
        args, options = arguments(problem)
        return lambda: mixture_lora(*args, **options, impl="triton")

    return {"triton": build}


def _in_basis(problem: BasisProblem) -> Callable[[], Tensor]:
    p, work = problem, problem.work
    weights = torch.full(p.ids.shape, 1 / work.J)
    args = (p.x, p.basis_a, p.basis_b, p.cores, p.ids, weights)
    return lambda: subspace_lora(*args, base=p.base, max_rank=work.R, impl="triton")


def peers(*, download: bool = True) -> tuple[dict[str, Contender], list[str]]:
    """Their contenders, and for each project that is not to be had the reason.

    They have no basis, and a thousand adapters would take them hours here.
    """
    found, reasons = {}, []
    for project in (triton_wheels.vllm, triton_wheels.sglang):
        try:
            builds = project(download=download)
        except triton_wheels.Unavailable as error:
            reasons.append(f"{project.__name__}: {error}")
            continue
        for name, build in builds.items():
            found[name] = lambda problem, build=build: build(problem.for_peers())
    return found, reasons
