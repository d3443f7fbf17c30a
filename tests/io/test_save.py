"""A bank is saved as one folder per adapter, after every check; wrong arguments are named."""

import os

import pytest
import torch

from lora_fused.io import load_adapters, read_adapter, save_adapters, save_subspace, write_adapter
from lora_fused.methods import fit_subspace


@pytest.fixture
def bank(plain_adapter, folder):
    config, tensors = plain_adapter
    scaled = [{key: t * (i + 1) for key, t in tensors.items()} for i in range(3)]
    return load_adapters([folder(config, t, name) for t, name in zip(scaled, "abc", strict=True)])


def assert_equal(bank, other):
    assert bank.names == other.names
    for module, stack in bank.stacks.items():
        assert torch.equal(stack.lora_a, other.stacks[module].lora_a)
        assert torch.equal(stack.lora_b, other.stacks[module].lora_b)
        assert torch.equal(stack.scale, other.stacks[module].scale)


def test_a_bank_comes_back(bank, tmp_path):
    out = tmp_path / "deep" / "out"
    assert save_adapters(bank, out) == [out / "a", out / "b", out / "c"]
    assert_equal(load_adapters(out), bank)
    assert save_adapters(bank, str(tmp_path / "some"), ["c", "a"]) == [
        tmp_path / "some" / "c",
        tmp_path / "some" / "a",
    ]


def test_values_in_training_are_saved(bank, tmp_path):
    (first, *_) = bank.trainable(["b"])
    with torch.no_grad():
        first += 1
    save_adapters(bank, tmp_path / "out", ["b"])
    assert read_adapter(tmp_path / "out" / "b").modules["layers.0.q"].lora_a.equal(first)


@pytest.mark.parametrize("name", ["x/y", "x\\y", "..", ".x", "/x", "x\0y"])
def test_a_name_that_is_no_folder(bank, tmp_path, name):
    bank.rename("c", name)
    with pytest.raises(ValueError, match="save_adapters: names must serve as a folder's name"):
        save_adapters(bank, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_where_one_cannot_be(bank, tmp_path):
    out = tmp_path / "out"
    save_adapters(bank, out, ["b"])
    with pytest.raises(FileExistsError, match=r"save_adapters: .*out/b exists \(overwrite_ok"):
        save_adapters(bank, out)
    with pytest.raises(ValueError, match=r"name must be a loaded adapter .*'d'"):
        save_adapters(bank, out, ["a", "d"])
    assert [p.name for p in out.iterdir()] == ["b"]
    save_adapters(bank, out, overwrite_ok=True)
    assert_equal(load_adapters(out), bank)


def test_wrong_arguments(bank, tmp_path):
    adapter = bank.adapter("a")
    wrong = {
        r"save_adapters: bank must be an AdapterBank, got Adapter": (adapter, tmp_path),
        r"save_adapters: directory must be a path, got int": (bank, 3),
        r"save_adapters: names must be a list of names, got 'a'": (bank, tmp_path, "a"),
        r"save_adapters: names must be distinct": (bank, tmp_path, ["a", "a"]),
    }
    for message, arguments in wrong.items():
        with pytest.raises(ValueError, match=message):
            save_adapters(*arguments)
    for message, arguments in {
        r"write_adapter: adapter must be an Adapter .*, got AdapterBank": (bank, tmp_path / "x"),
        r"write_adapter: adapter must be an Adapter .*, got PosixPath": (tmp_path / "x", adapter),
        r"write_adapter: path must be a path, got NoneType": (adapter, None),
    }.items():
        with pytest.raises(ValueError, match=message):
            write_adapter(*arguments)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_others_may_read_as_the_umask_says(bank, tmp_path, umask, mode):
    """safetensors gives its files to their writer alone; a server may be another user."""
    before = os.umask(umask)
    try:
        write_adapter(bank.adapter(bank.names[0]), tmp_path / "written" / "one")
        save_subspace(fit_subspace(bank, rank=2, progress=False), tmp_path / "written" / "basis")
    finally:
        os.umask(before)
    found = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "written").rglob("*.*")}
    assert set(found.values()) == {mode} and len(found) == 4
