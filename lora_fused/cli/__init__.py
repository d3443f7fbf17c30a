"""The program ``lora-fused``. Importing lora_fused imports neither this package nor typer."""

import sys
from importlib.util import find_spec


def main() -> None:
    """Entry point of ``lora-fused``: one line and exit code 1 where typer or rich is missing."""
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        need, packages = " and ".join(missing), " ".join(missing)
        sys.exit(f"lora-fused: {need} must be installed; run: pip install {packages}")
    try:
        from lora_fused.cli.app import app

        app()
    except KeyboardInterrupt:
        sys.exit(130)


__all__ = ["main"]
