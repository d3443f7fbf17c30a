"""Where vision transformers keep what token pruning needs, for the layouts that are known."""

import dataclasses
from collections.abc import Sequence

from torch import nn

from lora_fused.checks import invalid

_KNOWN = "timm's VisionTransformer, transformers' ViTModel or CLIPVisionModel, or patch, cls, pos "
_KNOWN += "and blocks with q, k and heads"


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A vision transformer with a CLS token in front of its patches.

    Attributes:
        layout: the class that gives it away, for messages.
        blocks: its layers, each called with the hidden states ``[B, S, E]`` first.
        prefix: tokens in front of the patches, CLS the first of them.
        query, key: paths in a block of modules whose outputs are q and k, ``[B, S, H * D]`` or
            ``[B, H, S, D]``.
        head_count: path in a block of H.
    """

    layout: str
    blocks: Sequence[nn.Module]
    prefix: int
    query: str
    key: str
    head_count: str

    def projections(self, layer: int) -> tuple[nn.Module, nn.Module]:
        block = self.blocks[layer]
        return block.get_submodule(self.query), block.get_submodule(self.key)

    def heads(self, layer: int) -> int:
        return _attribute(self.blocks[layer], self.head_count)


def encoder_of(op: str, model: nn.Module) -> Encoder:
    """The one vision transformer in a model; other layouts are refused by name."""
    if not isinstance(model, nn.Module):
        raise invalid(op, "model", "be a module", type(model).__name__)
    found = {name: one for name, module in model.named_modules() if (one := _of(op, module))}
    if not found:
        children = {type(child).__name__ for child in model.children()}
        got = f"{type(model).__name__} of {', '.join(sorted(children)) or 'nothing'}"
        raise invalid(op, "model", f"hold a vision transformer of a known layout ({_KNOWN})", got)
    if len(found) > 1:
        rule = "hold one vision transformer (pass the one that is meant)"
        raise invalid(op, "model", rule, sorted(found))
    return next(iter(found.values()))


def _of(op: str, module: nn.Module) -> Encoder | None:
    names = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(module).__mro__}
    if ("timm", "VisionTransformer") in names:
        return _timm(op, module)
    if ("transformers", "ViTModel") in names:
        return _transformers_vit(op, module)
    clip = {("transformers", "CLIPVisionModel"), ("transformers", "CLIPVisionTransformer")}
    if names & clip and hasattr(module, "encoder"):
        blocks, at = module.encoder.layers, "self_attn"
        return _checked(op, module, blocks, 1, f"{at}.q_proj", f"{at}.k_proj", f"{at}.num_heads")
    if all(hasattr(module, name) for name in ("patch", "cls", "pos", "blocks")):
        return _checked(op, module, module.blocks, 1, "q", "k", "heads")
    return None


def _timm(op: str, module: nn.Module) -> Encoder:
    if module.cls_token is None:
        raise invalid(op, "model", "have a CLS token", f"{type(module).__name__} without one")
    dropout = getattr(module.patch_drop, "prob", 0.0)
    if dropout and module.training:
        rule = "not drop patches at random while it trains"
        raise invalid(op, "model", rule, f"patch_drop of {dropout}")
    kinds = {type(getattr(block, "attn", None)).__name__ for block in module.blocks}
    if kinds != {"Attention"}:  # rotary or differential attention scores otherwise
        rule = "have timm's plain Attention in every block"
        raise invalid(op, type(module).__name__, rule, ", ".join(sorted(kinds)))
    # q and k after their norms, which are called also where they are identities.
    parts = ("attn.q_norm", "attn.k_norm", "attn.num_heads")
    return _checked(op, module, module.blocks, module.num_prefix_tokens, *parts)


def _transformers_vit(op: str, module: nn.Module) -> Encoder:
    if hasattr(module, "layers"):
        names = ("attention.q_proj", "attention.k_proj", "attention.num_attention_heads")
        return _checked(op, module, module.layers, 1, *names)
    at = "attention.attention"  # before transformers 5
    names = (f"{at}.query", f"{at}.key", f"{at}.num_attention_heads")
    return _checked(op, module, module.encoder.layer, 1, *names)


def _checked(op: str, module: nn.Module, blocks, prefix: int, *names: str) -> Encoder:
    """An encoder of which every block has the parts of its layout."""
    for i, block in enumerate(blocks):
        for name in names:
            if _attribute(block, name) is None:
                rule = f"have {name} in every block, as its layout has"
                got = f"none in block {i}, a {type(block).__name__}"
                raise invalid(op, type(module).__name__, rule, got)
    if not len(blocks):
        raise invalid(op, type(module).__name__, "have at least one block", "none")
    return Encoder(type(module).__name__, tuple(blocks), prefix, *names)


def _attribute(module: nn.Module, path: str):
    found = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found
