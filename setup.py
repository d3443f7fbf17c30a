"""Builds lora_fused._C. Everything else is in pyproject.toml.

LORA_FUSED_NATIVE=auto (default): build if torch and a C++ compiler are there, else say so loudly
and install pure Python. cpu: a build that fails is an error. off: pure Python.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "cpu", "off")


def say(*lines: str) -> None:
    bar = "=" * 88
    print("\n".join(["", bar, *lines, bar, ""]), file=sys.stderr, flush=True)


def why_not() -> str | None:
    """The reason no extension can be built here, or None."""
    try:
        import torch
    except ImportError:
        return "torch is not installed in the build environment (use pip --no-build-isolation)"
    if tuple(int(p) for p in torch.__version__.split(".")[:2]) < (2, 10):
        return f"torch must be 2.10 or newer (stable ABI), got {torch.__version__}"
    compiler = os.environ.get("CXX", "c++").split()[0]
    return None if shutil.which(compiler) else f"no C++ compiler ({compiler!r} is not on PATH)"


def extension() -> dict:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    compiler = os.environ.get("CXX", "c++")
    # -fno-wrapv: Python's own flags carry -fwrapv, which costs gcc 12 a factor of 9 in the loops.
    flags = ["-std=c++17", "-O3", "-fno-wrapv", "-fno-math-errno", "-fvisibility=hidden"]
    flags += [f"-ffile-prefix-map={ROOT}/="]  # error messages name csrc/..., not the build folder
    # gcc 12 warns of its own AVX-512 headers.
    flags += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    macros = [
        ("LORA_FUSED_COMPILER", f'"{compiler}"'),
        ("LORA_FUSED_BUILD_TORCH", f'"{torch.__version__}"'),
        # Only what torch 2.10 already had, so that one build serves every later torch.
        ("TORCH_TARGET_VERSION", "0x020a000000000000"),
    ]
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.cpp"))
    headers = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.h"))
    module = CppExtension(
        "lora_fused._C",
        sources,
        depends=headers,
        define_macros=macros,
        extra_compile_args=flags,
        extra_link_args=["-Wl,-s"] if sys.platform == "linux" else [],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


wanted = os.environ.get("LORA_FUSED_NATIVE", "auto")
if wanted not in CHOICES:
    raise SystemExit(f"setup: LORA_FUSED_NATIVE must be one of {CHOICES}, got {wanted!r}")
reason = "LORA_FUSED_NATIVE=off" if wanted == "off" else why_not()
if reason is None:
    setup(**extension())
elif wanted == "cpu":
    raise SystemExit(f"setup: LORA_FUSED_NATIVE=cpu must find what it needs, got: {reason}")
else:
    if wanted == "auto":
        say(
            "lora_fused: installing WITHOUT native kernels (slower, pure torch): " + reason,
            "Set LORA_FUSED_NATIVE=cpu to make this an error, =off to silence it.",
        )
    setup()
