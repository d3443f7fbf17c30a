"""Several adapters merged into one, by every rule that PEFT's users know.

Exact: "cat", "svd" and task arithmetic (either with weights of any sign) come from the factors
alone. PEFT's ``add_weighted_adapter`` says: "cat" joins the factors, "svd" factorises the dense
sum, "linear" adds the factors, each times sqrt(|w_k s_k|), and the entrywise rules treat factors
("ties") or dense updates ("ties_svd"). **We compute** the same. **We differ**: "svd" never forms
the sum (two thin orthogonalisations and an SVD as small as the sum of the ranks); "*_svd" holds one
dense update at a time and finds only the singular vectors it keeps; "*_core" and "*_knots" apply
the same rules in small lossless spaces; every result says how far it is from the exact sum; the
default is exact; draws have a seed; one adapter alone is not silently merged by "linear".
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import SupportsFloat

import torch

from lora_fused.adapters import BASE, Adapter, AdapterBank, LoraFactors
from lora_fused.checks import invalid
from lora_fused.methods import exact_sums
from lora_fused.methods.core_space import merge_cores, merge_knots
from lora_fused.methods.dense_space import merge_updates
from lora_fused.methods.entrywise import RULES, Entrywise
from lora_fused.methods.exact_sums import Part, Used
from lora_fused.methods.factor_space import layer_of, merge_factors
from lora_fused.methods.merge_report import Merged, MergeReport, ModuleReport, relative

_OP = "merge"
_SPACES = {"svd": merge_updates, "core": merge_cores, "knots": merge_knots}
EXACT = ("cat", "svd", "linear")
TYPES = (*EXACT, *RULES, *(f"{rule}_{space}" for space in _SPACES for rule in RULES))
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.no_grad()
def merge(
    bank: AdapterBank,
    weights: Mapping[str, float],
    *,
    combination_type: str = "cat",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
    name: str = "merged",
    dtype: torch.dtype | None = None,
    saved_modules: str = "error",
) -> Merged:
    """Merge adapters of a bank into one adapter; the bank stays as it is.

    D = sum_k weights[k] * scale[k] * B_k A_k for each module that any of them adapts; an adapter
    without the module adds nothing to it. Weights may be negative and need not sum to one; one of
    weight 0 is left out, except that it has a vote where signs are elected, as in PEFT.

    Args:
        bank: The adapters, also those in training. Ranks, scales and modules may differ.
        weights: Adapter name -> weight; nothing is normalised.
        combination_type: ``"cat"``: D exactly, of the sum of the ranks. ``"svd"``: the best
            approximation of D of a given rank. ``"linear"``: PEFT's sum of the factors, for parity;
            cross terms make it another update than D (read its error), and ranks must agree.
            Entrywise, ``"ties"``, ``"dare_linear"``, ``"dare_ties"`` and ``"magnitude_prune"``,
            each in four spaces with results of their own:
            no suffix: on A and on B, as PEFT does; ranks must agree, and cross terms as above.
            ``_svd``: on the dense updates, as PEFT does, then the best approximation of a rank.
            ``_core``: on the cores of Core Space, ``_knots``: on the right singular vectors of
            KnOTS; as cheap as "svd", then the best approximation of a rank.
        rank: Of the result, for "svd", "_svd", "_core" and "_knots". A module whose result has less
            gets all of it. Default: the largest rank merged, as in PEFT.
        energy: In place of rank: each module gets the smallest rank that keeps this share of the
            squared norm of what the rule gives, such as 0.95.
        density: Entrywise only, and needed there: share of the entries that is kept, in (0, 1].
        majority_sign_method: "ties" and "dare_ties" only: the sign elected is that of the
            ``"total"`` or the one of higher ``"frequency"``.
        seed: "dare" only: what is dropped depends on (seed, module, adapter) alone.
        name: Name of the result; not one of the bank's.
        dtype: Of the result: float32, float16 or bfloat16. Default: the bank's.
        saved_modules: What fully trained modules (modules_to_save) do, which have no weighted sum
            here: ``"error"``, or ``"ignore"`` to leave them out.

    Returns:
        ``adapter`` and ``report``: for each module and overall the rank, the energy kept and
        ``error_to_exact`` = ||merged - D||_F / ||D||_F, rounding to dtype included.

    Raises:
        ValueError: a wrong argument, an unknown or taken name, ranks that differ ("linear" and
            rules on factors), saved modules, NaN in an adapter in training, or values that dtype
            cannot hold.

    Numerics:
        Float64 from the stored factors up to the final rounding; dense updates and KnOTS' vectors
        in float32, the former's singular vectors to the accuracy of a full SVD in float32. Cut to a
        rank, each singular value is split evenly, sqrt(s) to either factor, and the scale is 1: of
        all splits this has the smallest ||A||^2 + ||B||^2, so neither factor is near the edge of a
        narrow dtype and further training moves both alike. "cat" puts the largest |weight * scale|
        in the scale and the ratios to it, with the signs, in B: adapters of one weight and scale
        are kept bit for bit. Deterministic.

    Cost:
        T the sum of the ranks: T^2 (I + O) multiply-adds a module, modules of equal shapes batched;
        entrywise rules go over each adapter's tensor twice more. Only "_svd" forms [O, I] matrices,
        of one adapter at a time.

    Example:
        >>> adapter, report = merge(bank, {"math": 0.7, "code": -0.2}, combination_type="svd")
        >>> print(report)
        >>> write_adapter(adapter, "math_without_code")
    """
    weights = _check_weights(bank, weights)
    _check_options(combination_type, rank, energy, name, dtype)
    if name in bank:
        raise invalid(_OP, "name", "be new to the bank", f"{name!r}, which is loaded")
    rule = _rule(combination_type, density, majority_sign_method, seed)
    voting = rule is not None and rule.elects
    used = [Used(n, bank.id(n), w) for n, w in weights.items() if w or voting]
    _check_saved(bank, used, saved_modules)
    if not _cuts(combination_type) and combination_type != "cat":
        _check_equal_ranks(bank, used, combination_type)
    if _cuts(combination_type) and energy is None:
        rank = _common_rank(bank, used, rank, combination_type)
    dtype = dtype or bank.dtype
    merged: dict[str, tuple[LoraFactors, ModuleReport]] = {}
    for modules, part in _parts(bank, used, combination_type, rule, rank, energy, dtype):
        merged.update(_results(part, modules, bank))
    order = [module for module in bank.modules if module in merged]
    parts = {module: merged[module][0] for module in order}
    options = {"rank": rank, "energy": energy} | ({} if rule is None else _told(rule))
    options = {key: value for key, value in options.items() if value is not None}
    report = MergeReport(combination_type, weights, {m: merged[m][1] for m in order}, options)
    metadata = {
        "config": _config(bank, used, parts),
        "merge": {
            "weights": weights,
            "combination_type": combination_type,
            **options,
            "energy": report.energy,
            "error_to_exact": report.error_to_exact,
        },
    }
    return Merged(Adapter(name, parts, metadata=metadata), report)


def _parts(
    bank: AdapterBank, used: Sequence[Used], combination_type, rule, rank, energy, dtype
) -> Iterator[tuple[list[str], Part]]:
    """The merged factors, a few modules at a time: one, where a rule is applied."""
    values = 0 if rule is None else 1
    for modules in exact_sums.batches(bank, used, values):
        total = exact_sums.gather(bank, modules, used)
        if combination_type == "cat":
            yield modules, exact_sums.cat(total, dtype)
        elif combination_type == "svd":
            yield modules, exact_sums.svd(total, rank, energy, dtype)
        elif combination_type == "linear":
            held = sum(bank.stacks[modules[0]].ranks[one.id] > 0 for one in used)
            yield modules, exact_sums.linear(total, held, dtype)
        else:
            layer = layer_of(bank, modules[0], used)
            space = _SPACES.get(combination_type.rpartition("_")[2])
            if space is None:
                yield modules, merge_factors(layer, total, rule, dtype)
            else:
                yield modules, space(layer, total, rule, rank, energy, dtype)


def _cuts(combination_type: str) -> bool:
    """Whether the type ends with the best approximation of a rank."""
    return combination_type.rpartition("_")[2] in _SPACES


def _rule(combination_type: str, density, majority_sign_method, seed) -> Entrywise | None:
    rule = next((rule for rule in RULES if combination_type.startswith(rule)), None)
    number = isinstance(density, (int, float)) and not isinstance(density, bool)
    if rule is None and density is not None:
        got = f"{density} for {combination_type!r}"
        raise invalid(_OP, "density", f"be given for {RULES} and their forms only", got)
    if rule is not None and not (number and 0 < density <= 1):
        got = f"{density!r} for {combination_type!r}"
        raise invalid(_OP, "density", "be a number in (0, 1]", got)
    if majority_sign_method not in ("total", "frequency"):
        got = repr(majority_sign_method)
        raise invalid(_OP, "majority_sign_method", "be 'total' or 'frequency'", got)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise invalid(_OP, "seed", "be an integer", repr(seed))
    return None if rule is None else Entrywise(rule, density, majority_sign_method, seed)


def _told(rule: Entrywise) -> dict[str, int | float | str]:
    """The options that the rule has."""
    options: dict[str, int | float | str] = {"density": rule.density}
    if rule.elects:
        options["majority_sign_method"] = rule.majority_sign_method
    return options | ({"seed": rule.seed} if rule.draws else {})


def _results(
    part: Part, modules: Sequence[str], bank: AdapterBank
) -> Iterator[tuple[str, tuple[LoraFactors, ModuleReport]]]:
    finite = part.lora_a.isfinite().all(-1).all(-1) & part.lora_b.isfinite().all(-1).all(-1)
    finite &= part.scale.isfinite() & (part.scale != 0)
    finite = finite.tolist()
    kept = [(None, None)] * len(modules)
    if part.energy is not None:
        kept = list(zip(part.energy.tolist(), part.rule_norm.tolist(), strict=True))
    facts = zip(part.scale.tolist(), part.norm.tolist(), part.error.tolist(), strict=True)
    for i, (scale, norm, error) in enumerate(facts):
        module, rank = modules[i], part.ranks[i]
        if not finite[i]:
            rule = f"keep the merged factors of {module} within {part.lora_a.dtype}"
            raise invalid(_OP, "weights and dtype", rule, "values beyond it")
        factors = (part.lora_a[i, :rank], part.lora_b[i, :rank])
        energy, rule_norm = kept[i]
        report = ModuleReport(rank, norm, energy, relative(error, norm), rule_norm)
        yield module, (LoraFactors(*factors, scale, bank.stacks[module].embedding), report)


def _config(bank: AdapterBank, used: Sequence[Used], parts: dict[str, LoraFactors]) -> dict:
    """A PEFT config for the result; lora_fused.io adds patterns where modules differ from it."""
    configs = [bank.metadata[one.name].get("config") or {} for one in used]
    kinds = {config.get("task_type") for config in configs}
    saved = any(one.name in bank.saved for one in used)
    rank = Counter(part.lora_a.shape[0] for part in parts.values()).most_common(1)[0][0]
    scale = Counter(part.scale for part in parts.values()).most_common(1)[0][0]
    return {
        "base_model_name_or_path": next(
            (path for config in configs if (path := config.get("base_model_name_or_path"))), None
        ),
        "bias": "none",
        "fan_in_fan_out": any(config.get("fan_in_fan_out") for config in configs),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank if scale == 1 else scale * rank,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(parts),
        # A task type would make PEFT look for the head that was left out.
        "task_type": kinds.pop() if len(kinds) == 1 and not saved else None,
        "use_rslora": False,
    }


def _check_weights(bank: AdapterBank, weights: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(bank, AdapterBank):
        raise invalid(_OP, "bank", "be an AdapterBank", type(bank).__name__)
    if not isinstance(weights, Mapping):
        rule = 'map names of adapters to numbers, as in {"math": 0.7}'
        raise invalid(_OP, "weights", rule, type(weights).__name__)
    if not weights:
        raise invalid(_OP, "weights", "name at least one adapter", "none")
    for name, weight in weights.items():
        if name not in bank:
            bank.id(name)  # raises, naming the close ones
        if not isinstance(weight, SupportsFloat) or isinstance(weight, str | bool):
            raise invalid(_OP, f"weight of {name!r}", "be a number", repr(weight))
        if not abs(float(weight)) <= torch.finfo(torch.float32).max:
            raise invalid(_OP, f"weight of {name!r}", "be finite in float32", weight)
    weights = {name: float(weight) for name, weight in weights.items()}
    if not any(weights.values()):
        raise invalid(_OP, "weights", "hold a weight other than 0", weights)
    return weights


def _check_options(combination_type, rank, energy, name, dtype) -> None:
    if combination_type not in TYPES:
        raise invalid(_OP, "combination_type", f"be one of {TYPES}", repr(combination_type))
    for label, value in (("rank", rank), ("energy", energy)):
        if value is not None and not _cuts(combination_type):
            got = f"{value} for {combination_type!r}"
            rule = "be given for 'svd', '*_svd', '*_core' and '*_knots' only"
            raise invalid(_OP, label, rule, got)
    if rank is not None and energy is not None:
        raise invalid(_OP, "rank and energy", "not both be given", f"{rank} and {energy}")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise invalid(_OP, "rank", "be an integer of at least 1", repr(rank))
    if energy is not None and (not isinstance(energy, (int, float)) or not 0 < energy <= 1):
        raise invalid(_OP, "energy", "be a number in (0, 1]", repr(energy))
    if not isinstance(name, str) or not name or name == BASE:
        raise invalid(_OP, "name", f"be a non-empty string other than {BASE!r}", repr(name))
    if dtype is not None and dtype not in _DTYPES:
        raise invalid(_OP, "dtype", f"be one of {_DTYPES}", dtype)


def _check_saved(bank: AdapterBank, used: Sequence[Used], policy: str) -> None:
    if policy not in ("error", "ignore"):
        raise invalid(_OP, "saved_modules", "be 'error' or 'ignore'", repr(policy))
    found = {
        one.name: sorted({path.rpartition(".")[0] for path in bank.saved[one.name]})
        for one in used
        if one.name in bank.saved
    }
    if found and policy == "error":
        rule = "have no saved modules (pass saved_modules='ignore' to leave them out)"
        raise invalid(_OP, "adapters", rule, found)


def _check_equal_ranks(bank: AdapterBank, used: Sequence[Used], kind: str) -> None:
    for module, stack in bank.stacks.items():
        ranks = {one.name: stack.ranks[one.id] for one in used if stack.ranks[one.id]}
        if len(set(ranks.values())) > 1:
            also = "'cat' or 'svd'" if kind == "linear" else f"'{kind}_svd' or '{kind}_core'"
            got = f"{kind!r} at {module!r}, ranks {ranks}"
            raise invalid(_OP, "combination_type", f"be {also} where ranks differ", got)


def _common_rank(bank: AdapterBank, used: Sequence[Used], rank: int | None, kind: str) -> int:
    """The rank asked for, or the largest merged; refused where no module's result can have it."""
    if rank is None:
        return max(stack.ranks[one.id] for stack in bank.stacks.values() for one in used)
    limits = {
        module: min(
            stack.in_features,
            stack.out_features,
            # An entrywise rule on dense updates gives what has any rank.
            *(() if kind.endswith("_svd") else [sum(stack.ranks[one.id] for one in used)]),
        )
        for module, stack in bank.stacks.items()
    }
    module = max(limits, key=limits.get)
    if rank > limits[module]:
        rule = f"be at most {limits[module]}, the largest rank of a result (at {module!r})"
        raise invalid(_OP, "rank", rule, rank)
    return rank
