"""Tiny PEFT folders, written by hand, and the program as a function."""

import json

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from lora_fused.cli.app import app

SIZES = {"layer.0.query": (8, 12), "layer.0.dense": (12, 6)}


@pytest.fixture
def run():
    """run("info", "--json") -> the result with exit_code, stdout and stderr."""
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def make_adapter(tmp_path):
    """make_adapter("name", seed=..., ...) -> the folder of a small adapter."""

    def make(name: str, seed: int = 0, *, rank=2, alpha=4, init=None, nan=False, inert=False):
        torch.manual_seed(seed)
        tensors = {}
        for module, (n_in, n_out) in SIZES.items():
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, n_in)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(n_out, rank) * (not inert)
        if init is not None:
            start = torch.Generator().manual_seed(init)
            for key in [k for k in tensors if "lora_A" in k]:
                shared = torch.randn(tensors[key].shape, generator=start)
                tensors[key] = shared + 0.3 * tensors[key]
        if nan:
            tensors["base_model.model.layer.0.query.lora_B.weight"][3, 1] = torch.nan
        folder = tmp_path / name
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none"}
        config |= {"target_modules": ["query", "dense"], "base_model_name_or_path": "tiny/base"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return make
