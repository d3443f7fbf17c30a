"""AdapterLibrary: many adapters of one base, found by what they were trained for."""

import contextlib
import dataclasses
import datetime
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from lora_fused.adapters import Adapter, AdapterBank
from lora_fused.checks import check_whole, invalid, some
from lora_fused.io.find import Paths
from lora_fused.io.packed import PackedStore, locked
from lora_fused.io.packed_records import Record
from lora_fused.library import entries as rules
from lora_fused.library.catalogue import Catalogue
from lora_fused.library.entries import OP, Entry, Space
from lora_fused.library.fingerprint import module_sizes, unwrapped
from lora_fused.library.reader import LibraryReader, Progress
from lora_fused.library.sources import (
    check_layer,
    known_base,
    listed,
    metadata_of,
    places,
    read_source,
    sources,
    tags_of,
)
from lora_fused.methods.progress import show
from lora_fused.methods.prototypes import MINIMUM, Prototypes


class AdapterLibrary(LibraryReader):
    """A folder of adapters of one base, with vectors to find them by.

    An entry is an adapter under a name, the prototypes of its data (see ``make_prototypes``; no
    data is kept), tags and metadata. Entries are found by vectors, filters and tags, and loaded
    into an AdapterBank. Needs LanceDB: ``pip install lancedb pyarrow``.

    Safety: weights are on disk before the one commit that makes an entry. A killed process loses
    nothing that was committed and leaves at most unused room, which ``compact`` gives back. Any
    number of processes read; writers wait for each other.

    Limits: open a library in each process, after a fork: LanceDB calls its use across one
    experimental.
    On an object store (``s3://...``) lies the catalogue alone; the weights are in a folder that
    all writers share. Not on Windows, which lacks flock and private maps.

    Example:
        >>> library = AdapterLibrary.create("adapters.library", base=model, size=384)
        >>> made = rpe.make_prototypes({"math": library.embed(model, texts, tokenizer=tokenizer)})
        >>> library.add("adapters/math", made, tags=["reasoning"])
        >>> found = library.retrieve(library.embed(model, requests, tokenizer=tokenizer), k=4)
        >>> handle = attach(model, library.load(found.prototypes.names))
        >>> with handle.mix(rpe.weigh(found, "l1").mixture()):
        ...     model(**tokenizer(requests, padding=True, return_tensors="pt"))
    """

    @classmethod
    def create(
        cls,
        uri: str | os.PathLike,
        *,
        base: object,
        size: int,
        base_name: str | None = None,
        base_place: str | None = None,
        layer: str | int | None = None,
        pooling: str | None = None,
        normalize: bool = False,
        max_length: int | None = None,
        minimum: int = MINIMUM,
        store: str | os.PathLike | None = None,
        storage_options: Mapping[str, str] | None = None,
    ) -> "AdapterLibrary":
        """Make an empty library.

        Args:
            uri: A folder, or an address of an object store that LanceDB understands.
            base: The model that adapters are attached to; modules and sizes of adapters are
                checked against it. Or its fingerprint alone: then they are not.
            size: E, of its features.
            base_name: What adapters' configs may call the base, compared by its last part. Default:
                the model's own name. Without one, any.
            base_place: Where the base is, for the command line to find it again: a folder, or the
                installed package that holds it.
            layer, pooling, normalize, max_length: How vectors are made; see ``rpe.embed``. Kept,
                so that requests are embedded in the same way (``embed``). Text takes a
                ``max_length`` of 3 at least, a token between two marks.
            minimum: Examples that every prototype must be the mean of, unless told otherwise.
            store: Where the weights go. Default: ``weights`` inside the folder; with an object
                store it must be given.
            storage_options: See ``open``.

        Raises:
            FileExistsError: there is one, or ``store`` is another library's.
            ValueError: a wrong argument. RuntimeError: LanceDB is not installed.
        """
        uri, store = places(uri, store)
        check_whole(OP, "size", size)
        check_whole(OP, "minimum", minimum, least=0)
        names = {"base_name": base_name, "base_place": base_place}
        rules.check_settings(layer, pooling, normalize, max_length, **names)
        known, modules = known_base(base), None
        if not isinstance(base, str):
            modules = module_sizes(base)
            check_layer(base, layer)
            config = getattr(unwrapped(base), "config", None)
            base_name = base_name or getattr(config, "_name_or_path", None) or None
        space = Space(
            *(secrets.token_hex(16), size, known, base_name, modules),
            *(layer, pooling, normalize, max_length, minimum, base_place),
        )
        if Catalogue.exists(uri, storage_options):
            raise FileExistsError(f"{OP}: {uri} holds a library already")
        with locked(store):
            if Catalogue.exists(uri, storage_options):  # another was faster
                raise FileExistsError(f"{OP}: {uri} holds a library already")
            # The catalogue last: without one there is no library, and create may be called again.
            packed = PackedStore.create(store, space.id, abandoned=Path(uri) in store.parents)
            try:
                return cls(Catalogue.create(uri, space, storage_options), packed)
            except BaseException:
                packed.abandon()
                raise

    def add(
        self,
        adapter: Adapter | str | os.PathLike,
        prototypes: Prototypes | Tensor,
        *,
        name: str | None = None,
        tags: Sequence[str] = (),
        metadata: dict | None = None,
        counts: int | Sequence[int] | None = None,
        minimum: int | None = None,
        any_base: bool = False,
    ) -> Entry:
        """Add one adapter.

        Args:
            adapter: A PEFT folder or file (see ``read_adapter``), or an Adapter.
            prototypes: Prototypes that hold one of its name; or ``[E]`` or ``[P, E]``.
            name: What to call it. Default: its own, or its folder's.
            tags: To select entries by.
            metadata: What JSON can hold.
            counts: Examples behind each vector of a tensor.
            minimum: Of examples behind each, for this once. 1: any number; 0: also an unknown one.
            any_base: Take an adapter whose config names another base.

        Raises:
            ValueError: the name is taken or no folder can have it; another base, module or size;
                vectors of another size, not finite, or of too few examples; values that no bank
                can hold. The library is as it was. FileNotFoundError: a file is missing.
        """
        adapter = self._adapter_of(adapter, name, any_base)
        name = adapter.name
        made = rules.as_prototypes(prototypes, [name], counts)
        rules.check_vectors(made, self.space, minimum)
        told, facts = tags_of([name], tags), metadata_of([name], {name: metadata})
        return self._commit([adapter], made, told, facts)[0]

    def add_many(
        self,
        adapters: AdapterBank | Paths | Iterable[Adapter],
        prototypes: Prototypes,
        *,
        tags: Sequence[str] | Mapping[str, Sequence[str]] = (),
        metadata: Mapping[str, dict] | None = None,
        existing: str = "error",
        batch: int = 64,
        minimum: int | None = None,
        any_base: bool = False,
        progress: Progress = True,
    ) -> list[str]:
        """Add many, in batches of one commit each; names and prototypes are checked before.

        An error, or the end of the process, keeps the batches that were committed; call it again
        with ``existing="skip"`` for the rest.

        Args:
            adapters: Paths as ``load_adapters`` takes them, Adapters, or a bank.
            prototypes: Of all of them.
            tags: For all; or a dict of name to tags.
            metadata: A dict of name to metadata.
            existing: ``"skip"``: pass over names that have an entry, or get one meanwhile.
            batch: Adapters per commit.
            minimum, any_base: See ``add``.
            progress: True: a line on stderr where that is a terminal; or called as
                progress(done, total) after each commit.

        Returns:
            The names that were added.

        Raises: see ``add``.
        """
        check_whole(OP, "batch", batch)
        if existing not in ("error", "skip"):
            raise invalid(OP, "existing", "be 'error' or 'skip'", repr(existing))
        given = sources(adapters)
        made = rules.as_prototypes(prototypes, list(given), None)
        rules.check_vectors(made, self.space, minimum)
        told, facts = tags_of(list(given), tags), metadata_of(list(given), metadata)
        self.refresh()
        held = self._catalogue.held(list(given))
        if held and existing == "error":
            raise _taken(held)
        names = [name for name in given if name not in held]
        added = []
        for first in range(0, len(names), batch):
            part = names[first : first + batch]
            read = [self._adapter_of(given[name], name, any_base) for name in part]
            new = self._commit(read, made, told, facts, skip=existing == "skip")
            added += [entry.name for entry in new]
            done = first + len(part)
            show(progress, done, len(names), f"added {done} of {len(names)}")
        return added

    def update(
        self,
        name: str,
        *,
        adapter: Adapter | str | os.PathLike | None = None,
        prototypes: Prototypes | Tensor | None = None,
        tags: Sequence[str] | None = None,
        metadata: dict | None = None,
        counts: int | Sequence[int] | None = None,
        minimum: int | None = None,
        any_base: bool = False,
    ) -> Entry:
        """Change an entry in one commit: readers see the old one or the new one, whole.

        Args: see ``add``; what is not given stays.

        Raises: see ``add``. ValueError: also for prototypes that stay and are damaged.
        """
        change: dict = {}
        if adapter is not None:
            adapter = self._adapter_of(adapter, name, any_base)
            AdapterBank().add_many([adapter])
        if prototypes is not None:
            made = rules.as_prototypes(prototypes, [name], counts)
            rules.check_vectors(made, self.space, minimum)
            vectors, change["counts"] = made[name]
        elif counts is not None:
            raise invalid(OP, "counts", "come with prototypes", repr(counts))
        if tags is not None:
            change["tags"] = rules.check_tags(tags)
        if metadata is not None:
            change["metadata"] = rules.check_metadata(metadata, name)
        with self._writing():
            entry = self.entry(name)
            if prototypes is None:
                vectors = self._catalogue.vectors([name])[1]
                damage = self._catalogue.faults(name)
                if damage:  # written again it would have a checksum that fits
                    rule = "be as written (or given anew)"
                    raise invalid(OP, f"prototypes of {name!r}", rule, damage[0][1])
            if adapter is not None:
                record = self._append([adapter])[0]
                facts = record._asdict()
                change |= {"record": facts.pop("number"), **facts}
            entry = dataclasses.replace(entry, **change, updated=_now())
            self._catalogue.replace(entry, vectors)
        return entry

    def remove(self, names: str | Iterable[str]) -> None:
        """Take entries out in one commit. Their weights' room comes back with ``compact``."""
        names = listed(names)
        with self._writing():
            self._some(names)
            if names:
                self._catalogue.remove(names)

    def index(self) -> bool:
        """Build the index of vectors anew; without one every search compares all of them.

        Later entries are found too, by comparing each; so index again when they are many. Worth
        it from some 10^4 vectors on; below that there is none.

        Returns:
            Whether there is one.

        Cost:
            10 to 17 s for 10^5 vectors of 384, on a busy machine.
        """
        with self._writing():
            self._catalogue.optimize(None)
            return self._catalogue.index()

    def compact(self, *, keep: datetime.timedelta = datetime.timedelta(days=1)) -> None:
        """Give back the room of removed and replaced entries, and join small files.

        Who has the library open goes on reading the state it has seen. Needs room for a second
        copy of the weights where there is garbage among them.

        Args:
            keep: Older states of the catalogue go. Who has not refreshed for so long must.

        Raises:
            ValueError: an entry that is damaged (see ``verify``); nothing has changed then.
        """
        with self._writing():
            self._store.compact({e.record: e.sha256 for e in self._catalogue.entries(None)})
            self._catalogue.optimize(keep)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """The only writer, who sees all that was committed."""
        with self._store.writing():
            self.refresh()
            self._catalogue.begin()
            yield

    def _append(self, adapters: Sequence[Adapter]) -> list[Record]:
        return self._store.append(adapters, after=self._catalogue.last_record())

    def _commit(
        self, adapters: Sequence[Adapter], made, tags, metadata, skip: bool = False
    ) -> list[Entry]:
        """Weights first, to disk; then the rows, in one commit; ``skip`` names that are taken."""
        AdapterBank().add_many(adapters)  # refuses what no bank could hold
        with self._writing():
            taken = self._catalogue.held([adapter.name for adapter in adapters])
            if taken and not skip:
                raise _taken(taken)
            adapters = [adapter for adapter in adapters if adapter.name not in taken]
            if not adapters:
                return []
            names = [adapter.name for adapter in adapters]
            records, now = self._append(adapters), _now()
            new = [
                Entry(
                    *(name, tags[name], metadata[name], r.rank, r.bytes, now, now),
                    *(r.sha256, r.number, made[name][1]),
                )
                for name, r in zip(names, records, strict=True)
            ]
            self._catalogue.add(new, [made[name][0] for name in names])
        return new

    def _adapter_of(self, source: object, name: str | None, any_base: bool) -> Adapter:
        adapter = read_source(source, name)
        rules.check_adapter(adapter, self.space, any_base)
        return adapter


def _taken(names: Iterable[str]) -> ValueError:
    rule = "be new (update() changes an entry, existing='skip' passes over it)"
    return invalid(OP, "names", rule, some(sorted(map(repr, names))))


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)
