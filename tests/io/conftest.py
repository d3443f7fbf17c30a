"""Small adapter folders to read and to damage."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."


@pytest.fixture
def plain_adapter():
    """Config and tensors of a sound adapter: 2 layers, q and v, rank 4, alpha 8, [6] -> [5]."""
    generator = torch.Generator().manual_seed(0)
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q", "v"],
        "base_model_name_or_path": "somewhere/model",
    }
    tensors = {}
    for layer in range(2):
        for name in "qv":
            path = f"{PREFIX}layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(4, 6, generator=generator)
            tensors[f"{path}.lora_B.weight"] = torch.randn(5, 4, generator=generator)
    return config, tensors


@pytest.fixture
def folder(tmp_path):
    """folder(config, tensors, name="adapter") writes a PEFT folder as PEFT would."""

    def write(config, tensors, name="adapter") -> Path:
        path = tmp_path / name
        path.mkdir()
        (path / "adapter_config.json").write_text(json.dumps(config))
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        return path

    return write
