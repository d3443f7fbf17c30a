"""Tiny vision transformers of every layout, and a slow pruned forward to hold them to."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from support import text_tasks

WIDTH, HEADS, SIDE = 24, 3, 16  # 4 x 4 patches of 4 pixels


@dataclasses.dataclass
class Parts:
    """What the slow forward reads of a model."""

    embed: Callable[[Tensor], Tensor]
    blocks: list[tuple]  # norm1, qkv function, proj, norm2, mlp
    prefix: int
    norm: nn.Module


def images(count: int, seed: int = 5, side: int = SIDE) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def _spread(model: nn.Module, seed: int) -> nn.Module:
    """Weights far from their small beginnings, so that attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        near_one = "norm" in name and name.endswith("weight")
        parameter.data = 1 + 0.1 * noise if near_one else 0.25 * noise
    return model.eval()


def small_vit(seed: int = 0) -> nn.Module:
    with text_tasks.example("small_vit") as module:
        model = module.SmallViT(width=WIDTH, depth=4, heads=HEADS, size=SIDE, classes=5)
    return _spread(model, seed)


def timm_vit(seed: int = 0, name: str = "vit_tiny_patch16_224", **options) -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": SIDE, "patch_size": 4, "embed_dim": WIDTH, "num_heads": HEADS, "depth": 4}
    return _spread(timm.create_model(name, num_classes=0, **sizes, **options), seed)


def sizes() -> dict:
    return {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": HEADS,
        "image_size": SIDE,
        "patch_size": 4,
    }


def transformers_vit(seed: int = 0, attention: str = "sdpa") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**sizes(), attn_implementation=attention)
    return _spread(transformers.ViTModel(config, add_pooling_layer=False), seed)


def clip_vit(seed: int = 0, attention: str = "sdpa") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(**sizes(), attn_implementation=attention)
    return _spread(transformers.CLIPVisionModel(config), seed)


MODELS = {"small": small_vit, "timm": timm_vit, "vit": transformers_vit, "clip": clip_vit}


def feature(model: nn.Module, x: Tensor) -> Tensor:
    """The CLS token after the last norm, in every layout."""
    out = model(x)
    if isinstance(out, Tensor):
        return out
    return out.last_hidden_state[:, 0] if out.pooler_output is None else out.pooler_output


def parts(model: nn.Module) -> Parts:
    kind = type(model).__name__
    if kind == "SmallViT":
        blocks = [
            (b.norm1, _three(b.q, b.k, b.v), b.proj, b.norm2, _mlp(b.fc1, b.fc2))
            for b in model.blocks
        ]
        return Parts(lambda x: small_tokens(model, x), blocks, 1, model.norm)
    if kind == "VisionTransformer":
        blocks = [
            (b.norm1, lambda y, qkv=b.attn.qkv: qkv(y).chunk(3, -1), b.attn.proj, b.norm2, b.mlp)
            for b in model.blocks
        ]
        return Parts(lambda x: _timm_tokens(model, x), blocks, model.num_prefix_tokens, model.norm)
    if kind == "ViTModel":
        blocks = [
            (b.layernorm_before, _three(*_qkv(a)), a.o_proj, b.layernorm_after, b.mlp)
            for b, a in ((block, block.attention) for block in model.layers)
        ]
        return Parts(model.embeddings, blocks, 1, model.layernorm)
    blocks = [
        (b.layer_norm1, _three(*_qkv(a)), a.out_proj, b.layer_norm2, b.mlp)
        for b, a in ((block, block.self_attn) for block in model.encoder.layers)
    ]
    return Parts(lambda x: model.pre_layrnorm(model.embeddings(x)), blocks, 1, model.post_layernorm)


def slow(
    model: nn.Module, x: Tensor, ratios: dict[int, float], *, residual_of_norm: bool = False
) -> tuple[Tensor, list[list[int]]]:
    """One image, head and token at a time: features and the patches kept.

    ``residual_of_norm`` is a fault that pruned blocks must not have.
    """
    net, features, kept = parts(model), [], []
    for image in x:
        t = net.embed(image[None])[0]
        grid = list(range(len(t) - net.prefix))
        for l, (norm1, qkv, proj, norm2, mlp) in enumerate(net.blocks):
            y = norm1(t[None])
            mixed, seen = attention(*(part[0] for part in qkv(y)))
            faulty = residual_of_norm and l in ratios
            t = (y[0] if faulty else t) + proj(mixed[None])[0]
            t = t + mlp(norm2(t[None]))[0]
            t, grid = _without_least(t, grid, seen[net.prefix :], ratios.get(l, 0.0), net.prefix)
        features.append(net.norm(t[None])[0, 0])
        kept.append(grid)
    return torch.stack(features), kept


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, list[float]]:
    size = q.shape[1] // HEADS
    outs, rows = [], []
    for h in range(HEADS):
        at = slice(h * size, (h + 1) * size)
        table = torch.softmax(q[:, at] @ k[:, at].T / math.sqrt(size), -1)
        outs.append(table @ v[:, at])
        rows.append(table[0].detach())
    return torch.cat(outs, -1), (sum(rows) / HEADS).tolist()


def _without_least(t: Tensor, grid: list[int], seen: list[float], ratio: float, prefix: int):
    places = list(range(len(grid)))
    for _ in range(int(ratio * len(grid))):
        places.remove(min(places, key=lambda place: seen[place]))
    rows = [*range(prefix), *(prefix + place for place in places)]
    return t[rows], [grid[place] for place in places]


def small_tokens(model: nn.Module, x: Tensor) -> Tensor:
    patches = model.patch(x).flatten(2).transpose(1, 2)
    return torch.cat([model.cls.expand(len(x), -1, -1), patches], 1) + model.pos


def _timm_tokens(model: nn.Module, x: Tensor) -> Tensor:
    return model.norm_pre(model._pos_embed(model.patch_embed(x)))


def _qkv(a: nn.Module) -> tuple[nn.Module, ...]:
    return a.q_proj, a.k_proj, a.v_proj


def _three(q: nn.Module, k: nn.Module, v: nn.Module) -> Callable:
    return lambda y: (q(y), k(y), v(y))


def _mlp(fc1: nn.Module, fc2: nn.Module) -> Callable:
    return lambda y: fc2(nn.functional.gelu(fc1(y)))
