"""What a merge is asked for, checked before anything is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsFloat

import torch

from lora_fused.adapters import BASE, AdapterBank
from lora_fused.checks import check_whole, invalid
from lora_fused.methods.entrywise import RULES, Entrywise
from lora_fused.methods.exact_sums import Used

OP = "merge"
SPACES = ("svd", "core", "knots")
TYPES = ("cat", "svd", "linear", *RULES, *(f"{rule}_{space}" for space in SPACES for rule in RULES))
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Request:
    """A merge that can be made, with every default filled in.

    Attributes:
        bank: the adapters.
        weights: adapter name -> weight, as given.
        used: the adapters that take part.
        combination_type: one of TYPES.
        rule: the entrywise rule; None for the exact types and "linear".
        rank: to cut to; None with ``energy`` and for types that do not cut.
        energy: to keep.
        name: of the result.
        dtype: of the result.
    """

    bank: AdapterBank
    weights: dict[str, float]
    used: list[Used]
    combination_type: str
    rule: Entrywise | None
    rank: int | None
    energy: float | None
    name: str
    dtype: torch.dtype

    @property
    def space(self) -> str | None:
        return space_of(self.combination_type)

    @property
    def options(self) -> dict[str, int | float | str]:
        """The options that the type has."""
        found = {"rank": self.rank, "energy": self.energy}
        if self.rule is not None:
            found["density"] = self.rule.density
            if self.rule.elects:
                found["majority_sign_method"] = self.rule.majority_sign_method
            if self.rule.draws:
                found["seed"] = self.rule.seed
        return {key: value for key, value in found.items() if value is not None}


def checked(
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
) -> Request:
    """The request of ``merge`` with these arguments, or the ValueError that they deserve."""
    weights = _check_weights(bank, weights)
    _check_options(combination_type, rank, energy, name, dtype)
    if name in bank:
        raise invalid(OP, "name", "be new to the bank", f"{name!r}, which is loaded")
    rule = _rule(combination_type, density, majority_sign_method, seed)
    voting = rule is not None and rule.elects
    used = [Used(n, bank.id(n), w) for n, w in weights.items() if w or voting]
    _check_saved(bank, used, saved_modules)
    cuts = space_of(combination_type) is not None
    if not cuts and combination_type != "cat":
        _check_equal_ranks(bank, used, combination_type)
    if cuts and energy is None:
        rank = _common_rank(bank, used, rank, combination_type)
    dtype = dtype or bank.dtype
    return Request(bank, weights, used, combination_type, rule, rank, energy, name, dtype)


def space_of(combination_type: str) -> str | None:
    """``svd``, ``core`` or ``knots`` where the type ends with the best approximation of a rank."""
    last = combination_type.rpartition("_")[2]
    return last if last in SPACES else None


def _rule(combination_type: str, density, majority_sign_method, seed) -> Entrywise | None:
    rule = next((rule for rule in RULES if combination_type.startswith(rule)), None)
    number = isinstance(density, (int, float)) and not isinstance(density, bool)
    if rule is None and density is not None:
        got = f"{density} for {combination_type!r}"
        raise invalid(OP, "density", f"be given for {RULES} and their forms only", got)
    if rule is not None and not (number and 0 < density <= 1):
        got = f"{density!r} for {combination_type!r}"
        raise invalid(OP, "density", "be a number in (0, 1]", got)
    if majority_sign_method not in ("total", "frequency"):
        got = repr(majority_sign_method)
        raise invalid(OP, "majority_sign_method", "be 'total' or 'frequency'", got)
    if majority_sign_method != "total" and not (rule or "").endswith("ties"):
        got = f"{majority_sign_method!r} for {combination_type!r}"
        raise invalid(OP, "majority_sign_method", "be given for rules that elect signs only", got)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise invalid(OP, "seed", "be an integer", repr(seed))
    return None if rule is None else Entrywise(rule, density, majority_sign_method, seed)


def _check_weights(bank: AdapterBank, weights: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(bank, AdapterBank):
        raise invalid(OP, "bank", "be an AdapterBank", type(bank).__name__)
    if not isinstance(weights, Mapping):
        rule = 'map names of adapters to numbers, as in {"math": 0.7}'
        raise invalid(OP, "weights", rule, type(weights).__name__)
    if not weights:
        raise invalid(OP, "weights", "name at least one adapter", "none")
    for name, weight in weights.items():
        if name not in bank:
            bank.id(name)  # raises, naming the close ones
        if not isinstance(weight, SupportsFloat) or isinstance(weight, str | bool):
            raise invalid(OP, f"weight of {name!r}", "be a number", repr(weight))
        if not abs(float(weight)) <= torch.finfo(torch.float32).max:
            raise invalid(OP, f"weight of {name!r}", "be finite in float32", weight)
    weights = {name: float(weight) for name, weight in weights.items()}
    if not any(weights.values()):
        raise invalid(OP, "weights", "hold a weight other than 0", weights)
    return weights


def _check_options(combination_type, rank, energy, name, dtype) -> None:
    if combination_type not in TYPES:
        raise invalid(OP, "combination_type", f"be one of {TYPES}", repr(combination_type))
    for label, value in (("rank", rank), ("energy", energy)):
        if value is not None and space_of(combination_type) is None:
            got = f"{value} for {combination_type!r}"
            rule = "be given for 'svd', '*_svd', '*_core' and '*_knots' only"
            raise invalid(OP, label, rule, got)
    if rank is not None and energy is not None:
        raise invalid(OP, "rank and energy", "not both be given", f"{rank} and {energy}")
    if rank is not None:
        check_whole(OP, "rank", rank)
    if energy is not None and (not isinstance(energy, (int, float)) or not 0 < energy <= 1):
        raise invalid(OP, "energy", "be a number in (0, 1]", repr(energy))
    if not isinstance(name, str) or not name or name == BASE:
        raise invalid(OP, "name", f"be a non-empty string other than {BASE!r}", repr(name))
    if dtype is not None and dtype not in _DTYPES:
        raise invalid(OP, "dtype", f"be one of {_DTYPES}", dtype)


def _check_saved(bank: AdapterBank, used: Sequence[Used], policy: str) -> None:
    if policy not in ("error", "ignore"):
        raise invalid(OP, "saved_modules", "be 'error' or 'ignore'", repr(policy))
    found = {
        one.name: sorted({path.rpartition(".")[0] for path in bank.saved[one.name]})
        for one in used
        if one.name in bank.saved
    }
    if found and policy == "error":
        rule = "have no saved modules (pass saved_modules='ignore' to leave them out)"
        raise invalid(OP, "adapters", rule, found)


def _check_equal_ranks(bank: AdapterBank, used: Sequence[Used], kind: str) -> None:
    for module, stack in bank.stacks.items():
        ranks = {one.name: stack.ranks[one.id] for one in used if stack.ranks[one.id]}
        if len(set(ranks.values())) > 1:
            also = "'cat' or 'svd'" if kind == "linear" else f"'{kind}_svd' or '{kind}_core'"
            got = f"{kind!r} at {module!r}, ranks {ranks}"
            raise invalid(OP, "combination_type", f"be {also} where ranks differ", got)


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
        raise invalid(OP, "rank", rule, rank)
    return rank
