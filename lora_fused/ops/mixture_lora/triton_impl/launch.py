"""Block sizes and launches of mixture_lora's Triton kernels.

Every choice depends on shapes alone, never on values: nothing is read back from the device, and a
launch captured in a CUDA graph stays right when ids and weights change in place. The arithmetic
behind the numbers is in ops/mixture_lora/README.md.
"""

import dataclasses
import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lora_fused import backends
from lora_fused.ops.mixture_lora import plan as plans
from lora_fused.ops.mixture_lora.triton_impl.decode import _mixture_lora_decode_kernel
from lora_fused.ops.mixture_lora.triton_impl.expand import (
    _mixture_lora_expand_kernel,
    _mixture_lora_expand_shared_kernel,
)
from lora_fused.ops.mixture_lora.triton_impl.gradients import (
    _mixture_lora_outer_kernel,
    _mixture_lora_sum_kernel,
)
from lora_fused.ops.mixture_lora.triton_impl.shrink import _mixture_lora_shrink_kernel
from lora_fused.ops.triton_impl import capability


class Tile(NamedTuple):
    """Rows and columns of an expand program, its warps, and the columns that it walks."""

    rows: int
    columns: int
    warps: int
    span: int


# Few rows: many small programs, since the largest one sets the time (100 GB/s each).
FEW = Tile(rows=32, columns=32, warps=4, span=32)
# More rows: wide tiles, since re-reading B and h from L2 sets the time.
MANY = Tile(rows=64, columns=128, warps=8, span=128)
# Blocks of one mixture: h is kept in registers over the span.
SHARED = {64: Tile(64, 64, 4, 512), 128: Tile(128, 64, 8, 512)}


def slice_of(columns: int) -> int:
    """Columns of one shrink program: as few as keep the slices of h (4 bytes each) cheap."""
    width = 512 if columns <= 2048 else 1024
    return max(width, triton.cdiv(columns, 8 * width) * width)  # 8 slices at most


def _terms(b: Tensor, y: Tensor) -> int:
    """Into how many bfloat16 numbers h is cut: 16 bits of it suffice for a 16-bit result."""
    if b.dtype != torch.bfloat16:
        return 0
    return 3 if y.dtype == torch.float32 else 2


@dataclasses.dataclass
class Call:
    """One call of the op, for one or more projections of the same rows."""

    row_start: tuple[Tensor, ...]
    ranks: tuple[Tensor, ...]
    adapter_ids: Tensor
    weights: Tensor
    scale: tuple[Tensor, ...]
    row_mixture: Tensor | None
    plan: plans.MixturePlan | None
    max_rank: int
    rows: int
    count: int

    def __post_init__(self):
        self.mixtures, self.per_row = self.adapter_ids.shape
        self.pairs = self.rows * self.per_row
        self.groups = self.mixtures if self.row_mixture is None else self.row_mixture.shape[0]
        self.shared = plans.is_shared(self.rows, self.mixtures)
        self.empty = 0 in (self.pairs, self.count, self.max_rank)
        self.rank_block = max(16, triton.next_power_of_2(self.max_rank))
        self.block = plans.block_size(self.rows, self.mixtures)

    @functools.cached_property
    def capability(self) -> int:
        return capability()  # asked once a call: it is the driver's to say

    @property
    def precision(self) -> str:
        """How float32 operands are multiplied: on NVIDIA, three TF32 products keep the digits."""
        return "tf32x3" if self.capability else "ieee"

    @property
    def pdl(self) -> dict:
        """Start expand while shrink drains: sm_90 and later, on request until it was measured."""
        return {"launch_pdl": True} if backends.PDL and self.capability >= 90 else {}

    def planned(self) -> plans.MixturePlan:
        if self.plan is None:
            self.plan = plans.make_plan(self.adapter_ids, self.row_mixture, self.rows)
        return self.plan

    @property
    def blocks(self) -> int:
        """An upper bound on the plan's blocks that needs no reading."""
        units, keys = self.pairs, self.count
        if self.shared:  # one key more on either side of the mixtures: those out of range
            units, keys = self.rows, self.mixtures + 2
        return min(units, triton.cdiv(units, self.block) + min(keys, units))

    def chunks(self, itemsize: int, most: int = 128) -> tuple[int, int]:
        """Rank columns of one product (at most so many bytes), and how many such chunks."""
        columns = self.rank_block * (max(self.per_row, 1) if self.shared else 1)
        chunk = min(most // itemsize, triton.next_power_of_2(columns))
        return chunk, triton.cdiv(columns, chunk)

    def stack(self, sides: list[Tensor]) -> tuple:
        """row_start, ranks and slot rank of each projection, and the form they come in."""
        none = (None,) * len(sides)
        slots = tuple(side.shape[1] if side.dim() == 3 else 0 for side in sides)
        form = {"PACKED": bool(self.row_start), "HAS_RANKS": bool(self.ranks)}
        return self.row_start or none, self.ranks or none, slots, form

    def shrink(self, x: Tensor, sides: list[Tensor], *, zero: bool = False) -> Tensor:
        """h [projections, slices, pairs, max_rank] of x [N, C] and one side of the stacks."""
        columns = x.shape[1]
        width = slice_of(columns)
        slices = max(1, triton.cdiv(columns, width))
        make = torch.zeros if zero else torch.empty
        shape = (len(sides), slices, self.pairs, self.max_rank)
        h = make(shape, dtype=torch.float32, device=x.device)
        if self.empty or columns == 0:
            return h if zero else h.zero_()
        row_start, ranks, slots, form = self.stack(sides)
        plan, pdl = self.planned(), self.pdl
        itemsize = max(x.itemsize, sides[0].itemsize)
        chunk, chunks = self.chunks(itemsize)
        _mixture_lora_shrink_kernel[(self.blocks, len(sides) * chunks, slices)](
            x, tuple(sides), row_start, ranks, self.adapter_ids,
            plan.order, plan.key, plan.block_start, tuple(h),
            columns, self.mixtures, self.per_row, self.count, plan.order.shape[0], self.pairs,
            self.max_rank, width, slots, *x.stride(), *_strides(sides),
            **form, SHARED=self.shared, PDL=bool(pdl), PRECISION=self.precision,
            RANK=self.rank_block, CHUNKS=chunks,
            BLOCK_U=self.block, BLOCK_C=chunk,
            num_warps=8 if self.shared or itemsize == 4 or chunk == 64 else 4,  # fewer spill
            BLOCK_I=(128 if self.shared else 256) // itemsize,
        )  # fmt: skip
        return h

    def expand(
        self, h: Tensor, sides: list[Tensor], outs: list[Tensor], bases: list[Tensor]
    ) -> None:
        """Write base + sum of factor * h * side into each of outs [N, C]."""
        sizes = tuple(y.shape[1] for y in outs)
        if 0 in (self.rows, max(sizes)):
            return
        row_start, ranks, slots, form = self.stack(sides)
        plan, pdl = self.planned(), self.pdl
        stack = (tuple(sides), row_start, ranks, self.adapter_ids, self.weights)
        scale = self.scale or (None,) * len(sides)
        count = 0 if self.empty else self.count
        slice_size = self.pairs * self.max_rank
        tail = (slots, *_strides(sides), *_row_strides(bases, outs))
        form |= {
            "HAS_SCALE": bool(self.scale), "HAS_BASE": bool(bases), "PDL": bool(pdl),
            "SLICES": h.shape[1], "TERMS": _terms(sides[0], outs[0]), "PRECISION": self.precision,
        }  # fmt: skip
        out = (tuple(bases) or (None,) * len(sides), tuple(outs))
        tile = self.tile
        spans = sum(triton.cdiv(size, tile.span) for size in sizes)
        if self.shared:
            full = sides[0].itemsize == 4  # float32 operands are cut in three on NVIDIA
            chunk, chunks = self.chunks(sides[0].itemsize)
            if chunks > 1:  # h is then loaded within the loop, and large ones spill
                chunk, chunks = self.chunks(sides[0].itemsize, 64)
            _mixture_lora_expand_shared_kernel[(self.blocks, spans)](
                tuple(h), *stack, scale, plan.order, plan.key, plan.block_start, *out,
                self.rows, sizes, self.mixtures, self.per_row, count, self.max_rank, slice_size,
                *tail,
                **form, RANK=self.rank_block, CHUNKS=chunks, BLOCK_N=tile.rows,
                BLOCK_C=chunk, BLOCK_O=16 if full else tile.columns, SPAN=tile.span,
                num_warps=tile.warps, num_stages=1 if full else 3, **pdl,
            )  # fmt: skip
            return
        _mixture_lora_expand_kernel[(triton.cdiv(self.rows, tile.rows), spans)](
            tuple(h), *stack, scale, self.row_mixture, plan.row_order, *out,
            self.rows, sizes, self.mixtures, self.per_row, count, self.max_rank, slice_size,
            self.rows // self.groups, *tail,
            **form, HAS_GROUPS=self.row_mixture is not None, BLOCK_N=tile.rows,
            BLOCK_J=triton.next_power_of_2(max(self.per_row, 1)),
            BLOCK_R=min(32, self.rank_block), BLOCK_O=tile.columns,
            num_warps=tile.warps, **pdl,
        )  # fmt: skip

    @property
    def tile(self) -> Tile:
        if self.shared:
            return SHARED[self.block]
        return FEW if self.rows <= 64 and not backends.BATCH_INVARIANT else MANY

    def decode(self, x, lora_a: list[Tensor], lora_b: list[Tensor], outs, bases) -> None:
        """Both products in one launch."""
        row_start, ranks, slots, form = self.stack(lora_a)
        none = (None,) * len(lora_a)
        sizes = tuple(y.shape[1] for y in outs)
        columns = triton.next_power_of_2(self.rank_block * self.per_row)
        spans = sum(triton.cdiv(size, plans.SPAN) for size in sizes)
        if spans == 0:
            return
        _mixture_lora_decode_kernel[(self.rows, spans)](
            x, tuple(lora_a), tuple(lora_b), row_start, ranks, self.adapter_ids, self.weights,
            self.scale or none, self.row_mixture, tuple(bases) or none, tuple(outs),
            x.shape[1], sizes, self.mixtures, self.per_row, self.count, self.max_rank,
            self.rows // self.groups, slots, *x.stride(), *_strides(lora_a), *_strides(lora_b),
            *_row_strides(bases, outs), **form, HAS_GROUPS=self.row_mixture is not None,
            HAS_SCALE=bool(self.scale), HAS_BASE=bool(bases), RANK=self.rank_block, BLOCK_C=columns,
            BLOCK_I=8192 // columns, BLOCK_O=8192 // columns, SPAN=plans.SPAN, num_warps=8,
        )  # fmt: skip

    def outer(self, h: Tensor, x: Tensor, factor: Tensor, runs: tuple, like: Tensor) -> Tensor:
        """Gradient of one side: per adapter, sum over its pairs of factor * h (x) x."""
        out = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
        columns = x.shape[1]
        if self.empty or columns == 0:
            return out
        row_start, ranks, slots, form = self.stack([like])
        block = min(64, self.rank_block)
        grid = (self.count, triton.cdiv(self.max_rank, block), triton.cdiv(columns, 64))
        _mixture_lora_outer_kernel[grid](
            h, x, row_start, ranks, factor, *runs, out,
            columns, self.per_row, self.max_rank, self.pairs * self.max_rank, slots, *x.stride(),
            **form, SLICES=h.shape[0], PRECISION=self.precision,
            BLOCK_P=16, BLOCK_R=block, BLOCK_C=64,
        )  # fmt: skip
        return out

    def sum_runs(self, values: Tensor, runs: tuple) -> Tensor:
        """Sum of the pairs' values [N * J] per adapter, in the plan's order: [K]."""
        out = torch.zeros(self.count, dtype=torch.float32, device=values.device)
        if not self.empty:
            _mixture_lora_sum_kernel[(self.count,)](values, *runs, out, BLOCK_P=128)
        return out


def _strides(sides: list[Tensor]) -> tuple:
    """Strides of a stack's adapters (or rows, if packed), rows and columns, by projection."""
    return tuple(zip(*((s.stride(0), *s.stride()[-2:]) for s in sides), strict=True))


def _row_strides(bases: list[Tensor], outs: list[Tensor]) -> tuple:
    return tuple(zip(*(t.stride() for t in bases or outs), strict=True))
