"""What every test gets: poisoned memory, one thread, real data, and an honest last line."""

import importlib.util
import itertools
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network
# Kernels run on the CPU, or compiled under `pytest -m gpu`; read when Triton is imported.
os.environ.setdefault(
    "TRITON_INTERPRET", "0" if ("-m", "gpu") in itertools.pairwise(sys.argv) else "1"
)

import hypothesis
import torch
from support import ROOT

from lora_fused import backends

if importlib.util.find_spec("triton") and os.environ["TRITON_INTERPRET"] == "1":
    from support import interpreter

    interpreter.install()

hypothesis.settings.register_profile("few", max_examples=50, deadline=None, derandomize=True)
hypothesis.settings.load_profile("few")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty yields NaN, so a result that nobody wrote shows at once."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture(autouse=True)
def one_thread():
    """Tests that want more threads say so; the next test starts at one again."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real adapters, models and tasks; tests that need it skip where it is absent."""
    path = Path(os.environ.get("LORA_FUSED_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data: {path} is not a folder (set LORA_FUSED_DATA)")
    return path


def pytest_terminal_summary(terminalreporter):
    missing = [f"{name}: {why}" for name, why in backends.ERRORS.items() if why is not None]
    if not torch.cuda.is_available():
        missing.append("no GPU")
    terminalreporter.write_line("not covered: " + ("; ".join(missing) or "nothing"))
