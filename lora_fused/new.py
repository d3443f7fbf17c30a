"""A fresh adapter to train, as PEFT would begin it."""

import math
import re
from collections.abc import Sequence

import torch
from torch import nn

from lora_fused.adapters import Adapter, LoraFactors, peft_config
from lora_fused.checks import check_whole, invalid
from lora_fused.nn.linear import CONV1D, MixtureLayer, layer_class, layer_sizes

_OP = "new_adapter"


def new_adapter(
    model: nn.Module,
    name: str,
    *,
    rank: int = 8,
    alpha: float | None = None,
    target_modules: Sequence[str] | str,
    use_rslora: bool = False,
    seed: int,
) -> Adapter:
    """A new adapter of a model's modules that changes nothing yet: its update is zero.

    A is uniform within 1 / sqrt(I) (Kaiming with a = sqrt(5)) and B zero; of an embedding A is
    zero and B normal: PEFT's defaults.

    Args:
        model: The base, attached or not.
        name: What mixtures call the adapter.
        rank: R, of every module.
        alpha: The scale is alpha / R, with rsLoRA alpha / sqrt(R). Default: R.
        target_modules: As in PEFT: module names, each a whole path or the end of one; a regular
            expression that fits whole paths; or ``"all-linear"``, every linear layer but the head
            that the model names as its output embedding.
        use_rslora: See alpha.
        seed: Of A. Adapters of one seed and the same modules share their A.

    Returns:
        The adapter, in float32 on the CPU. lora_fused.io writes it with a config that names the
        model (``model.config``), rank, alpha and targets.

    Raises:
        ValueError: a wrong argument; no module fits; one that fits cannot be adapted.

    Example:
        >>> bank.add(new_adapter(model, "mine", target_modules=["q_proj", "v_proj"], seed=0))
        >>> optimizer = torch.optim.AdamW(bank.trainable(["mine"]))
    """
    check_whole(_OP, "rank", rank)
    alpha = rank if alpha is None else alpha
    if not isinstance(alpha, (int, float)) or not 0 < abs(alpha) < float("inf"):
        raise invalid(_OP, "alpha", "be a finite number other than 0", repr(alpha))
    if not isinstance(seed, int):
        raise invalid(_OP, "seed", "be an integer", repr(seed))
    if not isinstance(target_modules, str):
        target_modules = list(target_modules)
    targets = _targets(model, target_modules)
    generator = torch.Generator().manual_seed(seed)
    scale = alpha / (math.sqrt(rank) if use_rslora else rank)
    parts = {path: _part(module, rank, scale, generator) for path, module in targets.items()}
    config = peft_config(
        # PEFT, too, writes out what "all-linear" stood for.
        sorted(targets) if target_modules == "all-linear" else target_modules,
        rank,
        alpha,
        base=_base_name(model),
        fan_in_fan_out=any(_is_conv1d(module) for module in targets.values()),
        use_rslora=bool(use_rslora),
    )
    metadata = {"config": config}
    pointwise = [path for path, module in targets.items() if isinstance(module, nn.Conv2d)]
    if pointwise:
        metadata["pointwise"] = pointwise  # lora_fused.io writes theirs as PEFT does
    return Adapter(name, parts, metadata=metadata)


def _part(module: nn.Module, rank: int, scale: float, generator: torch.Generator) -> LoraFactors:
    size_in, size_out = layer_sizes(module)
    if isinstance(module, nn.Embedding):
        lora_b = torch.empty(rank, size_out).normal_(generator=generator)
        return LoraFactors(torch.zeros(rank, size_in), lora_b, scale, embedding=True)
    bound = 1 / math.sqrt(size_in)
    lora_a = torch.empty(rank, size_in).uniform_(-bound, bound, generator=generator)
    return LoraFactors(lora_a, torch.zeros(rank, size_out), scale)


def _targets(model: nn.Module, wanted: list[str] | str) -> dict[str, nn.Module]:
    # What an attached layer holds is no module of the base.
    ours = {"lora_stack", "lora_basis", "lora_saved"}
    modules = {p: m for p, m in model.named_modules() if not ours & set(p.split("."))}
    if isinstance(wanted, str):
        if wanted == "all-linear":
            return _all_linear(model, modules)
        try:
            found = [path for path in modules if re.fullmatch(wanted, path)]
        except re.error as error:
            raise invalid(_OP, "target_modules", f"be a regex ({error})", repr(wanted)) from error
    elif wanted and all(isinstance(end, str) and end for end in wanted):
        ends = tuple(f".{end}" for end in wanted)
        found = [path for path in modules if f".{path}".endswith(ends)]
        idle = [end for end in wanted if not any(f".{path}".endswith(f".{end}") for path in found)]
        if idle:
            raise invalid(_OP, "target_modules", "each fit a module of the model", f"{idle}")
    else:
        rule = "be names of modules, a regex or 'all-linear'"
        raise invalid(_OP, "target_modules", rule, repr(wanted))
    for path in found:
        if not _supported(modules[path]):
            rule = "fit only nn.Linear, nn.Embedding, 1 x 1 nn.Conv2d and transformers' Conv1D"
            got = f"{path!r}, {type(modules[path]).__qualname__}"
            raise invalid(_OP, "target_modules", rule, got)
    if not found:
        raise invalid(_OP, "target_modules", "fit a module of the model", repr(wanted))
    return {path: modules[path] for path in found}


def _all_linear(model: nn.Module, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    found = {
        path: module
        for path, module in modules.items()
        if _supported(module)
        and not isinstance(module, (nn.Embedding, nn.Conv2d))  # PEFT takes no convolution either
        and module is not output
    }
    if not found:
        raise invalid(_OP, "model", "have linear layers", type(model).__qualname__)
    return found


def _supported(module: nn.Module) -> bool:
    return isinstance(module, MixtureLayer) or layer_class(module) is not None


def _is_conv1d(module: nn.Module) -> bool:
    return any((kind.__module__, kind.__name__) == CONV1D for kind in type(module).__mro__)


def _base_name(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None
