"""Many processes at one library: readers see whole states, writers lose nothing."""

import multiprocessing
import shutil
import threading
import time

import pytest
import torch
from support.models import adapter

from lora_fused.io.packed import locked
from lora_fused.library import AdapterLibrary
from lora_fused.library.catalogue import Catalogue

PROCESSES = 3


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lancedb", "lora_fused.library", "support.models"])
    return context


def in_processes(processes, work, uri: str) -> list:
    """work(uri, number, queue) in several processes at once; what they put, in order of number."""
    queue = processes.Queue()
    children = [
        processes.Process(target=work, args=(uri, k, queue), daemon=True) for k in range(PROCESSES)
    ]
    for child in children:
        child.start()
    found = [queue.get(timeout=120) for _ in children]
    for child in children:
        child.join()
        assert child.exitcode == 0
    return [result for _, result in sorted(found)]


def vectors(parts: int):
    """What an entry of so many parts looks like throughout."""
    return torch.full((parts, 6), float(parts)), [10 * parts] * parts


def read_states(uri: str, number: int, queue) -> None:
    library = AdapterLibrary.open(uri)
    states = []
    while "end" not in library:
        entry, made = library.entry("changing"), library.prototypes(["changing"])
        parts = len(entry.counts)
        whole = torch.equal(made.vectors, vectors(parts)[0])
        whole &= entry.counts == (10 * parts,) * parts and entry.tags == (f"of-{parts}",)
        whole &= library.adapter("changing").modules["up"].lora_a.shape[0] == parts
        states.append((whole, parts, len(library)))
        library.refresh()
    queue.put((number, states))


def test_readers_see_whole_states(library, processes):
    parts = 1
    library.add(adapter("changing", 1, rank=1), vectors(1)[0], counts=vectors(1)[1], tags=["of-1"])
    queue = processes.Queue()
    readers = [
        processes.Process(target=read_states, args=(library.uri, k, queue), daemon=True)
        for k in range(PROCESSES)
    ]
    for reader in readers:
        reader.start()
    for turn in range(25):
        parts = parts % 3 + 1
        made, counts = vectors(parts)
        changed = adapter("changing", seed=turn, rank=parts)
        library.update(
            "changing", adapter=changed, prototypes=made, counts=counts, tags=[f"of-{parts}"]
        )
        library.add(adapter(f"more{turn}", seed=turn), torch.zeros(6), counts=10)
        if turn == 12:
            library.compact()
    library.add(adapter("end", seed=1), torch.zeros(6), counts=10)
    found = [queue.get(timeout=120)[1] for _ in readers]
    for states in found:
        assert all(whole for whole, _, _ in states)
        sizes = [size for _, _, size in states]
        assert sizes == sorted(sizes) and len(set(sizes)) > 1, "it saw the library grow"
    assert {parts for states in found for _, parts, _ in states} == {1, 2, 3}


def add_ten(uri: str, number: int, queue) -> None:
    library = AdapterLibrary.open(uri)
    for i in range(10):
        name = f"w{number}-{i}"
        library.add(adapter(name, seed=10 * number + i), torch.zeros(6), counts=10)
    queue.put((number, None))


def test_writers_lose_nothing(library, processes):
    in_processes(processes, add_ten, library.uri)
    library.refresh()
    expected = {f"w{k}-{i}": 10 * k + i for k in range(PROCESSES) for i in range(10)}
    assert len(library) == 12 + len(expected)
    for name, seed in expected.items():
        part = library.adapter(name).modules["down"]
        assert torch.equal(part.lora_b, adapter(name, seed).modules["down"].lora_b)
    assert library.verify(progress=False) == []


def add_the_same(uri: str, number: int, queue) -> None:
    library = AdapterLibrary.open(uri)
    try:
        library.add(adapter("same", seed=number), torch.zeros(6), counts=10)
    except ValueError as error:
        queue.put((number, str(error)))
    else:
        queue.put((number, "added"))


def test_one_of_two_writers_of_a_name_is_refused(library, processes):
    said = in_processes(processes, add_the_same, library.uri)
    refused = [text for text in said if text != "added"]
    assert len(refused) == PROCESSES - 1 and all("must be new" in text for text in refused)
    library.refresh()
    winner = adapter("same", seed=said.index("added")).modules["up"]
    assert torch.equal(library.adapter("same").modules["up"].lora_a, winner.lora_a)


def create_one(uri: str, number: int, queue) -> None:
    try:
        AdapterLibrary.create(uri, base="0" * 64, size=6 + number)
    except FileExistsError as error:
        queue.put((number, str(error)))
    else:
        queue.put((number, "made"))


def test_one_of_several_creators_wins(tmp_path, processes):
    for turn in range(4):
        uri = str(tmp_path / str(turn))
        said = in_processes(processes, create_one, uri)
        assert said.count("made") == 1, said
        assert all(text == "made" or "a library already" in text for text in said)
        library = AdapterLibrary.open(uri)
        assert library.space.size == 6 + said.index("made")
        library.add(adapter("a", seed=1), torch.zeros(library.space.size), counts=10)


def test_a_creator_that_comes_late_changes_nothing(tmp_path, monkeypatch):
    """Asked before and after the lock was waited for; then by the engine itself."""
    make = AdapterLibrary.create
    library = make(tmp_path / "l", base="0" * 64, size=6)
    for answers, store in (([False, True], None), ([False, False], tmp_path / "own")):
        turn = iter(answers)
        monkeypatch.setattr(Catalogue, "exists", lambda *_, turn=turn: next(turn))
        with pytest.raises(FileExistsError, match="holds a library already"):
            make(tmp_path / "l", base="0" * 64, size=6, store=store)
    assert not (tmp_path / "own" / "store.json").exists()
    library.add(adapter("a", seed=1), torch.zeros(6), counts=10)
    assert AdapterLibrary.open(library.uri).names == ["a"]


def test_names_that_others_add_meanwhile_can_be_skipped(empty, make):
    adapters, prototypes = make(6)

    def interfere(done, total) -> None:
        if done == 2:
            for name in ("a0002", "a0004", "a0005"):
                AdapterLibrary.open(empty.uri).add(adapter(name, 99), torch.zeros(6), counts=10)

    options = {"existing": "skip", "batch": 2, "progress": interfere}
    added = empty.add_many(adapters, prototypes, **options)
    assert added == ["a0000", "a0001", "a0003"] and len(empty) == 6
    theirs = adapter("a0002", 99).modules["up"].lora_a
    assert torch.equal(empty.adapter("a0002").modules["up"].lora_a, theirs)
    assert empty.verify(progress=False) == []


def test_a_writer_waits_and_gives_up(library, tmp_path):
    refused = pytest.raises(RuntimeError, match="got another writer")
    with locked(tmp_path), refused, locked(tmp_path, wait=0.1):
        pass
    with locked(tmp_path, wait=0.1):
        pass


def test_writers_take_turns(tmp_path):
    """One who writes without a pause does not keep others out."""
    ends = time.monotonic() + 30

    def hog() -> None:
        while not done.is_set() and time.monotonic() < ends:
            with locked(tmp_path):
                time.sleep(0.1)

    done = threading.Event()
    thread = threading.Thread(target=hog)
    thread.start()
    for _ in range(12):
        with locked(tmp_path, wait=1.5):
            pass
    done.set()
    thread.join()
    assert time.monotonic() < ends, "not by waiting for its end"


def test_compaction_keeps_readers_alive(library):
    """They go on with the state they have seen; of what is gone for good they hear."""
    reader, late = AdapterLibrary.open(library.uri), AdapterLibrary.open(library.uri)
    gone = reader.adapter("a0003").modules["up"].lora_a
    library.remove(["a0003"])
    library.update("a0001", adapter=adapter("a0001", seed=50))
    size = library.stats().disk
    library.compact()
    assert library.stats().disk < size
    held = adapter("a0003", seed=3, rank=1).modules["up"].lora_a
    assert torch.equal(gone, held)
    assert torch.equal(reader.adapter("a0003").modules["up"].lora_a, held), "it has the file mapped"
    for one in (reader, late):
        assert len(one) == 12 and len(one.search(torch.zeros(6), k=12)[0].names) == 12
        assert one.load(["a0002"]).names == ["a0002"], "records keep their numbers"
    with pytest.raises(ValueError, match=r"got none \(removed or replaced, and compacted: refresh"):
        late.load(["a0003"])
    for one in (reader, late):
        assert one.stats().disk == library.stats().disk
    late.refresh()
    assert late.stats().disk == library.stats().disk
    assert "a0003" not in late and late.verify(progress=False) == []


def test_a_killed_compaction_is_cleared(library):
    """What a compaction left before its commit is not read, and the next one removes it."""
    weights = f"{library.uri}/weights"
    shutil.copytree(f"{weights}/0", f"{weights}/1")
    (library._store.path / "1" / "index").write_bytes(b"half")
    assert AdapterLibrary.open(library.uri).verify(progress=False) == []
    library.remove(["a0003"])
    library.compact()
    left = ["1", "lock", "queue", "store.json"]
    assert sorted(p.name for p in library._store.path.iterdir()) == left
    assert AdapterLibrary.open(library.uri).verify(progress=False) == []
