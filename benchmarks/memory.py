"""Peak memory of a piece of work: the kernel's own account of this process (Linux).

Torch's tensors, LAPACK's workspaces and numpy's arrays all count. Measure in a fresh process: what
an allocator kept from earlier work would be used again without being seen.
"""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

PROC = Path("/proc/self")


def extra(run: Callable[[], object]) -> int:
    """Bytes by which resident memory peaked over what was resident before, results included."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    (PROC / "clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    kept = run()
    peak = _status("VmHWM")
    del kept
    return peak - before


def peak() -> int:
    """Bytes that were resident in this process at most since it began."""
    return _status("VmHWM")


def missing() -> str:
    """Why it cannot be measured here; "" where it can."""
    return "" if (PROC / "clear_refs").exists() else "peak memory needs Linux's /proc"


def _status(field: str) -> int:
    lines = (PROC / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
