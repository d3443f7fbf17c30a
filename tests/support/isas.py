"""Running tests of native kernels once per instruction set, each in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence

import pytest

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


def assert_tests_pass(isa: str, chosen: str, *files: str) -> None:
    """Run the chosen tests with ``isa`` forced; none may fail or be skipped."""
    if isa not in usable():
        pytest.skip(f"{isa}: this CPU does not have it")
    said = in_process(
        isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen, *files
    )
    assert " passed" in said and "skipped" not in said


def digests_of(isas: Sequence[str], file: str) -> dict[str, dict]:
    """What ``file`` prints as JSON under each ISA, which it must name."""
    found = {}
    for isa in isas:
        if isa not in usable():
            pytest.skip(f"{isa}: this CPU does not have it")
        found[isa] = json.loads(in_process(isa, file))
        assert found[isa].pop("isa") == isa
    return found
