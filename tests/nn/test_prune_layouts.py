"""Token pruning in real layouts: attention implementations, tokens in front, unknown models."""

import pytest
import torch
from support import vits
from torch import nn

from lora_fused import AdapterBank, Mixture, new_adapter
from lora_fused.nn import attach
from lora_fused.nn.prune import prune_tokens

RATIOS = {1: 0.5}


@pytest.mark.parametrize("make", [vits.transformers_vit, vits.clip_vit], ids=["vit", "clip"])
def test_keeps_the_same_under_any_attention(make):
    kept = {}
    for attention in ("sdpa", "eager"):
        model = make(attention=attention)
        with prune_tokens(model, RATIOS) as pruning, torch.no_grad():
            vits.feature(model, vits.images(3))
        kept[attention] = pruning.kept
    assert torch.equal(kept["sdpa"], kept["eager"])


@pytest.mark.parametrize("make", [vits.transformers_vit, vits.clip_vit], ids=["vit", "clip"])
def test_scores_are_the_attention_that_eager_reports(make):
    model = make(attention="eager")
    with prune_tokens(model, RATIOS) as pruning, torch.no_grad():
        seen = model(vits.images(3), output_attentions=True).attentions[1]
    best = seen[:, :, 0, 1:].mean(1).topk(8, dim=1).indices.sort(1).values
    assert torch.equal(pruning.kept, best)


def test_gradient_checkpointing_of_transformers():
    grads = []
    for checkpointed in (False, True):
        model, x = vits.transformers_vit().train(), vits.images(2).requires_grad_()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with prune_tokens(model, RATIOS) as pruning:
            vits.feature(model, x).square().sum().backward()
        assert pruning.kept.shape == (2, 8)
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_heads_on_top_are_found_through():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**vits.sizes(), num_labels=3)
    model = transformers.ViTForImageClassification(config).eval()
    with prune_tokens(model, RATIOS) as pruning:
        assert model(vits.images(2)).logits.shape == (2, 3)
    assert pruning.kept.shape == (2, 8)
    text = transformers.CLIPTextConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    vision = transformers.CLIPVisionConfig(**vits.sizes())
    both = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    ).eval()
    with prune_tokens(both, RATIOS) as pruning:
        both.get_image_features(vits.images(2))
    assert pruning.kept.shape == (2, 8)


def test_registers_in_front_stay():
    model = vits.timm_vit(reg_tokens=2, qk_norm=True)
    x = vits.images(2)
    with prune_tokens(model, RATIOS) as pruning, torch.no_grad():
        assert model.forward_features(x).shape[1] == 3 + 8
    _, kept = vits.slow(_normed(model), x, RATIOS)
    assert pruning.kept.tolist() == kept


def _normed(model: nn.Module) -> nn.Module:
    """The slow forward knows no norms of q and k: put them behind qkv."""
    for block in model.blocks:
        block.attn.qkv = _Normed(block.attn)
    return model


class _Normed(nn.Module):
    def __init__(self, attn: nn.Module):
        super().__init__()
        self.qkv, self.q_norm, self.k_norm = attn.qkv, attn.q_norm, attn.k_norm

    def forward(self, y):
        q, k, v = (t.unflatten(-1, (vits.HEADS, -1)) for t in self.qkv(y).chunk(3, -1))
        return torch.cat([t.flatten(-2) for t in (self.q_norm(q), self.k_norm(k), v)], -1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"class_token": False, "global_pool": "avg"}, "CLS token, got VisionTransformer without"),
        ({"attn_layer": "diff"}, "plain Attention in every block, got DiffAttention"),
    ],
    ids=["no-cls", "differential"],
)
def test_refuses_what_cannot_be_scored(options, message):
    with pytest.raises(ValueError, match=f"^prune_tokens: .*{message}"):
        prune_tokens(vits.timm_vit(**options), RATIOS)


def test_refuses_random_patch_dropout_in_training():
    model = vits.timm_vit(patch_drop_rate=0.5)
    with prune_tokens(model, RATIOS):
        model(vits.images(1))
    with pytest.raises(ValueError, match=r"drop patches at random while it trains, got .* 0\.5"):
        prune_tokens(model.train(), RATIOS)


def test_refuses_unknown_layouts_by_name():
    transformers = pytest.importorskip("transformers")
    siglip = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vits.sizes()))
    with pytest.raises(ValueError, match=r"of a known layout \(timm.*got SiglipVisionModel"):
        prune_tokens(siglip, RATIOS)
    with pytest.raises(ValueError, match=r"known layout .*got Sequential of Linear"):
        prune_tokens(nn.Sequential(nn.Linear(2, 2)), RATIOS)
    with pytest.raises(ValueError, match="must be a module, got str"):
        prune_tokens("vit", RATIOS)
    with pytest.raises(ValueError, match=r"hold one vision transformer .*got \['0', '1'\]"):
        prune_tokens(nn.Sequential(vits.small_vit(), vits.small_vit()), RATIOS)
    broken = vits.small_vit()
    del broken.blocks[2].k
    with pytest.raises(ValueError, match=r"SmallViT must have k in every block.*block 2, a Block"):
        prune_tokens(broken, RATIOS)


def test_rank_4_on_q_and_v_of_vit_b_has_147456_parameters():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False)
    one = new_adapter(model, "meta", rank=4, target_modules=["q_proj", "v_proj"], seed=0)
    assert sum(p.lora_a.numel() + p.lora_b.numel() for p in one.modules.values()) == 147_456
    assert len(one.modules) == 24


@pytest.mark.parametrize("make", [vits.transformers_vit, vits.timm_vit], ids=["vit", "timm"])
def test_a_mixture_per_row_reaches_pruned_blocks(make):
    model, x, bank = make(), vits.images(3), AdapterBank()
    names = ["qkv"] if make is vits.timm_vit else ["q_proj", "v_proj"]
    for i, name in enumerate("ab"):
        one = new_adapter(model, name, rank=2, target_modules=names, seed=i)
        for part in one.modules.values():
            part.lora_b.normal_(std=0.5, generator=torch.Generator().manual_seed(i))
        bank.add(one)
    handle = attach(model, bank)
    rows, alone = ["a", None, {"a": 0.5, "b": -1.0}], []
    with torch.no_grad():
        with handle.mix(Mixture.rows(rows)), prune_tokens(model, RATIOS) as pruning:
            y = vits.feature(model, x)
        for i, row in enumerate(rows):
            with handle.mix(row), prune_tokens(model, RATIOS) as one:
                alone.append(vits.feature(model, x[i : i + 1]))
            assert torch.equal(one.kept[0], pruning.kept[i])
        torch.testing.assert_close(y, torch.cat(alone))
        with handle.mix(Mixture.rows(rows[::-1])), prune_tokens(model, RATIOS):
            wrong = vits.feature(model, x)
    assert (wrong - y).abs().max() > 1e-2
