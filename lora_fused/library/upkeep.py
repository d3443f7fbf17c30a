"""What a library holds in sum, and whether it is whole."""

import dataclasses
from collections import Counter
from typing import NamedTuple

from lora_fused.io.packed import PackedStore
from lora_fused.library.catalogue import Catalogue
from lora_fused.methods.progress import show


class Fault(NamedTuple):
    """What is wrong with an entry; an empty name: with the catalogue, so that none can be read."""

    name: str
    what: str


@dataclasses.dataclass(frozen=True)
class Stats:
    """A library in figures.

    Attributes:
        entries, prototypes: how many.
        size: E.
        base, fingerprint: whose adapters these are; base None: not named.
        bytes: of the tensors of all entries.
        disk: of the weights' files: what is beyond ``bytes`` is texts, some 1 kB per entry, and
            what removed and replaced entries left behind, for ``compact``.
        indexed: prototypes in the index; 0: there is none.
        unknown: prototypes of an unknown number of examples.
        ranks: rank -> entries. tags: tag -> entries.
    """

    entries: int
    prototypes: int
    size: int
    base: str | None
    fingerprint: str
    bytes: int
    disk: int
    indexed: int
    unknown: int
    ranks: dict[int, int]
    tags: dict[str, int]


def measured(catalogue: Catalogue, store: PackedStore) -> Stats:
    wanted = ("prototype", "count", "rank", "bytes", "tags")
    numbers, counts, *facts = catalogue.columns(wanted).values()
    first = [row for row, number in enumerate(numbers) if number == 0]
    ranks, sizes, tags = ([column[row] for row in first] for column in facts)
    return Stats(
        entries=len(first),
        prototypes=len(counts),
        size=catalogue.space.size,
        base=catalogue.space.base,
        fingerprint=catalogue.space.fingerprint,
        bytes=sum(sizes),
        disk=store.size(),
        indexed=catalogue.indexed(),
        unknown=counts.count(0),
        ranks=dict(sorted(Counter(ranks).items())),
        tags=dict(sorted(Counter(tag for own in tags for tag in own).items())),
    )


def faults(catalogue: Catalogue, store: PackedStore, progress) -> list[Fault]:
    try:
        found = [Fault(name, what) for name, what in catalogue.faults()]
        entries = catalogue.entries(None)
    except (ValueError, OSError, RuntimeError) as error:
        return [Fault("", str(error))]
    for done, entry in enumerate(entries, 1):
        try:
            adapter = store.read(entry.record, entry.sha256)
            if adapter.name != entry.name:
                found.append(Fault(entry.name, f"its record is of {adapter.name!r}"))
        except (ValueError, OSError) as error:
            found.append(Fault(entry.name, str(error)))
        show(progress, done, len(entries), f"verified {done} of {len(entries)}")
    return found
