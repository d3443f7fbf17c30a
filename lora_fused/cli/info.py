"""``lora-fused info``: what can run here, and why the rest cannot."""

import os
import pkgutil
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import torch
import typer

from lora_fused import __version__, backends, ops
from lora_fused.cli.console import print_json, stdout, table

PACKAGES = ("triton", "safetensors", "transformers", "peft")


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show every op and backend with "ok" or the reason, versions, threads and the CPU's ISA."""
    facts = collect()
    if as_json:
        print_json(facts)
        return
    console = stdout()
    impls = list(backends.ERRORS)
    # The reasons are sentences, so they stand below the table and the cells stay short.
    cells = [
        [op, *("ok" if row[i] == "ok" else "no" for i in impls)]
        for op, row in facts["backends"].items()
    ]
    console.print(table("Backends", {"op": "left", **dict.fromkeys(impls, "left")}, cells))
    for impl, reason in backends.ERRORS.items():
        if reason is not None:
            console.print(f"{impl}: {reason}", markup=False, soft_wrap=True)
    rows = [[name, value or "not installed"] for name, value in facts["versions"].items()]
    rows += [["threads", facts["threads"]], *facts["native"].items()]
    rows += facts["environment"].items()
    console.print(table("Here", {"what": "left", "value": "left"}, rows))


def collect() -> dict:
    """The facts behind the tables, as ``--json`` prints them."""
    reasons = {impl: reason or "ok" for impl, reason in backends.ERRORS.items()}
    names = [module.name for module in pkgutil.iter_modules(ops.__path__) if module.ispkg]
    versions = {"lora_fused": __version__, "python": platform.python_version()}
    versions["torch"] = torch.__version__
    return {
        "backends": {op: dict(reasons) for op in names},
        "versions": versions | {name: _version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "native": _native(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("LORA_FUSED_")},
    }


def _native() -> dict[str, str]:
    if backends.NATIVE is None:
        return {"isa in use": "none: the native extension is not built"}
    build = {f"build {key}": str(value) for key, value in backends.NATIVE.build_info().items()}
    available = ", ".join(map(str, backends.NATIVE.isas()))
    return {"isa in use": backends.NATIVE.isa(), "isa available": available, **build}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
