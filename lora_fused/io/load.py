"""Many adapters at once: finding them, and loading them into one bank, all or none."""

import contextlib
import gc
import glob
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lora_fused.adapters import Adapter, AdapterBank
from lora_fused.checks import invalid
from lora_fused.io.peft import CONFIG, PICKLE, WEIGHTS, default_name, read_adapter

Paths = str | os.PathLike | Iterable[str | os.PathLike]


def load_adapters(
    paths: Paths,
    *,
    names: Sequence[str] | None = None,
    bank: AdapterBank | None = None,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> AdapterBank:
    """Read adapters into one bank, all or none.

    Args:
        paths: One or several of: an adapter's folder or file; a glob, which stands for the adapters
            among its matches, sorted; ``@list.txt``, a file with one of these per line (relative to
            the list; empty lines and lines that begin with # are skipped).
        names: One name per adapter. Default: its folder's name (a file's: without the suffix).
        bank: Add to this bank. Default: a new one. After an error it is as it was.
        dtype: Storage dtype of a new bank. Default: the files' own if all agree, else float32.
        allow_pickle: See ``read_adapter``.
        on_progress: Called as on_progress(done, total) after each file.

    Returns:
        The bank.

    Raises:
        FileNotFoundError: a path, or every match of a glob, is missing.
        ValueError: see ``read_adapter``; names that clash; sizes that do not fit each other; values
            that the bank's dtype cannot hold.

    Example:
        >>> bank = load_adapters("adapters/*", dtype=torch.bfloat16)
    """
    found = _expand(paths)
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
    _check_sizes(adapters, bank)
    try:
        bank.add_many(adapters)
    except ValueError:
        _explain_overflow(adapters, bank.dtype)
        raise
    return bank


def find_adapters(path: str | os.PathLike) -> list[Path]:
    """All adapters below a folder (or the path itself), sorted, whether or not they can be loaded.

    A folder counts if it holds adapter_config.json or an adapter_model file; another .safetensors
    file if a tensor name in it speaks of LoRA or it cannot be read; a .bin file if its own name
    does. Hidden files and folders are passed over.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"find_adapters: no such file or folder: {path}")
    if path.is_file() or _is_adapter(path):
        return [path]
    found = []
    for folder, inner, files in os.walk(path):
        inner[:] = [name for name in inner if not name.startswith(".")]
        here = [Path(folder)] if _is_adapter(Path(folder)) else [Path(folder, f) for f in files]
        found += [p for p in here if not p.name.startswith(".") and _is_adapter(p)]
    return sorted(found)


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


def _is_adapter(path: Path) -> bool:
    if path.is_dir():
        return any((path / file).is_file() for file in (CONFIG, WEIGHTS, PICKLE))
    if path.suffix != ".safetensors":
        return path.suffix == ".bin" and "lora" in path.name.lower()
    try:
        with safe_open(path, "pt") as opened:
            return any("lora" in key.lower() for key in opened.keys())  # noqa: SIM118
    except SafetensorError:
        return True  # let the reader say what is wrong with it


def _expand(paths: Paths) -> list[Path]:
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    found: list[Path] = []
    for path in map(os.fspath, paths):
        if path.startswith("@"):
            found += _read_list(Path(path[1:]))
        elif glob.has_magic(path) and not os.path.exists(path):
            matches = [m for m in map(Path, sorted(glob.glob(path))) if _is_adapter(m)]
            if not matches:
                raise FileNotFoundError(f"load_adapters: no adapter matches {path}")
            found += matches
        else:
            found.append(Path(path))
    if not found:
        raise invalid("load_adapters", "paths", "name at least one adapter", "none")
    return found


def _read_list(file: Path) -> list[Path]:
    if not file.is_file():
        raise FileNotFoundError(f"load_adapters: no such list of adapters: {file}")
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return _expand([os.path.join(file.parent, s) for s in lines if s and not s.startswith("#")])


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
