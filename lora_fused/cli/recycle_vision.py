"""What ``lora-fused recycle`` runs on: vision models, their image scaling, heads of adapters."""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_fused.adapters import AdapterBank
from lora_fused.checks import invalid, shape

_OP = "recycle"
_SHORT = {
    "q": ("q", "q_proj", "query"),
    "k": ("k", "k_proj", "key"),
    "v": ("v", "v_proj", "value"),
}


class Vision(NamedTuple):
    """A vision model in eval mode, and how images get into it and features out of it.

    Attributes:
        model: In float32.
        features: ``[N, C, H, W]`` -> ``[N, E]``: what the model's head reads; without a head, what
            the model gives as its image embedding, its pooling (one without weights), or CLS.
        width: E.
        prepare: A list of PIL images -> ``[N, C, H, W]``.
        black, white: ``[C]`` what prepare makes of these pixels: the range of pixel values.
        size: H, W.
        head: What the model calls its head, in adapters that hold one.
    """

    model: nn.Module
    features: Callable[[Tensor], Tensor]
    width: int
    prepare: Callable[[list], Tensor]
    black: Tensor
    white: Tensor
    size: tuple[int, int]
    head: str

    def pixels(self, side: int | None) -> dict:
        """What ``invert`` asks of its images; ``side`` in place of the model's own size."""
        ends = self.black.tolist(), self.white.tolist()
        return {
            "size": self.size if side is None else side,
            "channels": len(self.black),
            "pixel_range": ends,
        }


def attached(model: str | Vision, bank, device: str = "cpu") -> tuple:
    """The model, loaded if it is a name, and its handle; None where the bank holds no adapter."""
    from lora_fused.nn import attach

    if isinstance(model, str):
        saved = {path.rpartition(".")[0] for tensors in bank.saved.values() for path in tensors}
        vision = load_vision(model, {*bank.modules, *saved}, device)
    else:
        vision = model
    check_saved(bank, vision.head)
    names = own_names(vision.model, bank.modules)
    bank = bank if names is None else renamed(bank, names)
    handle = attach(vision.model, bank, saved_modules="ignore") if len(bank) else None
    return vision, handle


def load_vision(name: str, modules: Iterable[str] = (), device: str = "cpu") -> Vision:
    """A transformers folder, or a model that timm knows by name.

    Args:
        name: The folder; or timm's name, which timm looks up (``local-dir:PATH`` is a folder).
        modules: That adapters have: of the model and the same with a head, the one that has them.
        device: Where it runs.
    """
    need("PIL", "pillow")
    found = _transformers if Path(name).is_dir() else _timm
    if found is _timm and ":" not in name and ("/" in name or find_spec("timm") is None):
        reason = "" if "/" in name else " (names of timm's models need: pip install timm)"
        what = "no folder of transformers" if Path(name).exists() else "no such folder"
        raise FileNotFoundError(f"{_OP}: {what}: {name}{reason} (hubs are not asked)")
    model, features, prepare, head = found(name, modules)
    model.eval().requires_grad_(False).to(device)
    black, white = (prepare([_plain(level)])[0] for level in (0, 255))
    with torch.no_grad():
        out = features(black[None].to(device))
    if out.dim() != 2:
        raise invalid(_OP, f"model {name}", "give one row of features per image", shape(out))
    ends = black.amin((1, 2)), white.amax((1, 2))
    size = tuple(black.shape[1:])
    return Vision(model, features, out.shape[1], prepare, *ends, size, head)


def _plain(level: int):
    from PIL import Image

    return Image.new("RGB", (256, 256), (level, level, level))


def _transformers(folder: str, modules: Iterable[str]) -> tuple:
    need("transformers")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what it warns of is checked below
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    kind = _class_for(transformers, config, set(modules))
    options = {"dtype": torch.float32, "output_loading_info": True, "local_files_only": True}
    model, info = kind.from_pretrained(folder, **options)
    missing = [k for k in info["missing_keys"] if k.split(".")[0] not in ("classifier", "pooler")]
    if missing:
        rule = f"hold every weight of {kind.__name__}"
        raise invalid(_OP, f"model {folder}", rule, f"none for {sorted(missing)[:3]}")
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        rule = "hold its image processor (preprocessor_config.json)"
        raise invalid(_OP, f"model {folder}", rule, str(error).splitlines()[0]) from None

    def prepare(images: list) -> Tensor:
        return processor(images=images, return_tensors="pt")["pixel_values"]

    return model, _features_of(model), prepare, "classifier"


def _class_for(transformers, config, modules: set[str]) -> type:
    """The class that has the modules: the one that the config names, or one with or without head.

    Adapters trained on ``ViTForImageClassification`` name modules ``vit.layers...``, those trained
    on ``ViTModel`` the same ones ``layers...``.
    """
    found = [(getattr(transformers, name, None), config) for name in config.architectures or ()]
    if config.model_type == "clip":  # of both towers one is needed
        found.append((transformers.CLIPVisionModelWithProjection, config.vision_config))
    for table in (transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, transformers.MODEL_MAPPING):
        found.append((table.get(type(config), None), config))
    found = [one for one in found if getattr(one[0], "main_input_name", "") == "pixel_values"]
    if not found:
        rule = "read images (ViT, CLIP, DINOv2, ...)"
        raise invalid(_OP, "model", rule, f"model_type {config.model_type!r}")
    for kind, own in found:
        with torch.device("meta"):
            model = kind(own)
        if own_names(model, modules) is not None:
            return kind
    return found[0][0]  # attach says what it lacks


def own_names(model: nn.Module, modules: Iterable[str]) -> dict[str, str] | None:
    """Adapters' module names -> the model's; None if it lacks some.

    transformers 5 calls modules of ViT, CLIP and others differently than 4 did, and with a head
    there is a prefix before the same names. It renames a checkpoint's tensors as it loads them;
    what adapters call them goes by the same rules.
    """
    known, found = {name for name, _ in model.named_modules()}, {}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    for name, today in _todays(model, modules).items():
        wanted = [one for own in (name, today) for one in (own, prefix + own)]
        wanted += [own.removeprefix(prefix) for own in (name, today)]
        fits = [one for one in wanted if one in known]
        if not fits:
            return None
        found[name] = fits[0]
    return found


def _todays(model: nn.Module, modules: Iterable[str]) -> dict[str, str]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # before transformers 5
        return {name: name for name in modules}
    plain = ("WeightRenaming", "PrefixChange")  # the others make new tensors of several
    rules = get_model_conversion_mapping(model) if hasattr(model, "config") else []
    found = {}
    for name in modules:
        key = f"{name}.weight"
        for rule in rules:
            if type(rule).__name__ in plain:
                key, _ = rule.rename_source_key(key)
        found[name] = key.removesuffix(".weight")
    return found


def renamed(bank: AdapterBank, names: dict[str, str]) -> AdapterBank:
    """The same adapters with other module names; the bank itself where none differs."""
    if all(old == new for old, new in names.items()):
        return bank
    made = AdapterBank()
    adapters = [bank.adapter(name) for name in bank.names]
    for adapter in adapters:
        own = [names[module] for module in adapter.modules]
        if len(set(own)) < len(own):
            rule = "name each module of the model once"
            raise invalid(_OP, f"adapter {adapter.name!r}", rule, sorted(adapter.modules)[:4])
        adapter.modules = dict(zip(own, adapter.modules.values(), strict=True))
    made.add_many(adapters)
    return made


def _features_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """What the head reads: a classifier is taken out, for heads are the adapters' own."""
    if hasattr(model, "classifier"):
        model.classifier = nn.Identity()
        return lambda images: model(pixel_values=images).logits.flatten(1)
    pooler = getattr(model, "pooler", None)
    weighted = pooler is not None and any(True for _ in pooler.parameters())

    def features(images: Tensor) -> Tensor:
        out = model(pixel_values=images)
        for name in ("image_embeds", *(() if weighted else ("pooler_output",))):
            if getattr(out, name, None) is not None:
                return out[name].flatten(1)
        return out.last_hidden_state[:, 0]

    return features


def _timm(name: str, _: Iterable[str]) -> tuple:
    need("timm")
    import timm

    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except (RuntimeError, OSError) as error:
        rule = "be a folder that is there, or a model that timm can load"
        raise invalid(_OP, f"model {name}", rule, str(error).splitlines()[0]) from error
    options = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**options, is_training=False)
    head = model.pretrained_cfg.get("classifier") or "head"

    def prepare(images: list) -> Tensor:
        return torch.stack([transform(image) for image in images])

    return model, model, prepare, head


def targets_of(model: nn.Module, wanted: str | None) -> list[str]:
    """Module names of a meta-LoRA: q, k and v stand for what the model calls them."""
    ends = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if wanted is None:
        wanted = "qkv" if "qkv" in ends else "q,v"  # timm has one layer for the three
    names = [name.strip() for name in wanted.split(",")]
    return [next((own for own in _SHORT.get(name, ()) if own in ends), name) for name in names]


def need(package: str, install: str | None = None) -> None:
    """Raise, in one line that says what to run, where a package is missing."""
    if find_spec(package) is None:
        install = install or package
        raise ImportError(f"{_OP}: {install} must be installed; run: pip install {install}")


def check_saved(bank, head: str) -> None:
    """Refuse adapters that hold fully trained modules besides a head: features would lack them."""
    for name, tensors in bank.saved.items():
        others = [path for path in tensors if not path.startswith(f"{head}.")]
        if others:
            rule = f"hold no fully trained modules but its head, {head!r}"
            raise invalid(_OP, f"adapter {name!r}", rule, others[:3])


def heads_of(vision: Vision, bank, file: str | None) -> dict[str, tuple[Tensor, Tensor | None]]:
    """Adapter -> (weight, bias): from a file, or as each adapter saved it (modules_to_save)."""
    if file is None:
        held = {name: bank.saved.get(name, {}) for name in bank.names}
        found = {name: _leaves(tensors, f"{vision.head}.") for name, tensors in held.items()}
        rule = f"hold its head {vision.head!r} (modules_to_save), or --heads be given"
    else:
        tensors = _read_heads(Path(file))
        own = ("weight", "bias")
        found = {
            name: {leaf: [tensors[f"{name}.{leaf}"]] for leaf in own if f"{name}.{leaf}" in tensors}
            for name in bank.names
        }
        rule = f"have a head in {file}, as <adapter>.weight and, if need be, <adapter>.bias"
    heads = {}
    for name, leaves in found.items():
        if len(leaves.get("weight", ())) != 1 or len(leaves.get("bias", ())) > 1:
            got = "none" if not leaves else "something else than one linear layer"
            raise invalid(_OP, f"adapter {name!r}", rule, got)
        weight, (bias,) = leaves["weight"][0], leaves.get("bias", [None])
        if weight.dim() != 2 or weight.shape[1] != vision.width:
            rule = f"be [classes, {vision.width}], a row of the model's features wide"
            raise invalid(_OP, f"head of {name!r}", rule, shape(weight))
        heads[name] = (weight, bias)
    return heads


def _leaves(tensors: dict[str, Tensor], start: str) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for path, tensor in tensors.items():
        if path.startswith(start):
            found.setdefault(path.rpartition(".")[2], []).append(tensor)
    return found


def _read_heads(file: Path) -> dict[str, Tensor]:
    from lora_fused.io.tensors import read_tensors

    if not file.is_file():
        raise FileNotFoundError(f"{_OP}: no such file of heads: {file}")
    return read_tensors(file, False, _OP)[0]
