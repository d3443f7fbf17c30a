"""subspace_lora in Triton: project x into the basis, apply the cores there, lift the result.

Two launches for diagonal cores, which the first one applies. Between them pairs are mixture_lora's
kernels on the P coordinates, in one launch more, or two; and full cores the second of these alone.
Where x is wider than 4096, one launch more adds the slices of its product. Backward is the same
with the bases exchanged. No atomics and no reads by the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_fused.ops.mixture_lora import triton_impl as of_mixture
from lora_fused.ops.mixture_lora.triton_impl.launch import Call
from lora_fused.ops.mixture_lora.triton_impl.routing import Routing
from lora_fused.ops.subspace_lora import plan as plans
from lora_fused.ops.subspace_lora.triton_impl.launch import diagonal_gradients, lift, project


def forward(
    x, basis_a, basis_b, core_a, core_b, row_start, adapter_ids, weights, scale, row_mixture, base,
    plan: Sequence[Tensor], max_rank: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(base + update, z) for x [N, I], with z = x basis_a^T, float32 [N, P]."""
    route = (adapter_ids, weights, scale, row_mixture)
    call = _call(x, core_a, core_b, row_start, *route, plan, max_rank)
    diagonal = core_a if core_b is None and core_a.dim() == 2 else None
    z, t = project(call, x, basis_a, diagonal)
    if diagonal is None:
        t = _mix(call, z, core_a, core_b, basis_b.shape[0])
    kept = x.dtype if base is None else base.dtype
    y = x.new_empty(x.shape[0], basis_b.shape[1], dtype=kept)
    return lift(call, t, basis_b, y, base), z


def backward(
    grad, z, basis_a, basis_b, core_a, core_b, row_start, adapter_ids, weights, scale, row_mixture,
    x_dtype: torch.dtype, needs: int, plan: Sequence[Tensor], max_rank: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, core_a, core_b, weights, scale where ``needs`` has their bit, else empty."""
    route = (adapter_ids, weights, scale, row_mixture)
    call = _call(grad, core_a, core_b, row_start, *route, plan, max_rank)
    diagonal = core_a if core_b is None and core_a.dim() == 2 else None
    q, grad_z = project(call, grad, basis_b, diagonal)
    if diagonal is not None:
        grads = _diagonal_gradients(call, z, q, diagonal, needs)
    elif core_b is not None:
        grad_z, *grads = of_mixture.backward(
            q, z, core_a, core_b, row_start, None, *route, needs, plan, max_rank
        )
    else:
        grad_z, *grads = _full_gradients(q, z, core_a, *route, needs, plan)
    grad_x = grad.new_empty(0, dtype=x_dtype)
    if needs & 1:
        grad_x = grad.new_empty(grad.shape[0], basis_a.shape[1], dtype=x_dtype)
        lift(call, grad_z, basis_a, grad_x, None)
    return grad_x, *grads


def _call(
    x, core_a, core_b, row_start, adapter_ids, weights, scale, row_mixture, plan, max_rank
) -> Call:
    row_start, scale = ([] if t is None else [t] for t in (row_start, scale))
    if core_b is None:  # as pairs with the unit matrix, of rank P
        max_rank = core_a.shape[-1]
    return of_mixture.call_of(
        x, [core_a], row_start, [], adapter_ids, weights, scale, row_mixture, plan, max_rank
    )


def _mix(call: Call, z: Tensor, core_a: Tensor, core_b: Tensor | None, directions: int) -> Tensor:
    """The middle stage of pairs and of full cores: t [N, P of basis_b]."""
    t = z.new_empty(call.rows, directions)
    one = plans.is_one_launch(call.rows, call.per_row, call.max_rank, core_a, core_b)
    if core_b is None:  # a pair with the unit matrix, whose h is z itself
        h = z.repeat_interleave(call.per_row, 0)[None, None]
        call.expand(h, [core_a.mT], [t], [])
    elif one and not call.empty:
        call.decode(z, [core_a], [core_b], [t], [])
    else:
        call.expand(call.shrink(z, [core_a]), [core_b], [t], [])
    return t


def _diagonal_gradients(call: Call, z: Tensor, q: Tensor, core: Tensor, needs: int) -> list[Tensor]:
    """Those of core_a, core_b (never), weights and scale."""
    none = [core.new_empty(0), core.new_empty(0), z.new_empty(0), z.new_empty(0)]
    if not needs & 0b11010:
        return none
    route = Routing(call)
    grad, dot = diagonal_gradients(call, z, q, core, route.factor, route.runs)
    found = [grad, none[1], route.weight_gradient(dot), route.scale_gradient(dot)]
    return [t if needs >> i & 1 else none[i - 1] for i, t in enumerate(found, 1)]


def _full_gradients(
    q, z, core, adapter_ids, weights, scale, row_mixture, needs: int, plan
) -> tuple[Tensor, ...]:
    """Those of z, core_a, core_b (never), weights and scale: of pairs with the unit matrix."""
    unit = torch.eye(z.shape[1], dtype=core.dtype, device=core.device)
    wanted = needs & 0b11001 | (needs >> 1 & 1) << 2
    grad_z, none, grad_core, grad_weights, grad_scale = of_mixture.backward(
        q, z, unit.expand(core.shape[0], -1, -1), core.mT, None, None, adapter_ids, weights, scale,
        row_mixture, wanted, plan, z.shape[1],
    )  # fmt: skip
    if needs & 0b10:
        grad_core = grad_core.mT.contiguous()
    return grad_z, grad_core, none, grad_weights, grad_scale
