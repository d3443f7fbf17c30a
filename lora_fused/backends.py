"""What can run here, decided once at import.

Constants, not functions: a probe that imports inside the call breaks torch.compile(fullgraph=True).
Each ``*_ERROR`` is None when the backend works, else the one sentence that the error of a named
implementation, ``lora-fused info`` and the test skip all show.
"""

import importlib.util
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


NATIVE, NATIVE_ERROR = _load_native()
ERRORS = {"reference": None, "native": NATIVE_ERROR}


def choose(op: str, impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve ``impl`` to the implementation that will run; a named one never falls back."""
    if impl == "auto":
        usable = NATIVE_ERROR is None and device.type == "cpu" and dtype != torch.float64
        return "native" if usable else "reference"
    if impl not in ERRORS:
        names = ", ".join(["auto", *ERRORS])
        raise ValueError(f"{op}: impl must be one of {names}, got {impl!r}")
    if ERRORS[impl] is not None:
        raise RuntimeError(f"{op}: impl must be usable here, got {impl!r}: {ERRORS[impl]}")
    if impl == "native" and device.type != "cpu":
        raise RuntimeError(f"{op}: impl 'native' must get CPU tensors, got device {device}")
    return impl
