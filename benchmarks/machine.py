"""Where a benchmark ran: names for its rows, and the rates that its floor is computed from."""

import functools
import platform
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

import lora_fused
from lora_fused.backends import NATIVE

PROBE_SECONDS = 0.15  # for each rate
ROOT = Path(__file__).resolve().parent.parent


@functools.cache
def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def torch_isa() -> str:
    return torch.backends.cpu.get_cpu_capability().lower()


def native_isa() -> str:
    return NATIVE.isa().lower() if NATIVE is not None else ""


@functools.cache
def commit() -> str:
    """The commit that is checked out, "-dirty" behind it where tracked files differ from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    # The results themselves are written while measuring.
    code = [line for line in changed.splitlines() if "benchmarks/results/" not in line]
    return head + ("-dirty" if code else "")


def versions() -> dict[str, str]:
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = ""
    return {
        "torch": torch.__version__,
        "triton": triton,
        "version": lora_fused.__version__,
        "commit": commit(),
    }


class Rates:
    """What this machine does at best: bytes per second by working set, FLOPs per second by dtype.

    Bytes count as read and as written. The bandwidth used for a cell is that of a copy whose
    working set is nearest to the cell's, so that a cell that fits a cache is held to the cache.
    ``clock`` is the one that the cells are timed by: on a busy machine another finds other rates.
    """

    SIZES = tuple(2**p for p in range(18, 29, 2))

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.bandwidth = {size: 0.0 for size in self.SIZES}
        for size in self.SIZES:
            source = torch.ones(size // 8)
            target = torch.empty_like(source)
            self.bandwidth[size] = size / self._fastest(lambda s=source, t=target: t.copy_(s))
        self._flops: dict[str, float] = {}

    def flops(self, dtype: str) -> float:
        """Of torch's matrix product; low precision counts as float32 where that is faster."""
        if dtype not in self._flops:
            a, b = torch.randn(2, 1024, 1024).to(getattr(torch, dtype)).unbind(0)
            c = torch.empty_like(a)
            self._flops[dtype] = 2 * 1024**3 / self._fastest(lambda: torch.mm(a, b, out=c))
        return (
            self._flops[dtype]
            if dtype == "float32"
            else max(self._flops[dtype], self.flops("float32"))
        )

    def floor(self, flops: float, traffic: float, dtype: str) -> float:
        """Seconds that nothing on this machine can undercut by much: the larger of two bounds."""
        nearest = min(self.SIZES, key=lambda size: max(size, traffic) / min(size, traffic))
        return max(flops / self.flops(dtype), traffic / self.bandwidth[nearest])

    def __str__(self) -> str:
        copies = ", ".join(
            f"{rate / 1e9:.0f} GB/s at {size / 2**20:g} MiB"
            for size, rate in self.bandwidth.items()
        )
        return f"float32 GEMM {self.flops('float32') / 1e9:.0f} GFLOP/s; copy {copies}"

    def _fastest(self, run) -> float:
        run()
        best, until = float("inf"), self.clock() + PROBE_SECONDS
        while best == float("inf") or self.clock() < until:
            start = self.clock()
            run()
            best = min(best, self.clock() - start)
        return best


def _git(*args: str) -> str:
    command = ["git", "-C", str(ROOT), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
