"""The packed store: what is written comes back, only its own rows are read, damage is noticed."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from support import ROOT

from lora_fused import Adapter, LoraFactors
from lora_fused.io.packed import PackedStore, locked
from lora_fused.io.packed_records import content_digest

MODULES = {"embed": (40, 8, True), "up": (8, 12, False), "down": (12, 8, False)}


def adapter(name: str, seed: int, rank: int = 3, dtype=torch.float32, modules=MODULES) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for module, (i, o, embedding) in modules.items():
        a, b = (torch.randn(rank, n, generator=generator).to(dtype) for n in (i, o))
        parts[module] = LoraFactors(a, b, 0.1 + seed, embedding)
    return Adapter(name, parts, {"head.bias": torch.arange(5)}, {"config": {"r": rank}})


def assert_same(actual: Adapter, expected: Adapter) -> None:
    assert (actual.name, actual.metadata) == (expected.name, expected.metadata)
    assert list(actual.modules) == list(expected.modules)
    for module, part in expected.modules.items():
        found = actual.modules[module]
        assert (found.scale, found.embedding) == (part.scale, part.embedding)
        for side in ("lora_a", "lora_b"):
            a, b = getattr(found, side), getattr(part, side)
            assert a.dtype == b.dtype and torch.equal(a, b)
    assert actual.saved.keys() == expected.saved.keys()
    assert all(torch.equal(actual.saved[p], t) for p, t in expected.saved.items())


@pytest.fixture
def store(tmp_path):
    with locked(tmp_path / "store"):
        return PackedStore.create(tmp_path / "store", "identity")


@pytest.fixture
def filled(store):
    """A store of nine adapters, their records and what they were."""
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    adapters = [adapter(f"a{i}", i, rank=1 + i % 4, dtype=dtypes[i % 3]) for i in range(9)]
    with store.writing():
        records = [*store.append(adapters[:4]), *store.append(adapters[4:])]
    return store, records, adapters


def file_of(store: PackedStore, name: str) -> str:
    return os.path.join(store.path, str(store.generation), name)


def test_records_come_back(filled):
    store, records, adapters = filled
    again = PackedStore(store.path)
    assert [r.number for r in records] == list(range(9)) and again.identity == "identity"
    for record, one in zip(records, adapters, strict=True):
        assert_same(again.read(record.number, record.sha256), one)
        factors = [t for p in one.modules.values() for t in (p.lora_a, p.lora_b)]
        assert record.bytes == sum(t.nbytes for t in factors) + 40
        assert record.rank == len(factors[0])


def test_files_are_one_per_group(filled):
    store, _, _ = filled
    kinds = ("float32", "bfloat16", "float16")
    groups = {f"{s}-{k}{e}" for k in kinds for s, e in (("8x12", ""), ("12x8", ""))}
    groups |= {f"40x8-{k}-embedding" for k in kinds}
    assert set(os.listdir(file_of(store, ""))) == {*groups, "index", "texts", "saved"}


def test_two_dtypes_in_a_module_are_kept_in_one_that_holds_both(store):
    a, b = torch.randn(2, 8).half(), torch.randn(2, 12).bfloat16()
    with store.writing():
        store.append([Adapter("a", {"up": LoraFactors(a, b, 1.0)})])
    found = store.read(0).modules["up"]
    assert found.lora_a.dtype is torch.float32 is found.lora_b.dtype
    assert torch.equal(found.lora_a, a.float()) and torch.equal(found.lora_b, b.float())


def test_an_adapter_costs_its_own_rows(filled, monkeypatch):
    """Bytes taken from the files: those of the record's tensors, its text and its index entry."""
    store, records, _ = filled
    taken = []
    take = PackedStore._take

    def counted(self, file, offset, size):
        taken.append((file, offset, size))
        return take(self, file, offset, size)

    monkeypatch.setattr(PackedStore, "_take", counted)
    reader = PackedStore(store.path)
    assert taken == [], "opening reads no record"
    record = records[5]
    reader.read(record.number, record.sha256)
    tensors = sum(size for file, _, size in taken if file not in ("index", "texts"))
    assert tensors == record.bytes
    assert sum(size for *_, size in taken) < record.bytes + 1000
    assert len({(file, offset) for file, offset, _ in taken}) == len(taken), "nothing twice"


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs /proc/self/smaps")
def test_pages_of_other_adapters_stay_on_disk(store):
    sizes = {"up": (4096, 4096, False)}
    with store.writing():
        for first in range(0, 32, 8):
            parts = [adapter(f"a{i}", i, rank=16, modules=sizes) for i in range(first, first + 8)]
            store.append(parts)
    reader = PackedStore(store.path)
    reader.read(17, None).modules["up"].lora_a.sum()
    resident = mapped = 0
    with open("/proc/self/smaps") as lines:
        ours = False
        for line in lines:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                ours = str(store.path) in line and "4096x4096" in line
            elif ours and line.startswith(("Size:", "Rss:")):
                kb = int(line.split()[1])
                mapped += kb if line.startswith("Size") else 0
                resident += kb if line.startswith("Rss") else 0
    assert mapped >= 32 * 512 and 256 <= resident < 1024, (mapped, resident)


@pytest.mark.skipif(sys.platform != "linux", reason="maps without reserve are Linux's")
def test_a_store_may_be_larger_than_memory(filled):
    store, records, adapters = filled
    with open(file_of(store, "8x12-float32"), "r+b") as file:
        try:
            file.truncate(1 << 43)  # 8 TB of nothing
        except OSError as error:
            pytest.skip(f"no sparse files here: {error}")
    assert_same(PackedStore(store.path).read(0, records[0].sha256), adapters[0])


def test_a_killed_writer_leaves_room_alone(filled):
    """Torn ends of every file: records from before and from after are whole."""
    store, records, adapters = filled
    for i, name in enumerate(sorted(os.listdir(file_of(store, "")))):
        with open(file_of(store, name), "ab") as file:
            file.write(b"\xff" * (2 * i + 1))
    more = adapter("more", 50)
    with store.writing():
        (late,) = store.append([more], after=8)
    assert late.number > 9, "the torn index entry is passed over"
    again = PackedStore(store.path)
    assert_same(again.read(late.number, late.sha256), more)
    for record, one in zip(records, adapters, strict=True):
        assert_same(again.read(record.number, record.sha256), one)


def flip(path: str, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("name", ["8x12-float32", "40x8-float32-embedding", "saved"])
def test_one_flipped_bit_is_noticed(filled, name):
    store, records, adapters = filled
    flip(file_of(store, name), 8)
    reader = PackedStore(store.path)
    with pytest.raises(ValueError, match=r"record 0 in .* must match its checksum"):
        reader.read(0, records[0].sha256)
    assert reader.read(0).name == "a0", "without a checksum nobody would know"
    assert_same(reader.read(4, records[4].sha256), adapters[4])


def test_a_damaged_text_is_noticed(filled):
    store, records, _ = filled
    flip(file_of(store, "texts"), 40)
    with pytest.raises(ValueError, match=r"record 0 in .* must be whole"):
        PackedStore(store.path).read(0, records[0].sha256)


def test_missing_parts_are_named(filled):
    store, records, _ = filled
    group = file_of(store, "12x8-float32")
    os.truncate(group, 100)
    where = re.escape(group)
    with pytest.raises(ValueError, match=f"{where} must hold what its records name, got .* of 100"):
        PackedStore(store.path).read(3, records[3].sha256)
    os.remove(group)
    with pytest.raises(FileNotFoundError, match=where):
        PackedStore(store.path).read(3, records[3].sha256)
    with pytest.raises(ValueError, match=r"index must hold what its records name"):
        PackedStore(store.path).read(99)


@pytest.mark.parametrize("name", ["12x8-float32", "saved", "texts", "index"])
def test_a_file_cut_while_it_is_mapped_is_named(tmp_path, name):
    """Reading its lost pages would kill the process, so another one tries."""
    code = f"""
        import os, torch
        from pathlib import Path
        from lora_fused import Adapter, LoraFactors
        from lora_fused.io.packed import PackedStore, locked
        path = Path({str(tmp_path)!r})
        with locked(path):
            store = PackedStore.create(path, "i")
        saved = {{"head": torch.arange(70000)}}
        part = LoraFactors(torch.ones(9000, 12), torch.ones(9000, 8), 1.0)
        metadata = {{"noise": torch.randn(30000).tolist()}}
        with store.writing():
            records = store.append([Adapter("a", {{"up": part}}, saved, metadata)])
        number, known = 0, records[0].sha256
        reader = PackedStore(path)
        assert reader.read(number, known).name == "a"
        os.truncate(path / "0" / {name!r}, 0)
        try:
            reader.read(number, known)
        except ValueError as error:
            print(error)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert f"{name} must hold what its records name, got" in done.stdout


def test_texts_cannot_lead_elsewhere(filled, monkeypatch):
    store, _, _ = filled
    text = {"name": "a", "modules": {"up": ["../../store.json", 0, 1, 1.0]}, "saved": {}}
    monkeypatch.setattr(PackedStore, "_text", lambda self, number, where: {**text, "metadata": {}})
    with pytest.raises(ValueError, match="must be that of a group"):
        store.read(0)


def test_the_digest_is_of_the_content():
    one = adapter("a", 1)
    same = Adapter(
        "b", dict(reversed(one.modules.items())), one.saved, one.metadata | {"path": "x"}
    )
    assert content_digest(same) == content_digest(one)
    up = one.modules["up"]
    flipped = up.lora_b.clone()
    flipped[2, 3] += 1e-6
    others = [
        dataclasses.replace(one, modules={**one.modules, "up": part})
        for part in (
            dataclasses.replace(up, lora_b=flipped),
            dataclasses.replace(up, scale=up.scale * (1 + 1e-12)),
            dataclasses.replace(up, lora_a=up.lora_a.double(), lora_b=up.lora_b.double()),
        )
    ]
    others.append(dataclasses.replace(one, saved={}))
    others.append(dataclasses.replace(one, metadata={"config": {"r": 4}}))
    assert len({content_digest(other) for other in [one, *others]}) == 6


def test_what_files_cannot_hold_is_refused(filled):
    store, _, _ = filled
    size = store.size()
    narrow = adapter("a", 1, modules={"up": (8, 12, False)}, dtype=torch.float8_e4m3fn)
    spoken = dataclasses.replace(adapter("a", 1), metadata={"config": {"r": {1, 2}}})
    cut = dataclasses.replace(adapter("a", 1), metadata={("a", "b"): 1})
    for bad, said in ((narrow, "dtype of 'up' in 'a' must"), (spoken, "JSON"), (cut, "JSON")):
        with store.writing(), pytest.raises(ValueError, match=said):
            store.append([adapter("good", 2), bad])
    assert store.size() == size, "nothing was written"


def test_an_older_copy_of_a_store_is_refused(filled):
    store, _, _ = filled
    with store.writing(), pytest.raises(ValueError, match="an older copy"):
        store.append([adapter("more", 1)], after=20)


def test_compaction_keeps_numbers(filled):
    store, records, adapters = filled
    reader = PackedStore(store.path)
    assert_same(reader.read(2, records[2].sha256), adapters[2])
    live = {r.number: r.sha256 for r in records if r.number in (2, 5, 8)}
    before = store.size()
    with store.writing():
        store.compact(live)
    assert store.size() < before / 2 and store.generation == 1
    for number in live:
        assert_same(PackedStore(store.path).read(number, live[number]), adapters[number])
        assert_same(reader.read(number, live[number]), adapters[number])
    with pytest.raises(ValueError, match="removed or replaced"):
        PackedStore(store.path).read(3)
    with store.writing():
        (late,) = store.append([adapters[0]], after=8)
    assert late.number == 9


def test_compaction_without_garbage_copies_nothing(filled):
    store, records, _ = filled
    with store.writing():
        store.compact({r.number: r.sha256 for r in records})
        assert store.generation == 0
        store.compact({r.number: r.sha256 for r in records[1:]})
        assert store.generation == 1
        store.compact({r.number: r.sha256 for r in records[1:]})
    assert store.generation == 1 and store.read(5).name == "a5"


def test_compaction_gives_back_what_killed_writers_left(filled):
    """Where every record is live, too: torn ends, and a generation that was never finished."""
    store, records, adapters = filled
    live, size = {r.number: r.sha256 for r in records}, store.size()
    shutil.copytree(store.path / "0", store.path / "1")
    assert store.size() == 2 * size
    with store.writing():
        store.compact(live)
    assert store.size() == size and store.generation == 0
    for turn, name in enumerate(("8x12-float32", "texts", "saved", "4x4-float32"), 1):
        with open(file_of(store, name), "ab") as file:
            file.write(b"x" * 100)
        with store.writing():
            if turn == 1:  # it lies in the middle
                (late,) = store.append([adapters[0]])
                live[late.number] = late.sha256
            store.compact(live)
        assert store.generation == turn, name
        with store.writing():
            store.compact(live)
        assert store.generation == turn, "nothing is left"
    assert_same(PackedStore(store.path).read(3, live[3]), adapters[3])


def test_a_number_comes_once(filled):
    """A reader that knows the last record is not given another in its place."""
    store, records, adapters = filled
    with store.writing():
        store.compact({r.number: r.sha256 for r in records[:4]})
    assert PackedStore(store.path).size() == store.size()
    with store.writing():
        (late,) = store.append([adapters[0]])
    assert late.number == 9
    with pytest.raises(ValueError, match="removed or replaced"):
        PackedStore(store.path).read(8, records[8].sha256)
    with store.writing():
        store.compact({})
        (later,) = store.append([adapters[1]])
    assert later.number == 10
    assert_same(PackedStore(store.path).read(10, later.sha256), adapters[1])


def test_compaction_refuses_damage(filled):
    store, records, _ = filled
    flip(file_of(store, "8x12-float32"), 8)
    with store.writing(), pytest.raises(ValueError, match=r"record 0 .* must match its checksum"):
        store.compact({r.number: r.sha256 for r in records[:8]})
    assert PackedStore(store.path).read(5, records[5].sha256).name == "a5"


HEADER = {"format": "lora_fused.packed", "format_version": 1, "id": "i", "generation": 0}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "be the header of a store"),
        (json.dumps({"format": "lora_fused.packed"}), "be the header of a store"),
        (json.dumps({**HEADER, "format": "other"}), "be lora_fused.packed 1"),
        (json.dumps({**HEADER, "format_version": 2}), "be lora_fused.packed 1"),
    ],
    ids=["no JSON", "no identity", "another format", "a newer version"],
)
def test_headers_are_checked(store, text, said):
    (store.path / "store.json").write_text(text)
    with pytest.raises(ValueError, match=said):
        PackedStore(store.path)


def test_a_store_of_another_library_is_refused(store):
    """An empty one too, but where it is known that no library has it."""
    with pytest.raises(FileExistsError, match="holds the store identity already"):
        PackedStore.create(store.path, "another")
    assert PackedStore(store.path).identity == "identity"
    assert PackedStore.create(store.path, "another", abandoned=True).identity == "another"
    refused = pytest.raises(ValueError, match="be the store identity that was opened, got another")
    with refused, store.writing():
        pass


def test_there_must_be_a_store(tmp_path, filled):
    with pytest.raises(FileNotFoundError, match=r"holds no store\.json"):
        PackedStore(tmp_path)
    with pytest.raises(FileExistsError, match="holds records already"):
        PackedStore.create(filled[0].path, "another")
