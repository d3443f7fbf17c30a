"""The average of factors, and what it leaves out: together the exact average of the updates.

FedEx-LoRA (arXiv:2410.09432): clients train adapters of one shape; averaging A and B apart gives a
good place to train on from, but another update than the average of B A. The difference, the
residual, goes into the frozen weights. **We compute** both as adapters: the averaged one, to train
on, and the residual in factors, to merge into the base or to run beside it. **We differ**: weights,
scales and which modules an adapter has are free; a residual of less than its full rank is the best
of that rank (the paper's FedEx-SVD variant), its error reported.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lora_fused.adapters import Adapter, AdapterBank
from lora_fused.methods import exact_sums
from lora_fused.methods.exact_sums import Part, Sum
from lora_fused.methods.merge_report import MergeReport
from lora_fused.methods.merge_request import checked
from lora_fused.methods.merging import Parts, finished


class FedexMerged(NamedTuple):
    """An average and its residual.

    Attributes:
        adapter: the averaged factors.
        residual: what the exact average has beside; its name ends with "_residual".
        report: of both together.
        without_residual: of ``adapter`` alone.
    """

    adapter: Adapter
    residual: Adapter
    report: MergeReport
    without_residual: MergeReport


@torch.no_grad()
def fedex(
    bank: AdapterBank,
    weights: Mapping[str, float],
    *,
    residual_rank: int | None = None,
    name: str = "merged",
    dtype: torch.dtype | None = None,
    saved_modules: str = "error",
) -> FedexMerged:
    """Average the factors of adapters, and find the residual to the exact average.

    D = sum_k w_k s_k B_k A_k = s B' A' + residual, A' = sum_k w_k A_k, B' = sum_k w_k s_k / s B_k,
    s the largest scale. An average where the weights sum to one.

    Args:
        bank: The adapters, of equal ranks in each module.
        weights: Adapter name -> weight; nothing is normalised.
        residual_rank: Keep the best approximation of this rank. Default: all of it, up to the sum
            of the ranks.
        name, dtype, saved_modules: As in ``merge``.

    Raises:
        ValueError: as ``merge`` with "linear".

    Example:
        >>> averaged, residual, report, _ = fedex(bank, {"a": 0.5, "b": 0.5})
    """
    request = checked(
        bank,
        weights,
        combination_type="linear",
        name=name,
        dtype=dtype,
        saved_modules=saved_modules,
    )
    rank, policy = residual_rank, saved_modules
    checked(bank, weights, combination_type="svd", rank=rank, name=name, saved_modules=policy)
    averages: list[Parts] = []
    residuals: list[Parts] = []
    for modules in exact_sums.batches(bank, request.used):
        total = exact_sums.gather(bank, modules, request.used)
        held = [one for one in request.used if bank.stacks[modules[0]].ranks[one.id]]
        weight = total.factor.new_tensor([one.weight for one in held])
        averages.append((modules, _average(total, weight, request.dtype)))
        residuals.append((modules, _residual(total, averages[-1][1], rank, request.dtype)))
    request = replace(request, combination_type="fedex")
    together = [
        (modules, residual._replace(norm=average.norm))
        for (modules, average), (_, residual) in zip(averages, residuals, strict=True)
    ]
    adapter, without = finished(request, averages)
    residual, _ = finished(replace(request, name=f"{name}_residual"), residuals)
    return FedexMerged(adapter, residual, finished(request, together).report, without)


def _average(total: Sum, weight: Tensor, dtype: torch.dtype) -> Part:
    adapters = len(weight)
    scales = total.factor.unflatten(1, (adapters, -1))[..., 0] / weight
    scale = scales.gather(1, scales.abs().argmax(1, keepdim=True)).float().double()
    lora_a, lora_b = (
        (rows.unflatten(1, (adapters, -1)) * share[..., None, None]).sum(1)
        for rows, share in ((total.lora_a, weight), (total.lora_b, weight * scales / scale))
    )
    return exact_sums.measured(total, lora_a, lora_b, dtype, scale=scale[:, 0])


def _residual(total: Sum, average: Part, rank: int | None, dtype: torch.dtype) -> Part:
    """The exact sum less the average as it is stored."""
    factor = -average.scale[:, None].expand(-1, average.lora_a.shape[1])
    rest = Sum(
        torch.cat([total.lora_a, average.lora_a.double()], 1),
        torch.cat([total.lora_b, average.lora_b.double()], 1),
        torch.cat([total.factor, factor], 1),
    )
    # The averaged rows add no direction to those that they are made of, but for their rounding.
    return exact_sums.svd(rest, rank or total.lora_a.shape[1], None, dtype)
