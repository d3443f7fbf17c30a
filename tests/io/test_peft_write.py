"""What is written is what was read, to the last bit, whole or not at all."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from lora_fused import Adapter, AdapterBank, LoraFactors
from lora_fused.io import read_adapter, write_adapter

WEIGHTS = "adapter_model.safetensors"


def config_of(path):
    return json.loads((path / "adapter_config.json").read_text())


def data_of(path) -> bytes:
    # Behind the header: safetensors writes the header's metadata in no fixed order.
    data = (path / WEIGHTS).read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def made(ranks=(3,), scales=(2.0,), dtype=torch.float32, **more) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for i, (rank, scale) in enumerate(zip(ranks, scales, strict=True)):
        a, b = (torch.randn(rank, n, generator=generator).to(dtype) for n in (6, 5))
        modules[f"layers.{i}.q"] = LoraFactors(a, b, scale)
    return Adapter("made", modules, **more)


def assert_equal(left: Adapter, right: Adapter):
    assert left.modules.keys() == right.modules.keys()
    for name, part in left.modules.items():
        other = right.modules[name]
        for one, two in ((part.lora_a, other.lora_a), (part.lora_b, other.lora_b)):
            assert one.dtype == two.dtype and torch.equal(one, two)
        assert torch.tensor(part.scale) == torch.tensor(other.scale)
        assert part.embedding == other.embedding
    assert left.saved.keys() == right.saved.keys()
    assert all(torch.equal(left.saved[key], right.saved[key]) for key in left.saved)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_read_and_written_is_the_same(dtype, plain_adapter, folder, tmp_path):
    config, tensors = plain_adapter
    config |= {
        "modules_to_save": ["head"],
        "lora_dropout": 0.1,
        "peft_version": "0.9",
        "task_type": "X",
    }
    config |= {"rank_pattern": {}, "alpha_pattern": {"0.q": 3.25}, "revision": None}
    tensors = {key: tensor.to(dtype) for key, tensor in tensors.items()}
    tensors["base_model.model.head.weight"] = torch.randn(3, 2)
    tensors["base_model.model.head.count"] = torch.tensor([3], dtype=torch.int64)
    path = folder(config, tensors)
    bank = AdapterBank()
    bank.add(read_adapter(path))
    for source in (read_adapter(path), bank.adapter("adapter")):
        write_adapter(source, tmp_path / "out", overwrite_ok=True)
        assert config_of(tmp_path / "out") == config_of(path)
        written = load_file(tmp_path / "out" / WEIGHTS)
        assert written.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert written[key].dtype == tensor.dtype and torch.equal(written[key], tensor)


def test_mixed_dtypes_come_back_from_a_bank(plain_adapter, folder, tmp_path):
    config, tensors = plain_adapter
    halves = {key: t.bfloat16() if "q.lora_A" in key else t for key, t in tensors.items()}
    bank = AdapterBank()
    bank.add(read_adapter(folder(config, halves)))
    assert bank.dtype == torch.float32
    write_adapter(bank.adapter("adapter"), tmp_path / "out")
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert {key: t.dtype for key, t in written.items()} == {k: t.dtype for k, t in halves.items()}


def test_trained_values_keep_their_digits(plain_adapter, folder, tmp_path):
    # A bfloat16 adapter trained in float32 must not be rounded back.
    config, tensors = plain_adapter
    bank = AdapterBank(dtype=torch.float32)
    bank.add(read_adapter(folder(config, {k: t.bfloat16() for k, t in tensors.items()})))
    bank.stacks["layers.0.q"].lora_a += 1e-6
    write_adapter(bank.adapter("adapter"), tmp_path / "out")
    written = load_file(tmp_path / "out" / WEIGHTS)
    key = "base_model.model.layers.0.q.lora_A.weight"
    assert torch.equal(written[key], bank.stacks["layers.0.q"].lora_a)
    assert written[key.replace("lora_A", "lora_B")].dtype == torch.bfloat16


scales = st.floats(1e-4, 1e4) | st.sampled_from([-1.0, 2.0, 0.5])


@given(
    parts=st.lists(st.tuples(st.integers(1, 5), scales), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_made_adapters_come_back(parts, dtype, tmp_path_factory):
    ranks, scales = zip(*parts, strict=True)
    adapter = made(ranks, scales, dtype, saved={"head.weight": torch.ones(2)})
    path = tmp_path_factory.mktemp("made") / "adapter"
    write_adapter(adapter, path)
    assert_equal(read_adapter(path), adapter)
    again = path.parent / "again"
    write_adapter(read_adapter(path), again)
    assert data_of(again) == data_of(path)
    assert config_of(again) == config_of(path)


def test_config_of_a_made_adapter(tmp_path):
    write_adapter(made((3, 3, 2), (2.0, 2.0, 0.5)), tmp_path / "a")
    config = config_of(tmp_path / "a")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6)
    assert config["rank_pattern"] == {r"^layers\.2\.q": 2}
    assert config["alpha_pattern"] == {r"^layers\.2\.q": 1}
    assert config["target_modules"] == ["layers.0.q", "layers.1.q", "layers.2.q"]


def test_peft_reads_a_made_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    adapter = made((3, 2), (2.0, 0.3))
    write_adapter(adapter, tmp_path / "a")
    base = torch.nn.Module()
    base.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(2))
    for layer in base.layers:
        layer.q = torch.nn.Linear(6, 5)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "a")
    for name, part in adapter.modules.items():
        layer = model.base_model.model.get_submodule(name)
        assert layer.scaling["default"] == pytest.approx(part.scale, rel=1e-12)
        assert torch.equal(layer.lora_A["default"].weight, part.lora_a)
        assert torch.equal(layer.lora_B["default"].weight, part.lora_b.mT)


def test_embedding_and_its_saved_base(tmp_path):
    part = LoraFactors(torch.randn(2, 7), torch.randn(2, 5), 1.5, embedding=True)
    adapter = Adapter("e", {"embed": part}, {"embed.weight": torch.randn(7, 5)})
    write_adapter(adapter, tmp_path / "e")
    keys = {"lora_embedding_A", "lora_embedding_B", "base_layer.weight"}
    written = load_file(tmp_path / "e" / WEIGHTS)
    assert written.keys() == {f"base_model.model.embed.{key}" for key in keys}
    assert_equal(read_adapter(tmp_path / "e"), adapter)


def test_changed_adapter_changes_only_its_part_of_the_config(plain_adapter, folder, tmp_path):
    config, tensors = plain_adapter
    config |= {"use_rslora": True, "alpha_pattern": {"v": 3}, "peft_version": "0.9"}
    adapter = read_adapter(folder(config, tensors))
    part = adapter.modules["layers.1.v"]
    adapter.modules["layers.1.v"] = LoraFactors(part.lora_a[:2], part.lora_b[:2], part.scale * 0.7)
    del adapter.modules["layers.0.q"]
    write_adapter(adapter, tmp_path / "out")
    written = config_of(tmp_path / "out")
    assert_equal(read_adapter(tmp_path / "out"), adapter)
    assert written["rank_pattern"] == {r"^layers\.1\.v": 2}
    assert list(written["alpha_pattern"])[-1] == "v"
    assert written["target_modules"] == ["layers.0.v", "layers.1.q", "layers.1.v"]
    assert written["peft_version"] == "0.9" and written["use_rslora"]
    assert config_of(folder(config, tensors, "untouched")) == adapter.metadata["config"]


def test_dropped_heads_are_not_promised(plain_adapter, folder, tmp_path):
    config, tensors = plain_adapter
    config["modules_to_save"] = ["head"]
    tensors["base_model.model.head.weight"] = torch.ones(2)
    adapter = dataclasses.replace(read_adapter(folder(config, tensors)), saved={})
    write_adapter(adapter, tmp_path / "out")
    assert config_of(tmp_path / "out")["modules_to_save"] is None
    assert not read_adapter(tmp_path / "out").saved


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf"), 1e300])
def test_scale_that_cannot_be_written(scale, tmp_path):
    with pytest.raises(ValueError, match=r"layers\.0\.q of adapter 'made'.*scale"):
        write_adapter(made((3,), (scale,)), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_rejects(tmp_path):
    with pytest.raises(ValueError, match="at least one module"):
        write_adapter(Adapter("empty", {}), tmp_path / "a")
    clash = made(saved={"layers.0.weight": torch.ones(2)})
    with pytest.raises(ValueError, match=r"layers\.0\.q of adapter 'made' must be outside"):
        write_adapter(clash, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_config_without_what_gives_the_scale_is_refused_by_its_key(tmp_path):
    factors = LoraFactors(torch.ones(2, 3), torch.ones(2, 4), 1.0)
    adapter = Adapter("a", {"q": factors}, metadata={"config": {"peft_type": "LORA", "r": 2}})
    with pytest.raises(ValueError, match="lora_alpha in the config of adapter 'a' must be a"):
        write_adapter(adapter, tmp_path / "a")
    assert not any(tmp_path.iterdir())


def test_overwriting(tmp_path):
    path = tmp_path / "a"
    path.mkdir()  # an empty folder is nobody's work
    write_adapter(made(), path)
    with pytest.raises(FileExistsError, match="overwrite_ok=True"):
        write_adapter(made(scales=(4.0,)), path)
    assert read_adapter(path).modules["layers.0.q"].scale == 2.0
    (path / "README.md").write_text("mine")
    (path / "adapter_model.bin").write_text("old weights that would contradict the new")
    write_adapter(made(scales=(8.0,)), path / "checkpoint-1")
    write_adapter(made(scales=(4.0,)), path, overwrite_ok=True)
    assert read_adapter(path).modules["layers.0.q"].scale == 4.0
    assert read_adapter(path / "checkpoint-1").modules["layers.0.q"].scale == 8.0
    left = {"README.md", "adapter_config.json", WEIGHTS, "checkpoint-1"}
    assert {p.name for p in path.iterdir()} == left
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_never_overwrites_what_is_no_adapter(kind, tmp_path):
    path = tmp_path / "precious"
    if kind == "file":
        path.write_text("x")
    else:
        path.mkdir()
        (path / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="not an adapter folder"):
        write_adapter(made(), path, overwrite_ok=True)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_adapter(made(), path)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("lora_fused.io.peft.save_tensors", full)
    with pytest.raises(OSError, match="no space left"):
        write_adapter(made(scales=(4.0,)), path, overwrite_ok=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert read_adapter(path).modules["layers.0.q"].scale == 2.0


def test_reading_over_the_file_that_is_mapped(tmp_path):
    path = tmp_path / "a"
    write_adapter(made(), path)
    adapter = read_adapter(path)
    expected = adapter.modules["layers.0.q"].lora_a.clone()
    write_adapter(made((7,), (1.0,)), path, overwrite_ok=True)
    assert torch.equal(adapter.modules["layers.0.q"].lora_a, expected)


@given(position=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_any_flipped_bit_is_noticed(position, bit, tmp_path_factory):
    path = tmp_path_factory.mktemp("rot") / "a"
    write_adapter(made((3, 1), (2.0, 1.0), torch.bfloat16, saved={"head.x": torch.ones(3)}), path)
    file = path / WEIGHTS
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + position % (len(data) - start)] ^= 1 << bit
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{WEIGHTS} must match its checksum"):
        read_adapter(path)
