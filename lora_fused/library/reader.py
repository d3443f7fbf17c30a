"""What a library is asked: search, retrieval, weights, checks. Reading takes no lock."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor

from lora_fused.adapters import Adapter, AdapterBank
from lora_fused.checks import check_whole, invalid
from lora_fused.io.packed import PackedStore
from lora_fused.io.peft import write_adapter
from lora_fused.library.catalogue import Catalogue, tagged
from lora_fused.library.entries import OP, Entry, Space, check_tags
from lora_fused.library.sources import known_base, listed, places
from lora_fused.library.upkeep import Fault, Stats, faults, measured
from lora_fused.methods.prototypes import Prototypes, checked_features
from lora_fused.methods.retrieval import Retrieved, retrieve

Progress = bool | Callable[[int, int | None], None]
_SPARE = 8  # entries beyond k: the engine's distances are float32, retrieve's are exact


class Hits(NamedTuple):
    """The entries nearest to one query, nearest first."""

    names: list[str]
    distances: list[float]


class LibraryReader:
    """The reading half of an AdapterLibrary."""

    def __init__(self, catalogue: Catalogue, store: PackedStore):
        self._catalogue, self._store = catalogue, store

    @classmethod
    def open(
        cls,
        uri: str | os.PathLike,
        *,
        base: object = None,
        store: str | os.PathLike | None = None,
        storage_options: Mapping[str, str] | None = None,
    ) -> "LibraryReader":
        uri, store = places(uri, store)
        catalogue = Catalogue.open(uri, storage_options)
        packed = PackedStore(store)
        if packed.identity != catalogue.space.id:
            raise invalid(OP, str(store), f"hold the weights of {uri}", "another library's")
        library = cls(catalogue, packed)
        if base is not None:
            library._check_base(base)
        return library

    @property
    def uri(self) -> str:
        """Where the catalogue lies."""
        return self._catalogue.uri

    @property
    def space(self) -> Space:
        """What all entries share."""
        return self._catalogue.space

    @property
    def names(self) -> list[str]:
        """Names of all entries, sorted."""
        return self._catalogue.names()

    def __len__(self) -> int:
        return len(self._catalogue)

    def __contains__(self, name: str) -> bool:
        return bool(self._catalogue.held([name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __repr__(self) -> str:
        base = self.space.base or self.space.fingerprint[:12]
        held = f"{len(self)} adapters of {base}, vectors of {self.space.size}"
        return f"AdapterLibrary({held}, {self.uri})"

    def refresh(self) -> None:
        """See what other processes have committed since this library was opened or refreshed."""
        self._catalogue.refresh()

    def entries(self, filter: str | None = None, *, tags: Sequence[str] = ()) -> list[Entry]:
        """Facts of all entries, or of those that a filter and tags select, by name."""
        return self._catalogue.entries(tagged(filter, check_tags(tags, "the search")))

    def entry(self, name: str) -> Entry:
        return self._some([name])[0]

    def search(
        self, queries: Tensor, *, k: int = 8, filter: str | None = None, tags: Sequence[str] = ()
    ) -> list[Hits]:
        check_whole(OP, "k", k)
        where = tagged(filter, check_tags(tags, "the search"))
        return [self._nearest(q, k, where) for q in self._queries(queries)]

    def retrieve(
        self, queries: Tensor, *, k: int = 8, filter: str | None = None, tags: Sequence[str] = ()
    ) -> Retrieved:
        hits = self.search(queries, k=k + _SPARE, filter=filter, tags=tags)
        names = sorted({name for hit in hits for name in hit.names})
        if not names:
            raise invalid(OP, "filter and tags", "leave some entries", "none")
        return retrieve(queries, self.prototypes(names), k=k)

    def prototypes(self, names: Sequence[str] | None = None) -> Prototypes:
        names = None if names is None else listed(names)
        owners, vectors, counts = self._catalogue.vectors(names)
        held = list(dict.fromkeys(owners))
        if names is not None and len(held) < len(names):
            self._some(names)  # says which one is unknown
        if not held:
            raise invalid(OP, "library", "hold entries", "none")
        place = {name: k for k, name in enumerate(held)}
        index = torch.tensor([place[name] for name in owners])
        made = Prototypes(tuple(held), vectors, index, torch.tensor(counts))
        return made if names in (None, held) else made.subset(names)

    def load(
        self,
        names: Sequence[str],
        *,
        dtype: torch.dtype | None = None,
        bank: AdapterBank | None = None,
    ) -> AdapterBank:
        adapters = [self._read(entry) for entry in self._some(listed(names))]
        if bank is not None and dtype not in (None, bank.dtype):
            raise invalid(OP, "dtype", f"be that of the bank ({bank.dtype})", dtype)
        bank = AdapterBank(dtype=dtype) if bank is None else bank
        bank.add_many(adapters)
        return bank

    def adapter(self, name: str) -> Adapter:
        return self._read(self.entry(name))

    def export(self, name: str, folder: str | os.PathLike, *, overwrite_ok: bool = False) -> None:
        write_adapter(self.adapter(name), folder, overwrite_ok=overwrite_ok)

    def verify(self, *, progress: Progress = True) -> list[Fault]:
        return faults(self._catalogue, self._store, progress)

    def stats(self) -> Stats:
        return measured(self._catalogue, self._store)

    def _read(self, entry: Entry) -> Adapter:
        return dataclasses.replace(self._store.read(entry.record, entry.sha256), name=entry.name)

    def _some(self, names: Sequence[str]) -> list[Entry]:
        """Entries of these names, in this order."""
        found = {entry.name: entry for entry in self._catalogue.of(names)}
        for name in names:
            if name not in found:
                close = get_close_matches(str(name), self.names, n=3)
                known = f" (close: {', '.join(map(repr, close))})" if close else ""
                raise invalid(OP, "name", f"be of an entry{known}", repr(name))
        return [found[name] for name in names]

    def _nearest(self, query: list[float], k: int, where: str | None) -> Hits:
        """The k nearest entries: of more rows each time, until k of different entries are found."""
        limit = k
        while True:
            names, distances = self._catalogue.nearest(query, limit, where)
            first: dict[str, float] = {}
            for name, distance in zip(names, distances, strict=True):
                first.setdefault(name, distance)
            if len(first) >= k or len(names) < limit:
                return Hits(list(first)[:k], list(first.values())[:k])
            limit *= 4

    def _queries(self, queries: Tensor) -> list[list[float]]:
        if isinstance(queries, Tensor) and queries.dim() == 1:
            queries = queries[None]
        queries = checked_features(OP, "queries", queries)
        if queries.shape[1] != self.space.size:
            rule = f"have the library's size {self.space.size}"
            raise invalid(OP, "queries", rule, list(queries.shape))
        return queries.tolist()

    def _check_base(self, base: object) -> None:
        known = known_base(base)
        if known != self.space.fingerprint:
            rule = f"have the library's fingerprint {self.space.fingerprint[:12]}..."
            raise invalid(OP, "base", rule, f"{known[:12]}..., another model or a changed one")
