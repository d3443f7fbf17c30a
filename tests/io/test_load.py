"""Many adapters: found, named, and loaded all or none."""

import gc
import shutil

import pytest
import torch
from safetensors.torch import save_file

from lora_fused import AdapterBank
from lora_fused.io import find_adapters, load_adapters, read_adapter

Q0 = "base_model.model.layers.0.q"


@pytest.fixture
def three(plain_adapter, folder):
    """Folders a, b, c of different values under one parent."""
    config, tensors = plain_adapter
    return [
        folder(config, {key: tensor * (i + 1) for key, tensor in tensors.items()}, name)
        for i, name in enumerate("abc")
    ]


def assert_untouched(bank, names):
    assert bank.names == names
    assert bank.count == len(names)
    assert all(stack.lora_a.shape[0] == 4 * len(names) for stack in bank.stacks.values())


def test_one_bank(three):
    bank = load_adapters(three)
    assert bank.names == ["a", "b", "c"]
    for path in three:
        one, other = read_adapter(path), bank.adapter(path.name)
        for module, part in one.modules.items():
            assert torch.equal(part.lora_a, other.modules[module].lora_a)
            assert torch.equal(part.lora_b, other.modules[module].lora_b)
        assert bank.metadata[path.name] == one.metadata


def test_ways_to_name_paths(three, tmp_path):
    (tmp_path / "notes.json").write_text("{}")  # a glob passes over what is no adapter
    (tmp_path / "list.txt").write_text("# mine\nb\n\n  c/  \n" + str(three[0]) + "\n")
    assert load_adapters(str(tmp_path / "*")).names == ["a", "b", "c"]
    assert load_adapters(str(tmp_path / "[bc]")).names == ["b", "c"]
    assert load_adapters(f"@{tmp_path / 'list.txt'}").names == ["b", "c", "a"]
    assert load_adapters(three[1]).names == ["b"]
    assert load_adapters(three[1] / "adapter_model.safetensors").names == ["b"]
    assert load_adapters([three[2], str(tmp_path / "[ab]")]).names == ["c", "a", "b"]
    assert load_adapters(three[:2], names=["x", "y"]).names == ["x", "y"]


def test_missing_paths(three, tmp_path):
    for paths in (tmp_path / "d", str(tmp_path / "x*"), f"@{tmp_path / 'no.txt'}"):
        with pytest.raises(FileNotFoundError, match=r"no such|no adapter matches"):
            load_adapters(paths)
    for nothing in ([], {}):
        with pytest.raises(ValueError, match="at least one adapter"):
            load_adapters(nothing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no adapter in .*empty"):
        load_adapters(tmp_path / "empty")


def test_a_folder_of_adapters(three, tmp_path):
    assert load_adapters(tmp_path).names == ["a", "b", "c"]
    assert load_adapters([tmp_path / "c", str(tmp_path)], names=list("wxyz")).count == 4


def test_a_dict_gives_the_names(three, tmp_path):
    assert load_adapters({"x": three[2], "y": str(three[0])}).names == ["x", "y"]
    with pytest.raises(ValueError, match="names must be None with a dict"):
        load_adapters({"x": three[0]}, names=["y"])
    with pytest.raises(ValueError, match=r"paths\['x'\] must be one adapter, got 3 in"):
        load_adapters({"x": tmp_path})
    with pytest.raises(ValueError, match="name must be a non-empty string"):
        load_adapters({"": three[0]})


@pytest.mark.parametrize("paths", [3, None, [3], [None], {"x": 3}, [["a"]]])
def test_what_is_no_path(paths):
    with pytest.raises(ValueError, match=r"load_adapters: paths must be a path, a list"):
        load_adapters(paths)


def test_clashing_names(three, tmp_path):
    shutil.copytree(three[0], tmp_path / "deep" / "a")
    with pytest.raises(ValueError, match=r"names must be distinct.*give names=.*'a' \(.*deep/a\)"):
        load_adapters([*three, tmp_path / "deep" / "a"])
    bank = load_adapters(three[:1])
    with pytest.raises(ValueError, match=r"not in the bank.*'a'"):
        load_adapters(three, bank=bank)
    assert_untouched(bank, ["a"])
    with pytest.raises(ValueError, match=r"names must be a list of 3.*\['x'\]"):
        load_adapters(three, names=["x"])


def test_a_failed_load_leaves_the_bank(three, plain_adapter, folder):
    config, tensors = plain_adapter
    bank = load_adapters(three[:1])
    broken = dict(tensors)
    broken[f"{Q0}.lora_B.weight"] = broken[f"{Q0}.lora_B.weight"] * torch.nan
    other_size = {key: t[:, :5] if "lora_A" in key else t for key, t in tensors.items()}
    faults = {
        "nan": (config, broken, rf"{Q0}.lora_B.weight.*nan/adapter_model.*finite"),
        "size": (config, other_size, r"layers\.0\.q.*size must be \(6, 5, False\) as in the bank"),
        "rank": ({**config, "r": 8}, tensors, "rank 8"),
    }
    for name, (its_config, its_tensors, message) in faults.items():
        path = folder(its_config, its_tensors, name)
        with pytest.raises(ValueError, match=message):
            load_adapters([three[1], path], bank=bank)
        assert_untouched(bank, ["a"])
    load_adapters(three[1:], bank=bank)
    assert_untouched(bank, ["a", "b", "c"])


def test_sizes_that_disagree_name_both_files(three, plain_adapter, folder):
    config, tensors = plain_adapter
    other = folder(config, {k: t[:3] if "lora_B" in k else t for k, t in tensors.items()}, "other")
    with pytest.raises(
        ValueError, match=r"layers\.0\.q.*/other must be \(6, 5, False\) as in .*/a"
    ):
        load_adapters([*three, other])


def test_values_beyond_the_dtype(three, plain_adapter, folder):
    config, tensors = plain_adapter
    tensors[f"{Q0}.lora_A.weight"][0, 0] = 1e5
    path = folder(config, tensors, "large")
    with pytest.raises(ValueError, match=r"lora_A of 'layers.0.q' in .*large must fit.*float16"):
        load_adapters([*three, path], dtype=torch.float16)
    assert load_adapters([*three, path], dtype=torch.bfloat16).dtype == torch.bfloat16


def test_dtype(three):
    assert load_adapters(three).dtype == torch.float32
    assert load_adapters(three, dtype=torch.bfloat16).dtype == torch.bfloat16
    bank = AdapterBank(dtype=torch.float16)
    load_adapters(three[:1], bank=bank)
    load_adapters(three[1:2], bank=bank, dtype=torch.float16)
    with pytest.raises(ValueError, match="dtype must be that of the bank"):
        load_adapters(three[2:], bank=bank, dtype=torch.float32)
    assert_untouched(bank, ["a", "b"])


def test_dtype_by_name(three):
    assert load_adapters(three, dtype="bfloat16").dtype == torch.bfloat16
    assert load_adapters(three, dtype="torch.float16").dtype == torch.float16
    for wrong in ("bf16", "int8", torch.int8, 16):
        with pytest.raises(ValueError, match=r"dtype must be one of float32, .*, got .*(8|16)"):
            load_adapters(three, dtype=wrong)


def test_bases_must_agree(plain_adapter, folder):
    config, tensors = plain_adapter
    bases = {
        "a": "somewhere/model",
        "b": "D:\\other\\Model\\",
        "c": "model/",
        "d": None,
        "e": "",
        "g": "/home/x/hub/models--some--model/snapshots/0123abcd/",
        "f": "somewhere/model-2",
    }
    paths = {
        name: folder({**config, "base_model_name_or_path": base}, tensors, name)
        for name, base in bases.items()
    }
    other = paths.pop("f")
    bank = load_adapters(paths)
    assert bank.names == list("abcdeg")
    message = r"of .*/f must be 'somewhere/model' as in .*/a \(any_base.*got 'somewhere/model-2'"
    with pytest.raises(ValueError, match=message):
        load_adapters([*paths.values(), other])
    with pytest.raises(ValueError, match=r"of .*/f must be 'somewhere/model' as in adapter 'a'"):
        load_adapters(other, bank=bank)
    assert_untouched(bank, list("abcdeg"))
    assert load_adapters(other, bank=bank, any_base=True).names == list("abcdegf")
    assert load_adapters([paths["d"], other]).names == ["d", "f"]


def test_progress(three):
    seen = []
    load_adapters(three, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_interrupted_load(three):
    bank = AdapterBank()

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_adapters(three, bank=bank, on_progress=stop)
    assert gc.isenabled() and len(bank) == 0


def test_find_adapters(three, tmp_path):
    nested = tmp_path / "a" / "checkpoint-1"
    shutil.copytree(three[1], nested)
    single = tmp_path / "sd" / "style.safetensors"
    single.parent.mkdir()
    shutil.copy(three[0] / "adapter_model.safetensors", single)
    (tmp_path / "sd" / "broken.safetensors").write_text("version https://git-lfs")
    (tmp_path / ".cache").mkdir()
    shutil.copytree(three[1], tmp_path / ".cache" / "x")
    (tmp_path / "model").mkdir()
    torch_file = tmp_path / "model" / "pytorch_model.bin"
    torch.save({}, torch_file)
    save_file({"layer.weight": torch.ones(2)}, tmp_path / "model" / "model.safetensors")
    assert find_adapters(tmp_path) == sorted(
        [*three, nested, single, tmp_path / "sd" / "broken.safetensors"]
    )
    assert find_adapters(three[1]) == [three[1]]
    assert find_adapters(single) == [single]
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        find_adapters(tmp_path / "nowhere")


def test_links_are_followed_once(three, tmp_path):
    shelf = tmp_path / "shelf"
    (shelf / "own").mkdir(parents=True)
    (shelf / "own" / "back").symlink_to(tmp_path)  # up the tree: would be endless
    (shelf / "own" / "self").symlink_to(shelf)
    (shelf / "linked").symlink_to(three[0])
    (shelf / "again").symlink_to(three[0])
    (shelf / "gone").symlink_to(tmp_path / "nowhere")
    (shelf / "gone.safetensors").symlink_to(tmp_path / "nowhere")
    found = find_adapters(shelf)
    assert sorted(p.resolve() for p in found) == [p.resolve() for p in three]
    assert find_adapters(shelf / "linked") == [shelf / "linked"]
    # Beside its link a folder goes by its own name.
    (tmp_path / "A").symlink_to(three[1])
    assert find_adapters(tmp_path) == three
