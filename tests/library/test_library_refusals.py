"""What a library refuses, by name, and that it is then as it was."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from support import ROOT
from support.models import Net, adapter

from lora_fused import AdapterBank
from lora_fused.library import AdapterLibrary, fingerprint
from lora_fused.methods import rpe

Z = torch.ones(6)


@pytest.fixture
def unchanged(library):
    """The library, which must be as it was when the test is over."""
    before = library.entries()
    size = library.stats().disk
    yield library
    assert AdapterLibrary.open(library.uri).entries() == before
    assert library.stats().disk == size, "nothing was written"
    assert library.verify(progress=False) == []


def test_names(unchanged):
    one = adapter("a", 1)
    for name in ("", ".hidden", "a/b", "a\\b", "a\0", "a\n", "__base__", "x" * 201, " a", "a "):
        with pytest.raises(ValueError, match="name must serve as a folder's name"):
            unchanged.add(one, Z, name=name, counts=10)
    with pytest.raises(ValueError, match=r"names must be new .* got 'a0001'"):
        unchanged.add(one, Z, name="a0001", counts=10)
    unchanged.remove([])


def test_odd_names_are_taken(empty):
    for name in ("it's", 'a "b"', "ünï-ço∂é", "a b", "100%", "x; DROP TABLE y", "a_b", "-"):
        empty.add(adapter("a", 1), Z, name=name, counts=10, tags=[name])
        assert name in empty and empty.load([name]).names == [name]
        assert empty.search(Z, k=9, tags=[name])[0].names == [name]
        empty.update(name, tags=[f"{name}'"])
        assert empty.entry(name).tags == (f"{name}'",)
    assert len(empty) == 8
    empty.remove(empty.names)
    assert len(empty) == 0 and empty.search(Z)[0].names == []


def test_names_among_many(unchanged, make):
    adapters, prototypes = make(5, first=10)  # a0010 and a0011 are in
    with pytest.raises(ValueError, match=r"names must be new .* got 'a0010', 'a0011'"):
        unchanged.add_many(adapters, prototypes, batch=1, progress=False)
    with pytest.raises(ValueError, match=r"'a0002', 'a0003', 'a0004', 'a0005' and 3 more$"):
        unchanged.add_many(*make(7, first=2), progress=False)
    with pytest.raises(ValueError, match="adapters must have distinct names, got 'a0012' twice"):
        unchanged.add_many([*adapters[2:], adapters[2]], prototypes, progress=False)


def test_existing_names_can_be_skipped(library, make):
    adapters, prototypes = make(5, first=10)
    held = library.entry("a0010")
    added = library.add_many(adapters, prototypes, existing="skip", progress=False)
    assert added == ["a0012", "a0013", "a0014"] and len(library) == 15
    assert library.entry("a0010") == held


def test_vectors(unchanged, make):
    one = adapter("new", 1)
    for bad, said in (
        (torch.ones(5), r"prototypes of 'new' must have the library's size 6, got \[1, 5\]"),
        (torch.full((6,), torch.nan), "prototypes of 'new' must be finite"),
        (torch.ones(6, dtype=torch.int64), "must be a floating point tensor"),
        (torch.ones(0, 6), "must be .*not empty"),
        ([1.0] * 6, "prototypes must be Prototypes"),
        (make(3)[1], "prototypes must hold those of adapter 'new'"),
    ):
        with pytest.raises(ValueError, match=said):
            unchanged.add(one, bad, counts=None if isinstance(bad, rpe.Prototypes) else 10)


def test_means_of_few_examples(unchanged, make):
    """Privacy: so few are told from their mean. Unknown numbers count as too few."""
    one, few = adapter("new", 1), r"be means of at least 10 examples each .*, got 9"
    with pytest.raises(ValueError, match=few):
        unchanged.add(one, Z, counts=9)
    with pytest.raises(ValueError, match="got an unknown number"):
        unchanged.add(one, Z)
    with pytest.raises(ValueError, match="got an unknown number"):
        unchanged.add(one, Z, minimum=1)
    with pytest.raises(ValueError, match=few):
        unchanged.update("a0001", prototypes=torch.ones(2, 6), counts=[10, 9])
    made = rpe.make_prototypes({"new": torch.randn(9, 6)}, minimum=1)
    with pytest.raises(ValueError, match=few):
        unchanged.add_many([one], made, progress=False)
    with pytest.raises(ValueError, match="counts of 'new' must be 2, one per prototype"):
        unchanged.add(one, torch.ones(2, 6), counts=10)


def test_few_examples_when_told(empty):
    empty.add(adapter("few", 1), Z, counts=1, minimum=1)
    empty.add(adapter("unknown", 1), Z, minimum=0)
    assert empty.entry("few").counts == (1,) and empty.stats().unknown == 1


def test_adapters_of_another_base(unchanged, base):
    other = dataclasses.replace(adapter("new", 1), metadata={"config": {}})
    odd = {**other.modules, "layers.9.up": other.modules["up"]}
    with pytest.raises(ValueError, match=r"each module of adapter 'new' must be one of the base's"):
        unchanged.add(dataclasses.replace(other, modules=odd), Z, counts=10)
    swapped = {"up": other.modules["down"]}
    with pytest.raises(ValueError, match=r"module 'up' of .* sizes \[I, O\] = \[8, 12\], got"):
        unchanged.add(dataclasses.replace(other, modules=swapped), Z, counts=10)
    with pytest.raises(ValueError, match="base must have the library's fingerprint"):
        AdapterLibrary.open(unchanged.uri, base=Net(seed=1))
    with pytest.raises(ValueError, match="base must be a model or its fingerprint"):
        AdapterLibrary.open(unchanged.uri, base="gpt2")
    with pytest.raises(ValueError, match="base must have the library's fingerprint"):
        unchanged.embed(Net(seed=1), torch.zeros(2, 3, dtype=torch.long))
    assert len(AdapterLibrary.open(unchanged.uri, base=base)) == 12
    assert len(AdapterLibrary.open(unchanged.uri, base=fingerprint(base))) == 12


def test_the_base_of_a_config_is_compared(tmp_path):
    library = AdapterLibrary.create(tmp_path / "l", base="0" * 64, base_name="org/Model-1B", size=6)
    for i, named in enumerate(("/home/x/model-1b", None, "a/models--org--model-1b/snapshots/9f")):
        config = {"config": {"base_model_name_or_path": named}}
        library.add(dataclasses.replace(adapter(f"a{i}", 1), metadata=config), Z, counts=10)
    config = {"config": {"base_model_name_or_path": "org/model-2b"}}
    other = dataclasses.replace(adapter("b", 1), metadata=config)
    with pytest.raises(
        ValueError,
        match=r"the base of adapter 'b' must be 'org/Model-1B' .*any_base.*create\(base_name=",
    ):
        library.add(other, Z, counts=10)
    library.add(other, Z, counts=10, any_base=True)


def test_values_that_no_bank_can_hold(unchanged):
    one = adapter("new", 1)
    one.modules["up"].lora_a[0, 0] = torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        unchanged.add(one, Z, counts=10)
    zero = {"up": dataclasses.replace(adapter("new", 1).modules["up"], scale=0.0)}
    with pytest.raises(ValueError, match="have a scale that is finite"):
        unchanged.add(dataclasses.replace(one, modules=zero), Z, counts=10)
    with pytest.raises(ValueError, match="adapt at least one module"):
        unchanged.add(dataclasses.replace(one, modules={}), Z, counts=10)


def test_tags_and_metadata(unchanged):
    one = adapter("new", 1)
    for tags in ("text", [1], [""], 7):
        with pytest.raises(ValueError, match="must be a list of strings"):
            unchanged.add(one, Z, counts=10, tags=tags)
    for metadata in ([], {1: 2}, {"a": {1}}, {"a": float("nan")}, {"a": (1,)}):
        with pytest.raises(ValueError, match="metadata of 'new' must be a dict that JSON can hold"):
            unchanged.add(one, Z, counts=10, metadata=metadata)
    with pytest.raises(ValueError, match="tags must be of adapters that are added, got 'b'"):
        unchanged.add_many([one], rpe.Prototypes(("new",), Z[None]), tags={"b": []}, minimum=0)


def test_questions(unchanged):
    for bad, said in (
        ({"k": 0}, "k must be an integer of at least 1"),
        ({"filter": "colour = 3"}, r"filter must be SQL over name, .*No field named colour"),
        ({"filter": "rank ==== 3"}, "filter must be SQL over name"),
        ({"filter": "1/0 = 1"}, "filter must be SQL over .*Divide by zero error\\), got"),
        ({"filter": "CAST(name AS INT) > 1"}, r"filter must be SQL over .*Cannot cast"),
        ({"filter": "count(*) > 1"}, r"filter must be SQL over .*not implemented"),
        ({"filter": "max(rank) > 1"}, r"filter must be SQL over .*not implemented"),
        ({"filter": " "}, "filter must be SQL, not empty"),
        ({"filter": 3}, "filter must be SQL, not empty"),
        ({"tags": "even"}, "tags must be a list of strings"),
    ):
        with pytest.raises(ValueError, match=said):
            unchanged.search(Z, **bad)
    with pytest.raises(ValueError, match=r"queries must have the library's size 6, got \[1, 5\]"):
        unchanged.search(torch.ones(5))
    with pytest.raises(ValueError, match="queries must be finite"):
        unchanged.search(torch.full((6,), torch.inf))
    with pytest.raises(ValueError, match="filter and tags must leave some entries"):
        unchanged.retrieve(Z, tags=["odd"])
    for ask in (unchanged.load, unchanged.prototypes, unchanged.remove):
        with pytest.raises(ValueError, match=r"name must be of an entry \(close: 'a0009'"):
            ask(["a0001", "a0009x"])
        with pytest.raises(ValueError, match="names must be distinct"):
            ask(["a0001", "a0001"])
    with pytest.raises(ValueError, match="dtype must be that of the bank"):
        unchanged.load(["a0001"], bank=AdapterBank(), dtype=torch.float64)


@pytest.mark.parametrize("tags", [(), ("even",)], ids=["alone", "with tags"])
def test_a_filter_cannot_reach_beyond_itself(unchanged, tags):
    for bad in (
        "1=1) OR (1=1",
        "rank < 0) OR (rank > 0",
        "1=1)",
        "(1=1",
        "1=1 -- ",
        "1=1 /* ) */",
        "1=1) OR name IN ('(x'",
        "$$'$$ = 'x') OR ('x' = '",
        "name = 'a\\') OR ('' = '",
        "1=1; SELECT 1",
        "1=1 ORDER BY name",
        "name = 'a",
    ):
        for ask in (unchanged.entries, lambda where, **o: unchanged.search(Z, filter=where, **o)):
            with pytest.raises(ValueError, match="filter must be"):
                ask(bad, tags=tags)
    fine = "name = '(it''s; $1 -- x' OR (name IN ('a0001', 'a0002') AND \"rank\" < 9)"
    found = [e.name for e in unchanged.entries(fine, tags=tags)]
    assert found == (["a0002"] if tags else ["a0001", "a0002"])


def test_numbers_beyond_measure(unchanged):
    assert len(unchanged.search(Z, k=1 << 40)[0].names) == 12
    assert len(unchanged.retrieve(Z, k=1 << 63).names(0)) == 12
    for counts in (1 << 63, 10.5, "10", [10.5]):
        with pytest.raises(ValueError, match="counts of 'new' must"):
            unchanged.add(adapter("new", 1), Z, counts=counts)
    assert 3 not in unchanged and None not in unchanged
    assert unchanged.add_many([], rpe.Prototypes(("x",), Z[None]), progress=False) == []


def test_a_bad_adapter_among_many_keeps_what_was_committed(empty, make):
    adapters, prototypes = make(10)
    adapters[7].modules["up"].lora_b[0, 0] = torch.inf
    seen = []
    with pytest.raises(ValueError, match="lora_b of adapter 'a0007' at 'up' must be finite"):
        empty.add_many(adapters, prototypes, batch=3, progress=lambda *at: seen.append(at))
    assert seen == [(3, 10), (6, 10)] and empty.names == [f"a{i:04}" for i in range(6)]
    assert empty.verify(progress=False) == []


def test_places(library, tmp_path, base):
    with pytest.raises(FileExistsError, match="holds a library already"):
        AdapterLibrary.create(library.uri, base=base, size=6)
    with pytest.raises(FileNotFoundError, match="holds no library"):
        AdapterLibrary.open(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists(), "asking makes no folder"
    other = AdapterLibrary.create(tmp_path / "other", base=base, size=6)
    with pytest.raises(ValueError, match="got another library's"):
        AdapterLibrary.open(other.uri, store=tmp_path / "library" / "weights")
    with pytest.raises(FileExistsError, match="of another library"):
        weights = tmp_path / "other" / "weights"
        AdapterLibrary.create(tmp_path / "third", base=base, size=6, store=weights)
    other.add(adapter("a", 1), Z, counts=10)
    with pytest.raises(FileNotFoundError, match=r"holds no store\.json"):
        AdapterLibrary.open(library.uri, store=tmp_path / "elsewhere")
    for options, said in (
        ({"size": 0}, "size must be"),
        ({"size": 6, "minimum": -1}, "minimum must be"),
        ({"size": 6, "pooling": "median"}, "pooling must be one of"),
        ({"size": 6, "pooling": ["mean"]}, "pooling must be one of"),
        ({"size": 6, "layer": 1.5}, "layer must be a module's name, a number or None"),
        ({"size": 6, "layer": True}, "layer must be a module's name, a number or None"),
        ({"size": 6, "layer": "upp"}, r"layer must be a module of the base's \(close: 'up'"),
        ({"size": 6, "layer": "xyz"}, r"layer must be a module of the base's \(known: '"),
        ({"size": 6, "normalize": "yes"}, "normalize must be True or False"),
        ({"size": 6, "max_length": 2}, "max_length must be an integer of at least 3"),
        ({"size": 6, "max_length": "9"}, "max_length must be an integer of at least 3"),
        ({"size": 6, "base_name": 7}, "base_name must be a name or None"),
    ):
        with pytest.raises(ValueError, match=said):
            AdapterLibrary.create(tmp_path / "new", base=base, **options)
    assert not (tmp_path / "new").exists()
    AdapterLibrary.create(tmp_path / "new", base=base, size=12, layer="up", max_length=3)


def test_create_after_a_killed_create(tmp_path, base):
    """The catalogue is made last: without one, what lies there is not a library."""
    (tmp_path / "library" / "weights" / "0").mkdir(parents=True)
    (tmp_path / "library" / "weights" / "store.json").write_text("{")
    library = AdapterLibrary.create(tmp_path / "library", base=base, size=6)
    library.add(adapter("a", 1), Z, counts=10)
    assert AdapterLibrary.open(library.uri).verify(progress=False) == []


def test_no_engine(tmp_path):
    """The module imports without LanceDB, and says what to install when it is needed."""
    code = "import sys; sys.modules['lancedb'] = None\n"
    code += "from lora_fused.library import AdapterLibrary\n"
    code += f"try: AdapterLibrary.create({str(tmp_path / 'l')!r}, base='0' * 64, size=4)\n"
    code += "except RuntimeError as error: print(error)\n"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "pip install lancedb pyarrow" in done.stdout
    assert not (tmp_path / "l").exists()
