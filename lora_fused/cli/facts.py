"""What ``inspect`` and ``validate`` say about adapters, from their factors and never densely."""

import dataclasses
import math
from collections import Counter

import torch
from torch import Tensor

from lora_fused.adapters import Adapter, LoraFactors


@dataclasses.dataclass
class Facts:
    """One adapter in figures; each ``*_range`` is (least, median, largest) over its modules."""

    name: str
    path: str
    base_model: str | None
    ranks: list[int]
    alpha: list[float]
    scale: list[float]
    modules: int
    kinds: dict[str, int]
    parameters: int
    dtypes: list[str]
    norm_range: tuple[float, float, float]
    effective_rank_range: tuple[float, float, float]
    saved_modules: list[str]
    faults: list[str]


def facts_of(adapter: Adapter, path: str) -> Facts:
    """Measure one adapter, whose values the reader has found finite."""
    parts = adapter.modules
    spectra = [singular_values(part) for part in parts.values()]
    config = adapter.metadata.get("config") or {}
    kinds = Counter(_kind(module) for module in parts)
    tensors = [t for part in parts.values() for t in (part.lora_a, part.lora_b)]
    return Facts(
        name=adapter.name,
        path=path,
        base_model=config.get("base_model_name_or_path"),
        ranks=sorted({part.lora_a.shape[0] for part in parts.values()}),
        alpha=_alphas(config),
        scale=sorted({part.scale for part in parts.values()}),
        modules=len(parts),
        kinds=dict(sorted(kinds.items())),
        parameters=sum(t.numel() for t in tensors),
        dtypes=sorted({str(t.dtype).removeprefix("torch.") for t in tensors}),
        norm_range=_range([float(torch.linalg.vector_norm(s)) for s in spectra]),
        effective_rank_range=_range([effective_rank(s) for s in spectra]),
        saved_modules=sorted({key.rpartition(".")[0] for key in adapter.saved}),
        faults=inert(adapter),
    )


def singular_values(part: LoraFactors) -> Tensor:
    """The singular values of the update scale * B A.

    With A^T = Q_a R_a and B = Q_b R_b they are those of scale * R_b R_a^T, a matrix as wide as the
    rank: the dense [O, I] product is never formed.
    """
    r_a = torch.linalg.qr(part.lora_a.double().mT, mode="r").R
    r_b = torch.linalg.qr(part.lora_b.double().mT, mode="r").R
    return abs(part.scale) * torch.linalg.svdvals(r_b @ r_a.mT)


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum; 0 for a zero update.

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007, definition 1.
    """
    total = values.sum()
    if not total > 0:
        return 0.0
    share = values / total
    return math.exp(-float(torch.special.xlogy(share, share).sum()))


def inert(adapter: Adapter) -> list[str]:
    """Say so where every update is exactly zero: such an adapter changes nothing."""
    parts = adapter.modules.values()
    used = any(bool(part.lora_a.any()) and bool(part.lora_b.any()) for part in parts)
    if used or adapter.saved:
        return []
    return ["every update is zero (A or B never trained), the adapter has no effect"]


def _kind(module: str) -> str:
    """What a module is called in its block: ``q_proj``, or ``to_out.0``, a number being no name."""
    last, *before = reversed(module.split("."))
    return f"{before[0]}.{last}" if last.isdigit() and before else last


def _alphas(config: dict) -> list[float]:
    given = [config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()]
    return sorted({float(alpha) for alpha in given if alpha is not None})


def _range(values: list[float]) -> tuple[float, float, float]:
    ordered = sorted(values)
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]
