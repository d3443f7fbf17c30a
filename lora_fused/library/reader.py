"""What a library is asked: search, retrieval, weights, checks. Reading takes no lock."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor

from lora_fused.adapters import Adapter, AdapterBank
from lora_fused.checks import check_whole, invalid, shape
from lora_fused.io.packed import PackedStore
from lora_fused.io.peft import write_adapter
from lora_fused.library.catalogue import Catalogue
from lora_fused.library.entries import OP, Entry, Space, check_tags
from lora_fused.library.sources import known_base, listed, places
from lora_fused.library.upkeep import Fault, Stats, faults, measured
from lora_fused.methods.embedding import embed
from lora_fused.methods.prototypes import Prototypes, checked_features
from lora_fused.methods.retrieval import Retrieved, retrieve

Progress = bool | Callable[[int, int | None], None]
_SPARE = 8  # entries beyond k: the engine's distances are float32, retrieve's are exact


class Hits(NamedTuple):
    """The entries nearest to one query, nearest first.

    Attributes:
        names: of the entries.
        distances: squared L2 to the nearest prototype of each, in float32.
    """

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
        """Open a library, for reading and writing; many processes may have it open.

        Args:
            uri: The folder, or an address that LanceDB understands (``s3://bucket/path``).
            base: A model, or its fingerprint, that must be the library's base. None: not checked.
            store: The folder of the weights. Default: ``weights`` inside the folder.
            storage_options: Credentials and endpoint of an object store, as LanceDB takes them.

        Raises:
            FileNotFoundError: no library there, or no weights.
            ValueError: another base; weights of another library.
            RuntimeError: LanceDB is not installed.
        """
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
        return isinstance(name, str) and bool(self._catalogue.held([name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __repr__(self) -> str:
        base = self.space.base or self.space.fingerprint[:12]
        held = f"{len(self)} adapters of {base}, vectors of {self.space.size}"
        return f"AdapterLibrary({held}, {self.uri})"

    def refresh(self) -> None:
        """See what others have committed since this library was opened, refreshed or written to.

        Until then every answer is of one state of the library, whatever others do.
        """
        self._catalogue.refresh()

    def entries(self, filter: str | None = None, *, tags: Sequence[str] = ()) -> list[Entry]:
        """Facts of all entries, or of those that a filter and tags select; see ``search``."""
        return self._catalogue.entries(self._catalogue.selected(filter, check_tags(tags)))

    def entry(self, name: str) -> Entry:
        """Facts of one entry."""
        return self._some([name])[0]

    def embed(
        self,
        model,
        inputs: object,
        *,
        tokenizer: Callable | None = None,
        batch_size: int = 32,
        progress: Progress = True,
    ) -> Tensor:
        """Features of inputs as the library's vectors are made, ``[n, E]``; see ``rpe.embed``.

        Raises:
            ValueError: the model is not the library's base, or its features have another size.
        """
        self._check_base(model)
        space = self.space
        how = {"layer": space.layer, "pooling": space.pooling, "normalize": space.normalize}
        how |= {"max_length": space.max_length, "tokenizer": tokenizer}
        return self._queries(embed(model, inputs, batch_size=batch_size, progress=progress, **how))

    def search(
        self,
        queries: Tensor,
        *,
        k: int = 8,
        filter: str | None = None,
        tags: Sequence[str] = (),
        exact: bool = False,
    ) -> list[Hits]:
        """The k nearest entries of each query, each by the nearest of its prototypes.

        Args:
            queries: ``[Q, E]``, or ``[E]`` for one.
            k: Entries. Fewer come where the library, or what the filter leaves, has fewer.
            filter: SQL over ``name``, ``rank``, ``bytes``, ``tags``, ``created``, ``updated``,
                ``sha256`` and ``count``: ``"rank <= 8 AND name LIKE 'math-%'"``. It selects
                entries: where it holds for any of an entry's prototypes (``"count >= 50"``), all
                of them are looked at.
            tags: All of these an entry must have.
            exact: Compare every vector also where there is an index, which finds some 98 % of the
                nearest. Without one (see ``index``) that is always so.

        Returns:
            One Hits per query.

        Raises:
            ValueError: a wrong argument, a filter that is not SQL over these columns or fails.
            FileNotFoundError: another has compacted what this state needs: ``refresh``.

        Cost:
            Exact: Q * P * E multiply-adds. With the index, 3 to 4 ms per query at 10^5 vectors.
        """
        check_whole(OP, "k", k)
        where = self._catalogue.selected(filter, check_tags(tags))
        return [Hits(*f) for f in self._catalogue.nearest(self._queries(queries), k, where, exact)]

    def retrieve(
        self,
        queries: Tensor,
        *,
        k: int = 8,
        filter: str | None = None,
        tags: Sequence[str] = (),
        exact: bool = False,
    ) -> Retrieved:
        """``rpe.retrieve`` among the entries that a search finds: for ``rpe.weigh`` and the rest.

        The same adapters and distances (float64) as from all prototypes, where the search finds
        the nearest entries. ``prototypes`` of the result are those of the found entries alone, and
        it is marked as ``narrowed``: ``rpe.explain`` warns of nothing then, unless it is given a
        reference. Or use ``rpe.retrieve(queries, library.prototypes())``.

        Args: see ``search``.
        """
        hits = self.search(queries, k=k + _SPARE, filter=filter, tags=tags, exact=exact)
        names = sorted({name for hit in hits for name in hit.names})
        if not names:
            raise invalid(OP, "filter and tags", "leave some entries", "none")
        return dataclasses.replace(retrieve(queries, self.prototypes(names), k=k), narrowed=True)

    def prototypes(self, names: Sequence[str] | None = None) -> Prototypes:
        """Prototypes of these entries, in this order; of all, by name, without."""
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
        """Adapters of these entries in a bank; no other adapter's rows are read.

        Args:
            names: Which, in the order of their ids.
            dtype: Storage dtype of a new bank. Default: the adapters' own if all agree, else
                float32.
            bank: Add to this one. After an error it is as it was.

        Raises:
            ValueError: an unknown name; weights that are not as they were written.
            FileNotFoundError: a file of weights is missing.

        Example:
            >>> found = library.retrieve(features, k=4)
            >>> bank = library.load(found.prototypes.names)
            >>> with attach(model, bank).mix(rpe.weigh(found).mixture()): ...
        """
        adapters = [self._read(entry) for entry in self._some(listed(names))]
        if bank is not None and dtype not in (None, bank.dtype):
            raise invalid(OP, "dtype", f"be that of the bank ({bank.dtype})", dtype)
        bank = AdapterBank(dtype=dtype) if bank is None else bank
        bank.add_many(adapters)
        return bank

    def adapter(self, name: str) -> Adapter:
        """One adapter as it was added; its tensors are views of the mapped files: do not write.

        Factors of two dtypes in one module come in one that holds both.
        """
        return self._read(self.entry(name))

    def export(self, name: str, folder: str | os.PathLike, *, overwrite_ok: bool = False) -> None:
        """Write one adapter as a PEFT folder; see ``write_adapter``."""
        write_adapter(self.adapter(name), folder, overwrite_ok=overwrite_ok)

    def verify(self, *, progress: Progress = True) -> list[Fault]:
        """Read everything; what is missing, cut off, or not as it was written. Empty: all is well.

        Cost:
            Reads every byte of the library and takes its sha256.
        """
        return faults(self._catalogue, self._store, progress)

    def stats(self) -> Stats:
        """The library in figures."""
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

    def _queries(self, queries: Tensor) -> Tensor:
        if isinstance(queries, Tensor) and queries.dim() == 1:
            queries = queries[None]
        queries = checked_features(OP, "queries", queries)
        if queries.shape[1] != self.space.size:
            rule = f"have the library's size {self.space.size}"
            raise invalid(OP, "queries", rule, shape(queries))
        return queries.cpu()

    def _check_base(self, base: object) -> None:
        known = known_base(base)
        if known != self.space.fingerprint:
            rule = f"have the library's fingerprint {self.space.fingerprint[:12]}..."
            raise invalid(OP, "base", rule, f"{known[:12]}..., another model or a changed one")
