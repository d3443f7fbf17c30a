"""mixture_lora in Triton: at most two launches forward, from the same kernels and one more back.

Few rows and ranks: one launch (decode.py). Else shrink, then expand; both group their work by
adapter, or by mixture where rows share one (plan.py). No atomics and no reads by the host.
"""

from collections.abc import Sequence

from torch import Tensor

from lora_fused.ops.mixture_lora import plan as plans
from lora_fused.ops.mixture_lora.triton_impl.launch import Call
from lora_fused.ops.mixture_lora.triton_impl.routing import Routing


def forward(
    x, lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture, base,
    plan: Sequence[Tensor], max_rank: int, out: Sequence[Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    """base + update for x [N, I], by projection: stacks, scale and base are sequences.

    row_start, ranks, scale and base are empty where no projection has any; ``out`` is written in
    place of fresh tensors and may be ``base``.
    """
    call = call_of(
        x, lora_a, row_start, ranks, adapter_ids, weights, scale, row_mixture, plan, max_rank
    )
    if out is None:
        kinds = [y.dtype for y in base] or [x.dtype] * len(lora_b)
        sizes = [(x.shape[0], b.shape[-1]) for b in lora_b]
        out = [x.new_empty(s, dtype=kind) for s, kind in zip(sizes, kinds, strict=True)]
    per_row = adapter_ids.shape[1]
    if not call.empty and plans.is_one_launch(x, lora_b, per_row, max_rank):
        call.decode(x, lora_a, lora_b, out, base)
    else:
        call.expand(call.shrink(x, lora_a), lora_b, out, base)
    return out


def backward(
    grad, x, lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture,
    needs: int, plan: Sequence[Tensor], max_rank: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, lora_a, lora_b, weights, scale where ``needs`` has their bit, else empty."""
    stack = ([] if t is None else [t] for t in (row_start, ranks, scale))
    row_start, ranks, scale_list = stack
    call = call_of(
        x, [lora_a], row_start, ranks, adapter_ids, weights, scale_list, row_mixture, plan, max_rank
    )
    need_x, need_a, need_b, need_weights, need_scale = (needs >> i & 1 for i in range(5))
    # Zero where a pair has no such rank: the sums below read what lies there.
    h, q = call.shrink(x, [lora_a], zero=True), call.shrink(grad, [lora_b], zero=True)
    route = Routing(call)
    out = [t.new_empty(0) for t in (x, lora_a, lora_b, weights, weights)]
    if need_x:  # the update's transpose is the same op with the factors exchanged
        out[0] = x.new_empty(x.shape)
        call.expand(q, [lora_a], [out[0]], [])
    if need_a:
        out[1] = call.outer(q[0], x, route.factor, route.runs, lora_a)
    if need_b:
        out[2] = call.outer(h[0], grad, route.factor, route.runs, lora_b)
    if need_weights or need_scale:
        # <A x, B grad> of each pair; few sums over many terms, so in float64.
        dot = (h[0].sum(0).double() * q[0].sum(0).double()).sum(-1)
    if need_weights:
        out[3] = route.weight_gradient(dot)
    if need_scale:
        out[4] = route.scale_gradient(dot)
    return tuple(out)


def call_of(x, lora_a, row_start, ranks, adapter_ids, weights, scale, row_mixture, plan, max_rank):
    count = row_start[0].shape[0] - 1 if row_start else lora_a[0].shape[0]
    row_start, ranks, scale = (
        tuple(t.contiguous() for t in ts) for ts in (row_start, ranks, scale)
    )
    return Call(
        row_start, ranks, adapter_ids.contiguous(), weights.contiguous(), scale,
        None if row_mixture is None else row_mixture.contiguous(),
        plan=plans.MixturePlan(*plan) if plan else None,
        max_rank=max_rank, rows=x.shape[0], count=count,
    )  # fmt: skip
