"""Index, verification and embedding: what keeps a library fast and sound."""

import datetime
import os
from pathlib import Path

import pytest
import torch
from support.models import adapter, tokens

from lora_fused import Adapter, AdapterBank, LoraFactors
from lora_fused.io import packed_records
from lora_fused.io.packed import locked
from lora_fused.library import AdapterLibrary
from lora_fused.library.catalogue import Catalogue
from lora_fused.methods import rpe

MANY, WIDE = 12_000, 16


@pytest.fixture(scope="module")
def crowded(tmp_path_factory):
    """A library of 12,000 clustered vectors with an index, and its prototypes."""
    pytest.importorskip("lancedb", reason="lancedb is not installed")
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(60, WIDE, generator=generator)
    owners = torch.randint(0, 60, (MANY,), generator=generator)
    vectors = centres[owners] + 0.5 * torch.randn(MANY, WIDE, generator=generator)
    names = tuple(f"a{i:05}" for i in range(MANY))
    made = rpe.Prototypes(names, vectors, counts=torch.full((MANY,), 10))
    factors = LoraFactors(torch.ones(1, 2), torch.ones(1, 2), 1.0)
    path = tmp_path_factory.mktemp("crowded") / "library"
    library = AdapterLibrary.create(path, base="0" * 64, size=WIDE)
    bank = AdapterBank()
    bank.add_many([Adapter(name, {"q": factors}) for name in names])
    tags = {name: ["rare"] for name in names[::1000]}
    library.add_many(bank, made, tags=tags, batch=4000, progress=False)
    assert library.stats().indexed == 0 and library.index()
    assert library.stats().indexed == MANY
    return library, made


def recall(library, made, queries, **options) -> float:
    truth = rpe.retrieve(queries, made, k=10)
    hits = library.search(queries, k=10, **options)
    held = [len(set(hit.names) & set(truth.names(q))) / 10 for q, hit in enumerate(hits)]
    return sum(held) / len(held)


def test_search_with_an_index_finds_what_exact_search_finds(crowded):
    library, made = crowded
    near = made.vectors[::200] + 0.1
    assert recall(library, made, near) >= 0.95
    assert recall(library, made, near, exact=True) == 1.0
    far = torch.randn(20, WIDE, generator=torch.Generator().manual_seed(3))
    assert recall(library, made, far, exact=True) == 1.0


def test_the_index_is_used(crowded, monkeypatch):
    """Negative control: far from everything, one probe loses neighbours and all lose none."""
    library, made = crowded
    far = torch.randn(60, WIDE, generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr("lora_fused.library.catalogue._PROBES", 1)
    assert recall(library, made, far) < 1
    monkeypatch.setattr("lora_fused.library.catalogue._PROBES", MANY)
    assert recall(library, made, far) == 1


def test_filters_find_what_is_rare_in_an_index(crowded):
    """The nearest partitions hold none of them: more are looked through."""
    library, made = crowded
    rare = sorted(made.names[::1000])
    (hit,) = library.search(made.vectors[5], k=10, tags=["rare"])
    vectors = made.vectors[::1000]
    order = (made.vectors[5] - vectors).square().sum(1).sort().indices[:10]
    assert hit.names == [rare[i] for i in order]
    (named,) = library.search(made.vectors[5], k=3, filter="name IN ('a00007', 'a11000')")
    assert sorted(named.names) == ["a00007", "a11000"]


def test_new_entries_are_found_before_the_next_index(crowded):
    library, _ = crowded
    place = torch.full((WIDE,), 9.0)
    factors = {"q": LoraFactors(torch.ones(1, 2), torch.ones(1, 2), 1.0)}
    library.add(Adapter("late", factors), place, counts=10)
    try:
        assert library.search(place, k=1)[0] == (["late"], [0.0])
        assert library.stats().indexed == MANY
        library.compact()
        assert library.stats().indexed == MANY + 1, "compact takes new rows into the index"
        assert library.search(place, k=1)[0].names == ["late"]
    finally:
        library.remove("late")
    assert library.search(place, k=1)[0].names != ["late"]


def test_small_libraries_have_no_index(library, monkeypatch):
    build = Catalogue.index

    def alone(self) -> bool:
        with pytest.raises(RuntimeError, match="got another writer"), locked(weights, wait=0.05):
            pass
        return build(self)

    weights = Path(library.uri, "weights")
    monkeypatch.setattr(Catalogue, "index", alone)
    assert library.index() is False and library.stats().indexed == 0
    assert len(library.search(torch.zeros(6), k=12)[0].names) == 12


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_verify_names_damaged_weights(library):
    weights = Path(library.uri, "weights", "0")
    damage(weights / "8x12-float32", 4)
    (fault,) = AdapterLibrary.open(library.uri).verify(progress=False)
    assert fault.name == "a0000" and "must match its checksum" in fault.what
    with pytest.raises(ValueError, match="must match its checksum"):
        AdapterLibrary.open(library.uri).load(["a0001", "a0000"])
    assert AdapterLibrary.open(library.uri).load(["a0001"]).names == ["a0001"]


def test_verify_names_missing_weights(library):
    weights = Path(library.uri, "weights", "0")
    os.truncate(weights / "12x6-float32", 600)
    faults = AdapterLibrary.open(library.uri).verify(progress=False)
    assert 0 < len(faults) < 12 and {fault.name for fault in faults} < set(library.names)
    assert all("must hold what its records name" in fault.what for fault in faults)
    (weights / "texts").unlink()
    faults = AdapterLibrary.open(library.uri).verify(progress=False)
    assert [fault.name for fault in faults] == library.names


def test_verify_names_vectors_that_changed(library):
    """The engine keeps no checksum of its own: a flipped bit of a vector is seen by ours."""
    vectors = library.prototypes().vectors
    needle = bytes(vectors[3].view(torch.uint8).tolist())
    files = Path(library.uri, "catalogue.lance", "data").iterdir()
    files = [path for path in files if needle in path.read_bytes()]
    assert len(files) == 1
    damage(files[0], files[0].read_bytes().index(needle))
    changed = AdapterLibrary.open(library.uri)
    assert not torch.equal(changed.prototypes().vectors, vectors)
    assert changed.verify(progress=False) == [("a0003", "prototype 0 is not as written")]
    with pytest.raises(
        ValueError, match=r"prototypes of 'a0003' must be as written .* prototype 0"
    ):
        changed.update("a0003", tags=["new"])
    assert changed.verify(progress=False) == [("a0003", "prototype 0 is not as written")]
    changed.update("a0002", tags=["new"])
    changed.update("a0003", prototypes=vectors[3], counts=20)
    assert changed.verify(progress=False) == []


def test_verify_names_a_lost_file_of_the_catalogue(library):
    lost = sorted(Path(library.uri, "catalogue.lance", "data").iterdir())[0]
    lost.unlink()
    changed = AdapterLibrary.open(library.uri)
    (fault,) = changed.verify(progress=False)
    assert fault.name == "" and lost.name in fault.what and ".rs" not in fault.what
    for ask in (changed.stats, changed.entries, lambda: changed.search(torch.zeros(6))):
        with pytest.raises(FileNotFoundError, match=f"must hold .*{lost.name}, got none"):
            ask()


@pytest.mark.filterwarnings("ignore:optimize")
def test_readers_of_a_state_that_is_gone_are_told_to_refresh(library):
    reader = AdapterLibrary.open(library.uri)
    library.compact(keep=datetime.timedelta(0))
    with pytest.raises(FileNotFoundError, match=r"another compacted: refresh\(\)"):
        reader.entries("rank > 0")
    reader.refresh()
    assert reader.verify(progress=False) == [] and len(reader.entries("rank > 0")) == 12


def test_verify_tells_how_far_it_is(library):
    seen = []
    library.verify(progress=lambda *at: seen.append(at))
    assert seen == [(i, 12) for i in range(1, 13)]


def test_an_add_costs_its_own_files(library, make, monkeypatch):
    """What was there is neither put on disk again nor read for the numbers of records."""
    synced, read = [], []
    to_disk, columns = packed_records.path_to_disk, Catalogue._read
    monkeypatch.setattr(packed_records, "path_to_disk", lambda p: (synced.append(p), to_disk(p)))
    monkeypatch.setattr(
        Catalogue, "_read", lambda self, c, where: read.append(c) or columns(self, c, where)
    )
    for i in range(20):
        library.add(adapter(f"b{i}", i), torch.zeros(6), counts=10)
    assert read.count(["record"]) <= 1
    other = AdapterLibrary.open(library.uri)
    synced.clear()
    other.add(adapter("more", 1), torch.zeros(6), counts=10)
    assert 3 <= len({path for path in synced if "catalogue" in str(path)}) <= 8
    read.clear()
    library.remove("more")
    library.update("b3", adapter=adapter("b3", 50))
    assert read.count(["record"]) == 1, "another has committed"
    library.update("b4", tags=["x"])
    library.compact()
    synced.clear()
    library.add(adapter("last", 1), torch.zeros(6), counts=10)
    assert 3 <= len({path for path in synced if "catalogue" in str(path)}) <= 8
    assert library.entry("last").record == 34 and library.verify(progress=False) == []


def test_embedding_is_kept_with_the_library(tmp_path, base):
    library = AdapterLibrary.create(
        tmp_path / "l", base=base, size=6, pooling="max", normalize=True, minimum=3
    )
    again = AdapterLibrary.open(library.uri)
    expected = rpe.embed(base, tokens(5), pooling="max", normalize=True, progress=False)
    assert torch.equal(again.embed(base, tokens(5), progress=False), expected)
    made = rpe.make_prototypes({"a": expected}, minimum=3)
    library.add(adapter("a", 1), made)
    assert library.entry("a").counts == (5,)
    assert again.space.minimum == 3 and again.space.modules["up"] == [8, 12]


def test_features_of_another_size_are_refused(tmp_path, base):
    library = AdapterLibrary.create(tmp_path / "l", base=base, size=7)
    with pytest.raises(ValueError, match=r"queries must have the library's size 7, got \[3, 6\]"):
        library.embed(base, tokens(3), progress=False)
