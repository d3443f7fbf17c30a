"""What the middle stage of subspace_lora in Triton needs a plan for."""

from torch import Tensor

from lora_fused import backends
from lora_fused.ops.mixture_lora import plan as plans
from lora_fused.ops.subspace_lora.cores import OP


def is_one_launch(
    rows: int, per_row: int, max_rank: int, core_a: Tensor, core_b: Tensor | None
) -> bool:
    """Whether pairs are applied in one launch, a program for each row, which needs no plan.

    It reads a core anew for each row that uses it, from L2: up to what a second launch would cost.
    mixture_lora's own rule asks for few rows, too; but its adapters are as wide as the layer.
    """
    if core_b is None or backends.BATCH_INVARIANT:
        return False
    spans = -(-core_b.shape[1] // plans.SPAN)
    columns = core_a.shape[1] * spans + core_b.shape[1]
    program = max_rank * per_row * columns * core_a.itemsize
    # All ranks of a row are kept in registers, each adapter's padded to a power of two.
    padded = max(16, 1 << (max_rank - 1).bit_length()) * per_row
    small = program <= plans.ONE_PROGRAM and program * rows <= plans.ONE_LAUNCH
    return small and padded <= 128


def made_for(plan, flat: tuple, max_rank: int, for_backward: bool) -> tuple[Tensor, ...]:
    """The tensors of a plan for flattened arguments; none where no launch needs them."""
    x_ni, _, _, core_a, core_b, _, adapter_ids, _, _, row_mixture, _ = flat
    rows, per_row = x_ni.shape[0], adapter_ids.shape[1]
    if plan is not None:
        plans.check_plan(plan, rows, adapter_ids, OP)
    diagonal = core_a.dim() == 2 and core_b is None
    alone = not for_backward and is_one_launch(rows, per_row, max_rank, core_a, core_b)
    if diagonal or alone:
        return ()
    return tuple(plan or plans.make_plan(adapter_ids, row_mixture, rows))
