"""A file that lacks a layer, or one module of a layer, is refused unless its config says so."""

import re

import pytest
import torch

from lora_fused import Adapter, LoraFactors
from lora_fused.io import read_adapter, write_adapter
from lora_fused.io.gaps import gaps

LAYERS = range(8)
ENCODER = [f"encoder.layer.{i}.{name}" for i in LAYERS for name in ("query", "out.dense", "dense")]
TARGETS = {"target_modules": ["query", "dense"]}


def without(*ends: str) -> list[str]:
    return [m for m in ENCODER if not any(f".{end}" in m for end in ends)]


def write(folder, modules, **config):
    sizes = {"lora_A": (2, 3), "lora_B": (4, 2)}
    tensors = {
        f"base_model.model.{m}.{side}.weight": torch.ones(size)
        for m in modules
        for side, size in sizes.items()
    }
    return folder({"peft_type": "LORA", "r": 2, "lora_alpha": 2, **TARGETS, **config}, tensors)


@pytest.mark.parametrize(
    ("modules", "told"),
    [
        (without("3."), "none for encoder.layer.3.dense, .*layer.3.query"),
        (without("2.", "3."), "layer.2.dense.* and 2 more"),
        (without("3.query"), "none for encoder.layer.3.query"),
        (without("0.query"), "none for encoder.layer.0.query"),
        (without("7.out"), "none for encoder.layer.7.out.dense"),
    ],
    ids=["layer", "two layers", "module", "module of the first", "module of the last"],
)
def test_gap_is_refused(modules, told, folder):
    for number, targets in enumerate((["query", "dense"], r".*\.(query|dense)", "all-linear")):
        path = write(folder, modules, target_modules=targets)
        with pytest.raises(ValueError, match=told) as error:
            read_adapter(path)
        assert f"{path}/adapter_model.safetensors must" in str(error.value)
        path.rename(path.with_name(f"refused {number}"))


@pytest.mark.parametrize(
    ("modules", "config"),
    [
        (ENCODER, {}),
        (without("3."), {"layers_to_transform": [0, 1, 2, 4, 5, 6, 7]}),
        (without("3."), {"target_modules": without("3.")}),
        (without("3."), {"target_modules": r".*\.[0124567]\.(query|.*dense)"}),
        (without("3."), {"exclude_modules": r".*\.3\..*"}),
        (without("3.query"), {"target_modules": without("3.query")}),
        (without("3.query"), {"exclude_modules": ["layer.3.query"]}),
    ],
    ids=["none", "layers", "paths", "regex", "excluded layer", "paths of modules", "excluded"],
)
def test_what_the_config_explains_is_read(modules, config, folder):
    assert set(read_adapter(write(folder, modules, **config)).modules) == set(modules)


@pytest.mark.parametrize(
    "modules",
    [
        [f"h.{i}.attn.q" for i in (3, 7, 11)],
        [f"blocks.{i}.fc" for i in (0, 2, 4)],
        [f"up_blocks.{i}.q" for i in (1, 2, 3)],
        [f"net.{i}" for i in (0, 1, 2, 3, 5)],
        ["h.0.mlp.up", *(f"h.{i}.experts.{e}.up" for i in range(1, 6) for e in range(4))],
        [f"h.{i}.{'conv' if i in (1, 4) else 'attn'}.out" for i in range(6)],
        ["pooler.dense"],
    ],
    ids=["few layers", "every second", "not from 0", "numbered", "dense first", "mixed", "one"],
)
def test_models_of_unlike_layers_have_no_gaps(modules):
    assert gaps({"target_modules": "all-linear"}, modules) == []


def test_an_adapter_that_lost_modules_here_is_written_so_that_it_loads(folder, tmp_path):
    read = read_adapter(write(folder, ENCODER))
    fresh = Adapter(
        "fresh",
        {m: LoraFactors(torch.ones(2, 3), torch.ones(2, 4), 1.0) for m in ENCODER},
        metadata={"config": {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **TARGETS}},
    )
    for adapter in (read, fresh):
        del adapter.modules["encoder.layer.3.query"]
        write_adapter(adapter, tmp_path / "written" / adapter.name)
        back = read_adapter(tmp_path / "written" / adapter.name)
        assert back.modules.keys() == adapter.modules.keys()
        assert re.fullmatch("encoder.*", back.metadata["config"]["target_modules"][0])
