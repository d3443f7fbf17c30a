"""Row arithmetic of mixture_lora on a device: what shares an adapter, what shares a mixture."""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_fused import backends
from lora_fused.checks import invalid

_OP = "mixture_lora"

# One launch recomputes h = A x for every SPAN columns of y. It is taken where that costs less than
# a second launch does: 2 microseconds, at 100 GB/s a program and 5.5 TB/s for all of them; and not
# for more rows, which share adapters: one launch reads an adapter for each row anew.
SPAN = 1024
ONE_PROGRAM, ONE_LAUNCH, ONE_ROWS = 200_000, 11_000_000, 16  # bytes, bytes, rows


class MixturePlan(NamedTuple):
    """Units sorted by key and cut into blocks of one key.

    Where at least 16 rows share each mixture, units are rows and keys mixtures; else units are
    pairs n * J + j and keys adapters, with -1 for none. Made from (adapter_ids, row_mixture, N)
    alone, so one plan serves all layers of a forward; made without reading anything back.

    Attributes:
        order: units in ascending order of their key, int32.
        key: the key of each of these, int32.
        block_start: where in ``order`` each block begins, int32; the number of units past the last.
        row_order: rows in ascending order of their first adapter, int32 ``[N]``; empty where units
            are rows, so that one kind of plan does not pass for the other.
    """

    order: Tensor
    key: Tensor
    block_start: Tensor
    row_order: Tensor


def is_shared(rows: int, mixtures: int) -> bool:
    """Whether work is grouped by mixture: x is then read once for all J adapters."""
    return rows >= 16 * max(mixtures, 1) and not backends.BATCH_INVARIANT


def block_size(rows: int, mixtures: int) -> int:
    """Units of one block: more where they share a read of a whole mixture."""
    if not is_shared(rows, mixtures):
        return 32
    return 128 if rows >= 4096 else 64


def is_one_launch(x_ni: Tensor, lora_b, per_row: int, max_rank: int) -> bool:
    """Whether forward runs in one launch, which needs no plan; ``lora_b`` by projection."""
    rows, columns = x_ni.shape
    ranks = max_rank * per_row
    program = ranks * (columns + SPAN) * lora_b[0].itemsize
    programs = rows * sum(-(-b.shape[-1] // SPAN) for b in lora_b)
    small = program <= ONE_PROGRAM and program * programs <= ONE_LAUNCH
    # All ranks of a row are kept in registers, each adapter's padded to a power of two.
    padded = max(16, 1 << (max_rank - 1).bit_length()) * per_row
    few = rows <= ONE_ROWS and padded <= 128
    return small and few and not backends.BATCH_INVARIANT


def make_plan(adapter_ids: Tensor, row_mixture: Tensor | None, rows: int) -> MixturePlan:
    """The plan of ``rows`` rows; adapter_ids [M, J], row_mixture [S] as mixture_lora takes them."""
    mixtures = adapter_ids.shape[0]
    if is_shared(rows, mixtures):
        index = torch.arange(mixtures, device=adapter_ids.device, dtype=torch.int32)
        key = _of_rows(index if row_mixture is None else row_mixture.clamp(-1, mixtures), rows)
    else:
        key = _of_rows(adapter_ids if row_mixture is None else adapter_ids[row_mixture], rows)
    key_u, order = key.flatten().sort(stable=True)
    position = torch.arange(order.shape[0], device=order.device)
    in_run = position - torch.searchsorted(key_u, key_u)
    opens = in_run % block_size(rows, mixtures) == 0
    if key.dim() == 2:  # pairs without an adapter are no work, but every row is written
        opens &= key_u >= 0
    starts = torch.where(opens, position, order.shape[0]).sort().values
    row_order = order[:0].int() if key.dim() == 1 else _rows_by_first(key)
    return MixturePlan(order.int(), key_u.int(), starts.int(), row_order)


def adapter_runs(ids_sj: Tensor, rows: int, count: int) -> tuple[Tensor, Tensor]:
    """Pairs in ascending order of their adapter, and where each adapter's begin, [K + 1]."""
    adapter, order = _of_rows(ids_sj, rows).flatten().sort(stable=True)
    ids_k = torch.arange(count + 1, device=order.device, dtype=adapter.dtype)
    return order.int(), torch.searchsorted(adapter, ids_k).int()


def _of_rows(of_groups: Tensor, rows: int) -> Tensor:
    """[S, ...] -> [N, ...]: each group's entry for its N // S rows."""
    groups, *rest = of_groups.shape
    shape = (groups, rows // max(groups, 1), *rest)
    return of_groups[:, None].expand(shape).reshape(rows, *rest)


def _rows_by_first(ids_nj: Tensor) -> Tensor:
    first = ids_nj[:, 0] if ids_nj.shape[1] else ids_nj.new_zeros(ids_nj.shape[0])
    return first.argsort(stable=True).int()


def rank_bound(row_start: Tensor | None, max_rank: int | None, op: str = _OP) -> int | None:
    """The largest rank of a packed stack; None where it cannot be read (T bounds it then)."""
    if row_start is None or torch.compiler.is_compiling() or row_start.numel() < 2:
        return max_rank
    if max_rank is None or row_start.device.type == "cpu":
        largest = int(row_start.diff().max())
        if max_rank is not None and max_rank < largest:
            raise invalid(op, "max_rank", f"be at least the largest rank, {largest}", max_rank)
        return largest
    return max_rank


def scratch_rank(lora_a: Tensor, row_start: Tensor | None, bound: int | None, op: str = _OP) -> int:
    """The rank that sizes Triton's scratch: of the slots, or what the host knows of a stack."""
    if row_start is None:
        return lora_a.shape[1]
    if bound is None and row_start.numel() > 1:
        rule = "be given for a packed stack where row_start cannot be read (torch.compile)"
        raise invalid(op, "max_rank", rule, bound)
    return bound or 0


def check_plan(plan: MixturePlan, rows: int, adapter_ids: Tensor, op: str = _OP) -> None:
    """Check the size of a plan made elsewhere."""
    shared = is_shared(rows, adapter_ids.shape[0])
    sizes = (rows, 0) if shared else (rows * adapter_ids.shape[1], rows)
    came = (plan.order.shape[0], plan.row_order.shape[0])
    if came != sizes:
        raise invalid(op, "plan", f"be made for the {rows} rows of this call, sizes {sizes}", came)
