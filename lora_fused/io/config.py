"""What an adapter_config.json means: rank and scale of each module, which modules it covers.

Matching follows PEFT's own rules, so that a file means here what it means there. Whatever changes
the arithmetic and is not computed by this package is refused by its key.
"""

import math
import re
from collections.abc import Iterable

from lora_fused.checks import invalid

# Keys whose value never changes what a saved adapter computes.
_HARMLESS = (
    "auto_mapping base_model_name_or_path corda_config eva_config fan_in_fan_out inference_mode "
    "loftq_config lora_dropout lora_ga_config megatron_core peft_version qalora_group_size "
    "revision runtime_config task_type"
)
_UNDERSTOOD = (
    "alpha_pattern bias exclude_modules init_lora_weights layers_pattern layers_to_transform "
    "lora_alpha modules_to_save peft_type r rank_pattern target_modules use_rslora"
)
_UNSUPPORTED = {
    "alora_invocation_tokens": "activated LoRA applies the update to some tokens only",
    "arrow_config": "Arrow routing needs every expert; it is not one adapter",
    "enable_lora": "old merged-qkv LoRA is a grouped convolution",
    "ensure_weight_tying": "tied adapters share factors with another module",
    "kasa_config": "KaSA changes the base weight and scales the rank components",
    "layer_replication": "replicated layers are not in the base model",
    "lora_bias": "the update would have a bias",
    "megatron_config": "Megatron layers hold shards",
    "monteclora_config": "MonteCLoRA samples its factors",
    "target_parameters": "the update is of a parameter, not of a module",
    "trainable_token_indices": "trained token rows are not a low-rank update",
    "use_bdlora": "block-diagonal factors are not plain factors",
    "use_dora": "DoRA rescales the base weight",
    "use_qalora": "QA-LoRA pools the inputs",
    "velora_config": "VeLoRA saves more than factors",
}
# Initialisations that leave the base weights as they are; the others (pissa, olora, corda, loftq,
# lora_ga) train against a changed base, and a saved file that still names them was not converted.
_INITS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
_TASK_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score")}


def check_config(config: dict, where: str) -> None:
    """Refuse a config that cannot be honoured exactly.

    Args:
        config: The parsed adapter_config.json.
        where: What the errors call it, normally its path.

    Raises:
        ValueError: naming the key.
    """
    if not isinstance(config, dict):
        raise _fault(where, "the config", "be a JSON object", type(config).__name__)
    if config.get("peft_type") != "LORA":
        raise _fault(where, "peft_type", "be 'LORA'", config.get("peft_type"))
    for key, reason in _UNSUPPORTED.items():
        if config.get(key) not in (None, False):
            raise _fault(where, key, f"be off ({reason})", config[key])
    if config.get("bias", "none") != "none":
        rule = "be 'none' (trained biases of the base are not part of an adapter here)"
        raise _fault(where, "bias", rule, config["bias"])
    init = config.get("init_lora_weights")
    if not (isinstance(init, bool) or init in _INITS):
        rule = f"be one of {_INITS[1:]} (others train against a changed base; convert on saving)"
        raise _fault(where, "init_lora_weights", rule, init)
    known = {*_HARMLESS.split(), *_UNDERSTOOD.split(), *_UNSUPPORTED}
    for key in config.keys() - known:
        # An empty value is what every option PEFT has ever added means by "not used".
        if config[key] not in (None, False, "", [], {}):
            raise _fault(where, key, "be a known config key or empty", config[key])
    _check_numbers(config, where)
    _check_selection(config, where)


def rank_and_scale(config: dict, module: str) -> tuple[int, float]:
    """The rank and the factor of B A that the config gives a module.

    scale = alpha / rank, or alpha / sqrt(rank) with use_rslora; rank_pattern and alpha_pattern
    hold regular expressions matched against the end of the module's path, the first match counts.
    """
    rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def base_key(name: object) -> str:
    """What a base model is compared by: the last part of its path, ignoring case; "" for none.

    The rest is where the model lay on somebody's machine. In a hub's cache the last part is a hash,
    and the folder ``models--<owner>--<name>`` counts.
    """
    parts = re.findall(r"[^/\\]+", name) if isinstance(name, str) else []
    cached = [part.split("--")[-1] for part in parts if part.startswith("models--")]
    return [*parts, *cached][-1].casefold() if parts else ""


def covers(config: dict, module: str) -> bool:
    """Whether the config's selection (targets, exclusions, layers) takes in a module path.

    A config without target_modules leaves the choice to the file and takes in every module.
    """
    excluded = config.get("exclude_modules")
    if excluded and _selects(excluded, module):
        return False
    if any(f".{saved}." in f".{module}." for saved in config.get("modules_to_save") or ()):
        return False
    targets = config.get("target_modules")
    if targets is None or targets == "all-linear":
        return True
    if not _selects(targets, module):
        return False
    layers = config.get("layers_to_transform")
    # A full path in target_modules is taken whatever the layers, as in PEFT.
    if isinstance(targets, str) or module in targets or layers in (None, []):
        return True
    layer = _layer_index(module, config.get("layers_pattern"))
    return layer is not None and layer in ([layers] if isinstance(layers, int) else layers)


def layers_without(config: dict, modules: Iterable[str]) -> list[int]:
    """Layers that layers_to_transform names and no module belongs to."""
    layers = config.get("layers_to_transform")
    wanted = [layers] if isinstance(layers, int) else layers or []
    found = {_layer_index(module, config.get("layers_pattern")) for module in modules}
    return sorted(set(wanted) - found)


def saves(config: dict, path: str) -> bool:
    """Whether a tensor path belongs to a module that the config declares as fully trained."""
    # PEFT compares the ends of names: "classifier" also takes in "pre_classifier".
    parents = path.split(".")[:-1]
    declared = [*(config.get("modules_to_save") or ())]
    declared += _TASK_HEADS.get(config.get("task_type"), ())
    prefixes = [".".join(parents[: i + 1]) for i in range(len(parents))]
    return any(prefix.endswith(name) for prefix in prefixes for name in declared)


def _fault(where: str, key: str, rule: str, got: object) -> ValueError:
    return invalid("read_adapter", f"{key} in {where}", rule, repr(got))


def _check_numbers(config: dict, where: str) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key)
        if not (patterns is None or isinstance(patterns, dict)):
            raise _fault(where, key, "map patterns to numbers", patterns)
        for pattern in patterns or ():
            _check_regex(where, key, pattern)
    ranks = {"r": config.get("r"), **(config.get("rank_pattern") or {})}
    for key, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            key = key if key == "r" else f"rank_pattern[{key!r}]"
            raise _fault(where, key, "be an integer of at least 1", rank)
    alphas = {"lora_alpha": config.get("lora_alpha"), **(config.get("alpha_pattern") or {})}
    for key, alpha in alphas.items():
        number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
        if not number or not 0 < abs(alpha) <= 3e38:
            key = key if key == "lora_alpha" else f"alpha_pattern[{key!r}]"
            raise _fault(where, key, "be a finite number other than 0", alpha)
    if not isinstance(config.get("use_rslora") or False, bool):
        raise _fault(where, "use_rslora", "be true or false", config["use_rslora"])


def _check_selection(config: dict, where: str) -> None:
    for key in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = config.get(key)
        names = isinstance(value, list) and all(isinstance(item, str) for item in value)
        one_string = isinstance(value, str) and key != "modules_to_save"
        if not (value is None or names or one_string):
            raise _fault(where, key, "be a list of strings or a string", value)
        if isinstance(value, str) and value != "all-linear":
            _check_regex(where, key, value)
    layers = config.get("layers_to_transform")
    listed = isinstance(layers, list) and all(type(layer) is int for layer in layers)
    if not (layers is None or type(layers) is int or listed):
        raise _fault(where, "layers_to_transform", "be integers", layers)
    if isinstance(config.get("target_modules"), str) and layers not in (None, []):
        raise _fault(where, "layers_to_transform", "be null when target_modules is a regex", layers)


def _check_regex(where: str, key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise _fault(where, key, f"hold regular expressions ({error})", pattern) from error


def _by_pattern(patterns: dict | None, module: str, default):
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _selects(names: list[str] | str, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return module in names or module.endswith(tuple(f".{name}" for name in names))


def _layer_index(module: str, layers_pattern: list[str] | str | None) -> int | None:
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else layers_pattern
    for pattern in patterns or [None]:
        # The first index counts: the second of "layers.1.experts.0" is an expert.
        named = r".*?\.[^.]*\.(\d+)\." if not pattern else rf"(?:^|.*?\.){pattern}\.(\d+)\."
        match = re.match(named, module)
        if match:
            return int(match.group(1))
    return None
