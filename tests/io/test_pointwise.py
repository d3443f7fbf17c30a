"""Adapters of 1 x 1 convolutions in files: PEFT's shapes, read and written exactly."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from support.convs import ConvNet, adapter, images

from lora_fused import AdapterBank, new_adapter
from lora_fused.io import read_adapter, save_adapters, write_adapter
from lora_fused.methods import fit_subspace, merge, mix_factors
from lora_fused.nn import attach
from lora_fused.testing import assert_within_budget

C0 = "base_model.model.layers.0.q"


def of_convolutions(tensors: dict) -> dict:
    return {name: t[:, :, None, None] for name, t in tensors.items()}


def data_of(path) -> bytes:
    data = (path / "adapter_model.safetensors").read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_read_and_written_is_the_same(dtype, plain_adapter, folder, tmp_path):
    config, tensors = plain_adapter
    tensors = {name: t.to(dtype) for name, t in tensors.items()}
    flat, path = folder(config, tensors, "flat"), folder(config, of_convolutions(tensors))
    one, other = read_adapter(path), read_adapter(flat)
    assert one.metadata["pointwise"] == list(one.modules) and "pointwise" not in other.metadata
    for name, part in one.modules.items():
        assert torch.equal(part.lora_a, other.modules[name].lora_a)
        assert torch.equal(part.lora_b, other.modules[name].lora_b)
    write_adapter(one, tmp_path / "again")
    assert data_of(tmp_path / "again") == data_of(path)
    bank = AdapterBank()
    bank.add(one)
    (saved,) = save_adapters(bank, tmp_path / "bank")
    again = read_adapter(saved)
    assert data_of(saved) == data_of(path)
    assert again.metadata["pointwise"] == one.metadata["pointwise"]


def test_linear_layers_and_convolutions_in_one_file(plain_adapter, folder, tmp_path):
    config, tensors = plain_adapter
    mixed = {n: t[:, :, None, None] if ".q." in n else t for n, t in tensors.items()}
    one = read_adapter(folder(config, mixed))
    assert one.metadata["pointwise"] == ["layers.0.q", "layers.1.q"]
    write_adapter(one, tmp_path / "again")
    assert data_of(tmp_path / "again") == data_of(tmp_path / "adapter")


REFUSED = {
    "3 x 3": ("A", torch.ones(4, 6, 3, 3), r"kernel of 1 x 1.*got \[4, 6, 3, 3\]"),
    "1 x 3": ("A", torch.ones(4, 6, 1, 3), "kernel of 1 x 1"),
    "of B": ("B", torch.ones(5, 4, 3, 3), "kernel of 1 x 1"),
    "Conv1d": ("A", torch.ones(4, 6, 1), "two dimensions, or the four of a 1 x 1"),
    "one of two": ("B", torch.ones(5, 4), "as many dimensions as lora_A of layers.0.q"),
    "groups": ("B", torch.ones(5, 2, 1, 1), r"be \[O, 4\] to fit lora_A"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, plain_adapter, folder):
    side, tensor, message = REFUSED[case]
    config, tensors = plain_adapter
    tensors = of_convolutions(tensors) | {f"{C0}.lora_{side}.weight": tensor}
    path = folder(config, tensors)
    with pytest.raises(ValueError, match=rf"{C0}.lora_{side}.weight.*{message}") as caught:
        read_adapter(path)
    assert str(path) in str(caught.value)


def test_an_embedding_is_no_convolution(plain_adapter, folder):
    config, tensors = plain_adapter
    config["target_modules"] = None
    tensors[f"{C0}e.lora_embedding_A"] = torch.ones(4, 6, 1, 1)
    tensors[f"{C0}e.lora_embedding_B"] = torch.ones(5, 4, 1, 1)
    with pytest.raises(ValueError, match=r"lora_embedding_A.*two dimensions, got a convolution's"):
        read_adapter(folder(config, tensors))


def test_a_single_file_becomes_a_folder(tmp_path):
    from safetensors.torch import save_file

    stem = "lora_unet_down_blocks_0_attentions_1_proj_in"
    a, b = torch.randn(3, 8, 1, 1), torch.randn(6, 3, 1, 1)
    tensors = {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
    save_file(tensors, tmp_path / "style.safetensors")
    one = read_adapter(tmp_path / "style.safetensors")
    (module,) = one.modules
    assert one.metadata["pointwise"] == [module]
    write_adapter(one, tmp_path / "folder")
    again = read_adapter(tmp_path / "folder")
    assert again.metadata["pointwise"] == [module]
    assert torch.equal(again.modules[module].lora_b, b[:, :, 0, 0].T)


@pytest.mark.parametrize("source", ["fresh", "made"])
def test_peft_loads_what_was_written(source, tmp_path):
    peft = pytest.importorskip("peft")
    model, x = ConvNet().eval(), images(2)
    if source == "fresh":
        one = new_adapter(model, "one", rank=3, target_modules=["expand", "reduce"], seed=1)
        for part in one.modules.values():
            part.lora_b.normal_(generator=torch.Generator().manual_seed(2))
    else:
        one = adapter("one", 1, 3, ("expand", "reduce", "head"))
    bank = AdapterBank()
    bank.add(one)
    write_adapter(bank.adapter("one"), tmp_path / "one")
    wrapped = peft.PeftModel.from_pretrained(ConvNet(), tmp_path / "one").eval()
    handle = attach(model, bank)
    with torch.no_grad(), handle.mix("one"):
        y, reference = model(x), wrapped(x)
        assert_within_budget(y, reference, wrapped.double()(x.double()))
    handle.detach()
    assert (model(x) - reference).abs().max() > 1e-2  # the negative control


def made_of(bank: AdapterBank) -> dict:
    subspace = fit_subspace(bank, rank=4, progress=False)
    subspace.new_task("task", rank=2)
    return {
        "merged": merge(bank, {"a": 0.5, "b": 0.5}, combination_type="svd", rank=3).adapter,
        "hub": mix_factors(bank, {"a": 0.5, "b": 0.5}),
        "start": subspace.initial_adapter("start", rank=2),
        "task": subspace.reconstruct("task"),
    }


def test_what_is_made_of_convolutions_is_of_convolutions(tmp_path):
    bank, modules = AdapterBank(), ("expand", "reduce", "head")
    for name in "ab":
        one = adapter(name, 2, 3, modules)
        bank.add(dataclasses.replace(one, name=name))
    for name, made in made_of(bank).items():
        write_adapter(made, tmp_path / name)
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        dims = {key.split(".")[2]: t.dim() for key, t in tensors.items()}
        assert dims == {"expand": 4, "reduce": 4, "head": 2}, name
