"""save_subspace and load_subspace: bit for bit, whole or not at all, nothing damaged gets in."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import SIZES, Net, adapter, tokens

from lora_fused import Adapter, AdapterBank, LoraFactors, attach
from lora_fused.io import load_subspace, save_adapters, save_subspace, sealed
from lora_fused.io.load import load_adapters
from lora_fused.io.subspace import check_same_base
from lora_fused.methods.eigenlorax import METHODS, fit_subspace
from lora_fused.methods.subspace import Base, Subspace

EVERY = pytest.mark.parametrize("method", METHODS)
ALL = ("embed", "up", "down")


def make(method="eigenlorax", head=True, **options) -> Subspace:
    bank = AdapterBank()
    bank.add_many(
        [adapter("d", 4, 1, ("up",)), adapter("a", 1, 2, ALL), adapter("b", 2, 3, ("down", "up"))]
    )
    config = {"base_model_name_or_path": "hub/tiny", "r": 2, "lora_alpha": 3}
    bank.metadata["a"] = {"path": "some/a", "config": config, "dtypes": {"x": "bfloat16"}}
    if head:
        bank.saved["b"] = {"head.weight": torch.randn(2, 6), "head.steps": torch.tensor([3, 4])}
    return fit_subspace(bank, rank=3, method=method, progress=False, **options)


def same(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return left.dtype == right.dtype and torch.equal(left, right)


def assert_equal(left: Subspace, right: Subspace) -> None:
    assert left.options == right.options and left.modules == right.modules
    for module, basis in left.bases.items():
        other = right.bases[module]
        assert basis.embedding == other.embedding
        for one, two in ((basis.a, other.a), (basis.b, other.b)):
            assert all(
                same(getattr(one, n), getattr(two, n)) for n in ("basis", "spectrum", "mean")
            )
            for name in ("total", "count", "keeps_mean", "augmented"):
                assert getattr(one, name) == getattr(two, name)
    one, two = left.cores, right.cores
    assert (one.names, one.modules, one.count) == (two.names, two.modules, two.count)
    assert [one.id(n) for n in one] == [two.id(n) for n in two] and one.metadata == two.metadata
    for module, stack in one.stacks.items():
        other = two.stacks[module]
        assert stack.ranks == other.ranks and not other.trained
        parts = [(*each.factors(), each.scale) for each in (stack, other)]
        for x, y in zip(*parts, strict=True):
            assert same(x.detach(), y) and not y.requires_grad
    assert one.saved.keys() == two.saved.keys()
    for name, tensors in one.saved.items():
        assert list(tensors) == list(two.saved[name])
        assert all(same(t, two.saved[name][path]) for path, t in tensors.items())


@EVERY
def test_a_round_trip_is_bitwise(method, tmp_path):
    subspace = make(method, augment=1) if method == "eigenlorax" else make(method)
    folder = save_subspace(subspace, tmp_path / "deep" / "sub")
    again = load_subspace(folder)
    assert_equal(subspace, again)
    assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".safetensors"]
    assert_equal(again, load_subspace(save_subspace(again, tmp_path / "twice")))
    names = [sorted(p.name for p in f.iterdir()) for f in (folder, tmp_path / "twice")]
    assert names[0] == names[1], "the same subspace is the same file"


def test_what_has_changed_since_the_fit_is_kept(tmp_path):
    subspace = make()
    subspace.add(adapter("late", 8, 2, ("up",)))
    subspace.cores.remove("a")  # "embed" has no adapter any more; ids keep their gap
    subspace.to(dtype=torch.bfloat16)
    subspace.bases["up"].float()  # dtypes that differ
    subspace.new_task("mine", rank=2, modules=["up"])[0].data.fill_(0.25)
    again = load_subspace(save_subspace(subspace, tmp_path / "sub"))
    assert_equal(subspace, again)
    assert again.cores.id("mine") == 4 and again.cores.count == 5
    for one in (subspace, again):
        one.cores.freeze()
        one.add(adapter("later", 9, 1, ("up", "down")))
    assert_equal(subspace, again)
    empty = Subspace(subspace.bases, AdapterBank(), subspace.options)
    assert_equal(empty, load_subspace(save_subspace(empty, tmp_path / "empty")))


def test_a_loaded_subspace_serves_projects_and_writes_adapters(tmp_path):
    subspace, outs = make(head=False), []
    for one in (subspace, load_subspace(save_subspace(subspace, tmp_path / "sub"))):
        model = Net()
        with attach(model, one).mix(["a", {"b": 0.5, "d": 1.0}, None]), torch.no_grad():
            outs.append(model(tokens()))
        bank = AdapterBank()
        bank.add_many([one.reconstruct(name) for name in ("b", "d")])
        one.new_task("mine")
        config = one.reconstruct("mine").metadata["config"]
        assert config["base_model_name_or_path"] == "hub/tiny" and config["r"] == 8
        (folder, _) = save_adapters(bank, tmp_path / f"peft{len(outs)}")
        outs.append(load_adapters(folder).stacks["up"].lora_b)
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])


def test_the_header_tells_where_every_adapter_comes_from(tmp_path):
    header = json.loads((save_subspace(make(), tmp_path / "s") / "subspace.json").read_text())
    d, a, b = header["adapters"]
    assert (a["name"], a["path"], a["rank"], a["alpha"]) == ("a", "some/a", 2, 3)
    assert a["dtypes"] == ["bfloat16"] and a["base"] == "hub/tiny" and a["scales"] == [2.5]
    assert d["core_ranks"] == [1] and b["saved"] == ["head.weight", "head.steps"]
    assert header["base"] == {"names": ["hub/tiny"], "fingerprint": []}
    assert header["format_version"] == 1 and header["library_version"].count(".") == 2


def test_an_interrupted_save_leaves_the_old_one_whole(tmp_path, monkeypatch):
    old, new = make("hosvd"), make("hooi", head=False)
    folder = save_subspace(old, tmp_path / "sub")
    (folder / "notes.txt").write_text("mine")
    for calls in range(3):  # in the data file, before it is in place, before the header is
        with monkeypatch.context() as patch:
            if calls:
                left, replace = [calls], os.replace

                def failing(*args, left=left, replace=replace):
                    left[0] -= 1
                    if not left[0]:
                        raise OSError("no space left")
                    replace(*args)

                patch.setattr(os, "replace", failing)
            else:
                patch.setattr(
                    sealed, "write_safetensors", lambda *a, **k: (_ for _ in ()).throw(OSError)
                )
            with pytest.raises(OSError):
                save_subspace(new, folder, overwrite_ok=True)
        assert_equal(old, load_subspace(folder))
        assert [p.name for p in tmp_path.iterdir()] == ["sub"], "nothing half made is left"
    save_subspace(new, folder, overwrite_ok=True)
    assert_equal(new, load_subspace(folder))
    assert len(list(folder.glob("*.safetensors"))) == 1 and (folder / "notes.txt").exists()
    with monkeypatch.context() as patch:
        patch.setattr(sealed, "write_safetensors", lambda *a, **k: (_ for _ in ()).throw(OSError))
        with pytest.raises(OSError):
            save_subspace(new, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_what_is_there_is_replaced_only_when_asked(tmp_path):
    folder = save_subspace(make(), tmp_path / "sub")
    with pytest.raises(FileExistsError, match=r"sub exists \(overwrite_ok=True replaces it\)"):
        save_subspace(make(), folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is not the folder of a subspace"):
        save_subspace(make(), tmp_path / "other", overwrite_ok=True)


def rewrite(folder: Path, change) -> None:
    """Change header and tensors, and seal them again: only what they say can be wrong then."""
    header = json.loads((folder / "subspace.json").read_text())
    file = folder / header["file"]
    tensors = load_file(file)
    change(header, tensors)
    file.unlink()
    save_file(tensors, file)
    for name, part in sealed._bytes_of(file):
        entry = header["tensors"].setdefault(name, {})
        entry["sha256"] = hashlib.sha256(part).hexdigest()
        entry |= {"dtype": sealed.word(tensors[name].dtype), "shape": list(tensors[name].shape)}
    for name in header["tensors"].keys() - tensors.keys():
        del header["tensors"][name]
    header.pop("sha256")
    header["sha256"] = sealed._digest(header)
    (folder / "subspace.json").write_text(json.dumps(header))


def put(name: str, value) -> object:
    return lambda header, tensors: tensors.__setitem__(name, value(tensors.get(name)))


def entry(*path, value) -> object:
    def change(header, tensors):
        for key in path[:-1]:
            header = header[key]
        header[path[-1]] = value

    return change


FAULTS = {
    "nan": (put("bases/up/a/basis", lambda t: t.fill_(torch.nan)), "bases/up/a/basis.*hold finite"),
    "infinity": (put("cores/up/scale", lambda t: t / 0), "cores/up/scale.*hold finite values"),
    "missing": (lambda h, t: t.pop("cores/down/lora_b"), "cores/down/lora_b.*must be there"),
    "missing head": (lambda h, t: t.pop("saved/2/head.weight"), "saved/2/head.weight.*be there"),
    "missing mean": (lambda h, t: t.pop("bases/up/b/mean"), "bases/up/b/mean.*must be there"),
    "mean untold": (entry("modules", "up", "a", "mean", value=False), "bases/up/a/mean.*unknown"),
    "extra": (put("more", lambda t: torch.ones(1)), "tensor 'more' .*an unknown tensor"),
    "basis": (put("bases/up/b/basis", lambda t: t[:, 1:].clone()), r"bases/up/b/basis.*\[4, 12\]"),
    "cores": (put("cores/up/lora_a", lambda t: t[1:].clone()), r"cores/up/lora_a.*\[6, 4\]"),
    "ints": (put("cores/up/lora_a", lambda t: t.int()), "must be floating point.*got int32"),
    "ranks": (put("cores/up/ranks", lambda t: t[1:].clone()), r"cores/up/ranks.*int32 \[3\]"),
    "negative": (put("cores/up/ranks", lambda t: -t), "cores/up/ranks.*none negative"),
    "size": (entry("modules", "up", "a", "size", value=9), r"bases/up/a/basis.*\[4, 9\]"),
    "newer": (entry("format_version", value=2), r"format_version in .* be from 1 to 1 .*got 2, "),
    "other format": (entry("format", value="x"), "format in .* must be 'lora_fused.subspace'"),
    "options": (entry("options", "colour", value=1), "json must describe modules.*colour"),
    "module": (entry("cores", value=["up", "head"]), "must describe modules.*KeyError: 'head'"),
    "name twice": (entry("adapters", 1, "name", value="d"), "name must be new, got 'd'"),
    "outside": (entry("file", value="../x.safetensors"), "file in .* must be subspace-"),
    "no table": (lambda h, t: h.pop("modules"), "must describe modules.*KeyError: 'modules'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_file_is_refused_though_its_checksums_fit(fault, tmp_path):
    change, match = FAULTS[fault]
    folder = save_subspace(make(), tmp_path / "sub")
    rewrite(folder, lambda header, tensors: None)
    load_subspace(folder)  # rewriting alone does no harm
    rewrite(folder, change)
    with pytest.raises(ValueError, match=match) as caught:
        load_subspace(folder)
    assert str(caught.value).startswith(("load_subspace: ", "AdapterBank"))
    assert str(folder) in str(caught.value) or fault == "name twice"


def test_any_flipped_bit_is_found(tmp_path):
    folder = save_subspace(make(), tmp_path / "sub")
    header = json.loads((folder / "subspace.json").read_text())
    file = folder / header["file"]
    whole = file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    table = json.loads(whole[8:start])
    for name in header["tensors"]:
        first, last = table[name]["data_offsets"]
        damaged = bytearray(whole)
        damaged[start + (first + last) // 2] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"tensor '{name}' .* must match its checksum"):
            load_subspace(folder)
    for wrong in (whole[:-1], whole + b"\0", b"x", b""):
        file.write_bytes(wrong)
        with pytest.raises(ValueError, match="must be a whole safetensors file"):
            load_subspace(folder)
    file.write_bytes(whole)
    text = (folder / "subspace.json").read_text()
    for old, new in (('"alpha": 3', '"alpha": 4'), ('"up"', '"uq"'), ("{", "")):
        (folder / "subspace.json").write_text(text.replace(old, new, 1))
        with pytest.raises(ValueError, match=r"subspace.json must (match its checksum|be JSON)"):
            load_subspace(folder)
    (folder / "subspace.json").write_text(text)
    load_subspace(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no subspace-\w+.safetensors"):
        load_subspace(folder)
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="load_subspace: "):
            load_subspace(path)


def test_another_base_is_refused(tmp_path):
    model, subspace = Net(), make(head=False)
    plain = save_subspace(subspace, tmp_path / "plain")
    load_subspace(plain, base="cache/models--hub--tiny/snapshots/1", model=Net(1))
    with pytest.raises(ValueError, match=r"the base in .*json must be 'large', got 'hub/tiny'"):
        load_subspace(plain, base="large")
    folder = save_subspace(subspace, tmp_path / "marked", model=model)
    assert_equal(subspace, load_subspace(folder, model=model))
    load_subspace(folder, model=Net().bfloat16())  # the same, rounded
    grown = load_subspace(folder)
    grown.add(adapter("late", 8, 2, ("up",)))
    again = save_subspace(grown.truncated(2), tmp_path / "again")
    load_subspace(again, model=model)
    with pytest.raises(ValueError, match=r"tensor 'base/\w+' in .* agree with the model's"):
        load_subspace(again, model=Net(1))
    attach(model, load_subspace(folder))
    load_subspace(folder, model=model)
    changed = Net()
    changed.up.weight.data *= 1.0001
    for other in (Net(1), changed):
        with pytest.raises(ValueError, match=r"tensor 'base/\w+' in .* agree with the model's"):
            load_subspace(folder, model=other)
    wide = Net()
    wide.up = torch.nn.Linear(8, 13)
    for each in (plain, folder):
        with pytest.raises(ValueError, match=r"weight of 'up' must be \[O, I\] = \[12, 8\]"):
            load_subspace(each, model=wide)
    del wide.up
    with pytest.raises(ValueError, match="model must have a module 'up'"):
        save_subspace(subspace, tmp_path / "none", model=wide)
    assert not (tmp_path / "none").exists() and SIZES["up"] == (8, 12)


def test_adapters_of_another_base_are_told():
    subspace, bank = make(), AdapterBank()
    subspace.base = Base(("folder/of/the/model",))  # another name of the same
    bank.add_many([adapter("x", 1, 1, ("up",)), adapter("y", 2, 1, ("up",))])
    check_same_base(subspace, bank)  # they name none
    bank.metadata["x"] = {"config": {"base_model_name_or_path": "local/Tiny"}}
    check_same_base(subspace, bank)
    bank.metadata["y"] = {"config": {"base_model_name_or_path": "hub/large"}}
    with pytest.raises(ValueError, match=r"base of adapter 'y' must be 'hub/tiny' .*'hub/large'"):
        check_same_base(subspace, bank)


def test_a_folder_in_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "sub", tmp_path / "file" / "deep" / "sub"):
        with pytest.raises(NotADirectoryError, match=r"save_subspace: .* is not a folder"):
            save_subspace(make(), path)


def test_what_no_file_can_hold_is_refused(tmp_path):
    def refused(match, subspace):
        with pytest.raises(ValueError, match=f"save_subspace: {match}"):
            save_subspace(subspace, tmp_path / "sub")
        assert not list(tmp_path.iterdir())

    refused("subspace must be a Subspace .*got SubspaceClusters", make(clusters=2))
    subspace = make()
    subspace.bases["up"].a.basis[0, 0] = torch.nan
    refused("tensor 'bases/up/a/basis' must hold finite values", subspace)
    for metadata in ({"config": {"x": {1, 2}}}, {"x": (1, 2)}, {1: "x"}, {"x": float("nan")}):
        subspace = make()
        subspace.cores.metadata["d"] = metadata
        refused("metadata of adapter 'd' must hold what JSON can hold", subspace)
    subspace = make()
    part = LoraFactors(torch.ones(1, 3), torch.ones(1, 3), 1.0)
    subspace.cores.add(Adapter("x", {"head": part}))
    refused("cores of 'head' must have the sizes of a basis, None", subspace)
    with pytest.raises(ValueError, match="directory must be a path"):
        save_subspace(make(), None)
