"""AdapterLibrary: what goes in comes out, is found, and changes whole or not at all."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from support.models import Net, adapter

from lora_fused import Adapter, AdapterBank, read_adapter, write_adapter
from lora_fused.library import AdapterLibrary
from lora_fused.methods import rpe

QUERIES = torch.randn(5, 6, generator=torch.Generator().manual_seed(99))


def assert_same(actual: Adapter, expected: Adapter) -> None:
    assert actual.modules.keys() == expected.modules.keys()
    for module, part in expected.modules.items():
        found = actual.modules[module]
        for side in ("lora_a", "lora_b"):
            a, b = getattr(found, side), getattr(part, side)
            assert a.dtype == b.dtype and torch.equal(a, b), f"{side} of {module}"
        assert (found.scale, found.embedding) == (part.scale, part.embedding)
    assert actual.saved.keys() == expected.saved.keys()
    for path, tensor in expected.saved.items():
        assert actual.saved[path].dtype == tensor.dtype
        assert torch.equal(actual.saved[path], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_adapters_come_back_exactly(empty, make, dtype):
    """Mixed ranks, an embedding, saved tensors of other dtypes, in one library."""
    parts = adapter("a", seed=3, rank=5, modules=("embed", "up", "down"), dtype=dtype)
    saved = {"down.weight": torch.randn(6, 12), "count": torch.tensor(7), "none": torch.zeros(0, 2)}
    mixed = dataclasses.replace(parts, saved=saved)
    other = adapter("b", seed=4, rank=1, modules=("up",), dtype=torch.float64)
    for one in (mixed, other):
        empty.add(one, torch.randn(6), counts=10)
    again = AdapterLibrary.open(empty.uri)
    assert_same(again.adapter("a"), mixed)
    assert_same(again.adapter("b"), other)
    assert again.verify(progress=False) == []


def test_a_folder_goes_through_unchanged(empty, tmp_path):
    """PEFT folder -> library -> PEFT folder: the same tensors, names and config, rsLoRA's too."""
    one = adapter("a", seed=1, rank=4, modules=("embed", "up", "down"))
    parts = {n: dataclasses.replace(p, scale=8 / 4**0.5) for n, p in one.modules.items()}
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True}
    config |= {"target_modules": ["embed", "up", "down"]}
    write_adapter(Adapter("a", parts, {}, {"config": config}), tmp_path / "first")
    empty.add(tmp_path / "first", torch.randn(6), name="a", counts=10)
    empty.export("a", tmp_path / "second")
    first, second = tmp_path / "first", tmp_path / "second"
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (first / file).stat().st_size == (second / file).stat().st_size
    file = "adapter_config.json"
    assert (first / file).read_bytes() == (second / file).read_bytes()
    tensors = [load_file(path / "adapter_model.safetensors") for path in (first, second)]
    assert list(tensors[0]) == list(tensors[1])
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    assert_same(read_adapter(tmp_path / "second"), empty.adapter("a"))


def test_a_bank_goes_in_and_comes_out(empty, make):
    adapters, prototypes = make(7)
    bank = AdapterBank()
    bank.add_many(adapters)
    assert empty.add_many(bank, prototypes, progress=False) == bank.names
    loaded = empty.load(bank.names)
    for one in adapters:
        assert_same(loaded.adapter(one.name), one)
    assert empty.load(["a0003"], bank=loaded.subset(["a0001"])).names == ["a0001", "a0003"]
    assert empty.load(["a0003"], dtype=torch.bfloat16).dtype is torch.bfloat16


def test_the_library_is_a_collection(library):
    names = [f"a{i:04}" for i in range(12)]
    assert len(library) == 12 and list(library) == library.names == names
    assert "a0003" in library and "a0099" not in library
    assert repr(library).startswith("AdapterLibrary(12 adapters of ")


def test_search_finds_the_nearest(library):
    held = library.prototypes()
    truth = (QUERIES[:, None] - held.vectors).square().sum(-1).sort(dim=1)
    for hit, order, distances in zip(
        library.search(QUERIES, k=4), truth.indices, truth.values, strict=True
    ):
        assert hit.names == [held.names[i] for i in order[:4]]
        assert torch.allclose(torch.tensor(hit.distances), distances[:4], rtol=1e-5)
    assert len(library.search(QUERIES[0], k=99)[0].names) == 12


def test_search_returns_entries_not_prototypes(empty, make):
    adapters, prototypes = make(9, per_adapter=4)
    empty.add_many(adapters, prototypes, progress=False)
    assert len(prototypes.vectors) > 20
    for query, hit in zip(QUERIES, empty.search(QUERIES, k=9), strict=True):
        assert sorted(hit.names) == sorted(prototypes.names)
        assert hit.distances == sorted(hit.distances)
        nearest = (query - prototypes.vectors).square().sum(-1).argmin()
        assert hit.names[0] == prototypes.names[prototypes.owners[nearest]]


@pytest.mark.parametrize("per_adapter", [1, 3])
def test_retrieve_is_that_of_all_prototypes(empty, make, per_adapter):
    adapters, prototypes = make(40, per_adapter=per_adapter)
    empty.add_many(adapters, prototypes, progress=False)
    actual = empty.retrieve(QUERIES, k=3)
    expected = rpe.retrieve(QUERIES, prototypes, k=3)
    assert len(actual.prototypes) < len(prototypes), "narrowed"
    for query in range(len(QUERIES)):
        assert actual.names(query) == expected.names(query)
    assert torch.equal(actual.distances, expected.distances)
    ours, theirs = (rpe.weigh(found, "l1").mixture() for found in (actual, expected))
    assert ours.adapters == theirs.adapters and torch.equal(ours.weights, theirs.weights)


def test_a_part_of_a_library_warns_of_nothing(empty, make):
    """Known single inputs look strange beside a few prototypes; against others they do not."""
    adapters, prototypes = make(40)
    empty.add_many(adapters, prototypes, progress=False)
    generator = torch.Generator().manual_seed(1)
    near = prototypes.vectors.repeat(2, 1)
    inputs, others = near + torch.randn(2, 80, 6, generator=generator)
    chosen = rpe.weigh(empty.retrieve(inputs, k=3).take(slice(0, 80)), "l1")
    assert {(one.outside, one.of) for one in rpe.explain(chosen)} == {(None, 0)}
    assert "give reference=" in str(rpe.explain(chosen)[0])
    warned = [one.outside for one in rpe.explain(chosen, reference=others)]
    assert set(warned) == {True, False} and sum(warned) < 12
    whole = rpe.weigh(rpe.retrieve(inputs, empty.prototypes(), k=3), "l1")
    assert None not in {one.outside for one in rpe.explain(whole)}


def test_filters_and_tags_narrow(library):
    assert library.search(QUERIES[0], k=12, tags=["even"])[0].names
    even = {f"a{i:04}" for i in range(0, 12, 2)}
    assert set(library.search(QUERIES[0], k=12, tags=["even"])[0].names) == even
    some = library.search(QUERIES[0], k=12, filter="rank = 3 OR name = 'a0001'")[0].names
    assert set(some) == {"a0001", "a0002", "a0005", "a0008", "a0011"}
    both = library.search(QUERIES[0], k=12, filter="rank = 3 OR name = 'a0001'", tags=["even"])
    assert set(both[0].names) == {"a0002", "a0008"}
    assert [e.name for e in library.entries("rank = 3", tags=["even"])] == ["a0002", "a0008"]
    assert library.retrieve(QUERIES, k=3, tags=["even"]).prototypes.names


def test_filters_select_entries_by_any_of_their_prototypes(library):
    """Also by what differs among them; then all of an entry's prototypes are looked at."""
    ends = torch.stack([torch.full((6,), 100.0), torch.full((6,), -100.0)])
    library.add(adapter("two", 1), ends, counts=[10, 50])
    library.add(adapter("big", 1), torch.full((6,), 40.0), counts=50)
    for where in ("count = 10 AND name = 'two'", "COUNT = 10", "prototype = 1"):
        assert [e.name for e in library.entries(where)] == ["two"], where
        assert library.entries(where)[0].counts == (10, 50)
        assert library.search(ends[1], filter=where) == [(["two"], [0.0])]
        found = library.retrieve(ends[1], k=3, filter=where)
        assert found.names(0) == ["two"] and found.distances.tolist() == [[0.0]]
    assert library.search(ends[0], k=9, filter="count = 50")[0].names == ["two", "big"]
    assert library.search(ends[0], filter="count = 11") == [([], [])]
    assert library.entries("count = 11") == []


def test_an_update_replaces_all_of_an_entry(library):
    before = library.entry("a0003")
    vectors = torch.randn(3, 6, generator=torch.Generator().manual_seed(5))
    library.update("a0003", prototypes=vectors, counts=[11, 12, 13], tags=["new"])
    after = library.entry("a0003")
    assert after.counts == (11, 12, 13) and after.tags == ("new",)
    assert (after.sha256, after.created) == (before.sha256, before.created)
    assert after.updated > before.updated
    assert torch.equal(library.prototypes(["a0003"]).vectors, vectors)
    changed = adapter("whatever", seed=77, rank=6)
    library.update("a0003", adapter=changed, prototypes=vectors[:1], counts=10)
    assert_same(library.adapter("a0003"), changed)
    assert library.entry("a0003").counts == (10,) and library.entry("a0003").rank == 6
    assert len(library) == 12 and library.verify(progress=False) == []


def test_removed_entries_are_gone(library):
    library.remove(["a0003", "a0004"])
    assert len(library) == 10 and "a0003" not in library
    assert "a0003" not in library.search(QUERIES[0], k=12)[0].names
    with pytest.raises(ValueError, match="must be of an entry"):
        library.load(["a0003"])
    library.add(adapter("a0003", seed=5), torch.zeros(6), counts=10)
    assert_same(library.adapter("a0003"), adapter("a0003", seed=5))


def test_stats(library):
    stats = library.stats()
    assert (stats.entries, stats.prototypes, stats.size, stats.unknown) == (12, 12, 6, 0)
    assert stats.ranks == {1: 4, 2: 4, 3: 4} and stats.tags == {"even": 6}
    rows = sum(1 + i % 3 for i in range(12))
    assert stats.bytes == 4 * rows * (8 + 12 + 12 + 6) <= stats.disk


def test_loaded_adapters_run(library, base):
    from support.models import merged, tokens

    from lora_fused import Mixture, attach

    bank, x = library.load(["a0002", "a0005"]), tokens()
    handle = attach(base, bank)
    with handle.mix(Mixture.of({"a0002": 0.3, "a0005": 0.7})):
        actual = base(x)
    held = [library.adapter(name) for name in bank]
    truth = merged(Net(), held, {"a0002": 0.3, "a0005": 0.7})(x)
    assert torch.allclose(actual.double(), truth, atol=1e-5)
