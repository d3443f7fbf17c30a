"""What can run here, decided once at import.

Constants, not functions: a probe that imports inside the call breaks torch.compile(fullgraph=True).
Each ``*_ERROR`` is None when the backend works, else the one sentence that the error of a named
implementation, ``lora-fused info`` and the test skip all show.
"""

import importlib.util
import os
import warnings

import torch  # before the extension, which resolves its symbols against the torch already loaded


def _load_native() -> tuple[object | None, str | None]:
    if importlib.util.find_spec("lora_fused._C") is None:
        return None, (
            "the native extension was not built; install a C++ compiler and reinstall with "
            "LORA_FUSED_NATIVE=cpu pip install --no-build-isolation"
        )
    try:
        from lora_fused import _C
    except (ImportError, OSError) as error:
        reason = f"the native extension was built but does not load: {error}"
        warnings.warn(f"lora_fused: {reason}; the slow reference runs instead", stacklevel=2)
        return None, reason
    return _C, None


def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if torch.cuda.is_available() or INTERPRETING:
        return None
    return "no CUDA device; TRITON_INTERPRET=1 runs the kernels slowly on the CPU, for tests"


INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# Triton: one regime for every N, so a row's result does not depend on how many rows there are.
BATCH_INVARIANT = os.environ.get("LORA_FUSED_BATCH_INVARIANT") == "1"
# Triton on sm_90 and later: programmatic dependent launch of expand. Not measured yet, so off.
PDL = os.environ.get("LORA_FUSED_PDL") == "1"
NATIVE, NATIVE_ERROR = _load_native()
TRITON_ERROR = _why_no_triton()
ERRORS = {"reference": None, "native": NATIVE_ERROR, "triton": TRITON_ERROR}


def choose(op: str, impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve ``impl`` to the implementation that will run; a named one never falls back."""
    if impl == "auto":
        fast = {"cpu": "native", "cuda": "triton"}.get(device.type, "reference")
        usable = ERRORS[fast] is None and dtype != torch.float64
        return fast if usable else "reference"
    if impl not in ERRORS:
        names = ", ".join(["auto", *ERRORS])
        raise ValueError(f"{op}: impl must be one of {names}, got {impl!r}")
    if ERRORS[impl] is not None:
        raise RuntimeError(f"{op}: impl must be usable here, got {impl!r}: {ERRORS[impl]}")
    devices = {"native": ("cpu",), "triton": ("cuda", "cpu") if INTERPRETING else ("cuda",)}
    if device.type not in devices.get(impl, (device.type,)):
        wanted = " or ".join(devices[impl])
        raise RuntimeError(f"{op}: impl {impl!r} must get {wanted} tensors, got device {device}")
    return impl
