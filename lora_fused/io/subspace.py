"""A fitted subspace on disk: subspace.json says what it is, a safetensors file has the numbers."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_fused.adapters import AdapterBank, AdapterStack
from lora_fused.checks import invalid, shape
from lora_fused.io.config import base_key
from lora_fused.io.sealed import (
    HEADER,
    check_names,
    check_target,
    fault,
    is_finite,
    read_sealed,
    word,
    write_sealed,
)
from lora_fused.io.tensors import FLOATS
from lora_fused.methods.basis import Directions, SharedBasis
from lora_fused.methods.subspace import Base, FitOptions, Subspace

_COUNTS = ("total", "count", "augmented")
_SAMPLES = 64  # weights of the base looked at in each module
_SAVE, _LOAD = "save_subspace", "load_subspace"


def save_subspace(
    subspace: Subspace,
    directory: str | os.PathLike,
    *,
    model: nn.Module | None = None,
    overwrite_ok: bool = False,
) -> Path:
    """Write a subspace as a folder, whole or not at all.

    Bases, cores, options, and of every adapter its name, id, metadata (so its original folder,
    config and dtypes) and saved modules. Cores in training are written as they are now.

    Args:
        subspace: From ``fit_subspace``.
        directory: The folder. A new one appears complete or not at all; where one is replaced, the
            old subspace stays whole until the new one is.
        model: The base, attached or not. Given, some of its weights are kept as its fingerprint,
            and ``load_subspace(directory, model=...)`` tells another base of the same sizes.
            Default: the fingerprint that the subspace was loaded with, if any.
        overwrite_ok: Replace the subspace in an existing folder; other files there stay.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists.
        ValueError: naming the tensor that is not finite, the adapter whose metadata JSON cannot
            hold, or the module that the model lacks.
    """
    if not isinstance(subspace, Subspace):
        rule = "be a Subspace (of clusters: save each of their parts)"
        raise invalid(_SAVE, "subspace", rule, type(subspace).__name__)
    if not isinstance(directory, (str, os.PathLike)):
        raise invalid(_SAVE, "directory", "be a path", type(directory).__name__)
    path = Path(os.path.abspath(directory))
    check_target(path, overwrite_ok)
    _check_cores(subspace)
    tensors = _tensors_of(subspace)
    base = subspace.base
    if model is not None:
        base = Base(_names_of(model), dict(_samples(_SAVE, subspace.bases, model)))
    tensors |= {f"base/{name}": part for name, part in base.weights.items()}
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise invalid(_SAVE, f"tensor {name!r}", "hold finite values", "NaN or infinity")
    write_sealed(tensors, _header(subspace, base), path)
    return path


def load_subspace(
    directory: str | os.PathLike, *, model: nn.Module | None = None, base: str | None = None
) -> Subspace:
    """Read what ``save_subspace`` wrote, bit for bit: ids, order of modules and dtypes included.

    Args:
        directory: The folder.
        model: The base that is meant, attached or not: it must have the modules, in their sizes
            and, where the file has a fingerprint, with its weights (as rounded as the narrower of
            the two dtypes).
        base: Name of the base that is meant. Compared as ``load_adapters`` does, by its last part;
            a file whose adapters name none fits all.

    Returns:
        The subspace, on the CPU and frozen.

    Raises:
        FileNotFoundError: the folder, or a file in it, is missing.
        ValueError: naming the file and the tensor: damaged, missing, unknown, not finite, of other
            sizes than its module's, or of another base; or of a newer format.
    """
    header, tensors, file = read_sealed(Path(directory))
    subspace = _assemble(tensors, header, file)
    if base is not None:
        _check_base(subspace, base, file.with_name(HEADER))
    if model is not None:
        _check_model(subspace, model, file)
    return subspace


def _check_cores(subspace: Subspace) -> None:
    """Refuse cores that no basis carries: such a file could not be loaded."""
    for name, stack in subspace.cores.stacks.items():
        basis = subspace.bases.get(name)
        wanted = None if basis is None else (len(basis.a), len(basis.b))
        if (stack.in_features, stack.out_features) != wanted:
            got = (stack.in_features, stack.out_features)
            raise invalid(_SAVE, f"cores of {name!r}", f"have the sizes of a basis, {wanted}", got)


def _tensors_of(subspace: Subspace) -> dict[str, Tensor]:
    found = {}
    for name, basis in subspace.bases.items():
        for side in "ab":
            for part, tensor in getattr(basis, side).named_buffers():
                found[f"bases/{name}/{side}/{part}"] = tensor
    for name, stack in subspace.cores.stacks.items():
        lora_a, lora_b = stack.factors()
        ranks = torch.tensor(stack.ranks, dtype=torch.int32)
        parts = {"lora_a": lora_a, "lora_b": lora_b, "scale": stack.scale, "ranks": ranks}
        found |= {f"cores/{name}/{part}": tensor for part, tensor in parts.items()}
    for adapter, saved in subspace.cores.saved.items():
        k = subspace.cores.id(adapter)
        found |= {f"saved/{k}/{path}": tensor for path, tensor in saved.items()}
    # clone: two names may share memory, which a safetensors file cannot.
    whole = {"memory_format": torch.contiguous_format}
    return {name: tensor.detach().cpu().clone(**whole) for name, tensor in found.items()}


def _header(subspace: Subspace, base: Base) -> dict:
    cores = subspace.cores
    names = [cores._names[k] for k in range(cores.count)]
    return {
        "base": {
            "names": list(base.names) or subspace.base_names,
            "fingerprint": list(base.weights),
        },
        "options": dataclasses.asdict(subspace.options),
        "modules": {name: _module_entry(basis) for name, basis in subspace.bases.items()},
        "cores": list(cores.stacks),
        "dtype": None if cores._forced_dtype is None else word(cores._forced_dtype),
        "adapters": [None if name is None else _adapter_entry(cores, name) for name in names],
    }


def _module_entry(basis: SharedBasis) -> dict:
    sides = {
        side: {
            "directions": len(part),
            "size": part.basis.shape[1],
            "mean": part.mean is not None,
            "keeps_mean": part.keeps_mean,
            **{name: getattr(part, name) for name in _COUNTS},
        }
        for side, part in (("a", basis.a), ("b", basis.b))
    }
    return {"embedding": basis.embedding, **sides}


def _adapter_entry(cores: AdapterBank, name: str) -> dict:
    """Where an adapter comes from; exact scales and ranks lie with the cores."""
    metadata, k = cores.metadata[name], cores.id(name)
    config, held = metadata.get("config") or {}, [s for s in cores.stacks.values() if s.ranks[k]]
    entry = {
        "name": name,
        "path": metadata.get("path"),
        "base": config.get("base_model_name_or_path"),
        "rank": config.get("r"),
        "alpha": config.get("lora_alpha"),
        "dtypes": sorted(set((metadata.get("dtypes") or {}).values())),
        "core_ranks": sorted({stack.ranks[k] for stack in held}),
        "scales": sorted({float(stack.scale[k]) for stack in held}),
        "saved": list(cores.saved.get(name, {})),
        "metadata": metadata,
    }
    try:
        same = json.loads(json.dumps(entry, allow_nan=False)) == entry
    except (TypeError, ValueError):
        same = False
    if not same:
        rule = "hold what JSON can hold: dicts by string, lists, strings, finite numbers"
        raise invalid(_SAVE, f"metadata of adapter {name!r}", rule, metadata)
    return entry


def _names_of(model: nn.Module) -> tuple[str, ...]:
    named = getattr(getattr(model, "config", None), "_name_or_path", None)
    return (named,) if named else ()


def _assemble(tensors: dict[str, Tensor], header: dict, file: Path) -> Subspace:
    """The subspace, where the tensors are exactly those that modules and adapters ask for."""
    parts = _Parts(tensors, file)
    try:
        bases = {}
        for module, entry in header["modules"].items():
            sides = (parts.directions(f"bases/{module}/{side}", entry[side]) for side in "ab")
            bases[module] = SharedBasis(*sides, embedding=bool(entry["embedding"]))
        stacks = {
            module: parts.stack(module, bases[module], len(header["adapters"]))
            for module in header["cores"]
        }
        bank = _bank(stacks, header["dtype"], header["adapters"], parts)
        weights = {m: parts.any(f"base/{m}") for m in header["base"]["fingerprint"]}
        base = Base(tuple(header["base"]["names"]), weights)
        subspace = Subspace(bases, bank, FitOptions(**header["options"]), base)
    except (KeyError, TypeError, AttributeError) as error:
        rule = "describe modules, cores, options, base and adapters"
        got = f"{type(error).__name__}: {error}"
        raise invalid(_LOAD, str(file.with_name(HEADER)), rule, got) from error
    check_names(tensors, parts.wanted, file, f"the modules and adapters of {HEADER}")
    return subspace


class _Parts:
    """The tensors of a file, taken one by one by name and size."""

    def __init__(self, tensors: dict[str, Tensor], file: Path):
        self.tensors, self.file = tensors, file
        self.wanted: set[str] = set()

    def take(self, name: str, *sizes: int) -> Tensor:
        tensor = self.any(name)
        if tuple(tensor.shape) != sizes or tensor.dtype not in FLOATS:
            got = f"{word(tensor.dtype)} {shape(tensor)}"
            rule = f"be floating point {list(sizes)}, as its module is"
            raise fault(name, self.file, rule, got)
        return tensor

    def any(self, name: str) -> Tensor:
        self.wanted.add(name)
        if name not in self.tensors:
            raise fault(name, self.file, f"be there, for {HEADER} asks for it", "none")
        return self.tensors[name]

    def directions(self, name: str, entry: dict) -> Directions:
        count, size = entry["directions"], entry["size"]
        basis = self.take(f"{name}/basis", count, size)
        spectrum = self.take(f"{name}/spectrum", count)
        mean = self.take(f"{name}/mean", size) if entry["mean"] else None
        held = count - entry["augmented"]
        inside = self.take(f"{name}/inside", held, held) if entry["keeps_mean"] else None
        parts = {"mean": mean, "inside": inside, **{key: entry[key] for key in _COUNTS}}
        return Directions(basis, spectrum, **parts)

    def stack(self, module: str, basis: SharedBasis, count: int) -> AdapterStack:
        name = f"cores/{module}/ranks"
        found = self.any(name)
        if found.shape != (count,) or found.dtype != torch.int32 or (found < 0).any():
            got = f"{word(found.dtype)} {shape(found)}"
            raise fault(name, self.file, f"be int32 [{count}], none negative", got)
        ranks = found.tolist()
        lora_a = self.take(f"cores/{module}/lora_a", sum(ranks), len(basis.a))
        lora_b = self.take(f"cores/{module}/lora_b", sum(ranks), len(basis.b))
        scale = self.take(f"cores/{module}/scale", count)
        return AdapterStack(lora_a, lora_b, scale, ranks=ranks)


def _bank(
    stacks: dict[str, AdapterStack], dtype: str | None, adapters: list, parts: _Parts
) -> AdapterBank:
    """The bank of the cores, put together as it was: adding anew would close the gaps in ids."""
    bank = AdapterBank(dtype=None if dtype is None else getattr(torch, dtype))
    bank.stacks = stacks
    for k, entry in enumerate(adapters):
        if entry is None:
            bank._names.append(None)
            continue
        name = entry["name"]
        bank._check_name(name, "add")
        bank._names.append(name)
        bank._ids[name], bank.metadata[name] = k, entry["metadata"]
        if entry["saved"]:
            bank.saved[name] = {path: parts.any(f"saved/{k}/{path}") for path in entry["saved"]}
    return bank


def check_same_base(subspace: Subspace, bank: AdapterBank) -> None:
    """Refuse adapters whose configs name another base than the subspace's.

    Raises:
        ValueError: naming the first. One that names none fits all.
    """
    names = subspace.base_names
    for adapter in bank:
        base = (bank.metadata[adapter].get("config") or {}).get("base_model_name_or_path")
        if names and base and base_key(base) not in map(base_key, names):
            rule = f"be {' or '.join(map(repr, names))} as the subspace's (any_base=True allows it)"
            raise invalid(_LOAD, f"the base of adapter {adapter!r}", rule, repr(base))


def _check_base(subspace: Subspace, base: str, where: Path) -> None:
    names = subspace.base.names
    if names and base_key(base) not in map(base_key, names):
        got = ", ".join(map(repr, names))
        raise invalid(_LOAD, f"the base in {where}", f"be {base!r}", got)


def _samples(
    op: str, bases: dict[str, SharedBasis], model: nn.Module
) -> Iterator[tuple[str, Tensor]]:
    """Some weights of each module, evenly spread; its sizes must be the basis's."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, basis in bases.items():
        weight = getattr(modules.get(name), "weight", None)
        sizes = [basis.b.basis.shape[1], basis.a.basis.shape[1]]
        if not isinstance(weight, Tensor) or weight.is_meta or not weight.is_floating_point():
            rule = f"have a module {name!r} with a floating-point weight"
            raise invalid(op, "model", rule, "none")
        # An embedding and a Conv1D hold theirs as [I, O], a 1 x 1 convolution as [O, I, 1, 1].
        if list(weight.shape) not in (sizes, sizes[::-1], [*sizes, 1, 1]):
            raise invalid(op, f"weight of {name!r}", f"be [O, I] = {sizes}", shape(weight))
        flat = weight.detach().flatten()
        yield name, flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].cpu().clone()


def _check_model(subspace: Subspace, model: nn.Module, file: Path) -> None:
    for name, found in _samples(_LOAD, subspace.bases, model):
        kept = subspace.base.weights.get(name)
        if kept is None:
            continue
        same = kept.shape == found.shape
        if same:
            coarse = max(torch.finfo(t.dtype).eps for t in (kept, found))
            kept, found = kept.double(), found.double()
            same = bool(((kept - found).abs() <= coarse * kept.abs() + 1e-7).all())
        if not same:
            rule = "agree with the model's weights"
            raise fault(f"base/{name}", file, rule, "another base's, or a changed one")
