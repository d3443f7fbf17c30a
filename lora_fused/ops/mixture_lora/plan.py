"""Row arithmetic of mixture_lora on a device: which pairs (row, j) name the same adapter."""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_fused.checks import invalid

_OP = "mixture_lora"
BLOCK_PAIRS = 16  # rows of one tensor-core tile


class MixturePlan(NamedTuple):
    """Pairs sorted by adapter, cut into blocks of at most BLOCK_PAIRS pairs of one adapter.

    Made from (adapter_ids, row_mixture, N) alone, so one plan serves all layers of a forward; made
    on the device without reading anything back.

    Attributes:
        pair_order: ``[N * J]`` int32, pairs ``n * J + j`` in ascending order of their adapter.
        pair_adapter: ``[N * J]`` int32, the adapter of each of these, -1 first.
        block_start: ``[N * J]`` int32, where in pair_order each block begins; N * J past the last.
        row_order: ``[N]`` int32, rows in ascending order of their first adapter.
    """

    pair_order: Tensor
    pair_adapter: Tensor
    block_start: Tensor
    row_order: Tensor


def make_plan(adapter_ids: Tensor, row_mixture: Tensor | None, rows: int) -> MixturePlan:
    """The plan of ``rows`` rows; adapter_ids [M, J], row_mixture [S] as mixture_lora takes them."""
    ids_sj = adapter_ids if row_mixture is None else adapter_ids[row_mixture]
    groups, per_row = ids_sj.shape
    ids_nj = ids_sj[:, None].expand(groups, rows // max(groups, 1), per_row).reshape(rows, per_row)
    adapter, order = ids_nj.flatten().sort(stable=True)
    position = torch.arange(order.shape[0], device=order.device)
    opens_run = torch.cat([torch.ones_like(adapter[:1]), adapter.diff()]) != 0
    in_run = position - torch.where(opens_run, position, 0).cummax(0).values
    opens_block = (in_run % BLOCK_PAIRS == 0) & (adapter >= 0)
    starts = torch.where(opens_block, position, order.shape[0]).sort().values
    first = ids_nj[:, 0] if per_row else ids_nj.new_zeros(rows)
    row_order = first.argsort(stable=True)
    return MixturePlan(order.int(), adapter.int(), starts.int(), row_order.int())


def rank_bound(row_start: Tensor | None, max_rank: int | None) -> int | None:
    """The largest rank of a packed stack; None where it cannot be read (T bounds it then)."""
    if row_start is None or torch.compiler.is_compiling() or row_start.numel() < 2:
        return max_rank
    if max_rank is None or row_start.device.type == "cpu":
        largest = int(row_start.diff().max())
        if max_rank is not None and max_rank < largest:
            raise invalid(_OP, "max_rank", f"be at least the largest rank, {largest}", max_rank)
        return largest
    return max_rank


def scratch_rank(lora_a: Tensor, row_start: Tensor | None, bound: int | None) -> int:
    """The rank that sizes Triton's scratch: of the slots, or what the host knows of a stack."""
    if row_start is None:
        return lora_a.shape[1]
    if bound is None and row_start.numel() > 1:
        rule = "be given for a packed stack where row_start cannot be read (torch.compile)"
        raise invalid(_OP, "max_rank", rule, bound)
    return bound or 0


def check_plan(plan, x_ni: Tensor, adapter_ids: Tensor):
    """Check the size of a plan made elsewhere; return it."""
    pairs = x_ni.shape[0] * adapter_ids.shape[1]
    if plan is not None and plan.pair_order.shape != (pairs,):
        rule = f"be made for the {pairs} pairs of this call"
        raise invalid(_OP, "plan", rule, plan.pair_order.shape[0])
    return plan
