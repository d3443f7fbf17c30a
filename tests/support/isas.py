"""Running tests of native kernels once per instruction set, each in a process of its own."""

import os
import subprocess
import sys

from support import ROOT

ISAS = ("generic", "avx2", "avx2_w16", "avx512")


def usable() -> list[str]:
    from lora_fused import _C

    return _C.isas()


def in_process(isa: str, *command: str) -> str:
    """What Python says with ``isa`` forced."""
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "LORA_FUSED_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
