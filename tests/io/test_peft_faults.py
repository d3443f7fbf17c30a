"""Every way in which a PEFT folder is damaged or asks for what is not computed is a loud error."""

import json
import math

import pytest
import torch

from lora_fused.io import read_adapter

Q0 = "base_model.model.layers.0.q"


def changed(config=None, tensors=None, drop=()):
    """A fault: keys set in the config, tensors set, keys dropped from both."""

    def apply(old_config, old_tensors):
        old_config.update(config or {})
        old_tensors.update(tensors or {})
        for key in drop:
            old_config.pop(key, None)
            old_tensors.pop(key, None)

    return apply


def rename(old, new):
    def apply(config, tensors):
        for key in list(tensors):
            tensors[key.replace(old, new)] = tensors.pop(key)

    return apply


def with_value(key, value):
    def apply(config, tensors):
        tensors[key][1, 2] = value

    return apply


# What is wrong -> what the message must name.
CONFIG_FAULTS = {
    "use_dora": (changed({"use_dora": True}), "use_dora"),
    "lora_bias": (changed({"lora_bias": True}), "lora_bias"),
    "bias": (changed({"bias": "all"}), "bias"),
    "target_parameters": (changed({"target_parameters": ["w"]}), "target_parameters"),
    "layer_replication": (changed({"layer_replication": [[0, 4]]}), "layer_replication"),
    "alora": (changed({"alora_invocation_tokens": [1, 2]}), "alora_invocation_tokens"),
    "arrow": (changed({"arrow_config": {"top_k": 3}}), "arrow_config"),
    "bdlora": (changed({"use_bdlora": {"nblocks": 2}}), "use_bdlora"),
    "kasa": (changed({"kasa_config": {"beta": 1.0}}), "kasa_config"),
    "monteclora": (changed({"monteclora_config": {"num_samples": 2}}), "monteclora_config"),
    "velora": (changed({"velora_config": {"num_groups": 2}}), "velora_config"),
    "qalora": (changed({"use_qalora": True}), "use_qalora"),
    "tied": (changed({"ensure_weight_tying": True}), "ensure_weight_tying"),
    "token rows": (changed({"trainable_token_indices": [3]}), "trainable_token_indices"),
    "merged qkv": (changed({"enable_lora": [True, False, True]}), "enable_lora"),
    "megatron": (changed({"megatron_config": {"hidden_size": 8}}), "megatron_config"),
    "pissa": (changed({"init_lora_weights": "pissa"}), "init_lora_weights"),
    "pissa_niter": (changed({"init_lora_weights": "pissa_niter_4"}), "init_lora_weights"),
    "olora": (changed({"init_lora_weights": "olora"}), "init_lora_weights"),
    "loftq": (changed({"init_lora_weights": "loftq"}), "init_lora_weights"),
    "other method": (changed({"peft_type": "LOHA"}), "peft_type"),
    "no method": (changed(drop=["peft_type"]), "peft_type"),
    "unknown key": (changed({"use_magic": 3}), "use_magic"),
    "no r": (changed(drop=["r"]), " r in .*at least 1"),
    "rank 0": (changed({"r": 0}), " r in .*at least 1"),
    "rank 0 in pattern": (changed({"rank_pattern": {"q": 0}}), "rank_pattern"),
    "no alpha": (changed(drop=["lora_alpha"]), "lora_alpha"),
    "alpha 0": (changed({"lora_alpha": 0}), "lora_alpha"),
    "alpha NaN": (changed({"lora_alpha": math.nan}), "lora_alpha"),
    "alpha infinite": (changed({"lora_alpha": math.inf}), "lora_alpha"),
    "alpha text": (changed({"lora_alpha": "8"}), "lora_alpha"),
    "alpha 0 in pattern": (changed({"alpha_pattern": {"q": 0}}), "alpha_pattern"),
    "bad regex": (changed({"target_modules": "(q"}), "target_modules"),
    "bad pattern": (changed({"rank_pattern": {"(q": 4}}), "rank_pattern"),
    "targets": (changed({"target_modules": 3}), "target_modules"),
    "layers of a regex": (
        changed({"target_modules": ".*[qv]", "layers_to_transform": [0]}),
        "layers_to_transform",
    ),
    "layers text": (changed({"layers_to_transform": ["0"]}), "layers_to_transform"),
    "rslora text": (changed({"use_rslora": "yes"}), "use_rslora"),
    "no saved modules": (changed({"modules_to_save": ["head"]}), "modules to save"),
}
TENSOR_FAULTS = {
    "nan": (with_value(f"{Q0}.lora_A.weight", math.nan), f"{Q0}.lora_A.weight.*finite"),
    "inf": (with_value(f"{Q0}.lora_B.weight", math.inf), f"{Q0}.lora_B.weight.*finite"),
    "-inf": (with_value(f"{Q0}.lora_B.weight", -math.inf), f"{Q0}.lora_B.weight.*finite"),
    "nan in a head": (
        changed(
            {"modules_to_save": ["head"]}, {"base_model.model.head.weight": torch.tensor(math.nan)}
        ),
        "head.weight.*finite",
    ),
    "product beyond float32": (
        changed(
            tensors={
                f"{Q0}.lora_A.weight": torch.full((4, 6), 1e25),
                f"{Q0}.lora_B.weight": torch.full((5, 4), 1e25),
            }
        ),
        f"{Q0}.lora_B.weight.*within float32",
    ),
    "one lora_B missing": (changed(drop=[f"{Q0}.lora_B.weight"]), f"{Q0}.lora_A.weight.*lora_B"),
    "one lora_A missing": (changed(drop=[f"{Q0}.lora_A.weight"]), f"{Q0}.lora_B.weight.*lora_A"),
    "layer missing": (
        changed({"layers_to_transform": [0, 1, 5], "layers_pattern": "layers"}),
        r"every layer.*none for \[5\]",
    ),
    "layer too many": (
        changed({"layers_to_transform": [0], "layers_pattern": "layers"}),
        "layers.1.q.lora_A.weight",
    ),
    "target too few": (changed({"target_modules": ["q"]}), "layers.0.v.lora_A.weight.*selects"),
    "excluded": (changed({"exclude_modules": ["v"]}), "layers.0.v.lora_A.weight.*selects"),
    "LoRA on a saved module": (
        changed({"modules_to_save": ["v"]}),
        "layers.0.v.lora_A.weight.*selects",
    ),
    "rank of the file": (changed({"r": 8}), f"{Q0}.lora_A.weight.*rank 8.*rank 4"),
    "rank of a pattern": (changed({"rank_pattern": {"0.q": 2}}), f"{Q0}.lora_A.weight.*rank 2"),
    "A and B disagree": (
        changed(tensors={f"{Q0}.lora_B.weight": torch.ones(5, 3)}),
        rf"{Q0}.lora_B.weight.*\[O, 4\].*\[5, 3\]",
    ),
    "rank 0": (
        changed(
            tensors={
                f"{Q0}.lora_A.weight": torch.ones(0, 6),
                f"{Q0}.lora_B.weight": torch.ones(5, 0),
            }
        ),
        f"{Q0}.lora_A.weight.*at least 1",
    ),
    "int8": (
        changed(tensors={f"{Q0}.lora_A.weight": torch.ones(4, 6, dtype=torch.int8)}),
        f"{Q0}.lora_A.weight.*floating-point.*int8",
    ),
    "float8": (
        changed(tensors={f"{Q0}.lora_A.weight": torch.ones(4, 6).to(torch.float8_e4m3fn)}),
        f"{Q0}.lora_A.weight.*F8_E4M3",
    ),
    "grouped convolution": (
        changed(tensors={f"{Q0}.lora_B.weight": torch.ones(5, 4, 1)}),
        f"{Q0}.lora_B.weight.*two dimensions",
    ),
    "DoRA magnitudes": (
        changed(tensors={f"{Q0}.lora_magnitude_vector": torch.ones(5)}),
        "lora_magnitude_vector.*DoRA",
    ),
    "LoRA bias": (changed(tensors={f"{Q0}.lora_B.bias": torch.ones(5)}), "lora_B.bias.*bias"),
    "token rows": (
        changed(tensors={"base_model.model.e.token_adapter.trainable_tokens_delta": torch.ones(2)}),
        "trainable_tokens_delta",
    ),
    "variant": (changed(tensors={f"{Q0}.lora_diag": torch.ones(4)}), "lora_diag.*unknown"),
    "kohya names": (rename("lora_A", "lora_down"), "lora_down.*kohya"),
    "unknown tensor": (changed(tensors={f"{Q0}.gate": torch.ones(4)}), f"{Q0}.gate"),
    "no LoRA at all": (rename(".lora_", ".plain_"), "hold LoRA factors|LoRA factor"),
    "another prefix": (
        changed(tensors={"layers.7.q.lora_A.weight": torch.ones(4, 6)}),
        "layers.7.q.lora_A.weight.*start with",
    ),
    "short prefix": (rename("base_model.model.", "base_model."), "start with"),
    "wrapped twice": (
        rename("base_model.model.", "base_model.model.base_model.model."),
        "wrapped twice",
    ),
    "inside a wrapper": (rename("layers.0.q", "layers.0.q.modules_to_save"), "plain module"),
    "frozen original": (
        changed(tensors={"base_model.model.head.original_module.weight": torch.ones(2, 2)}),
        "original_module",
    ),
    "two adapters": (
        changed(
            tensors={
                f"{Q0}.lora_A.one.weight": torch.ones(4, 6),
                f"{Q0}.lora_B.two.weight": torch.ones(5, 4),
            }
        ),
        "belong to one adapter",
    ),
    "linear and embedding": (
        changed(
            tensors={
                "base_model.model.q.lora_A.weight": torch.ones(4, 6),
                "base_model.model.q.lora_embedding_B": torch.ones(5, 4),
            }
        ),
        "one kind",
    ),
}


FAULTS = {**CONFIG_FAULTS, **{f"tensor: {case}": fault for case, fault in TENSOR_FAULTS.items()}}


@pytest.mark.parametrize("case", FAULTS)
def test_fault_is_refused(case, plain_adapter, folder):
    fault, message = FAULTS[case]
    config, tensors = plain_adapter
    fault(config, tensors)
    path = folder(config, tensors)
    with pytest.raises(ValueError, match=message) as caught:
        read_adapter(path)
    assert str(path) in str(caught.value)


def test_sound_folder_is_read(plain_adapter, folder):
    # The control of the table above: without a fault the same folder loads.
    adapter = read_adapter(folder(*plain_adapter))
    assert (adapter.name, len(adapter.modules)) == ("adapter", 4)
    assert all(part.scale == 2.0 for part in adapter.modules.values())


def test_empty_unknown_keys_are_accepted(plain_adapter, folder):
    config, tensors = plain_adapter
    config |= {"use_magic": None, "use_dora": False, "rank_pattern": {}, "merge_weights": False}
    assert len(read_adapter(folder(config, tensors)).modules) == 4


def test_missing_paths(tmp_path, plain_adapter, folder):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder.*user/repository"):
        read_adapter("user/repository")
    path = folder(*plain_adapter)
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        read_adapter(path)
    with pytest.raises(
        FileNotFoundError, match=r"no adapter_config.json; there is one in .*adapter"
    ):
        read_adapter(tmp_path)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_git_lfs_pointer(file, plain_adapter, folder):
    path = folder(*plain_adapter)
    (path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ValueError, match=f"{file} must be the file itself, got a Git LFS pointer"):
        read_adapter(path)


@pytest.mark.parametrize("kept", [0, 4, 60, -1, -20])
def test_truncated_file(kept, plain_adapter, folder):
    path = folder(*plain_adapter) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors must be a whole safetensors"):
        read_adapter(path.parent)


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff"])
def test_config_that_is_not_an_object(text, plain_adapter, folder):
    path = folder(*plain_adapter)
    (path / "adapter_config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        read_adapter(path)


def test_pickle_only_on_request(plain_adapter, folder):
    config, tensors = plain_adapter
    path = folder(config, tensors)
    (path / "adapter_model.safetensors").unlink()
    torch.save(tensors, path / "adapter_model.bin")
    with pytest.raises(ValueError, match="allow_pickle=True"):
        read_adapter(path)
    adapter = read_adapter(path, allow_pickle=True)
    expected = tensors[f"{Q0}.lora_A.weight"]
    assert torch.equal(adapter.modules["layers.0.q"].lora_a, expected)


def test_pickle_that_would_run_code(plain_adapter, folder):
    config, tensors = plain_adapter
    path = folder(config, tensors)
    (path / "adapter_model.safetensors").unlink()
    torch.save({"a": print}, path / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickle of tensors alone"):
        read_adapter(path, allow_pickle=True)
    torch.save([torch.ones(2)], path / "adapter_model.bin")
    with pytest.raises(ValueError, match="dict of tensors"):
        read_adapter(path, allow_pickle=True)


def test_every_refused_key_has_a_test():
    from lora_fused.io.config import _UNSUPPORTED

    tested = {key for fault, _ in CONFIG_FAULTS.values() for key in _keys_set_by(fault)}
    assert set(_UNSUPPORTED) <= tested


def _keys_set_by(fault):
    config = {}
    fault(config, {})
    return json.loads(json.dumps(config)).keys()
