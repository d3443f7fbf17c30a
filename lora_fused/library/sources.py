"""What is given to a library: where it lies, adapters in many forms, and what is said of them."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import nn

from lora_fused.adapters import Adapter, AdapterBank
from lora_fused.checks import hint, invalid
from lora_fused.io.find import Paths, expand
from lora_fused.io.peft import default_name, read_adapter
from lora_fused.library.entries import OP, check_metadata, check_name, check_tags
from lora_fused.library.fingerprint import fingerprint, unwrapped

Source = Adapter | AdapterBank | Path


def places(uri: object, store: object) -> tuple[str, Path]:
    """Where the catalogue and the weights are; weights lie in a folder, always."""
    if not isinstance(uri, (str, os.PathLike)):
        raise invalid(OP, "uri", "be a folder or the address of an object store", repr(uri))
    uri = os.fspath(uri)
    if store is not None:
        return uri, Path(store)
    if "://" in uri:
        raise invalid(OP, "store", f"be the folder of the weights where uri is {uri}", store)
    return uri, Path(uri, "weights")


def known_base(base: object) -> str:
    """The fingerprint of a model, or one that is given as such."""
    if not isinstance(base, str):
        return fingerprint(base)
    if not re.fullmatch("[0-9a-f]{64}", base):
        raise invalid(OP, "base", "be a model or its fingerprint, 64 hex digits", repr(base))
    return base


def check_layer(base: object, layer: str | int | None) -> None:
    """Refuse the name of a layer that no module has, of the model as given or out of wrappers."""
    if not isinstance(layer, str):
        return
    models = [m for m in (base, unwrapped(base)) if isinstance(m, nn.Module)]
    found = [name for model in models for name, _ in model.named_modules() if name]
    if layer not in found:
        rule = f"be a module of the base's ({hint(layer, found)})"
        raise invalid(OP, "layer", rule, repr(layer))


def listed(names: object) -> list[str]:
    """Names as a list, none twice."""
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, Iterable):
        raise invalid(OP, "names", "be a list of names", repr(names))
    names = list(names)
    if not all(isinstance(n, str) for n in names) or len(set(names)) < len(names):
        raise invalid(OP, "names", "be distinct names", names)
    return names


def sources(adapters: AdapterBank | Paths | Iterable[Adapter]) -> dict[str, Source]:
    """Name -> where its adapter comes from; nothing is read yet."""
    if isinstance(adapters, AdapterBank):
        return {check_name(name): adapters for name in adapters}
    if isinstance(adapters, Adapter):
        adapters = [adapters]
    elif isinstance(adapters, (str, os.PathLike)):
        adapters = expand(adapters)
    found: dict[str, Source] = {}
    for given in adapters:
        several = [given] if isinstance(given, Adapter) else expand(given)
        for one in several:
            name = check_name(one.name if isinstance(one, Adapter) else default_name(one))
            if name in found:
                raise invalid(OP, "adapters", "have distinct names", f"{name!r} twice")
            found[name] = one
    return found


def read_source(source: object, name: str | None) -> Adapter:
    """An adapter, called ``name`` if given."""
    if isinstance(source, AdapterBank):
        return source.adapter(name)
    if isinstance(source, Adapter):
        name = check_name(source.name if name is None else name)
        return Adapter(name, source.modules, source.saved, source.metadata)
    if not isinstance(source, (str, os.PathLike)):
        rule = "be an Adapter or a path"
        raise invalid(OP, "adapter", rule, type(source).__name__)
    name = check_name(default_name(Path(source)) if name is None else name)
    return read_adapter(source, name=name)


def tags_of(names: Sequence[str], tags: object) -> dict[str, tuple[str, ...]]:
    """Of each name its tags, from one list for all or a dict."""
    if not isinstance(tags, Mapping):
        return dict.fromkeys(names, check_tags(tags))
    _refuse_others(names, tags, "tags")
    return {name: check_tags(tags.get(name, ()), f"tags of {name!r}") for name in names}


def metadata_of(names: Sequence[str], metadata: Mapping[str, dict] | None) -> dict[str, dict]:
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, Mapping):
        raise invalid(OP, "metadata", "be a dict of name to dict", type(metadata).__name__)
    _refuse_others(names, metadata, "metadata")
    return {name: check_metadata(metadata.get(name), name) for name in names}


def _refuse_others(names: Sequence[str], given: Mapping, what: str) -> None:
    others = given.keys() - set(names)
    if others:
        raise invalid(OP, what, "be of adapters that are added", sorted(map(repr, others))[0])
