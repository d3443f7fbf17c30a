"""Records of the packed store: their content's digest, and how they are written. See packed.py."""

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lora_fused.adapters import Adapter
from lora_fused.checks import invalid
from lora_fused.io.tensors import FLOATS

OP = "PackedStore"
SLOT = 16  # bytes of an index entry: offset and size
_SIDES = ("lora_a", "lora_b")
ALIGNED = 64


class Record(NamedTuple):
    """What ``append`` tells of a record.

    Attributes:
        number: by which it is read.
        sha256: of its content, wherever it lies and whatever it is called.
        bytes: of its tensors.
        rank: the largest of its modules.
    """

    number: int
    sha256: str
    bytes: int
    rank: int


def content_digest(adapter: Adapter) -> str:
    """sha256 of an adapter's factors, scales, saved tensors and metadata, but for name and path.

    The same for every copy of an adapter, in whatever order its modules come.
    """
    adapter = _settled(adapter)
    modules, saved = sorted(adapter.modules.items()), sorted(adapter.saved.items())
    text = {
        "modules": [
            [m, str(part.lora_a.dtype), list(part.lora_a.shape), part.scale, part.embedding]
            for m, part in modules
        ],
        "saved": [[path, str(t.dtype), list(t.shape)] for path, t in saved],
        "metadata": {k: v for k, v in adapter.metadata.items() if k != "path"},
    }
    known = hashlib.sha256(json.dumps(text, sort_keys=True).encode())
    factors = [t for _, part in modules for t in (part.lora_a, part.lora_b)]
    for tensor in [*factors, *(t for _, t in saved)]:
        known.update(bytes_of(tensor))
    return known.hexdigest()


def _settled(adapter: Adapter) -> Adapter:
    """With factors as they are kept: of one dtype each, their own or one that holds both."""
    modules = {}
    for module, part in adapter.modules.items():
        dtype = torch.promote_types(part.lora_a.dtype, part.lora_b.dtype)
        sides = (t.detach().cpu().to(dtype).contiguous() for t in (part.lora_a, part.lora_b))
        sides = dict(zip(_SIDES, sides, strict=True))
        modules[module] = dataclasses.replace(part, **sides, scale=float(part.scale))
    return dataclasses.replace(adapter, modules=modules)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as they lie; alive as long as the tensor is."""
    tensor = tensor.detach().cpu().contiguous()
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(b"")
    view = (ctypes.c_ubyte * size).from_address(tensor.data_ptr())
    view.owner = tensor
    return memoryview(view)


class _Tail:
    """What is to be written behind a file's end."""

    def __init__(self, path: Path):
        self.path, self.parts = path, []
        self.start = path.stat().st_size if path.exists() else 0
        self.end = self.start
        self.align()
        self.start = self.end

    def align(self) -> None:
        room = -self.end % ALIGNED
        if room and self.parts:
            self.parts.append(memoryview(bytes(room)))
        self.end += room

    def put(self, part: memoryview) -> int:
        at = self.end
        self.parts.append(part)
        self.end += len(part)
        return at

    def write(self) -> None:
        with open(self.path, "r+b" if self.path.exists() else "wb") as file:
            file.seek(self.start)  # a killed writer may have left a torn end: it stays behind
            file.writelines(self.parts)
            to_disk(file)


def write_records(
    folder: Path, numbers: Sequence[int], adapters: Sequence[Adapter]
) -> list[Record]:
    """Write records under given numbers: first what the index points at, then the index."""
    tails: dict[str, _Tail] = {}
    records, slots = [], {}
    texts = _Tail(folder / "texts")
    for number, given in zip(numbers, adapters, strict=True):
        adapter = _settled(given)
        text, size = _packed(folder, adapter, tails)
        data = zlib.compress(_json(adapter, text), 1)
        slots[number] = texts.put(memoryview(data)), len(data)
        rank = max(len(part.lora_a) for part in adapter.modules.values())
        records.append(Record(number, content_digest(adapter), size, rank))
    new = [tail for tail in [*tails.values(), texts] if not tail.path.exists()]
    for tail in [*tails.values(), texts]:
        tail.write()
    index = folder / "index"
    with open(index, "r+b" if index.exists() else "wb") as file:
        for number, place in slots.items():
            file.seek(number * SLOT)
            file.write(b"".join(n.to_bytes(8, "little") for n in place))
        to_disk(file)
    if new:
        path_to_disk(folder)
    return records


def _packed(folder: Path, adapter: Adapter, tails: dict[str, _Tail]) -> tuple[dict, int]:
    """Lay an adapter's tensors behind the files' ends; its text, and their bytes."""
    modules, saved, total = {}, {}, 0
    for module, part in adapter.modules.items():
        a, b = part.lora_a, part.lora_b
        if a.dtype not in FLOATS:
            rule = f"be one of {', '.join(map(str, FLOATS))}"
            raise invalid(OP, f"dtype of {module!r} in {adapter.name!r}", rule, a.dtype)
        kind = str(a.dtype).removeprefix("torch.") + ("-embedding" if part.embedding else "")
        file = f"{a.shape[1]}x{b.shape[1]}-{kind}"
        tail = _tail(folder, file, tails)
        at = tail.put(bytes_of(a))
        tail.put(bytes_of(b))
        modules[module] = [file, at, len(a), part.scale]
        total += a.nbytes + b.nbytes
    for path, tensor in adapter.saved.items():
        tail = _tail(folder, "saved", tails)
        tail.align()
        kind = str(tensor.dtype).removeprefix("torch.")
        saved[path] = [tail.put(bytes_of(tensor)), kind, list(tensor.shape)]
        total += tensor.nbytes
    return {"modules": modules, "saved": saved}, total


def _tail(folder: Path, file: str, tails: dict[str, _Tail]) -> _Tail:
    """The one of this file; the file's end is looked up once."""
    if file not in tails:
        tails[file] = _Tail(folder / file)
    return tails[file]


def _json(adapter: Adapter, text: dict) -> bytes:
    whole = {"name": adapter.name, **text, "metadata": adapter.metadata}
    try:
        data = json.dumps(whole, allow_nan=False)
        same = json.loads(data) == whole
    except (TypeError, ValueError):
        same = False
    if not same:
        rule = "hold what JSON can hold: dicts by string, lists, strings, finite numbers"
        raise invalid(OP, f"metadata of adapter {adapter.name!r}", rule, adapter.metadata)
    return data.encode()


def to_disk(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def tree_to_disk(folder: Path, known: set[str]) -> None:
    """Put files of a tree on disk that are not ``known``, which learns them."""
    for place, _, names in os.walk(folder):
        fresh = [path for name in names if (path := os.path.join(place, name)) not in known]
        for path in fresh:
            with contextlib.suppress(FileNotFoundError):  # a draft of another process
                path_to_disk(path)
        if fresh:
            path_to_disk(place)
        known.update(fresh)


def files_below(folder: Path) -> set[str]:
    """Files of a tree, as ``tree_to_disk`` knows them."""
    return {os.path.join(place, name) for place, _, names in os.walk(folder) for name in names}


def path_to_disk(path: str | os.PathLike) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
