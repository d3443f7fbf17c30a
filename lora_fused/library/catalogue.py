"""The catalogue of a library: a table of vectors and facts in LanceDB, which only this file knows.

A row per prototype; an entry's rows carry the same facts, so that any of them can be filtered by.
Every change is one commit of the table: readers see it whole or not at all. Of the engine's two
interfaces the asynchronous one is used: the other hands a search over in six turns, a third of its
time.
"""

import asyncio
import contextlib
import datetime
import json
import math
import re
import zlib
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lora_fused.checks import invalid
from lora_fused.io.packed_records import files_below, tree_to_disk
from lora_fused.library.entries import OP, Entry, Space
from lora_fused.library.filters import by_row, named, tagged

_TABLE = "catalogue"
_HEADER = b"lora_fused"
FACTS = (
    *("name", "prototype", "count", "tags", "rank", "bytes"),
    *("created", "updated", "sha256", "metadata", "record"),
)
_STORED = [*FACTS, "crc", "vector"]
_FEW = 1000  # names in a filter; of more, all rows are read
_INDEX_FROM = 10_000  # vectors: fewer are compared one by one in a millisecond or two
# Partitions looked through, of about sqrt(n). Of 8,700 sentences' features 8 find 95 % of the ten
# nearest, 24 find 98 % and 48 find 99 %; each costs some 30 us at 10^5 vectors.
_PROBES = 24
_LOST = re.compile(r".*ot found: ([^,]+\.\w+)")
_PLACE = re.compile(r",? /\S+\.rs:\d+.*")
_AT_ONCE = 64  # queries under way at a time


class Catalogue:
    """Rows of a library's entries."""

    def __init__(self, table, space: Space, uri: str):
        self._table, self.space, self.uri = table, space, uri
        self._on_disk: set[str] | None = None  # not looked at
        self._last: tuple[int, int] | None = None  # a version, and its highest record

    @classmethod
    def create(cls, uri: str, space: Space, options: Mapping[str, str] | None) -> "Catalogue":
        schema = _schema(space.size, {_HEADER: space.to_json().encode()})
        made = cls(_run(_created(uri, schema, options)), space, uri)
        made._on_disk = set()
        made._settle()
        return made

    @classmethod
    def exists(cls, uri: str, options: Mapping[str, str] | None) -> bool:
        return _opened(uri, options) is not None

    @classmethod
    def open(cls, uri: str, options: Mapping[str, str] | None) -> "Catalogue":
        table = _opened(uri, options)
        if table is None:
            raise FileNotFoundError(f"{OP}: {uri} holds no library")
        text = (_run(table.schema()).metadata or {}).get(_HEADER)
        if text is None:
            raise invalid(OP, uri, "hold a library", "a table without a library's header")
        return cls(table, Space.from_json(text.decode(), uri), uri)

    def refresh(self) -> None:
        _run(self._table.checkout_latest())

    def begin(self) -> None:
        """Before a first change, as the only writer: what is there was put on disk by others."""
        if self._on_disk is None and "://" not in self.uri:
            self._on_disk = files_below(self._folder)

    def __len__(self) -> int:
        return _run(self._table.count_rows("prototype = 0"))

    def rows(self) -> int:
        return _run(self._table.count_rows())

    def names(self) -> list[str]:
        found = self._read(["name"], "prototype = 0")
        return sorted(found["name"].to_pylist())

    def held(self, names: Sequence[str]) -> set[str]:
        """Those of the names that have entries."""
        if len(names) > _FEW:
            return set(names).intersection(self.names())
        return set(self._read(["name"], f"prototype = 0 AND {named(names)}")["name"].to_pylist())

    def last_record(self) -> int:
        """The highest number of a record that a row names, or named; -1: there are no rows.

        All rows are read where another has committed since our last commit.
        """
        import pyarrow.compute

        version = _run(self._table.version())
        if self._last is None or self._last[0] != version:
            highest = pyarrow.compute.max(self._read(["record"], None)["record"]).as_py()
            self._last = version, -1 if highest is None else highest
        return self._last[1]

    def of(self, names: Sequence[str]) -> list[Entry]:
        if len(names) > _FEW:
            wanted = set(names)
            return [entry for entry in self.entries(None) if entry.name in wanted]
        return self.entries(named(names)) if names else []

    def selected(self, filter: str | None, tags: Sequence[str]) -> str | None:
        """A condition that all rows meet of the entries of which a filter finds any."""
        where = tagged(filter, tags)
        if not by_row(filter):
            return where
        return named(self._read(["name"], where)["name"].unique().to_pylist())

    def entries(self, where: str | None) -> list[Entry]:
        """Entries, all by name, of which a condition holds for all rows (see ``selected``)."""
        found = self._read(list(FACTS), where).to_pylist()
        counts: dict[str, dict[int, int]] = {}
        for row in found:
            counts.setdefault(row["name"], {})[row["prototype"]] = row["count"]
        rows = {row["name"]: row for row in found}
        return [_entry(rows[name], counts[name]) for name in sorted(rows)]

    def vectors(self, names: Sequence[str] | None) -> tuple[list[str], Tensor, list[int]]:
        """Name, vector and count of each row, sorted by name and prototype."""
        few = names is not None and len(names) <= _FEW
        columns = ["name", "prototype", "count", "vector"]
        found = self._read(columns, named(names) if few else None)
        found = found.sort_by([("name", "ascending"), ("prototype", "ascending")])
        owners, counts = found["name"].to_pylist(), found["count"].to_pylist()
        z = _tensor(found["vector"].chunks, self.space.size)
        if names is None or few:
            return owners, z, counts
        wanted = set(names)
        order = [i for i, name in enumerate(owners) if name in wanted]
        return [owners[i] for i in order], z[order], [counts[i] for i in order]

    def columns(self, names: Sequence[str]) -> dict[str, list]:
        """Some facts of all rows."""
        found = self._read(list(names), None)
        return {name: found[name].to_pylist() for name in names}

    def add(self, entries: Sequence[Entry], vectors: Sequence[Tensor]) -> None:
        """Add entries in one commit."""
        with self._commit(*(entry.record for entry in entries)):
            _run(self._table.add(self._rows(entries, vectors)))

    def replace(self, entry: Entry, vectors: Tensor) -> None:
        """Put new rows in the place of an entry's rows, in one commit."""
        change = self._table.merge_insert(["name", "prototype"])
        change = change.when_matched_update_all().when_not_matched_insert_all()
        change = change.when_not_matched_by_source_delete(named([entry.name]))
        with self._commit(entry.record):
            _run(change.execute(self._rows([entry], [vectors])))

    def remove(self, names: Sequence[str]) -> None:
        with self._commit():
            _run(self._table.delete(named(names)))

    def nearest(
        self, queries: Tensor, k: int, where: str | None, exact: bool
    ) -> list[tuple[list[str], list[float]]]:
        """Of each query, names and squared distances of the nearest entries, nearest first."""

        if k > _FEW:
            k = max(1, min(k, self.rows()))

        async def all_of(part: Tensor):
            return await asyncio.gather(*(self._nearest(q, k, where, exact) for q in part.numpy()))

        return [found for part in queries.split(_AT_ONCE) for found in _asked(all_of(part), where)]

    async def _nearest(self, query, k: int, where: str | None, exact: bool) -> tuple[list, list]:
        search = self._table.query().nearest_to(query).column("vector").distance_type("l2")
        # Where a filter leaves few, more partitions are looked through, if need be all.
        search = search.maximum_nprobes(0).minimum_nprobes(_PROBES).select(["name", "_distance"])
        search = search.bypass_vector_index() if exact else search
        search = search if where is None else search.where(where)
        limit = k
        while True:  # until k rows are of different entries
            found = await search.limit(limit).to_arrow()
            first: dict[str, float] = {}
            rows = (found[column].to_pylist() for column in ("name", "_distance"))
            for name, distance in zip(*rows, strict=True):
                first.setdefault(name, distance)
            if len(first) >= k or len(found) < limit:
                return list(first)[:k], list(first.values())[:k]
            limit *= 4

    def faults(self, name: str | None = None) -> list[tuple[str, str]]:
        """Names whose vectors are not as they were written; of one entry or of all."""
        return _run(self._faults(name))

    async def _faults(self, name: str | None) -> list[tuple[str, str]]:
        search, found = self._table.query().select(["name", "prototype", "crc", "vector"]), []
        search = search if name is None else search.where(named([name]))
        async for batch in await search.to_batches():
            vectors = _tensor([batch["vector"]], self.space.size)
            finite = vectors.isfinite().all(1).tolist()
            facts = (batch[column].to_pylist() for column in ("name", "prototype", "crc"))
            for vector, whole, name, number, crc in zip(vectors, finite, *facts, strict=True):
                if not whole or _crc(vector) != crc:
                    found.append((name, f"prototype {number} is not as written"))
        return found

    def indexed(self) -> int:
        """Rows in the index of vectors; 0: there is none."""
        found = _run(self._table.index_stats("vector_idx"))
        return 0 if found is None else found.num_indexed_rows

    def index(self) -> bool:
        """Build or refresh the index; False where there are too few vectors for one."""
        rows = self.rows()
        if rows < _INDEX_FROM:
            return False
        from lancedb.index import BTree, IvfFlat

        _run(self._table.create_index("name", config=BTree(), replace=True))
        flat = IvfFlat(distance_type="l2", num_partitions=round(math.sqrt(rows)))
        _run(self._table.create_index("vector", config=flat, replace=True))
        self._settle()
        return True

    def optimize(self, keep: datetime.timedelta | None) -> None:
        """Join small files, take new rows into the index, drop versions older than ``keep``."""
        _run(self._table.optimize())
        self._settle()
        if keep is not None:
            _run(self._table.optimize(cleanup_older_than=keep))
            self._on_disk = None  # names that are gone need no room

    @contextlib.contextmanager
    def _commit(self, *records: int) -> Iterator[None]:
        """One commit; what is known of the highest record stays known."""
        known = self._last
        if known is not None and known[0] != _run(self._table.version()):
            known = None
        yield
        self._settle()
        if known is not None:
            self._last = _run(self._table.version()), max([known[1], *records])

    @property
    def _folder(self) -> Path:
        return Path(self.uri, f"{_TABLE}.lance")

    def _settle(self) -> None:
        """See a commit on disk: the engine leaves that to the system, and power may fail."""
        if "://" not in self.uri:
            tree_to_disk(self._folder, self._on_disk)

    def _read(self, columns: list[str], where: str | None):
        search = self._table.query().select(columns)
        search = search if where is None else search.where(where)
        return _asked(search.to_arrow(), where)

    def _rows(self, entries: Sequence[Entry], vectors: Sequence[Tensor]):
        import pyarrow

        columns: dict[str, list] = {name: [] for name in [*FACTS, "crc"]}
        for entry, own in zip(entries, vectors, strict=True):
            facts = {name: getattr(entry, name, None) for name in FACTS}
            facts |= {"metadata": json.dumps(entry.metadata), "tags": list(entry.tags)}
            for number, count in enumerate(entry.counts):
                own_facts = {"prototype": number, "count": count, "crc": _crc(own[number])}
                for name, value in (facts | own_facts).items():
                    columns[name].append(value)
        schema = _schema(self.space.size, None)
        flat = pyarrow.array(torch.cat(list(vectors)).flatten().tolist(), pyarrow.float32())
        arrays = [pyarrow.array(part, schema.field(name).type) for name, part in columns.items()]
        arrays.append(pyarrow.FixedSizeListArray.from_arrays(flat, self.space.size))
        return pyarrow.Table.from_arrays(arrays, schema=schema)


def _engine():
    try:
        import lancedb
    except ImportError as error:
        message = f"{OP}: lancedb must be installed, got none; pip install lancedb pyarrow"
        raise RuntimeError(message) from error
    return lancedb


def _run(work: Coroutine):
    from lancedb.background_loop import LOOP

    try:
        return LOOP.run(work)
    except RuntimeError as error:
        lost = _LOST.search(str(error))  # small files and large ones are missed in other words
        if lost is None and "LanceError(IO)" not in str(error):
            raise
        if lost is None:
            raise OSError(f"{OP}: the catalogue must be readable, got {_reason(error)}") from error
        why = "lost, or gone since another compacted: refresh()"
        raise FileNotFoundError(f"{OP}: the catalogue must hold {lost[1]}, got none ({why})") from (
            error
        )


def _reason(error: Exception) -> str:
    """What the engine complains of, without where in its sources."""
    return _PLACE.sub("", str(error).splitlines()[0]).removeprefix("lance error: ")[:300]


def _asked(work: Coroutine, where: str | None):
    """The answer to a question; the engine's complaint about a filter in our words."""
    try:
        return _run(work)
    except (ValueError, RuntimeError) as error:
        if where is None:
            raise
        rule = f"be SQL over {', '.join(FACTS)} ({_reason(error)})"
        raise invalid(OP, "filter", rule, repr(where)) from error


async def _connected(uri: str, options: Mapping[str, str] | None):
    options = None if options is None else dict(options)
    return await _engine().connect_async(uri, storage_options=options)


async def _created(uri: str, schema, options: Mapping[str, str] | None):
    connection = await _connected(uri, options)
    try:
        return await connection.create_table(_TABLE, schema=schema, mode="create")
    except ValueError as error:
        if "already exists" not in str(error):
            raise
        raise FileExistsError(f"{OP}: {uri} holds a library already") from error


def _opened(uri: str, options: Mapping[str, str] | None):
    """The table; None where there is none."""

    async def opened():
        return await (await _connected(uri, options)).open_table(_TABLE)

    _engine()
    # Connecting would make the folder.
    if "://" not in uri and not Path(uri, f"{_TABLE}.lance").is_dir():
        return None
    try:
        return _run(opened())
    except ValueError as error:
        if "not found" not in str(error):
            raise
        return None


def _schema(size: int, header: Mapping[bytes, bytes] | None):
    import pyarrow as pa

    moment = pa.timestamp("us", tz="UTC")
    words = {"tags": pa.list_(pa.string()), "created": moment, "updated": moment}
    words |= dict.fromkeys(("name", "sha256", "metadata"), pa.string())
    words |= {"prototype": pa.int32(), "rank": pa.int32()}
    fields = [pa.field(name, words.get(name, pa.int64())) for name in _STORED[:-1]]
    fields.append(pa.field("vector", pa.list_(pa.float32(), size)))
    return pa.schema(fields, metadata=header)


def _crc(vector: Tensor) -> int:
    return zlib.crc32(vector.contiguous().view(torch.int32).numpy())


def _tensor(arrays: Iterable, size: int) -> Tensor:
    """``[n, size]``, a copy."""
    chunks = [torch.zeros(0, size)]
    for chunk in arrays:
        flat = chunk.flatten()
        if len(flat):
            view = memoryview(flat.buffers()[1])[4 * flat.offset : 4 * (flat.offset + len(flat))]
            chunks.append(torch.frombuffer(bytearray(view), dtype=torch.float32).view(-1, size))
    return torch.cat(chunks)


def _entry(row: dict, counts: dict[int, int]) -> Entry:
    kept = {name: row[name] for name in FACTS if name not in ("prototype", "count")}
    kept |= {"tags": tuple(row["tags"]), "metadata": json.loads(row["metadata"])}
    for moment in ("created", "updated"):
        kept[moment] = row[moment].astimezone(datetime.timezone.utc)
    return Entry(**kept, counts=tuple(counts[p] for p in sorted(counts)))
