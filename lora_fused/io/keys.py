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
    parts, names = {}, {}
    for key in keys:
        path = key.removeprefix(PREFIX)
        for wrapper in _WRAPPERS:
            path = path.replace(wrapper, "")
        if path.startswith(PREFIX):
            raise name_fault(key, file, f"hold {PREFIX!r} once", "an adapter wrapped twice")
        match = _LINEAR.fullmatch(path) or _EMBEDDING.fullmatch(path)
        if match is None:
            parts[key] = Part("saved", _saved_path(path, key, file))
            continue
        module, side, adapter = match.groups()
        if {"modules_to_save", "original_module", "base_layer"} & set(module.split(".")):
            raise name_fault(key, file, "belong to a plain module", "LoRA inside another wrapper")
        names.setdefault(adapter, key)
        parts[key] = Part(side.lower(), module, match.re is _EMBEDDING)
    if len(names) > 1:
        key = list(names.values())[1]
        raise name_fault(key, file, "belong to one adapter", f"adapters named {list(names)}")
    _refuse_duplicates(parts, file)
    return parts


def _saved_path(path: str, key: str, file: str) -> str:
    tail = ".".join(path.split(".")[-3:])
    for word, what in _REFUSED.items():
        if word in tail:
            raise name_fault(key, file, "be a plain LoRA factor or a saved module's tensor", what)
    # "head.modules_to_save.default.weight" -> "head.weight"; "embed.base_layer.weight" likewise.
    path = re.sub(r"\.modules_to_save(?:\.default)?\.", ".", path)
    return re.sub(r"\.base_layer\.([^.]+)$", r".\1", path)


def _refuse_duplicates(parts: dict[str, Part], file: str) -> None:
    seen: dict[Part, str] = {}
    for key, part in parts.items():
        if part in seen:
            raise name_fault(key, file, "be the only one for its module", f"also {seen[part]!r}")
        seen[part] = key


def name_fault(key: str, file: str, rule: str, got: object) -> ValueError:
    return invalid("read_adapter", f"tensor {key!r} in {file}", rule, got)
