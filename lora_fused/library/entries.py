"""What a library holds of an adapter, what all of its entries share, and what is refused."""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_fused.adapters import BASE, Adapter
from lora_fused.checks import check_whole, invalid, shape
from lora_fused.io.config import base_key
from lora_fused.methods.embedding import POOLINGS
from lora_fused.methods.prototypes import Prototypes, checked_features

OP = "AdapterLibrary"
FORMAT, VERSION = "lora_fused.library", 2
_READABLE = (1, VERSION)  # 1: without base_place


@dataclasses.dataclass(frozen=True)
class Space:
    """What all entries of a library share: one base, and one way to make vectors.

    Attributes:
        id: ties the catalogue to its weights.
        size: E, of every vector.
        fingerprint: of the base; see ``fingerprint``.
        base: the base's name, or None: adapters of any base name are taken.
        modules: the base's modules, name -> [I, O], or None: not looked at.
        layer, pooling, normalize, max_length: how ``embed`` makes vectors.
        minimum: examples in a prototype, at least.
        base_place: where the base was, for who has none at hand: a folder or an installed package.
    """

    id: str
    size: int
    fingerprint: str
    base: str | None = None
    modules: dict[str, list[int]] | None = None
    layer: str | int | None = None
    pooling: str | None = None
    normalize: bool = False
    max_length: int | None = None
    minimum: int = 10
    base_place: str | None = None

    def to_json(self) -> str:
        header = {"format": FORMAT, "format_version": VERSION, **dataclasses.asdict(self)}
        return json.dumps(header, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: str) -> "Space":
        header = json.loads(text)
        known = header.pop("format", None), header.pop("format_version", None)
        if known not in [(FORMAT, version) for version in _READABLE]:
            rule = f"be {FORMAT} of version {_READABLE} (update lora_fused to read newer ones)"
            raise invalid(OP, f"format of {where}", rule, known)
        return cls(**header)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One adapter of a library.

    Attributes:
        name: of the adapter.
        tags, metadata: the user's.
        rank: the largest of its modules.
        bytes: of its tensors.
        created, updated: UTC.
        sha256: of its content.
        record: its number in the packed store.
        counts: the examples in each of its prototypes; 0: not known.
    """

    name: str
    tags: tuple[str, ...]
    metadata: dict
    rank: int
    bytes: int
    created: datetime.datetime
    updated: datetime.datetime
    sha256: str
    record: int
    counts: tuple[int, ...]


def check_settings(
    layer: object, pooling: object, normalize: object, max_length: object, **names: object
) -> None:
    """Refuse settings of vectors that ``embed`` could do nothing with."""
    if isinstance(layer, bool) or not isinstance(layer, (str, int, type(None))) or layer == "":
        raise invalid(OP, "layer", "be a module's name, a number or None", repr(layer))
    if pooling is not None and not (isinstance(pooling, str) and pooling in POOLINGS):
        raise invalid(OP, "pooling", f"be one of {POOLINGS} or None", repr(pooling))
    if not isinstance(normalize, bool):
        raise invalid(OP, "normalize", "be True or False", repr(normalize))
    if max_length is not None:
        check_whole(OP, "max_length", max_length, least=3)
    for argument, name in names.items():
        if name is not None and not (isinstance(name, str) and name):
            raise invalid(OP, argument, "be a name or None", repr(name))


def check_name(name: object) -> str:
    """Refuse what cannot be the name of a folder that find_adapters finds."""
    folder = isinstance(name, str) and 0 < len(name.encode()) <= 200 and name != BASE
    if not folder or name[0] in ". " or name[-1] == " " or not name.isprintable():
        rule = f"serve as a folder's name, printable and not hidden, other than {BASE!r}"
        raise invalid(OP, "name", rule, repr(name))
    if set(name) & set("/\\"):
        raise invalid(OP, "name", "serve as a folder's name, without / and \\", repr(name))
    return name


def check_tags(tags: object, label: str = "tags") -> tuple[str, ...]:
    listed = isinstance(tags, Sequence) and not isinstance(tags, str)
    if not listed or not all(isinstance(tag, str) and tag for tag in tags):
        raise invalid(OP, label, "be a list of strings, none empty", repr(tags))
    return tuple(dict.fromkeys(tags))


def check_metadata(metadata: object, name: str) -> dict:
    metadata = {} if metadata is None else metadata
    try:
        same = json.loads(json.dumps(metadata, allow_nan=False)) == metadata
    except (TypeError, ValueError):
        same = False
    if not isinstance(metadata, dict) or not same:
        rule = "be a dict that JSON can hold"
        raise invalid(OP, f"metadata of {name!r}", rule, repr(metadata))
    return metadata


def other_base(adapter: Adapter, space: Space) -> str | None:
    """What the adapter's config calls its base, where that is not the library's."""
    base = (adapter.metadata.get("config") or {}).get("base_model_name_or_path")
    same = not (space.base and base) or base_key(base) == base_key(space.base)
    return None if same else base


def check_adapter(adapter: Adapter, space: Space, any_base: bool) -> None:
    """Refuse an adapter of another base: by its config, and by its modules."""
    base, where = other_base(adapter, space), f"adapter {adapter.name!r}"
    if base is not None and not any_base:
        rule = f"be {space.base!r} as the library's (any_base=True allows others for once, "
        rule += "create(base_name=...) gives a library another name)"
        raise invalid(OP, f"the base of {where}", rule, repr(base))
    if space.modules is None:
        return
    for module, part in adapter.modules.items():
        sizes = space.modules.get(module)
        if sizes is None:
            rule = "be one of the base's (of the very model that adapters are attached to)"
            raise invalid(OP, f"each module of {where}", rule, repr(module))
        found = [part.lora_a.shape[-1], part.lora_b.shape[-1]]
        if found != sizes:
            rule = f"have the base's sizes [I, O] = {sizes}"
            raise invalid(OP, f"module {module!r} of {where}", rule, found)


def as_prototypes(
    prototypes: object, names: Sequence[str], counts: int | Sequence[int] | None
) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """Of each name its vectors ``[P, E]`` and counts, from Prototypes or one adapter's tensor."""
    if isinstance(prototypes, Prototypes):
        if counts is not None:
            raise invalid(OP, "counts", "be left to the Prototypes", repr(counts))
        return _of_prototypes(prototypes, names)
    if not isinstance(prototypes, Tensor) or len(names) != 1:
        rule = "be Prototypes (of one adapter also a tensor [E] or [P, E])"
        raise invalid(OP, "prototypes", rule, type(prototypes).__name__)
    vectors = prototypes[None] if prototypes.dim() == 1 else prototypes
    vectors = checked_features(OP, f"prototypes of {names[0]!r}", vectors).cpu()
    counts = [0] * len(vectors) if counts is None else counts
    counts = list(counts) if isinstance(counts, Sequence) else [counts]
    if len(counts) != len(vectors):
        rule = f"be {len(vectors)}, one per prototype"
        raise invalid(OP, f"counts of {names[0]!r}", rule, counts)
    for count in counts:
        check_whole(OP, f"counts of {names[0]!r}", count, least=0)
        if count >= 1 << 63:
            raise invalid(OP, f"counts of {names[0]!r}", "fit into 63 bits", count)
    return {names[0]: (vectors, tuple(counts))}


def _of_prototypes(prototypes: Prototypes, names: Sequence[str]) -> dict:
    place = {name: k for k, name in enumerate(prototypes.names)}
    for name in names:
        if name not in place:
            raise invalid(OP, "prototypes", f"hold those of adapter {name!r}", repr(prototypes))
    order = prototypes.owners.cpu().sort(stable=True).indices
    sizes = torch.bincount(prototypes.owners.cpu(), minlength=len(prototypes)).tolist()
    vectors = prototypes.vectors.cpu()[order].split(sizes)
    counts = prototypes.counts.cpu()[order].split(sizes)
    rows = {name: place[name] for name in names}
    return {name: (vectors[k], tuple(counts[k].tolist())) for name, k in rows.items()}


def check_vectors(
    made: Mapping[str, tuple[Tensor, tuple[int, ...]]], space: Space, minimum: int | None
) -> None:
    """Refuse vectors of another size, and means of too few examples."""
    minimum = space.minimum if minimum is None else minimum
    check_whole(OP, "minimum", minimum, least=0)
    for name, (vectors, counts) in made.items():
        if vectors.shape[1] != space.size:
            rule = f"have the library's size {space.size}"
            raise invalid(OP, f"prototypes of {name!r}", rule, shape(vectors))
        few = [count for count in counts if count < minimum]
        if few:
            got = f"{few[0]}" if few[0] else "an unknown number (counts=; minimum=0 allows it)"
            rule = f"be means of at least {minimum} examples each (minimum=), to hide each of them"
            raise invalid(OP, f"prototypes of {name!r}", rule, got)
