"""Many adapters of a bank, written as one folder each."""

import os
from collections.abc import Sequence
from pathlib import Path

from lora_fused.adapters import AdapterBank
from lora_fused.checks import invalid
from lora_fused.io.peft import check_target, write_adapter

_OP = "save_adapters"


def save_adapters(
    bank: AdapterBank,
    directory: str | os.PathLike,
    names: Sequence[str] | None = None,
    *,
    overwrite_ok: bool = False,
) -> list[Path]:
    """Write adapters of a bank as PEFT folders ``directory/<name>``; see ``write_adapter``.

    Every name and folder is checked before the first is written, and each folder appears complete
    or not at all.

    Args:
        bank: The adapters, also those in training.
        directory: Made if need be. ``load_adapters(directory)`` reads it back.
        names: Which ones. Default: all.
        overwrite_ok: Replace adapters that are there.

    Returns:
        The folders, in the order of the names.

    Raises:
        FileExistsError: a folder exists.
        ValueError: no such adapter, or a name that no folder in the directory can have.
    """
    if not isinstance(bank, AdapterBank):
        raise invalid(_OP, "bank", "be an AdapterBank", type(bank).__name__)
    if not isinstance(directory, (str, os.PathLike)):
        raise invalid(_OP, "directory", "be a path", type(directory).__name__)
    if isinstance(names, str):
        raise invalid(_OP, "names", "be a list of names", repr(names))
    names = bank.names if names is None else list(names)
    if len(set(names)) < len(names):
        raise invalid(_OP, "names", "be distinct", names)
    adapters = [bank.adapter(name) for name in names]
    for adapter in adapters:
        # Hidden folders are passed over by find_adapters.
        if adapter.name.startswith(".") or set(adapter.name) & set("/\\\0"):
            rule = "serve as a folder's name, without / and \\ and not hidden (see bank.rename)"
            raise invalid(_OP, "names", rule, repr(adapter.name))
    paths = [Path(directory, adapter.name) for adapter in adapters]
    for path in paths:
        check_target(path, overwrite_ok, _OP)
    for adapter, path in zip(adapters, paths, strict=True):
        write_adapter(adapter, path, overwrite_ok=overwrite_ok)
    return paths
