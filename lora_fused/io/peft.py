"""Adapters on disk: PEFT folders read and written; single kohya and diffusers files read."""

import glob
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_fused.adapters import Adapter, AdapterBank, LoraFactors
from lora_fused.checks import invalid, shape
from lora_fused.io.config import check_config, covers, rank_and_scale, saves
from lora_fused.io.keys import PREFIX, Part, name_fault, parse_peft

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_adapter(
    path: str | os.PathLike, *, name: str | None = None, allow_pickle: bool = False
) -> Adapter:
    """Read one adapter.

    Args:
        path: A PEFT folder (adapter_config.json and adapter_model.safetensors or .bin).
        name: What to call it. Default: the folder's name.
        allow_pickle: Also read a ``.bin`` file, by torch.load with weights_only=True.

    Returns:
        The adapter. Its factors are views of the mapped file until a bank copies them; saved
        modules are copied. ``metadata`` holds "path", "config" (the original), "keys" (tensor
        names by module), "dtypes" and "saved_keys": what write_adapter needs.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: naming the file and the config key or tensor that cannot be honoured exactly.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"read_adapter: no such file or folder: {path}")
    name = name or path.resolve().name
    return _read_folder(path, name, allow_pickle)


def load_adapters(
    paths: str | os.PathLike | Iterable[str | os.PathLike],
    *,
    names: Sequence[str] | None = None,
    bank: AdapterBank | None = None,
    dtype: torch.dtype | None = None,
    allow_pickle: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> AdapterBank:
    """Read adapters into one bank, all or none."""
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    found = [
        Path(match)
        for path in paths
        for match in (sorted(glob.glob(str(path))) if "*" in str(path) else [path])
    ]
    adapters = []
    for done, path in enumerate(found, 1):
        given = None if names is None else names[done - 1]
        adapters.append(read_adapter(path, name=given, allow_pickle=allow_pickle))
        if on_progress is not None:
            on_progress(done, len(found))
    bank = AdapterBank(dtype=dtype) if bank is None else bank
    bank.add_many(adapters)
    return bank


def _read_folder(folder: Path, name: str, allow_pickle: bool) -> Adapter:
    config = _read_config(folder / CONFIG)
    file = folder / WEIGHTS
    if not file.exists() and (folder / PICKLE).exists():
        file = folder / PICKLE
    tensors, header = _read_tensors(file, allow_pickle)
    parts = parse_peft(list(tensors), str(file))
    metadata = {"path": str(folder), "config": config, "header": header}
    return _assemble(name, tensors, parts, config, str(file), metadata)


def _read_config(file: Path) -> dict:
    if not file.exists():
        raise FileNotFoundError(f"read_adapter: {file.parent} holds no {CONFIG}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise invalid("read_adapter", str(file), "be JSON", error) from error
    check_config(config, str(file))
    return config


def _read_tensors(file: Path, allow_pickle: bool) -> tuple[dict[str, Tensor], dict]:
    if not file.exists():
        raise FileNotFoundError(f"read_adapter: {file.parent} holds no {WEIGHTS}")
    with file.open("rb") as stream:
        if stream.read(23) == b"version https://git-lfs":
            raise invalid("read_adapter", str(file), "hold tensors", "a Git LFS pointer to them")
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, "pt") as opened:
                return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()
        except SafetensorError as error:
            raise invalid(
                "read_adapter", str(file), "be a whole safetensors file", error
            ) from error
    if not allow_pickle:
        rule = "be safetensors, or allow_pickle=True be given (torch.load with weights_only=True)"
        raise invalid("read_adapter", str(file), rule, "a pickle")
    return torch.load(file, weights_only=True, map_location="cpu"), {}


def _assemble(name, tensors, parts, config, file: str, metadata: dict) -> Adapter:
    by_module: dict[str, dict[str, str]] = {}
    saved_keys = {}
    for key, part in parts.items():
        if part.side == "saved":
            saved_keys[part.module] = key
        else:
            by_module.setdefault(part.module, {})[part.side] = key
    modules = {}
    for module, keys in by_module.items():
        embedding = parts[next(iter(keys.values()))].embedding
        rank, scale = rank_and_scale(config, module)
        lora_a, lora_b = tensors[keys["a"]], tensors[keys["b"]]
        modules[module] = LoraFactors(lora_a, lora_b.mT, scale, embedding)
    metadata["keys"] = {module: [keys["a"], keys["b"]] for module, keys in by_module.items()}
    metadata["saved_keys"] = saved_keys
    metadata["dtypes"] = {key: str(t.dtype).removeprefix("torch.") for key, t in tensors.items()}
    saved = {path: tensors[key].clone() for path, key in saved_keys.items()}
    return Adapter(name, modules, saved, metadata)
