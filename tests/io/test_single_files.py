"""kohya's and diffusers' single files: converted where the names tell the module, else refused."""

import pytest
import torch
from safetensors.torch import save_file

from lora_fused.io import load_adapters, read_adapter, write_adapter

UNET = "down_blocks.0.attentions.1.transformer_blocks.0"
KOHYA = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0"


@pytest.fixture
def single(tmp_path):
    def write(names, name="style.safetensors", metadata=None, **more):
        """A file with a rank-3 pair under each (down name, up name); ``more``: other tensors."""
        generator = torch.Generator().manual_seed(0)
        tensors = {key: torch.as_tensor(value) for key, value in more.items()}
        for down, up in names:
            tensors[down] = torch.randn(3, 8, generator=generator)
            tensors[up] = torch.randn(6, 3, generator=generator)
        save_file(tensors, tmp_path / name, metadata=metadata)
        return tmp_path / name

    return write


def pair(stem, down="lora_down", up="lora_up"):
    return f"{stem}.{down}.weight", f"{stem}.{up}.weight"


CONVERTED = {
    "kohya": (pair(f"{KOHYA}_attn1_to_q"), f"{UNET}.attn1.to_q", "kohya"),
    "kohya output": (pair(f"{KOHYA}_attn2_to_out_0"), f"{UNET}.attn2.to_out.0", "kohya"),
    "kohya feed-forward": (pair(f"{KOHYA}_ff_net_0_proj"), f"{UNET}.ff.net.0.proj", "kohya"),
    "kohya text encoder": (
        pair("lora_te_text_model_encoder_layers_11_self_attn_q_proj"),
        "text_model.encoder.layers.11.self_attn.q_proj",
        "kohya",
    ),
    "kohya, component twice": (
        tuple(f"lora_unet_unet_{KOHYA[10:]}_attn1_to_k_lora_{x}.weight" for x in ("down", "up")),
        f"{UNET}.attn1.to_k",
        "kohya",
    ),
    "diffusers processors": (
        pair(f"{UNET}.attn1.processor.to_out_lora", "down", "up"),
        f"{UNET}.attn1.to_out.0",
        "diffusers",
    ),
    "diffusers": (
        pair(f"unet.{UNET}.attn1.to_k.lora", "down", "up"),
        f"{UNET}.attn1.to_k",
        "diffusers",
    ),
    "diffusers, PEFT names": (
        pair(f"unet.{UNET}.attn1.to_k", "lora_A", "lora_B"),
        f"{UNET}.attn1.to_k",
        "diffusers",
    ),
    "diffusers text encoder": (
        pair("text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora", "down", "up"),
        "text_model.encoder.layers.0.self_attn.out_proj",
        "diffusers",
    ),
    "diffusers linear layer": (
        pair("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer", "down", "up"),
        "text_model.encoder.layers.0.mlp.fc1",
        "diffusers",
    ),
}


@pytest.mark.parametrize("case", CONVERTED)
def test_converted(case, single, tmp_path):
    names, module, layout = CONVERTED[case]
    adapter = read_adapter(single([names]))
    assert adapter.name == "style" and list(adapter.modules) == [module]
    assert adapter.metadata["layout"] == layout
    part = adapter.modules[module]
    assert (part.lora_a.shape, part.lora_b.shape, part.scale) == ((3, 8), (3, 6), 1.0)
    write_adapter(adapter, tmp_path / "folder")
    again = read_adapter(tmp_path / "folder").modules[module]
    assert torch.equal(again.lora_a, part.lora_a) and torch.equal(again.lora_b, part.lora_b)
    assert again.scale == 1.0


def test_alpha_keys_give_the_scale(single, tmp_path):
    stems = [f"{KOHYA}_attn1_to_q", f"{KOHYA}_attn1_to_k"]
    alphas = {f"{stems[0]}.alpha": 1.5, f"{stems[1]}.alpha": 6.0}
    adapter = read_adapter(single(map(pair, stems), **alphas))
    assert [adapter.modules[f"{UNET}.attn1.to_{x}"].scale for x in "qk"] == [0.5, 2.0]
    write_adapter(adapter, tmp_path / "out")
    again = read_adapter(tmp_path / "out")
    assert [again.modules[f"{UNET}.attn1.to_{x}"].scale for x in "qk"] == [0.5, 2.0]


def test_several_components_keep_their_names(single):
    te = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    adapter = read_adapter(single([pair(f"{KOHYA}_attn1_to_q"), pair(te)]))
    assert set(adapter.modules) == {
        f"unet.{UNET}.attn1.to_q",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    }


STEM = f"{KOHYA}_attn1_to_q"
REFUSED = {
    "alpha 0": ([pair(STEM)], {f"{STEM}.alpha": 0.0}, "alpha.*finite number"),
    "alpha NaN": ([pair(STEM)], {f"{STEM}.alpha": float("nan")}, "alpha.*finite number"),
    "alpha for some": (
        [pair(STEM), pair(f"{KOHYA}_attn1_to_k")],
        {f"{STEM}.alpha": 1.0},
        "to_k.*have an alpha",
    ),
    "alpha alone": (
        [pair(STEM)],
        {f"{STEM}.alpha": 1.0, f"{KOHYA}_attn1_to_k.alpha": 1.0},
        "to_k.alpha.*belong to",
    ),
    "unknown word": ([pair("lora_unet_strange_block_to_q")], {}, "to_q.*known words.*'strange'"),
    "unknown component": ([pair("lora_prior_mlp_fc1")], {}, "lora_prior_mlp_fc1"),
    "LoCon": ([pair(STEM)], {f"{STEM}.lora_mid.weight": [[1.0]]}, "lora_mid.*another method"),
    "DoRA": ([pair(STEM)], {f"{STEM}.dora_scale": [1.0]}, "dora_scale.*another method"),
    "LoHa": ([], {f"{STEM}.hada_w1_a": [[1.0]]}, "hada_w1_a.*another method"),
    "convolution": (
        [],
        {f"{STEM}.lora_down.weight": [[[[1.0, 2.0]]]], f"{STEM}.lora_up.weight": [[[[1.0]]]]},
        "lora_down.*kernel of 1 x 1",
    ),
    "half a pair": ([], {f"{STEM}.lora_down.weight": [[1.0]]}, "lora_down.*lora_B"),
    "PEFT without its config": (
        [pair("base_model.model.q", "lora_A", "lora_B")],
        {},
        "adapter_config.json",
    ),
    "a whole model": ([], {"model.layers.0.weight": [1.0]}, "known layout"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, single):
    names, more, message = REFUSED[case]
    path = single(names, **more)
    with pytest.raises(ValueError, match=message) as caught:
        read_adapter(path)
    assert str(path) in str(caught.value)


def test_header_with_its_own_config(single):
    path = single(
        [pair("unet.mid_block.to_q.lora", "down", "up")], metadata={"lora_adapter_metadata": "{}"}
    )
    with pytest.raises(ValueError, match="lora_adapter_metadata"):
        read_adapter(path)


def test_other_files(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"\.safetensors or \.bin"):
        read_adapter(tmp_path / "x.gguf")


def test_pickled_diffusers_file(tmp_path):
    down, up = pair("mid_block.attn1.processor.to_q_lora", "down", "up")
    torch.save(
        {down: torch.ones(2, 4), up: torch.ones(5, 2)}, tmp_path / "pytorch_lora_weights.bin"
    )
    with pytest.raises(ValueError, match="allow_pickle"):
        load_adapters(tmp_path / "pytorch_lora_weights.bin")
    bank = load_adapters(tmp_path / "pytorch_lora_weights.bin", allow_pickle=True)
    assert bank.modules == ("mid_block.attn1.to_q",)
