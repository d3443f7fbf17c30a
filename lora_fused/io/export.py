"""The adapter_config.json to write with an adapter."""

import copy
import math
import re
import struct
from collections import Counter

from lora_fused.adapters import Adapter, LoraFactors, peft_config
from lora_fused.checks import invalid
from lora_fused.io.config import check_config, covers, rank_and_scale
from lora_fused.io.gaps import gaps


def config_for(adapter: Adapter) -> dict:
    """The config to write with an adapter: its own, changed only where the adapter has changed.

    Ranks and scales that differ from what the config says go into rank_pattern and alpha_pattern;
    target_modules becomes the list of module paths if modules came or went.

    Raises:
        ValueError: naming the module whose rank or scale no config can express, or the key that
            its own config lacks or that cannot be honoured.
    """
    where = f"adapter {adapter.name!r}"
    if not adapter.modules:
        raise invalid("write_adapter", where, "have at least one module", "none")
    for module, part in adapter.modules.items():
        if part.lora_a.shape[0] < 1 or not 0 < abs(part.scale) < 3e38:
            got = f"rank {part.lora_a.shape[0]}, scale {part.scale}"
            rule = "have a rank of at least 1 and a finite scale other than 0"
            raise invalid("write_adapter", f"{module} of {where}", rule, got)
    original = adapter.metadata.get("config")
    if original:
        check_config(original, f"the config of {where}")
    config = copy.deepcopy(original) if original else _new_config(adapter)
    changed = {}
    for module, part in adapter.modules.items():
        expected = rank_and_scale(config, module)
        if expected[0] != part.lora_a.shape[0] or not _same(expected[1], part.scale):
            changed[module] = part
    for key, value in (("rank_pattern", _rank), ("alpha_pattern", _alpha)):
        patterns = {
            f"^{re.escape(module)}": value(part, config.get("use_rslora"))
            for module, part in changed.items()
        }
        if patterns:
            config[key] = {**patterns, **(config.get(key) or {})}
    held = adapter.metadata.get("keys") or adapter.modules
    selected = all(covers(config, module) for module in adapter.modules)
    if held.keys() != adapter.modules.keys() or not selected or gaps(config, adapter.modules):
        config["target_modules"] = sorted(adapter.modules)
        config.update(exclude_modules=None, layers_to_transform=None, layers_pattern=None)
    if config.get("modules_to_save") and not adapter.saved:
        config["modules_to_save"] = None
    check_config(config, f"the config written for {where}")
    _refuse_inexact(config, adapter, where)
    return config


def _refuse_inexact(config: dict, adapter: Adapter, where: str) -> None:
    for module, part in adapter.modules.items():
        rank, scale = rank_and_scale(config, module)
        if rank != part.lora_a.shape[0] or not _same(scale, part.scale):
            got = f"rank {part.lora_a.shape[0]}, scale {part.scale!r}"
            raise invalid("write_adapter", f"{module} of {where}", "fit a PEFT config", got)
        if not covers(config, module):
            rule = "be outside its saved modules and excluded modules"
            raise invalid("write_adapter", f"{module} of {where}", rule, module)


def _new_config(adapter: Adapter) -> dict:
    parts = adapter.modules.values()
    ranks = Counter(part.lora_a.shape[0] for part in parts)
    alphas = Counter(_alpha(part, False) for part in parts)
    saved = {path.rpartition(".")[0] for path in adapter.saved} - adapter.modules.keys()
    alpha, rank = (counted.most_common(1)[0][0] for counted in (alphas, ranks))
    config = peft_config(
        sorted(adapter.modules), rank, alpha, base=adapter.metadata.get("base_model")
    )
    patterns = {"alpha_pattern": {}, "rank_pattern": {}, "modules_to_save": sorted(saved) or None}
    return dict(sorted((config | patterns).items()))  # as a file is read


def _rank(part: LoraFactors, rslora: bool) -> int:
    return part.lora_a.shape[0]


def _alpha(part: LoraFactors, rslora: bool) -> float | int:
    divisor = math.sqrt(part.lora_a.shape[0]) if rslora else part.lora_a.shape[0]
    alpha = part.scale * divisor
    whole = round(alpha)
    return whole if whole and _same(whole / divisor, part.scale) else alpha


def _same(left: float, right: float) -> bool:
    # Scales are float32 in a stack; what came back from one is compared as such.
    return struct.pack("f", left) == struct.pack("f", right)
