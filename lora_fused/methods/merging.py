"""Several adapters merged into one: sum_k w_k s_k B_k A_k of each module, from the factors alone.

PEFT's ``add_weighted_adapter`` says: "cat" joins the factors, "svd" factorises the dense sum,
"linear" adds the factors, each times sqrt(|w_k s_k|). **We compute** the same three. **We differ**:
"svd" never forms the sum (two thin orthogonalisations and an SVD as small as the sum of the ranks);
every result says how far it is from the exact sum; the default is exact; one adapter alone can be
re-compressed too.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, SupportsFloat

import torch
from torch import Tensor

from lora_fused.adapters import BASE, Adapter, AdapterBank, AdapterStack, LoraFactors
from lora_fused.checks import invalid

_OP = "merge"
TYPES = ("cat", "svd", "linear")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Float64 values of a batch of modules. A CPU is fastest while they stay near its caches (28 modules
# of 2048: 0.20 s, 0.36 s in one batch), a GPU with few launches.
_BATCH_VALUES, _BATCH_VALUES_CPU = 2**26, 2**22
# One Cholesky pass leaves a basis orthonormal to eps * condition^2: 1e-8 at worst.
_WORST_CONDITION = 1e4


class ModuleReport(NamedTuple):
    """What became of one module.

    Attributes:
        rank: of the merged factors.
        norm: Frobenius norm of the exact sum.
        energy: share of norm^2 that the rank keeps; None for "linear", which is no projection.
        error_to_exact: ||merged - sum||_F / norm, of the factors as they are stored.
    """

    rank: int
    norm: float
    energy: float | None
    error_to_exact: float


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """How good a merge is; ``print`` shows the whole and the worst modules.

    Attributes:
        combination_type: "cat", "svd" or "linear".
        weights: as given.
        modules: module name -> ModuleReport.
    """

    combination_type: str
    weights: dict[str, float]
    modules: dict[str, ModuleReport]

    @property
    def energy(self) -> float | None:
        """Share of the exact sum's squared norm that was kept, over all modules."""
        parts = self.modules.values()
        if any(part.energy is None for part in parts):
            return None
        total = sum(part.norm**2 for part in parts)
        return sum(part.energy * part.norm**2 for part in parts) / total if total else 1.0

    @property
    def error_to_exact(self) -> float:
        """||merged - sum||_F / ||sum||_F over all modules."""
        parts = self.modules.values()
        if any(math.isinf(part.error_to_exact) for part in parts):
            return math.inf
        error = math.hypot(*(part.error_to_exact * part.norm for part in parts))
        return _relative(error, math.hypot(*(part.norm for part in parts)))

    def __str__(self) -> str:
        ranks = sorted({part.rank for part in self.modules.values()})
        span = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        head = f"{self.combination_type} of {len(self.weights)} adapters, {len(self.modules)} "
        head += f"modules, rank {span}: {_figures(self.energy, self.error_to_exact)}"
        worst = sorted(self.modules.items(), key=lambda item: -item[1].error_to_exact)[:5]
        lines = [
            f"  {name}: rank {part.rank}, {_figures(part.energy, part.error_to_exact)}"
            for name, part in worst
        ]
        return "\n".join([head, *lines])


class Merged(NamedTuple):
    """A merged adapter, for ``bank.add`` and ``write_adapter``, and how good it is."""

    adapter: Adapter
    report: MergeReport


@torch.no_grad()
def merge(
    bank: AdapterBank,
    weights: Mapping[str, float],
    *,
    combination_type: str = "cat",
    rank: int | None = None,
    energy: float | None = None,
    name: str = "merged",
    dtype: torch.dtype | None = None,
    saved_modules: str = "error",
) -> Merged:
    """Merge adapters of a bank into one adapter; the bank stays as it is.

    D = sum_k weights[k] * scale[k] * B_k A_k for each module that any of them adapts; an adapter
    without the module adds nothing to it. Weights may be negative and need not sum to one; one of
    weight 0 is left out.

    Args:
        bank: The adapters, also those in training. Ranks, scales and modules may differ.
        weights: Adapter name -> weight; nothing is normalised.
        combination_type: ``"cat"``: D exactly, of the sum of the ranks. ``"svd"``: the best
            approximation of D of a given rank. ``"linear"``: PEFT's sum of the factors, for parity;
            cross terms make it another update than D (read its error), and ranks must agree.
        rank: "svd" only: rank of the result. A module whose D has less (its ranks summed, or a
            side of the layer) gets D exactly. Default: the largest rank merged, as in PEFT.
        energy: "svd" only, in place of rank: each module gets the smallest rank that keeps this
            share of ||D||_F^2, such as 0.95.
        name: Name of the result.
        dtype: Of the result: float32, float16 or bfloat16. Default: the bank's.
        saved_modules: What fully trained modules (modules_to_save) do, which have no weighted sum
            here: ``"error"``, or ``"ignore"`` to leave them out.

    Returns:
        ``adapter`` and ``report``: for each module and overall the rank, the energy kept and
        ``error_to_exact`` = ||merged - D||_F / ||D||_F, rounding to dtype included.

    Raises:
        ValueError: a wrong argument, an unknown name, ranks that differ ("linear"), saved modules,
            NaN in an adapter in training, or values that dtype cannot hold.

    Numerics:
        Float64 from the stored factors up to the final rounding. "svd" splits each singular value
        evenly, sqrt(s) to either factor, and its scale is 1: of all splits this has the smallest
        ||A||^2 + ||B||^2, so neither factor is near the edge of a narrow dtype and further training
        moves both alike. "cat" puts the largest |weight * scale| in the scale and the ratios to it,
        with the signs, in B: adapters of one weight and scale are kept bit for bit. Deterministic.

    Cost:
        T the sum of the ranks: T^2 (I + O) multiply-adds a module, modules of equal shapes batched.
        No [O, I] matrix is formed.

    Example:
        >>> adapter, report = merge(bank, {"math": 0.7, "code": -0.2}, combination_type="svd")
        >>> print(report)
        >>> write_adapter(adapter, "math_without_code")
    """
    weights = _check_weights(bank, weights)
    used = [_Used(n, bank.id(n), weight) for n, weight in weights.items() if weight]
    _check_options(combination_type, rank, energy, name, dtype)
    _check_saved(bank, used, saved_modules)
    dtype = dtype or bank.dtype
    if combination_type == "linear":
        _check_equal_ranks(bank, used)
    if combination_type == "svd" and energy is None:
        rank = _common_rank(bank, used, rank)
    merged: dict[str, tuple[LoraFactors, ModuleReport]] = {}
    for modules in _batches(bank, used):
        total = _gather(bank, modules, used)
        if combination_type == "cat":
            part = _cat(total, dtype)
        elif combination_type == "svd":
            part = _svd(total, rank, energy, dtype)
        else:
            held = sum(bank.stacks[modules[0]].ranks[one.id] > 0 for one in used)
            part = _linear(total, held, dtype)
        merged.update(_results(part, modules, bank))
    order = [module for module in bank.modules if module in merged]
    parts = {module: merged[module][0] for module in order}
    report = MergeReport(combination_type, weights, {m: merged[m][1] for m in order})
    metadata = {
        "config": _config(bank, used, parts),
        "merge": {
            "weights": weights,
            "combination_type": combination_type,
            "energy": report.energy,
            "error_to_exact": report.error_to_exact,
        },
    }
    return Merged(Adapter(name, parts, metadata=metadata), report)


class _Used(NamedTuple):
    """An adapter that takes part."""

    name: str
    id: int
    weight: float  # not 0


class _Sum(NamedTuple):
    """The exact sums of a batch of modules: lora_b^T diag(factor) lora_a, in float64."""

    lora_a: Tensor  # [L, T, I]
    lora_b: Tensor  # [L, T, O]
    factor: Tensor  # [L, T]: weight * scale of each rank row


class _Part(NamedTuple):
    """Merged factors of a batch of modules, in their dtype; rows beyond a module's rank are 0."""

    lora_a: Tensor  # [L, R, I]
    lora_b: Tensor  # [L, R, O]
    scale: Tensor  # [L], float32 values
    ranks: list[int]
    norm: Tensor  # [L], of the sum
    error: Tensor  # [L], norm of merged - sum
    energy: Tensor | None  # [L]


def _cat(total: _Sum, dtype: torch.dtype) -> _Part:
    scale = total.factor.abs().amax(-1).float().double()
    ratio = total.factor / scale[:, None]
    exact = total.lora_b * total.factor[..., None]
    lora_a, lora_b = total.lora_a.to(dtype), (total.lora_b * ratio[..., None]).to(dtype)
    gram = _gram(total.lora_a)
    norm = _norm(_gram(exact), gram)
    left = lora_b.double() * scale[:, None, None] - exact
    if dtype.itemsize < 4:  # A may have been rounded too
        right = lora_a.double()
        left, right = torch.cat([left, exact], 1), torch.cat([right, right - total.lora_a], 1)
        gram = _gram(right)
    ranks = [lora_a.shape[1]] * len(lora_a)
    return _Part(
        lora_a, lora_b, scale, ranks, norm, _norm(_gram(left), gram), torch.ones_like(norm)
    )


def _svd(total: _Sum, rank: int | None, energy: float | None, dtype: torch.dtype) -> _Part:
    coords_a, lift_a, rows_a = _row_basis(total.lora_a)
    coords_b, lift_b, rows_b = _row_basis(total.lora_b)
    core = (coords_b * total.factor[..., None]).mT @ coords_a
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    energies = s.square()
    reached = energies.cumsum(-1)
    if energy is None:
        ranks = [min(rank, s.shape[-1])] * len(s)
    else:
        ranks = ((reached < energy * reached[:, -1:]).sum(-1) + 1).tolist()
    most = max(ranks)
    kept = (
        torch.arange(s.shape[-1], device=s.device) < torch.tensor(ranks, device=s.device)[:, None]
    )
    root = (s * kept).sqrt()[:, :most, None]
    best_a = (root * vh[:, :most]) @ lift_a @ rows_a
    best_b = (root * u.mT[:, :most]) @ lift_b @ rows_b
    lora_a, lora_b = best_a.to(dtype), best_b.to(dtype)
    stored_a, stored_b = lora_a.double(), lora_b.double()
    rounding = _norm(
        _gram(torch.cat([stored_b - best_b, best_b], 1)),
        _gram(torch.cat([stored_a, stored_a - best_a], 1)),
    )
    # What is cut off is orthogonal to what is kept, and to the rounding up to its square.
    error = torch.hypot((energies * ~kept).sum(-1).sqrt(), rounding)
    share = torch.where(reached[:, -1] > 0, (energies * kept).sum(-1) / reached[:, -1], 1.0)
    scale = torch.ones_like(error)
    return _Part(lora_a, lora_b, scale, ranks, reached[:, -1].sqrt(), error, share)


def _linear(total: _Sum, adapters: int, dtype: torch.dtype) -> _Part:
    root, sign = total.factor.abs().sqrt()[..., None], total.factor.sign()[..., None]
    lora_a, lora_b = (
        rows.unflatten(1, (adapters, -1)).sum(1).to(dtype)
        for rows in (total.lora_a * root * sign, total.lora_b * root)
    )
    exact = total.lora_b * total.factor[..., None]
    rank = lora_a.shape[1]
    gram_a = _gram(torch.cat([lora_a.double(), total.lora_a], 1))
    gram_b = _gram(torch.cat([lora_b.double(), -exact], 1))
    norm = _norm(gram_b[:, rank:, rank:], gram_a[:, rank:, rank:])
    scale = torch.ones_like(norm)
    return _Part(
        lora_a, lora_b, scale, [rank] * len(norm), norm, _norm(gram_b, gram_a), energy=None
    )


def _row_basis(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """coords, lift, carrier: rows [L, T, I] = coords [L, T, Q] @ (lift @ carrier), Q = min(T, I).

    lift @ carrier [L, Q, I] has orthonormal rows and need not be formed. One Cholesky pass on the
    float64 Gram matrix of the normalised rows, four times as fast as Householder's QR (carrier is
    rows, lift the inverse); modules whose rows are too nearly dependent for it take Householder's.
    """
    if rows.shape[1] > rows.shape[2]:
        q, r = torch.linalg.qr(rows.mT)
        return r.mT, torch.eye(q.shape[-1]).to(rows), q.mT
    gram = _gram(rows)
    size = gram.diagonal(dim1=-2, dim2=-1).sqrt()[..., None]
    lower, fault = torch.linalg.cholesky_ex(gram / (size * size.mT))
    unit = torch.eye(rows.shape[1]).to(rows)
    inverse = torch.linalg.solve_triangular(lower, unit.expand_as(lower), upper=False)
    condition = lower.norm(dim=(-2, -1)) * inverse.norm(dim=(-2, -1))
    coords, lift = lower * size, inverse / size.mT
    # Not "condition > worst": a row of zeros makes it NaN.
    weak = ~((condition <= _WORST_CONDITION) & (fault == 0))
    if weak.any():
        q, r = torch.linalg.qr(rows[weak].mT)
        rows = rows.clone()
        coords[weak], lift[weak], rows[weak] = r.mT, unit, q.mT
    return coords, lift, rows


def _gram(rows: Tensor) -> Tensor:
    return rows @ rows.mT


def _norm(gram_left: Tensor, gram_right: Tensor) -> Tensor:
    """||left^T right||_F of [L, T, O] and [L, T, I], each [L]; good to 1e-8 of its terms."""
    return (gram_left * gram_right).sum((-2, -1)).clamp_min(0).sqrt()


def _batches(bank: AdapterBank, used: Sequence[_Used]) -> Iterator[list[str]]:
    """The modules that any of the adapters has, in batches of equal sizes and ranks."""
    groups: dict[tuple, list[str]] = {}
    for module, stack in bank.stacks.items():
        ranks = tuple(stack.ranks[one.id] for one in used)
        if any(ranks):
            key = (stack.in_features, stack.out_features, ranks)
            groups.setdefault(key, []).append(module)
    budget = _BATCH_VALUES_CPU if bank.device.type == "cpu" else _BATCH_VALUES
    for (size_in, size_out, ranks), modules in groups.items():
        most = max(1, budget // (sum(ranks) * (size_in + size_out)))
        for start in range(0, len(modules), most):
            yield modules[start : start + most]


def _gather(bank: AdapterBank, modules: Sequence[str], used: Sequence[_Used]) -> _Sum:
    """The factors of these adapters, rank rows in their order."""
    first = bank.stacks[modules[0]]
    size = (len(modules), sum(first.ranks[one.id] for one in used))
    lora_a = first.lora_a.new_empty(*size, first.in_features, dtype=torch.float64)
    lora_b = first.lora_b.new_empty(*size, first.out_features, dtype=torch.float64)
    factors = []
    for i, module in enumerate(modules):
        stack = bank.stacks[module]
        held = [one for one in used if stack.ranks[one.id]]
        for side, rows in zip((lora_a, lora_b), stack.factors(), strict=True):
            torch.cat([rows[stack.rows(one.id)] for one in held], out=side[i])
            if not side[i].sum().isfinite():
                raise _non_finite(stack, module, held)
        # Scales are float32 already: float64 holds weight * scale to the last digit that matters.
        factor = stack.scale[[one.id for one in held]].double()
        factor *= torch.tensor([one.weight for one in held], dtype=factor.dtype).to(factor.device)
        ranks = torch.tensor([stack.ranks[one.id] for one in held], device=factor.device)
        factors.append(factor.repeat_interleave(ranks))
    return _Sum(lora_a, lora_b, torch.stack(factors))


def _results(
    part: _Part, modules: Sequence[str], bank: AdapterBank
) -> Iterator[tuple[str, tuple[LoraFactors, ModuleReport]]]:
    finite = part.lora_a.isfinite().all(-1).all(-1) & part.lora_b.isfinite().all(-1).all(-1)
    finite &= part.scale.isfinite() & (part.scale != 0)
    finite = finite.tolist()
    energies = [None] * len(modules) if part.energy is None else part.energy.tolist()
    facts = zip(part.scale.tolist(), part.norm.tolist(), part.error.tolist(), strict=True)
    for i, (scale, norm, error) in enumerate(facts):
        module, rank = modules[i], part.ranks[i]
        if not finite[i]:
            rule = f"keep the merged factors of {module} within {part.lora_a.dtype}"
            raise invalid(_OP, "weights and dtype", rule, "values beyond it")
        factors = (part.lora_a[i, :rank], part.lora_b[i, :rank])
        report = ModuleReport(rank, norm, energies[i], _relative(error, norm))
        yield module, (LoraFactors(*factors, scale, bank.stacks[module].embedding), report)


def _config(bank: AdapterBank, used: Sequence[_Used], parts: dict[str, LoraFactors]) -> dict:
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
        if value is not None and combination_type != "svd":
            got = f"{value} for {combination_type!r}"
            raise invalid(_OP, label, "be given for combination_type 'svd' only", got)
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


def _check_saved(bank: AdapterBank, used: Sequence[_Used], policy: str) -> None:
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


def _check_equal_ranks(bank: AdapterBank, used: Sequence[_Used]) -> None:
    for module, stack in bank.stacks.items():
        ranks = {one.name: stack.ranks[one.id] for one in used if stack.ranks[one.id]}
        if len(set(ranks.values())) > 1:
            rule = "be 'cat' or 'svd' where ranks differ"
            raise invalid(_OP, "combination_type", rule, f"'linear' at {module!r}, ranks {ranks}")


def _common_rank(bank: AdapterBank, used: Sequence[_Used], rank: int | None) -> int:
    """The rank asked for, or the largest merged; refused where no module's sum can have it."""
    if rank is None:
        return max(stack.ranks[one.id] for stack in bank.stacks.values() for one in used)
    limits = {
        module: min(sum(stack.ranks[one.id] for one in used), stack.in_features, stack.out_features)
        for module, stack in bank.stacks.items()
    }
    module = max(limits, key=limits.get)
    if rank > limits[module]:
        rule = f"be at most {limits[module]}, the largest rank that a sum can have (at {module!r})"
        raise invalid(_OP, "rank", rule, rank)
    return rank


def _non_finite(stack: AdapterStack, module: str, held: Sequence[_Used]) -> ValueError:
    for one in held:
        for side, rows in zip(("lora_a", "lora_b"), stack.factors(), strict=True):
            if not rows[stack.rows(one.id)].isfinite().all():
                where = f"{side} of adapter {one.name!r} at {module!r}"
                return invalid(_OP, where, "be finite", "non-finite values")
    raise AssertionError(f"no non-finite value found in {module}")


def _relative(error: float, norm: float) -> float:
    if error == 0:
        return 0.0
    return error / norm if norm else math.inf


def _figures(energy: float | None, error: float) -> str:
    kept = "" if energy is None else f"energy kept {energy:.4f}, "
    return f"{kept}error to the exact sum {error:.3g}"
