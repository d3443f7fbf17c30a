"""The packed store: the weights of all adapters of a library in a few files that only grow.

Modules of one size, dtype and kind share a file, in which an adapter's rows lie side by side: many
adapters open at once, for nothing is read, and one adapter costs its own rows. A store says nothing
about which records count; a library's catalogue does. Whatever a killed writer leaves behind is
room at the files' ends that no record of the catalogue names.

    store.json          format, identity, current generation
    lock, queue         held by the one writer, and by who is next
    <generation>/index  16 bytes per record: where its text lies
    <generation>/texts  zlib of JSON: modules with places, ranks and scales; saved tensors; metadata
    <generation>/<I>x<O>-<dtype>[-embedding]    lora_a [R, I] and lora_b [R, O], module by module
    <generation>/saved  tensors of modules_to_save
"""

import contextlib
import json
import mmap
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_fused.adapters import Adapter, LoraFactors
from lora_fused.checks import invalid
from lora_fused.io.packed_records import (
    ALIGNED,
    OP,
    SLOT,
    Record,
    bytes_of,
    content_digest,
    path_to_disk,
    to_disk,
    write_records,
)

HEADER = "store.json"
FORMAT, VERSION = "lora_fused.packed", 1
_FILE = re.compile(r"(index|texts|saved|(\d+)x(\d+)-(float\d+|bfloat16)(-embedding)?)")
_GENERATION = re.compile(r"\d+")
# Private maps are counted against memory although nobody writes to them, and a store may be larger
# than that. The constant has a name from Python 3.13 on.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class PackedStore:
    """Records of adapters in a folder. One process writes at a time, any number read."""

    def __init__(self, path: str | os.PathLike):
        self.path, self.identity = Path(path), None
        self._load()

    @classmethod
    def create(
        cls, path: str | os.PathLike, identity: str, *, abandoned: bool = False
    ) -> "PackedStore":
        """Make an empty store; ``identity`` ties it to a catalogue. Call it within ``locked``.

        Args:
            abandoned: An empty store that is there has no catalogue, and may be replaced.

        Raises:
            FileExistsError: there are records, or a store that another catalogue may name.
        """
        path = Path(path)
        if any(path.glob("*/index")):
            raise FileExistsError(f"{OP}: {path} holds records already")
        with contextlib.suppress(FileNotFoundError, ValueError):  # none, or half of one
            known = cls(path).identity
            if known != identity and not abandoned:
                message = f"{OP}: {path} holds the store {known} already, of another library"
                raise FileExistsError(message)
        (path / "0").mkdir(exist_ok=True)
        _put_header(path, identity, 0)
        return cls(path)

    def abandon(self) -> None:
        """Take back ``create``, where no catalogue came of it."""
        (self.path / HEADER).unlink(missing_ok=True)

    def _load(self) -> None:
        file = self.path / HEADER
        if not file.is_file():
            raise FileNotFoundError(f"{OP}: {self.path} holds no {HEADER}")
        try:
            header = json.loads(file.read_text(encoding="utf-8"))
            known = header["format"], header["format_version"]
            identity, generation = str(header["id"]), int(header["generation"])
        except (ValueError, KeyError, TypeError) as error:
            raise invalid(OP, str(file), "be the header of a store", repr(error)) from error
        if known != (FORMAT, VERSION):
            raise invalid(OP, f"format in {file}", f"be {FORMAT} {VERSION}", known)
        if self.identity not in (None, identity):
            rule = f"be the store {self.identity} that was opened"
            raise invalid(OP, str(self.path), rule, f"another, {identity}")
        self.identity, self.generation = identity, generation
        self._folder = self.path / str(self.generation)
        self._maps: dict[str, _Map] = {}

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only writer; see ``locked``."""
        with locked(self.path):
            self._load()
            yield

    def append(self, adapters: Sequence[Adapter], *, after: int = -1) -> list[Record]:
        """Write records and see them on disk; call it within ``writing``.

        Args:
            adapters: One record each.
            after: The last record that the catalogue knows of.

        Raises:
            ValueError: factors of a dtype that files do not hold; metadata that JSON does not.
        """
        first = -(-self._length("index") // SLOT)
        if after >= first:
            rule = f"hold record {after}, which the catalogue names"
            raise invalid(OP, str(self.path), rule, f"{first} records: an older copy?")
        return write_records(self._folder, range(first, first + len(adapters)), adapters)

    def read(self, number: int, sha256: str | None = None) -> Adapter:
        """One adapter, its tensors views of the mapped files: read them, do not write.

        Args:
            number: Of the record.
            sha256: What its content must have. None: not looked at.

        Raises:
            FileNotFoundError: a file is missing. ValueError: no such record, or a damaged one.
        """
        try:
            return self._read(number, sha256)
        except (FileNotFoundError, ValueError):
            # compact() may have moved everything meanwhile
            before = self.generation
            self._load()
            if self.generation == before:
                raise
            return self._read(number, sha256)

    def compact(self, live: Mapping[int, str]) -> None:
        """Keep these records alone, number -> sha256; call it within ``writing``.

        They are copied to a new generation that takes the old one's place at once. Who has the
        old files mapped goes on reading them. Where files hold nothing else nothing is copied.
        """
        self._clear()
        if self._numbers() == live.keys() and not self._garbage(live):
            return
        fresh = self.path / str(self.generation + 1)
        fresh.mkdir()
        numbers = sorted(live)
        for i in range(0, len(numbers), 64):
            part = numbers[i : i + 64]
            write_records(fresh, part, [self.read(n, live[n]) for n in part])
        # As long as before, so that no number comes twice: a reader may know it from before.
        with open(fresh / "index", "ab") as file:
            file.truncate(-(-self._length("index") // SLOT) * SLOT)
            to_disk(file)
        path_to_disk(fresh)
        _put_header(self.path, self.identity, self.generation + 1)
        self._load()
        self._clear()

    def size(self) -> int:
        """Bytes on disk of all generations, garbage included."""
        total = 0
        for file in self.path.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # compacted meanwhile
                total += file.stat().st_size if _GENERATION.fullmatch(file.parent.name) else 0
        return total

    def _length(self, file: str) -> int:
        path = self._folder / file
        return path.stat().st_size if path.exists() else 0

    def _garbage(self, live: Iterable[int]) -> bool:
        """Whether files hold what no live record names, such as a killed writer's."""
        named: dict[str, list[tuple[int, int]]] = {"index": [(0, self._length("index"))]}
        for number in live:
            for file, at, size in self._places(number):
                named.setdefault(file, []).append((at, size))
        for path in self._folder.iterdir():
            end = 0
            for at, size in sorted(named.get(path.name, [])):
                if at - end >= ALIGNED:  # less is what aligns the next
                    return True
                end = max(end, at + size)
            if path.stat().st_size > end:
                return True
        return False

    def _places(self, number: int) -> Iterator[tuple[str, int, int]]:
        """File, offset and size of all that a record names."""
        yield "texts", *self._slot(number)
        text = self._text(number, f"record {number} in {self._folder}")
        for file, at, rank, _ in text["modules"].values():
            i, o, kind = _FILE.fullmatch(file).group(2, 3, 4)
            yield file, at, rank * (int(i) + int(o)) * getattr(torch, kind).itemsize
        for at, kind, sizes in text["saved"].values():
            yield "saved", at, torch.Size(sizes).numel() * getattr(torch, kind).itemsize

    def _numbers(self) -> set[int]:
        """Of all records, live or not."""
        index = self._folder / "index"
        slots = index.read_bytes() if index.exists() else b""
        starts = range(0, len(slots) - SLOT + 1, SLOT)
        return {at // SLOT for at in starts if any(slots[at + 8 : at + SLOT])}

    def _clear(self) -> None:
        """Remove every generation but the current one."""
        for folder in self.path.iterdir():
            if _GENERATION.fullmatch(folder.name) and folder != self._folder:
                shutil.rmtree(folder)

    def _read(self, number: int, sha256: str | None) -> Adapter:
        where = f"record {number} in {self._folder}"
        text = self._text(number, where)
        try:
            modules = {name: self._factors(*entry) for name, entry in text["modules"].items()}
            saved = {path: self._saved(*entry) for path, entry in text["saved"].items()}
            adapter = Adapter(text["name"], modules, saved, text["metadata"])
        except (KeyError, TypeError, AttributeError) as error:
            raise invalid(OP, where, "be a record", repr(error)) from error
        if sha256 is not None and content_digest(adapter) != sha256:
            raise invalid(OP, where, "match its checksum", "other bytes than written")
        return adapter

    def _slot(self, number: int) -> tuple[int, int]:
        """Where a record's text lies: offset and size; no size: there is no such record."""
        slot = bytes(bytes_of(self._take("index", number * SLOT, SLOT)))
        return tuple(int.from_bytes(slot[i : i + 8], "little") for i in (0, 8))

    def _text(self, number: int, where: str) -> dict:
        offset, size = self._slot(number)
        if not size:
            raise invalid(
                OP, where, "be there", "none (removed or replaced, and compacted: refresh)"
            )
        try:
            return json.loads(zlib.decompress(bytes_of(self._take("texts", offset, size))))
        except (zlib.error, ValueError) as error:
            raise invalid(OP, where, "be whole", error) from error

    def _factors(self, file: str, offset: int, rank: int, scale: float) -> LoraFactors:
        match = _FILE.fullmatch(file)
        if match is None or match[2] is None:
            raise invalid(OP, f"file in {self._folder}", "be that of a group", repr(file))
        sizes, dtype = (int(match[2]), int(match[3])), getattr(torch, match[4])
        flat = self._take(file, offset, rank * sum(sizes) * dtype.itemsize).view(dtype)
        a, b = flat.split([rank * n for n in sizes])
        parts = (t.view(rank, n) for t, n in zip((a, b), sizes, strict=True))
        return LoraFactors(*parts, scale, match[5] is not None)

    def _saved(self, offset: int, dtype: str, shape: list[int]) -> Tensor:
        kind = getattr(torch, dtype)
        size = torch.Size(shape).numel() * kind.itemsize
        return self._take("saved", offset, size).view(kind).view(shape)

    def _take(self, file: str, offset: int, size: int) -> Tensor:
        """Bytes of a mapped file; every read goes through here."""
        path = self._folder / file
        held = self._maps.get(file)
        if held is None or offset + size > held.length:
            held = self._maps[file] = _Map(path)
        # Reading a page that has lost its file kills the process, so its length is asked again.
        length = min(held.length, held.left())
        if offset < 0 or size < 0 or offset + size > length:
            got = f"{size} bytes at {offset} of {length}"
            raise invalid(OP, str(path), "hold what its records name", got)
        return held.bytes[offset : offset + size]


@contextlib.contextmanager
def locked(path: str | os.PathLike, wait: float = 60.0) -> Iterator[None]:
    """Be the only writer to a folder, which is made if need be, among all who ask in this way.

    Raises:
        RuntimeError: another has held it for ``wait`` seconds.
    """
    try:
        import fcntl
    except ImportError as error:
        raise RuntimeError(f"{OP}: the system must have flock to write, got none") from error
    path, until = Path(path), time.monotonic() + wait
    path.mkdir(parents=True, exist_ok=True)

    def take(file) -> None:
        while True:
            try:
                return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    got = f"another writer for {wait:.0f} s"
                    message = f"{OP}: {path} must be free to write, got {got}"
                    raise RuntimeError(message) from None
                time.sleep(0.02)

    # Who waits for the lock holds the queue, so that one who writes again and again must wait too.
    with open(path / "lock", "ab") as lock, open(path / "queue", "ab") as queue:
        take(queue)
        take(lock)
        fcntl.flock(queue, fcntl.LOCK_UN)
        yield


class _Map:
    """A file's bytes as they were when it was mapped; a file that is gone keeps them."""

    def __init__(self, path: Path):
        flags = {"flags": mmap.MAP_PRIVATE | _NO_RESERVE, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
        self.bytes, self._map = torch.zeros(0, dtype=torch.uint8), None
        with path.open("rb") as file:
            self.length = os.fstat(file.fileno()).st_size
            if self.length:
                self._map = mmap.mmap(file.fileno(), self.length, **flags)
                self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def left(self) -> int:
        """The file's length now: who cuts it takes the pages away."""
        return self._map.size() if self._map is not None else 0


def _put_header(path: Path, identity: str, generation: int) -> None:
    header = {"format": FORMAT, "format_version": VERSION, "id": identity}
    draft = path / f".{HEADER}"
    with open(draft, "w", encoding="utf-8") as file:
        file.write(json.dumps({**header, "generation": generation}, indent=1) + "\n")
        to_disk(file)
    os.replace(draft, path / HEADER)
    path_to_disk(path)
