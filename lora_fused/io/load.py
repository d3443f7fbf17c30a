"""Many adapters at once, loaded into one bank, all or none."""

import contextlib
import gc
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from lora_fused.adapters import Adapter, AdapterBank
from lora_fused.checks import invalid
from lora_fused.io.config import base_key
from lora_fused.io.find import Paths, expand
from lora_fused.io.peft import default_name, read_adapter
from lora_fused.io.tensors import FLOATS

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS}


def load_adapters(
    paths: Paths | Mapping[str, str | os.PathLike],
    *,
    names: Sequence[str] | None = None,
    bank: AdapterBank | None = None,
    dtype: torch.dtype | str | None = None,
    any_base: bool = False,
    allow_pickle: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> AdapterBank:
    """Read adapters into one bank, all or none.

    Args:
        paths: One or several of: an adapter's folder or file; a folder that holds adapters (see
            ``find_adapters``); a glob, which stands for the adapters among its matches, sorted;
            ``@list.txt``, a file with one of these per line (relative to the list; empty lines and
            lines that begin with # are skipped). Or a dict of name to an adapter's folder or file.
        names: One name per adapter. Default: its folder's name (a file's: without the suffix).
        bank: Add to this bank. Default: a new one. After an error it is as it was.
        dtype: Storage dtype of a new bank, also by name (``"bfloat16"``). Default: the files' own
            if all agree, else float32.
        any_base: Allow adapters whose configs name different base models. Bases are compared by
            the last part of their paths, ignoring case; a config that names none fits all.
        allow_pickle: See ``read_adapter``.
        on_progress: Called as on_progress(done, total) after each file.

    Returns:
        The bank.

    Raises:
        FileNotFoundError: a path, or every match of a glob, is missing.
        ValueError: see ``read_adapter``; names that clash; base models or sizes that do not fit
            each other; values that the bank's dtype cannot hold.

    Example:
        >>> bank = load_adapters("adapters/*", dtype=torch.bfloat16)
    """
    if isinstance(paths, Mapping):
        if names is not None:
            raise invalid("load_adapters", "names", "be None with a dict of paths", repr(names))
        names, found = list(paths), _one_each(paths)
    else:
        found = expand(paths)
    dtype = _dtype(dtype)
    if bank is not None and dtype not in (None, bank.dtype):
        raise invalid("load_adapters", "dtype", f"be that of the bank ({bank.dtype})", dtype)
    names = _names(found, names, bank)
    adapters = []
    with _garbage_collection_off():
        for done, (path, name) in enumerate(zip(found, names, strict=True), 1):
            adapters.append(read_adapter(path, name=name, allow_pickle=allow_pickle))
            if on_progress is not None:
                on_progress(done, len(found))
    bank = AdapterBank(dtype=dtype) if bank is None else bank
    if not any_base:
        _check_bases(adapters, bank)
    _check_sizes(adapters, bank)
    try:
        bank.add_many(adapters)
    except ValueError:
        _explain_overflow(adapters, bank.dtype)
        raise
    return bank


@contextlib.contextmanager
def _garbage_collection_off() -> Iterator[None]:
    # Thousands of new objects, none of them garbage, make the collector walk the whole process:
    # 60 of 300 ms for 64 adapters.
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _one_each(paths: Mapping[str, str | os.PathLike]) -> list[Path]:
    found = {name: expand([path]) for name, path in paths.items()}
    for name, several in found.items():
        if len(several) > 1:
            got = f"{len(several)} in {paths[name]}"
            raise invalid("load_adapters", f"paths[{name!r}]", "be one adapter", got)
    return expand(path for several in found.values() for path in several)


def _names(found: list[Path], names: Sequence[str] | None, bank: AdapterBank | None) -> list[str]:
    if names is None:
        names = [default_name(path) for path in found]
    elif isinstance(names, str) or len(names) != len(found):
        rule = f"be a list of {len(found)}, one per adapter"
        raise invalid("load_adapters", "names", rule, repr(names))
    counts = Counter(names)
    clashes = [
        f"{name!r} ({path})"
        for name, path in zip(names, found, strict=True)
        if counts[name] > 1 or (bank is not None and name in bank)
    ]
    if clashes:
        rule = "be distinct and not in the bank (give names=)"
        raise invalid("load_adapters", "names", rule, ", ".join(clashes))
    return list(names)


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        dtype = _DTYPES.get(dtype.removeprefix("torch."), dtype)
    if dtype is not None and dtype not in FLOATS:
        rule = f"be one of {', '.join(_DTYPES)}, or None"
        raise invalid("load_adapters", "dtype", rule, repr(dtype))
    return dtype


def _check_bases(adapters: Sequence[Adapter], bank: AdapterBank) -> None:
    """Refuse adapters of another base: their update is added to a model it was not made for."""
    held = [(f"adapter {name!r} of the bank", bank.metadata[name]) for name in bank]
    known = None
    for owner, metadata in [*held, *((a.metadata["path"], a.metadata) for a in adapters)]:
        base = (metadata.get("config") or {}).get("base_model_name_or_path")
        key = base_key(base)
        if not key:
            continue
        known = known or (key, base, owner)
        if key != known[0]:
            where = f"base_model_name_or_path of {owner}"
            rule = f"be {known[1]!r} as in {known[2]} (any_base=True allows others)"
            raise invalid("load_adapters", where, rule, repr(base))


def _check_sizes(adapters: Sequence[Adapter], bank: AdapterBank) -> None:
    known = {
        module: ((stack.in_features, stack.out_features, stack.embedding), "the bank")
        for module, stack in bank.stacks.items()
    }
    for adapter in adapters:
        for module, part in adapter.modules.items():
            sizes = (part.lora_a.shape[1], part.lora_b.shape[1], part.embedding)
            other, owner = known.setdefault(module, (sizes, adapter.metadata["path"]))
            if sizes != other:
                where = f"(I, O, embedding) of {module!r} in {adapter.metadata['path']}"
                raise invalid("load_adapters", where, f"be {other} as in {owner}", sizes)


def _explain_overflow(adapters: Sequence[Adapter], dtype: torch.dtype | None) -> None:
    for adapter in adapters:
        for module, part in adapter.modules.items():
            for side, tensor in (("lora_A", part.lora_a), ("lora_B", part.lora_b)):
                if dtype is not None and not tensor.to(dtype).isfinite().all():
                    where = f"{side} of {module!r} in {adapter.metadata['path']}"
                    got = f"values up to {float(tensor.abs().max()):.3g}"
                    raise invalid("load_adapters", where, f"fit into {dtype}", got)
