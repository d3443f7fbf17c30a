"""Stacks, adapter-popularity samplers and the error budget: for tests and benchmarks only."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_fused.adapters import AdapterStack

WORKLOADS = ("distinct", "uniform", "zipf", "identical", "skewed")


def make_stack(
    ranks: Sequence[int],
    in_features: int,
    out_features: int,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AdapterStack:
    """A packed stack of random adapters whose updates of O(1) inputs are O(1), scales in [1, 2]."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(ranks)
    typical = max(sum(ranks) / max(len(ranks), 1), 1.0)
    lora_a = torch.randn(rows, in_features, generator=generator) * in_features**-0.5
    lora_b = torch.randn(rows, out_features, generator=generator) * typical**-0.5
    scale = 1 + torch.rand(len(ranks), generator=generator)
    return AdapterStack(lora_a.to(dtype), lora_b.to(dtype), scale, ranks=ranks)


def slotted(stack: AdapterStack, *, layout: str = "plain") -> AdapterStack:
    """The same adapters in padded slots [K, R, .], the padding NaN: it must never be read.

    layout "plain": contiguous. "vllm": lora_b stored as [K, 1, O, R] and viewed as [K, R, O].
    """
    count, most = len(stack), max(stack.max_rank, 1)
    lora_a = stack.lora_a.new_full((count, most, stack.in_features), torch.nan)
    lora_b = stack.lora_b.new_full((count, most, stack.out_features), torch.nan)
    if layout == "vllm":
        lora_b = lora_b.mT.contiguous().unsqueeze(1)[:, 0].transpose(1, 2)
    for k, rank in enumerate(stack.ranks):
        lora_a[k, :rank] = stack.lora_a[stack.rows(k)]
        lora_b[k, :rank] = stack.lora_b[stack.rows(k)]
    ranks = torch.tensor(stack.ranks, dtype=torch.int32)
    return AdapterStack(lora_a, lora_b, stack.scale, slot_ranks=ranks)


def sample_ids(
    workload: str, mixtures: int, per_row: int, adapters: int, *, seed: int = 0
) -> Tensor:
    """Adapter ids [M, J] int32 of one popularity pattern (names after Punica's benchmarks).

    distinct: each row other adapters, as far as there are enough. identical: the same J everywhere.
    uniform: drawn evenly. zipf: popularity 1 / rank^1.5. skewed: half of all draws hit adapter 0.
    Ids repeat within a row only where J exceeds the adapters.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (mixtures, per_row)
    if workload == "distinct":
        return (torch.arange(mixtures * per_row).reshape(shape) % adapters).int()
    if workload == "identical":
        return (torch.arange(per_row) % adapters).int().expand(shape).contiguous()
    popularity = {
        "uniform": torch.ones(adapters),
        "zipf": 1.0 / torch.arange(1, adapters + 1) ** 1.5,
        "skewed": torch.tensor([1.0] + [1.0 / max(adapters - 1, 1)] * (adapters - 1)),
    }
    if workload not in popularity:
        raise ValueError(f"sample_ids: workload must be one of {WORKLOADS}, got {workload!r}")
    odds = popularity[workload].expand(mixtures, adapters)
    replace = per_row > adapters
    return torch.multinomial(odds, per_row, replacement=replace, generator=generator).int()


def error(actual: Tensor, truth: Tensor) -> float:
    """Largest absolute difference, NaN and infinity counting as infinite."""
    if actual.numel() == 0:
        return 0.0
    worst = (actual.detach().double() - truth.detach().double()).abs().max()
    return float(worst) if worst.isfinite() else float("inf")


def assert_within_budget(actual: Tensor, reference: Tensor, truth: Tensor, label: str = "") -> None:
    """The one tolerance of this project, applied to an update alone (a base would hide it).

    error(actual) <= 2 * (error(reference) + eps * max|truth|), errors against the float64 truth,
    eps of actual's dtype.
    """
    assert actual.shape == truth.shape == reference.shape, (actual.shape, truth.shape)
    assert actual.dtype == reference.dtype, (actual.dtype, reference.dtype)
    largest = float(truth.detach().abs().max()) if truth.numel() else 0.0
    budget = 2 * (error(reference, truth) + torch.finfo(actual.dtype).eps * largest)
    assert error(actual, truth) <= budget < float("inf"), (
        f"{label} error {error(actual, truth):.3g} > {budget:.3g}"
    )
