"""One adapter on disk: PEFT folders read and written, kohya and diffusers files read."""

import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lora_fused.adapters import Adapter, LoraFactors
from lora_fused.checks import invalid, shape, some
from lora_fused.io.config import check_config, covers, layers_without, rank_and_scale, saves
from lora_fused.io.export import config_for
from lora_fused.io.gaps import gaps
from lora_fused.io.keys import PREFIX, Part, name_fault, parse_peft, parse_single
from lora_fused.io.tensors import FLOATS, magnitude, read_tensors, refuse_pointer, save_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
_FLOAT32_MAX = torch.finfo(torch.float32).max


def read_adapter(
    path: str | os.PathLike, *, name: str | None = None, allow_pickle: bool = False
) -> Adapter:
    """Read one adapter; everything that its config and its tensors tell is checked.

    Args:
        path: A PEFT folder (adapter_config.json and adapter_model.safetensors or .bin), or one
            file in kohya's or diffusers' layout, which is converted.
        name: What to call it. Default: the name of the folder, or of the file without its suffix.
        allow_pickle: Also read a ``.bin`` file, through torch.load with weights_only=True.

    Returns:
        The adapter. Its factors are views of the mapped file until a bank copies them (do not
        overwrite the file in place meanwhile); saved modules are copied. ``metadata``: "path",
        "layout" ("peft", "kohya" or "diffusers"), "config" (as in the file; for a single file one
        that says the same), "keys" and "saved_keys" (tensor names), "dtypes", "header",
        "pointwise" (modules that are 1 x 1 convolutions: [R, I, 1, 1] and [O, R, 1, 1] in files).

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: naming the file and the config key or tensor that is damaged, or that cannot
            be honoured exactly.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"read_adapter: no such file or folder: {path} (hubs are not asked)"
        )
    name = default_name(path) if name is None else name
    if _is_weights_of_folder(path):
        return _read_folder(path.parent, path, name, allow_pickle)
    if path.is_file():
        return _read_single(path, name, allow_pickle)
    weights = path / (WEIGHTS if (path / WEIGHTS).exists() else PICKLE)
    return _read_folder(path, weights, name, allow_pickle)


def default_name(path: Path) -> str:
    """The folder's name; of a file that stands alone, its name without the suffix."""
    if path.is_file() and not _is_weights_of_folder(path):
        return path.stem
    return (path.parent if path.is_file() else path).resolve().name


def _is_weights_of_folder(path: Path) -> bool:
    return path.is_file() and path.name in (WEIGHTS, PICKLE) and (path.parent / CONFIG).exists()


def write_adapter(adapter: Adapter, path: str | os.PathLike, *, overwrite_ok: bool = False) -> None:
    """Write one adapter as a PEFT folder, whole or not at all.

    What read_adapter found is written back: the config with every key, tensor names, dtypes, saved
    modules. The config is changed only where the adapter has changed (ranks, scales, modules). A
    tensor goes back to its dtype in the file if that loses no digit, else it keeps the one it has.

    Args:
        adapter: From read_adapter, ``bank.adapter(name)``, or made here.
        path: The folder. It appears complete or not at all.
        overwrite_ok: Replace the adapter in an existing adapter folder; other files there stay.

    Raises:
        FileExistsError: the folder exists.
        ValueError: nothing to write, or a scale that no config can express.
    """
    if not isinstance(adapter, Adapter):
        rule = "be an Adapter (of a bank: bank.adapter(name), or save_adapters)"
        raise invalid("write_adapter", "adapter", rule, type(adapter).__name__)
    if not isinstance(path, (str, os.PathLike)):
        raise invalid("write_adapter", "path", "be a path", type(path).__name__)
    path = Path(os.path.abspath(path))
    check_target(path, overwrite_ok)
    config = config_for(adapter)
    tensors = _tensors_to_write(adapter)
    header = adapter.metadata.get("header") or {"format": "pt"}
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    fresh, old = (path.with_name(f".{path.name}.{mark}.{kind}") for kind in ("new", "old"))
    try:
        if path.exists():
            shutil.copytree(path, fresh, ignore=lambda folder, _: _replaced(folder, path))
        else:
            fresh.mkdir()
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (fresh / CONFIG).write_text(text, encoding="utf-8")
        save_tensors(tensors, fresh / WEIGHTS, header)
        _swap(fresh, path, old)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def check_target(path: Path, overwrite_ok: bool, op: str = "write_adapter") -> None:
    """Refuse to write where something lies that must stay."""
    if path.exists() and (path.is_file() or any(path.iterdir())):
        if not (path / CONFIG).is_file():
            raise FileExistsError(f"{op}: {path} exists and is not an adapter folder")
        if not overwrite_ok:
            raise FileExistsError(f"{op}: {path} exists (overwrite_ok=True replaces it)")


def _replaced(folder: str, path: Path) -> list[str]:
    # Only at the top: adapters in folders below (checkpoints) are not ours to drop.
    return [CONFIG, WEIGHTS, PICKLE] if Path(folder) == path else []


def _swap(fresh: Path, path: Path, old: Path) -> None:
    if not path.exists():
        fresh.rename(path)
        return
    path.rename(old)
    try:
        fresh.rename(path)
    except OSError:
        old.rename(path)
        raise
    shutil.rmtree(old)


def _tensors_to_write(adapter: Adapter) -> dict[str, Tensor]:
    metadata, tensors = adapter.metadata, {}
    pointwise = set(metadata.get("pointwise", ()))
    for module, part in adapter.modules.items():
        kind, end = ("lora_embedding_", "") if part.embedding else ("lora_", ".weight")
        made = [f"{PREFIX}{module}.{kind}{side}{end}" for side in "AB"]
        key_a, key_b = metadata.get("keys", {}).get(module, made)
        sides = part.lora_a, part.lora_b.mT
        if module in pointwise:
            sides = (side[:, :, None, None] for side in sides)
        tensors[key_a], tensors[key_b] = sides
    for saved, tensor in adapter.saved.items():
        module, _, leaf = saved.rpartition(".")
        made = f"{module}.base_layer.{leaf}" if module in adapter.modules else saved
        tensors[metadata.get("saved_keys", {}).get(saved, PREFIX + made)] = tensor
    dtypes = metadata.get("dtypes", {})
    return {key: _in_dtype(t.detach().cpu(), dtypes.get(key)) for key, t in tensors.items()}


def _in_dtype(tensor: Tensor, name: str | None) -> Tensor:
    # clone: two names may share memory, which a safetensors file cannot.
    if name is not None:
        converted = tensor.to(getattr(torch, name))
        if torch.equal(converted.to(tensor.dtype), tensor):
            return converted.clone(memory_format=torch.contiguous_format)
    return tensor.clone(memory_format=torch.contiguous_format)


def _read_folder(folder: Path, file: Path, name: str, allow_pickle: bool) -> Adapter:
    config, where = _read_config(folder), str(folder / CONFIG)
    if not file.exists():
        raise FileNotFoundError(f"read_adapter: {folder} holds no {WEIGHTS} or {PICKLE}")
    tensors, header, bound = read_tensors(file, allow_pickle, "read_adapter")
    parts = parse_peft(list(tensors), str(file))
    metadata = {"path": str(folder), "layout": "peft", "config": config, "header": header}

    def scale_of(module: str, key: str, rank: int) -> float:
        if not covers(config, module):
            raise name_fault(key, file, f"be of a module that {where} selects", module)
        expected, scale = rank_and_scale(config, module)
        if rank != expected:
            raise name_fault(key, file, f"have rank {expected} as {where} says", f"rank {rank}")
        return scale

    adapter = _assemble(name, tensors, parts, scale_of, str(file), metadata, bound)
    missing = layers_without(config, adapter.modules)
    if missing:
        rule = f"hold factors for every layer in layers_to_transform of {where}"
        raise invalid("read_adapter", str(file), rule, f"none for {missing}")
    missing = gaps(config, adapter.modules)
    if missing:
        rule = f"hold factors for every module that {where} selects (layers_to_transform or full "
        rule += "paths in target_modules say so if some have none)"
        raise invalid("read_adapter", str(file), rule, f"none for {some(missing)}")
    declared = config.get("modules_to_save")
    if declared and not any(saves(config, saved) for saved in adapter.saved):
        raise invalid("read_adapter", str(file), f"hold the modules to save {declared}", "none")
    for saved, key in metadata["saved_keys"].items():
        if not saves(config, saved) and saved.rpartition(".")[2] not in ("weight", "bias"):
            raise name_fault(key, file, f"be a LoRA factor or saved by {where}", "neither")
    return adapter


def _read_single(file: Path, name: str, allow_pickle: bool) -> Adapter:
    if file.suffix not in (".safetensors", ".bin"):
        raise invalid("read_adapter", "path", "be a folder, .safetensors or .bin", str(file))
    tensors, header, bound = read_tensors(file, allow_pickle, "read_adapter")
    if "lora_adapter_metadata" in header:
        rule = "hold no lora_adapter_metadata (alpha in the header; save as a PEFT folder)"
        raise invalid("read_adapter", str(file), rule, "some")
    layout, parts = parse_single(list(tensors), str(file))
    alphas = {part.module: key for key, part in parts.items() if part.side == "alpha"}

    def scale_of(module: str, key: str, rank: int) -> float:
        # Both formats define the scale of a file without any alpha as 1.
        if not alphas:
            return 1.0
        if module not in alphas:
            raise name_fault(key, file, "have an alpha as other modules have", "none")
        alpha_key = alphas.pop(module)
        alpha = tensors[alpha_key]
        if alpha.numel() != 1 or not 0 < abs(float(alpha)) < float("inf"):
            raise name_fault(alpha_key, file, "be a finite number other than 0", alpha.tolist())
        return float(alpha) / rank

    has_alpha = bool(alphas)
    metadata = {"path": str(file), "layout": layout, "header": {"format": "pt"}}
    adapter = _assemble(name, tensors, parts, scale_of, str(file), metadata, bound)
    if has_alpha and alphas:
        raise name_fault(next(iter(alphas.values())), file, "belong to LoRA factors", "none")
    # The file's own names mean nothing in the PEFT folder that would be written.
    for table in ("keys", "saved_keys", "dtypes"):
        metadata[table] = {}
    metadata["config"] = config_for(adapter)
    return adapter


def _read_config(folder: Path) -> dict:
    file = folder / CONFIG
    if not file.exists():
        below = next(folder.glob(f"*/{CONFIG}"), None)
        hint = f"; there is one in {below.parent}" if below else ""
        raise FileNotFoundError(f"read_adapter: {folder} holds no {CONFIG}{hint}")
    refuse_pointer(file, "read_adapter")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise invalid("read_adapter", str(file), "be JSON", error) from error
    check_config(config, str(file))
    return config


def _assemble(
    name: str,
    tensors: dict[str, Tensor],
    parts: dict[str, Part],
    scale_of: Callable[[str, str, int], float],
    file: str,
    metadata: dict,
    bound: float,
) -> Adapter:
    pairs: dict[str, dict[str, str]] = {}
    saved_keys = {}
    for key, part in parts.items():
        if part.side == "saved":
            saved_keys[part.module] = key
        elif part.side != "alpha":
            keys = pairs.setdefault(part.module, {})
            keys[part.side] = key
            if parts[next(iter(keys.values()))].embedding != part.embedding:
                raise name_fault(
                    key, file, "be of one kind with its other factor", "an embedding's"
                )
    if not pairs:
        raise invalid("read_adapter", file, "hold LoRA factors", f"{len(tensors)} other tensors")
    modules = {}
    for module, keys in pairs.items():
        lora_a, lora_b = _factors(tensors, keys, module, file)
        scale = scale_of(module, keys["a"], lora_a.shape[0])
        modules[module] = LoraFactors(lora_a, lora_b, scale, parts[keys["a"]].embedding)
    pointwise = [module for module, keys in pairs.items() if tensors[keys["a"]].dim() == 4]
    if pointwise:
        metadata["pointwise"] = pointwise
    for module in pointwise:
        if modules[module].embedding:
            raise name_fault(pairs[module]["a"], file, "have two dimensions", "a convolution's")
    _check_values(tensors, pairs, saved_keys.values(), modules, bound, file)
    metadata["keys"] = {module: [keys["a"], keys["b"]] for module, keys in pairs.items()}
    metadata["saved_keys"] = saved_keys
    metadata["dtypes"] = {key: str(t.dtype).removeprefix("torch.") for key, t in tensors.items()}
    saved = {path: tensors[key].clone() for path, key in saved_keys.items()}
    return Adapter(name, modules, saved, metadata)


def _factors(tensors, keys: dict[str, str], module: str, file: str) -> tuple[Tensor, Tensor]:
    for side, other in (("a", "b"), ("b", "a")):
        if side not in keys:
            rule = f"come with lora_{side.upper()} of the same module"
            raise name_fault(keys[other], file, rule, "none")
        tensor = tensors[keys[side]]
        if tensor.dtype not in FLOATS:
            raise name_fault(keys[side], file, "be floating-point", tensor.dtype)
        if tensor.dim() not in (2, 4):
            rule = "have two dimensions, or the four of a 1 x 1 convolution"
            raise name_fault(keys[side], file, rule, shape(tensor))
        if tensor.shape[2:] not in ((), (1, 1)):
            rule = "have a kernel of 1 x 1 (a linear layer over pixels; wider ones are none)"
            raise name_fault(keys[side], file, rule, shape(tensor))
        if tensor.numel() == 0:
            raise name_fault(keys[side], file, "have a rank and sizes of at least 1", shape(tensor))
    if tensors[keys["a"]].dim() != tensors[keys["b"]].dim():
        rule = f"have as many dimensions as lora_A of {module}"
        raise name_fault(keys["b"], file, rule, shape(tensors[keys["b"]]))
    lora_a, lora_b = (tensors[keys[side]].flatten(1) for side in "ab")
    lora_b = lora_b.mT
    if lora_a.shape[0] != lora_b.shape[0]:
        rule = f"be [O, {lora_a.shape[0]}] to fit lora_A of {module}"
        raise name_fault(keys["b"], file, rule, shape(lora_b.mT))
    return lora_a, lora_b


def _check_values(tensors, pairs, saved_keys, modules, bound: float, file: str) -> None:
    """Refuse non-finite values, and factors whose product leaves float32.

    ``bound`` is the largest magnitude in the whole file: where it is harmless, as nearly always,
    no tensor needs a look of its own.
    """
    if all(_entry_bound(part, bound, bound) <= _FLOAT32_MAX for part in modules.values()):
        return
    largest = {}
    for key in [*saved_keys, *(key for keys in pairs.values() for key in keys.values())]:
        largest[key] = magnitude(tensors[key]) if tensors[key].is_floating_point() else 0.0
        if not largest[key] < torch.inf:
            raise name_fault(key, file, "hold finite values", "NaN or infinity")
    for module, keys in pairs.items():
        sizes = [largest[keys[side]] for side in "ab"]
        if _entry_bound(modules[module], *sizes) > _FLOAT32_MAX:
            rule = "give an update within float32 with its lora_A and scale"
            raise name_fault(keys["b"], file, rule, f"values up to {sizes[1]:.3g}")


def _entry_bound(part: LoraFactors, largest_a: float, largest_b: float) -> float:
    return part.lora_a.shape[0] * abs(part.scale) * largest_a * largest_b
