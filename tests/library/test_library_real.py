"""Real adapters through a library: PEFT folders of a MiniLM and of public authors."""

import json

import pytest
import torch
from safetensors.torch import load_file

from lora_fused import load_adapters
from lora_fused.io import find_adapters
from lora_fused.library import AdapterLibrary
from lora_fused.methods.rpe import Prototypes

FILES = ("adapter_config.json", "adapter_model.safetensors")


def filled(path, folder, **options):
    """A library of all sound adapters below a folder, and their paths by name."""
    paths = {p.name: p for p in find_adapters(folder) if p.is_dir() and (p / FILES[1]).exists()}
    vectors = torch.randn(len(paths), 8, generator=torch.Generator().manual_seed(0))
    made = Prototypes(tuple(sorted(paths)), vectors)
    library = AdapterLibrary.create(path, base="0" * 64, size=8, minimum=0, **options)
    library.add_many(sorted(paths.values()), made, batch=7, progress=False)
    return library, paths


def test_minilm_adapters(tmp_path, data_dir):
    folder = data_dir / "adapters_minilm"
    if not folder.is_dir():
        pytest.skip(f"no adapters in {folder}")
    library, paths = filled(tmp_path / "library", folder)
    assert len(library) >= 20 and library.verify(progress=False) == []
    names = library.names[3:9]
    loaded, expected = library.load(names), load_adapters({n: paths[n] for n in names})
    assert loaded.modules == expected.modules
    for module, stack in expected.stacks.items():
        ours = loaded.stacks[module]
        assert torch.equal(ours.lora_a, stack.lora_a) and torch.equal(ours.lora_b, stack.lora_b)
        assert torch.equal(ours.scale, stack.scale) and ours.ranks == stack.ranks
    library.export(names[0], tmp_path / "out")
    first, second = (
        json.loads((p / FILES[0]).read_text()) for p in (paths[names[0]], tmp_path / "out")
    )
    assert first == second


@pytest.mark.parametrize("model", ["distilbert", "vit", "gemma"])
def test_public_adapters_come_back(tmp_path, data_dir, model):
    """Of many authors: saved classifier heads, half precisions, odd configs."""
    folders = [p for p in (data_dir / "adapters").glob("*") if model in p.name.lower()]
    if not folders:
        pytest.skip(f"no adapters of {model}")
    for i, folder in enumerate(folders):
        library, paths = filled(tmp_path / f"library{i}", folder)
        for name, path in paths.items():
            out = tmp_path / f"out{i}" / name
            library.export(name, out)
            first, second = (load_file(p / FILES[1]) for p in (path, out))
            assert first.keys() == second.keys()
            for key, tensor in first.items():
                assert tensor.dtype == second[key].dtype and torch.equal(tensor, second[key])
