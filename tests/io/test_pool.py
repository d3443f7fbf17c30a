"""Files of long runs: checkpoints and pools are whole at every moment."""

import dataclasses

import pytest
import torch

from lora_fused.io import Checkpoint, load_pool, save_pool
from lora_fused.methods.recycle import Pool


def pool(kept: bool = False) -> Pool:
    generator = torch.Generator().manual_seed(0)
    return Pool(
        torch.randn(4, 3, 2, 2, generator=generator),
        torch.tensor([0, 1, 0, 2]),
        torch.tensor([0, 0, 1, 1]),
        torch.tensor([[1.0, 0.0, -torch.inf], [1.0, 0.0, -torch.inf]] + [[0.0, 1.0, 2.0]] * 2),
        torch.rand(4, generator=generator),
        ("first", "zweiter ü"),
        (("cat", "dog"), ("a", "b", "c")),
        torch.tensor([[0, 2]] * 4) if kept else None,
    )


@pytest.mark.parametrize("kept", [False, True])
def test_a_pool_comes_back(tmp_path, kept):
    save_pool(pool(kept), tmp_path / "made" / "pool.safetensors")
    found = load_pool(tmp_path / "made" / "pool.safetensors")
    for field in dataclasses.fields(Pool):
        one, other = getattr(found, field.name), getattr(pool(kept), field.name)
        same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        assert same, field.name
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["pool.safetensors"]


def test_accuracy_is_of_each_teacher():
    assert pool().accuracy() == {"first": 0.5, "zweiter ü": 0.5}
    assert repr(pool(True)) == "Pool(4 images, 2 teachers, 5 classes, 2 tokens kept)"


def test_a_checkpoint_is_replaced_whole(tmp_path):
    checkpoint = Checkpoint(tmp_path / "run.safetensors")
    assert checkpoint.read() is None
    checkpoint.write({"x": torch.arange(3), "step": torch.tensor(2.0)}, {"step": "1"})
    tensors, _ = checkpoint.read()
    before = tensors["x"].clone()
    checkpoint.write({"x": torch.zeros(3)}, {"step": "2"})
    assert torch.equal(tensors["x"], before), "what was read is no view of the file"
    with pytest.raises(TypeError):
        checkpoint.write({"x": torch.ones(3)}, {"step": 3})
    tensors, facts = checkpoint.read()
    assert facts["step"] == "2" and torch.equal(tensors["x"], torch.zeros(3))
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    def stop(tensors, file, header):
        file.write_bytes(b"half of it")
        raise KeyboardInterrupt

    path = tmp_path / "pool.safetensors"
    save_pool(pool(), path)
    monkeypatch.setattr("lora_fused.io.checkpoint.save_tensors", stop)
    with pytest.raises(KeyboardInterrupt):
        save_pool(pool(True), path)
    assert load_pool(path).kept is None and list(tmp_path.iterdir()) == [path]


def test_a_name_does_not_make_another_file_of_it(tmp_path):
    """Adapters in .bin files are pickles; what is written here never is."""
    save_pool(pool(), tmp_path / "pool.bin")
    assert torch.equal(load_pool(tmp_path / "pool.bin").images, pool().images)
    Checkpoint(tmp_path / "run.bin").write({"x": torch.ones(2)}, {"step": "1"})
    assert Checkpoint(tmp_path / "run.bin").read()[1]["step"] == "1"


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "pool.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no such file: .*pool\.safetensors"):
        load_pool(path)
    save_pool(pool(), path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^load_pool: .*pool.* must match its checksum"):
        load_pool(path)
    path.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=r"^load_pool: .* must be a whole safetensors file"):
        load_pool(path)
    with pytest.raises(ValueError, match=r"^Checkpoint: .* must be a whole safetensors file"):
        Checkpoint(path).read()
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"^load_pool: .* must be the file itself, got a Git LFS"):
        load_pool(path)
    Checkpoint(path).write({"x": torch.zeros(2)}, {})
    with pytest.raises(ValueError, match="must hold a pool"):
        load_pool(path)
    save_pool(pool(), path)
    content = path.read_bytes()
    for old, new in (
        (b'class_names\\"', b'klass_names\\"'),
        (b'{\\"names', b'[\\"names'),
        (b"cat", b'c\\"'),
    ):
        assert old in content
        path.write_bytes(content.replace(old, new))
        with pytest.raises(
            ValueError, match=r"^load_pool: .*pool\.safe.* whose header and tensors"
        ):
            load_pool(path)
    with pytest.raises(ValueError, match="pool must be a Pool"):
        save_pool({}, path)
    with pytest.raises(ValueError, match="path must be a path"):
        Checkpoint(None)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": torch.zeros(4, 3, 2)}, r"images must be \[N, C, H, W\]"),
        ({"labels": torch.tensor([0, 1, 0])}, "labels must have 1 axes and a row for each of 4"),
        ({"labels": torch.tensor([0, 2, 0, 2])}, "labels and teachers must name classes"),
        ({"labels": torch.tensor([0, 0.5, 0, 2])}, "labels must be integers, got torch.float32"),
        ({"teachers": torch.tensor([0, 0, 1, 2])}, "labels and teachers must name classes"),
        ({"class_names": (("cat", "dog"),)}, "class_names must name the classes of 2 teachers"),
    ],
    ids=["images", "labels", "class", "half a class", "teacher", "names"],
)
def test_pools_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(pool(), **change)
