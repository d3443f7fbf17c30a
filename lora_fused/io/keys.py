"""Tensor names of adapter files, turned into module paths.

A name is read or refused; none is passed over. PEFT's layout is ``<prefix><module>.lora_A.weight``;
the layouts of single files (kohya, diffusers) are converted where the name alone tells the module.
"""

import re
from typing import NamedTuple

from lora_fused.checks import invalid

PREFIX = "base_model.model."


class Part(NamedTuple):
    """What a tensor is: side "a", "b", "alpha" or "saved", of a module (for saved: its path)."""

    side: str
    module: str
    embedding: bool = False


_LINEAR = re.compile(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.weight")
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.([^.]+))?")
_REFUSED = {
    "lora_magnitude_vector": "DoRA magnitudes",
    "lora_B.bias": "a LoRA bias",
    "lora_down": "kohya names inside a PEFT folder",
    "lora_up": "kohya names inside a PEFT folder",
    "lora_": "an unknown LoRA variant",
    "original_module": "a copy of the frozen original",
    "trainable_tokens": "trained token rows",
    "hada_": "LoHa factors",
    "lokr_": "LoKr factors",
    "oft_": "OFT factors",
    "ia3_": "IA3 scales",
    "vera_": "VeRA scales",
    "prompt_embeddings": "a soft prompt",
}
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def parse_peft(keys: list[str], file: str) -> dict[str, Part]:
    """Read the names of a PEFT folder's tensors.

    A missing ``base_model.model.`` (in all names alike), an adapter name inside (``.default.``) and
    the prefixes of torch.compile and FSDP wrappers are converted.

    Raises:
        ValueError: naming the file and the tensor.
    """
    prefixed = [key for key in keys if key.startswith(PREFIX)]
    if prefixed and len(prefixed) < len(keys):
        odd = next(key for key in keys if not key.startswith(PREFIX))
        raise name_fault(odd, file, f"start with {PREFIX!r} as the others do", odd)
    if any(key.startswith("base_model.") for key in keys) and not prefixed:
        raise name_fault(keys[0], file, f"start with {PREFIX!r}", keys[0])
    parts, names, others = {}, {}, {}
    for key in keys:
        path = key.removeprefix(PREFIX)
        for wrapper in _WRAPPERS:
            path = path.replace(wrapper, "")
        if path.startswith(PREFIX):
            raise name_fault(key, file, f"hold {PREFIX!r} once", "an adapter wrapped twice")
        match = _LINEAR.fullmatch(path) or _EMBEDDING.fullmatch(path)
        if match is None:
            others[key] = path
            continue
        module, side, adapter = match.groups()
        if {"modules_to_save", "original_module", "base_layer"} & set(module.split(".")):
            raise name_fault(key, file, "belong to a plain module", "LoRA inside another wrapper")
        names.setdefault(adapter, key)
        parts[key] = Part(side.lower(), module, match.re is _EMBEDDING)
    if len(names) > 1:
        key = list(names.values())[1]
        raise name_fault(key, file, "belong to one adapter", f"adapters named {list(names)}")
    adapter = next(iter(names), None)
    for key, path in others.items():
        parts[key] = Part("saved", _saved_path(path, adapter, key, file))
    _refuse_duplicates(parts, file)
    return parts


def _saved_path(path: str, adapter: str | None, key: str, file: str) -> str:
    tail = ".".join(["", *path.split(".")[-3:]])
    for word, what in _REFUSED.items():
        if f".{word}" in tail:
            raise name_fault(key, file, "be a plain LoRA factor or a saved module's tensor", what)
    # "head.modules_to_save.default.weight" -> "head.weight"; "embed.base_layer.weight" likewise.
    if adapter is not None:
        path = path.replace(f".modules_to_save.{adapter}.", ".")
    path = path.replace(".modules_to_save.", ".")
    return re.sub(r"\.base_layer\.([^.]+)$", r".\1", path)


def _refuse_duplicates(parts: dict[str, Part], file: str) -> None:
    seen: dict[tuple[str, str], str] = {}
    for key, part in parts.items():
        other = seen.setdefault((part.side, part.module), key)
        if other != key:
            raise name_fault(key, file, "be the only one for its module", f"also {other!r}")


# Names with an underscore inside, in the models whose adapters come as single files. kohya writes
# module paths with "_" for ".", so a path can be recovered only where every word is known.
_COMPOUND_WORDS = (
    "down_blocks up_blocks mid_block input_blocks output_blocks middle_block transformer_blocks "
    "single_transformer_blocks to_q to_k to_v to_out to_add_out add_q_proj add_k_proj add_v_proj "
    "ff_context proj_in proj_out conv_in conv_out conv_shortcut time_emb_proj time_embedding "
    "add_embedding linear_1 linear_2 text_model self_attn q_proj k_proj v_proj out_proj o_proj "
    "gate_proj up_proj down_proj text_projection token_embedding position_embedding"
)
_WORDS = (
    "attentions attn attn1 attn2 ff net proj resnets downsamplers upsamplers conv conv1 conv2 op "
    "encoder layers mlp fc1 fc2 model"
)
_KNOWN = frozenset(f"{_COMPOUND_WORDS} {_WORDS}".split(" "))
_COMPONENTS = {
    "unet": "unet",
    "transformer": "transformer",
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
}
_KOHYA = re.compile(r"lora_([a-z0-9]+)_(.+?)(?:[._]lora_(down|up)\.weight|\.(alpha))")
_DIFFUSERS = re.compile(
    r"(?:(unet|transformer|text_encoder(?:_[23])?)\.)?(.+?)(?:\.processor)?"
    r"(?:\.(to_[qkv]|to_out)_lora\.|\.lora(?:_linear_layer)?\.|\.(?=lora_[AB]\.|alpha))"
    r"(down\.weight|up\.weight|lora_A\.weight|lora_B\.weight|alpha)"
)
_SIDES = {"down": "a", "up": "b", "lora_A": "a", "lora_B": "b", "alpha": "alpha"}
_TEXT_ENCODER = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def parse_single(keys: list[str], file: str) -> tuple[str, dict[str, Part]]:
    """Read the names in a file that stands alone: which layout it has, and what each tensor is.

    A file of one component (a UNet, say) gives paths in that component; a file of several gives
    paths that begin with the component (``unet.``, ``text_encoder.``), as diffusers names them.

    Raises:
        ValueError: naming the file and the first tensor that does not fit the layout.
    """
    if any(key.startswith(PREFIX) for key in keys):
        rule = "be in a folder with its adapter_config.json (alpha is only there)"
        raise name_fault(keys[0], file, rule, "a PEFT tensor alone")
    kohya = any(_KOHYA.fullmatch(key) for key in keys)
    found = {key: (_parse_kohya if kohya else _parse_diffusers)(key, file) for key in keys}
    several = len({component for component, _ in found.values()}) > 1
    parts = {
        key: part._replace(module=f"{component}.{part.module}") if several and component else part
        for key, (component, part) in found.items()
    }
    _refuse_duplicates(parts, file)
    return ("kohya" if kohya else "diffusers"), parts


def _parse_kohya(key: str, file: str) -> tuple[str, Part]:
    match = _KOHYA.fullmatch(key)
    if match is None or match[1] not in _COMPONENTS:
        raise name_fault(key, file, "be a LoRA factor or alpha in kohya's layout", _what(key))
    component = _COMPONENTS[match[1]]
    # Some converters put the component into the name a second time.
    words = match[2].removeprefix(f"{component}_").split("_")
    path: list[str] = []
    while words:
        sizes = range(min(3, len(words)), 0, -1)
        size = next((n for n in sizes if "_".join(words[:n]) in _KNOWN), 0)
        if not size and words[0].isdigit():
            size = 1
        if not size:
            rule = "consist of known words (its dots are lost, so the module path is a guess)"
            raise name_fault(key, file, rule, f"{words[0]!r}")
        path.append("_".join(words[:size]))
        words = words[size:]
    return component, Part(_SIDES[match[3] or match[4]], ".".join(path))


def _parse_diffusers(key: str, file: str) -> tuple[str, Part]:
    match = _DIFFUSERS.fullmatch(key)
    if match is None:
        raise name_fault(key, file, "be a LoRA factor in a known layout", _what(key))
    component, module, attention, tail = match.groups()
    if attention and "self_attn" in module:
        attention = _TEXT_ENCODER[attention]
    elif attention == "to_out":
        attention = "to_out.0"
    module = f"{module}.{attention}" if attention else module
    return component or "", Part(_SIDES[tail.split(".")[0]], module)


def _what(key: str) -> str:
    words = ("lora_mid", "hada_", "lokr_", "dora_scale", "diff", "oft_", "glora")
    return next((f"{word}* (another method)" for word in words if f".{word}" in key), "that name")


def name_fault(key: str, file: str, rule: str, got: object) -> ValueError:
    return invalid("read_adapter", f"tensor {key!r} in {file}", rule, got)
