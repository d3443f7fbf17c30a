"""Where adapters are: folders searched, patterns and lists expanded."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lora_fused.checks import invalid
from lora_fused.io.peft import CONFIG, PICKLE, WEIGHTS

Paths = str | os.PathLike | Iterable[str | os.PathLike]


def find_adapters(path: str | os.PathLike) -> list[Path]:
    """All adapters below a folder (or the path itself), sorted, whether or not they can be loaded.

    A folder counts if it holds adapter_config.json or an adapter_model file; another .safetensors
    file if a tensor name in it speaks of LoRA or it cannot be read; a .bin file if its own name
    does. Hidden files and folders are passed over. Links to folders are followed; a folder that
    several paths lead to is searched once.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"find_adapters: no such file or folder: {path}")
    if path.is_file() or is_adapter(path):
        return [path]
    found, seen = [], set()
    for folder, inner, files in os.walk(path, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            inner.clear()
            continue
        seen.add(real)
        # Links last: of two paths to one folder beside each other, its own is the one reported.
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        inner.sort(key=lambda name, folder=folder: os.path.islink(os.path.join(folder, name)))
        here = [Path(folder)] if is_adapter(Path(folder)) else [Path(folder, f) for f in files]
        found += [p for p in here if not p.name.startswith(".") and is_adapter(p)]
    return sorted(found)


def is_adapter(path: Path) -> bool:
    """Whether a path looks like an adapter; see ``find_adapters``."""
    if path.is_dir():
        return any((path / file).is_file() for file in (CONFIG, WEIGHTS, PICKLE))
    if path.suffix != ".safetensors" or not path.exists():
        return path.suffix == ".bin" and "lora" in path.name.lower()
    try:
        with safe_open(path, "pt") as opened:
            return any("lora" in key.lower() for key in opened.keys())  # noqa: SIM118
    except SafetensorError:
        return True  # let the reader say what is wrong with it


def expand(paths: Paths) -> list[Path]:
    """The adapters that ``load_adapters`` is asked for, in order."""
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    elif not isinstance(paths, Iterable):
        raise _not_a_path(paths)
    found: list[Path] = []
    for path in paths:
        if not isinstance(path, (str, os.PathLike)):
            raise _not_a_path(path)
        found += _expand_one(os.fspath(path))
    if not found:
        raise invalid("load_adapters", "paths", "name at least one adapter", "none")
    return found


def _expand_one(path: str) -> list[Path]:
    if path.startswith("@"):
        return _read_list(Path(path[1:]))
    if glob.has_magic(path) and not os.path.exists(path):
        matches = [m for m in map(Path, sorted(glob.glob(path))) if is_adapter(m)]
        if not matches:
            raise FileNotFoundError(f"load_adapters: no adapter matches {path}")
        return matches
    if not os.path.isdir(path):
        return [Path(path)]
    found = find_adapters(path)
    if not found:
        raise FileNotFoundError(f"load_adapters: no adapter in {path}")
    return found


def _read_list(file: Path) -> list[Path]:
    if not file.is_file():
        raise FileNotFoundError(f"load_adapters: no such list of adapters: {file}")
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return expand([os.path.join(file.parent, s) for s in lines if s and not s.startswith("#")])


def _not_a_path(got: object) -> ValueError:
    rule = "be a path, a list of paths, or a dict of name to path"
    return invalid("load_adapters", "paths", rule, f"{type(got).__name__} {got!r}")
