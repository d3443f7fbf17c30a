"""What is read equals what PEFT itself computes from the same files, for every config flag."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lora_fused import AdapterBank
from lora_fused.io import read_adapter, write_adapter
from lora_fused.testing import assert_within_budget


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 12), nn.Linear(12, 9, bias=False), nn.Linear(12, 7)


class Net(nn.Module):
    """Enough names for every selection rule: repeated blocks, an embedding, two heads."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(23, 12)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Block() for _ in range(3))
        self.pre_head, self.head = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x):
        return x


FLAGS = {
    "alpha": {"target_modules": ["q", "v"], "r": 4, "lora_alpha": 7},
    "rslora": {"target_modules": ["q", "v"], "r": 5, "lora_alpha": 16, "use_rslora": True},
    "rank_pattern": {
        "target_modules": ["q", "k", "v"],
        "rank_pattern": {"^model.layers.0.q": 3, "1.k": 2, ".*v": 1},
    },
    "alpha_pattern": {
        "target_modules": ["q", "k", "v"],
        "alpha_pattern": {"layers.[12].q": 3.5, "v": 1},
    },
    "patterns overlap": {
        "target_modules": ["q", "k"],
        "rank_pattern": {"layers.1.q": 6, "q": 2},
        "alpha_pattern": {"q": 5, "layers.1.q": 9},
        "use_rslora": True,
    },
    "regex": {"target_modules": r"model\.layers\.[02]\.(q|k)"},
    "full path": {"target_modules": ["model.layers.1.q", "k"]},
    "plain string": {"target_modules": "head"},
    "excluded": {"target_modules": ["q", "k"], "exclude_modules": ["layers.1.q"]},
    "excluded regex": {"target_modules": ["q", "k"], "exclude_modules": r".*\.2\..*"},
    "layers": {"target_modules": ["q"], "layers_to_transform": [0, 2]},
    "one layer": {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "saved modules": {"target_modules": ["q"], "modules_to_save": ["head"]},
    "embedding": {"target_modules": ["embed", "q"], "r": 3, "lora_alpha": 5},
    "names without match": {"target_modules": ["q", "query", "key"]},
    "gaussian": {"target_modules": ["q"], "init_lora_weights": "gaussian"},
    "orthogonal": {"target_modules": ["q"], "init_lora_weights": "orthogonal", "r": 4},
    "dropout": {"target_modules": ["q"], "lora_dropout": 0.3},
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def peft_model(base, seed=0, **flags):
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, peft.LoraConfig(**flags), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape))
    return model.eval()


def lora_layers(model):
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


def truth_of(layer):
    """float64 B A scale, [O, I], from PEFT's own parameters."""
    if layer.lora_embedding_A:
        a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return b.detach().double() @ a.detach().double() * layer.scaling["default"]


def assert_same_updates(adapter, model):
    layers = lora_layers(model)
    assert adapter.modules.keys() == layers.keys()
    for name, layer in layers.items():
        part = adapter.modules[name]
        actual = (part.lora_b.mT @ part.lora_a) * part.scale
        reference = layer.get_delta_weight("default").detach()
        transposed = part.embedding or getattr(layer, "fan_in_fan_out", False)
        truth = truth_of(layer)
        assert_within_budget(actual, reference.mT if transposed else reference, truth, name)


@pytest.mark.parametrize("flags", FLAGS)
def test_matches_peft(flags, tmp_path):
    peft_model(Net(), **FLAGS[flags]).save_pretrained(tmp_path / "a")
    adapter = read_adapter(tmp_path / "a")
    write_adapter(adapter, tmp_path / "b")
    # Read by PEFT (which sorts patterns on saving, so the model in memory may say otherwise); what
    # we wrote means the same to it.
    for folder in "ab":
        read = peft.PeftModel.from_pretrained(Net(), tmp_path / folder)
        assert_same_updates(adapter, read.eval())


def test_a_wrong_scale_is_noticed(tmp_path):
    # Negative control: the comparison above can fail.
    model = peft_model(Net(), **FLAGS["alpha"])
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    adapter.modules["model.layers.1.q"].scale *= 1.0001
    with pytest.raises(AssertionError, match=r"model\.layers\.1\.q error"):
        assert_same_updates(adapter, model)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, tmp_path):
    model = peft_model(Net().to(dtype), target_modules=["q", "embed"], r=3)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    assert {part.lora_a.dtype for part in adapter.modules.values()} == {dtype}
    assert_same_updates(adapter, model)


@pytest.mark.parametrize("fan_in_fan_out", [True, False])
def test_conv1d(fan_in_fan_out, tmp_path):
    transformers = pytest.importorskip("transformers")
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 31, "n_positions": 8}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size))
    flags = {"target_modules": ["c_attn", "mlp.c_proj", "wte"], "fan_in_fan_out": fan_in_fan_out}
    model = peft_model(base, r=3, **flags)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    adapter = read_adapter(tmp_path)
    assert adapter.modules["transformer.h.0.attn.c_attn"].lora_b.shape == (3, 48)
    assert adapter.modules["transformer.wte"].embedding
    assert_same_updates(adapter, model)


def test_all_linear(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.BertConfig(intermediate_size=20, vocab_size=30, **sizes)
    model = peft_model(transformers.BertModel(config), target_modules="all-linear", r=2)
    model.save_pretrained(tmp_path)
    assert_same_updates(read_adapter(tmp_path), model)


def test_saved_modules_are_exact(tmp_path):
    model = peft_model(Net(), target_modules=["q"], modules_to_save=["head"])
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    # PEFT compares the ends of names: pre_head is saved, too.
    paths = {f"{head}.{leaf}" for head in ("head", "pre_head") for leaf in ("weight", "bias")}
    assert adapter.saved.keys() == paths
    bank = AdapterBank()
    bank.add(adapter)
    head = model.base_model.model.head.modules_to_save["default"]
    assert torch.equal(bank.saved[adapter.name]["head.weight"], head.weight)


def test_saved_tensors_do_not_hold_the_file(tmp_path):
    model = peft_model(Net(), target_modules=["q"], modules_to_save=["head"])
    model.save_pretrained(tmp_path)
    saved = read_adapter(tmp_path).saved["head.weight"]
    assert saved.untyped_storage().nbytes() == saved.nbytes


def test_resized_embedding_is_kept(tmp_path):
    # save_embedding_layers writes base weights that no config key declares.
    model = peft_model(Net(), target_modules=["q", "embed"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weight = model.base_model.model.embed.base_layer.weight.detach().clone()
    save_file({**load_file(file), "base_model.model.embed.base_layer.weight": weight}, file)
    adapter = read_adapter(tmp_path)
    assert torch.equal(adapter.saved["embed.weight"], weight)
    write_adapter(adapter, tmp_path / "b")
    written = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert torch.equal(written["base_model.model.embed.base_layer.weight"], weight)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lora_A.", "lora_A.mine."),
        ("base_model.model.", ""),
        ("base_model.model.", "base_model.model._orig_mod."),
    ],
)
def test_other_namings_are_converted(old, new, plain_adapter, folder, tmp_path):
    config, tensors = plain_adapter
    plain = read_adapter(folder(config, tensors))
    renamed = {key.replace(old, new): tensor for key, tensor in tensors.items()}
    if "mine" in new:
        renamed = {k.replace("lora_B.", "lora_B.mine."): t for k, t in renamed.items()}
    adapter = read_adapter(folder(config, renamed, "renamed"))
    assert adapter.modules.keys() == plain.modules.keys()
    for name, part in adapter.modules.items():
        assert torch.equal(part.lora_a, plain.modules[name].lora_a)
    # ... and written back as they were.
    write_adapter(adapter, tmp_path / "out")
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys() == renamed.keys()


def test_saved_module_with_an_adapter_name_inside(plain_adapter, folder):
    config, tensors = plain_adapter
    config["modules_to_save"] = ["head"]
    tensors = {key.replace(".weight", ".mine.weight"): t for key, t in tensors.items()}
    tensors["base_model.model.head.modules_to_save.mine.dense.weight"] = torch.ones(2)
    assert read_adapter(folder(config, tensors)).saved.keys() == {"head.dense.weight"}


def test_saved_names_that_only_resemble_other_methods(plain_adapter, folder):
    config, tensors = plain_adapter
    config["modules_to_save"] = ["soft_head"]
    tensors["base_model.model.soft_head.weight"] = torch.ones(2)
    assert read_adapter(folder(config, tensors)).saved.keys() == {"soft_head.weight"}


@pytest.mark.parametrize("spaces", range(1, 8))
def test_unaligned_data(spaces, plain_adapter, folder):
    # Old writers did not pad the header; tensors then begin at odd addresses.
    config, tensors = plain_adapter
    path = folder(config, tensors)
    file = path / "adapter_model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length] + b" " * spaces
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    part = read_adapter(path).modules["layers.1.v"]
    assert torch.equal(part.lora_a, tensors["base_model.model.layers.1.v.lora_A.weight"])


def test_pickle_saved_on_a_gpu(plain_adapter, folder, monkeypatch):
    config, tensors = plain_adapter
    path = folder(config, tensors)
    (path / "adapter_model.safetensors").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")
        torch.save(tensors, path / "adapter_model.bin")
    adapter = read_adapter(path, allow_pickle=True)
    assert adapter.modules["layers.0.q"].lora_a.device.type == "cpu"
