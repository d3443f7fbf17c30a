"""From mixture_lora's arguments to the implementation that runs."""

from contextlib import AbstractContextManager, nullcontext, suppress

import torch
from torch import Tensor

from lora_fused.backends import ERRORS, choose
from lora_fused.checks import invalid
from lora_fused.ops.mixture_lora import autograd, contract, reference, registration
from lora_fused.ops.mixture_lora import plan as plans

OP = contract.OP
_ = registration  # defines the operators


def run(x: Tensor, args: tuple, plan, max_rank: int | None, impl: str) -> Tensor:
    """The result for x and (lora_a, ..., base), as api.mixture_lora takes them."""
    base = args[-1]
    if impl in ("auto", "native") and is_eager_cpu(x, base):
        # The kernel refuses what does not fit, and what it refuses is explained or sent to the
        # reference below. Checking first would double the time of a decode step's call.
        with suppress(RuntimeError, IndexError):
            y = autograd.forward(*contract.flatten(x, *args))
            return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])
    x = autocast(x)
    name = chosen(x, (args[0], base), impl)
    contract.check(x, *args, name)
    flat, out_shape = contract.flatten(x, *args), (*x.shape[:-1], args[1].shape[-1])
    if name == "native":
        return autograd.forward(*flat).reshape(out_shape)
    bound = plans.rank_bound(args[2], max_rank)
    if name == "triton":
        bound = plans.scratch_rank(args[0], args[2], bound)
        plan = _plan(plan, flat, [flat[2]], bound, autograd.wants_grad(*flat))
        return autograd.forward(*flat, name, bound, plan).reshape(out_shape)
    with without_autocast(x):
        y = reference.forward(*flat, max_rank=bound)
    return y.reshape(out_shape)


def run_into(out: Tensor, x: Tensor, args: tuple, plan, max_rank: int | None, impl: str) -> Tensor:
    """run(), written to ``out``, which may be base."""
    if autograd.wants_grad(x, *args, out):
        raise invalid(OP, "out", "be used without gradients (torch.no_grad)", "one wanted")
    base, shape = args[-1], (*x.shape[:-1], args[1].shape[-1])
    cast = autocast(x)
    name = chosen(cast, (args[0], base), impl)
    contract.check(cast, *args, name)
    dtype = cast.dtype if base is None else base.dtype
    if out.shape != shape or out.dtype != dtype or out.device != x.device:
        rule = f"be {dtype} {list(shape)} on {x.device}"
        raise invalid(OP, "out", rule, f"{out.dtype} {list(out.shape)} on {out.device}")
    if name != "triton" or not out.is_contiguous():
        return out.copy_(run(x, args, plan, max_rank, impl))
    flat = contract.flatten(cast, *args)
    bound = plans.scratch_rank(args[0], args[2], plans.rank_bound(args[2], max_rank))
    plan = _plan(plan, flat, [flat[2]], bound, False)
    rows = out.view(flat[0].shape[0], out.shape[-1])
    args = autograd.one_projection(*flat)
    torch.ops.lora_fused.mixture_lora_out_triton(*args, plan, bound, [rows])
    return out


def run_group(x: Tensor, columns: dict, route: tuple, plan, max_rank, impl: str) -> tuple:
    """Results by projection; columns: argument -> one entry each or None, route shared by all."""
    count = len(columns["lora_a"])
    for label, entries in columns.items():
        if entries is not None and len(entries) != count:
            raise invalid(
                OP, label, f"have one entry for each of {count} projections", len(entries)
            )
    entries = [t if t is not None else [None] * count for t in columns.values()]
    ids, weights, row_mixture = route
    calls = [
        (a, b, start, ranks, ids, weights, scale, row_mixture, base)
        for a, b, start, ranks, scale, base in zip(*entries, strict=True)
    ]
    if not calls:
        return ()
    cast = autocast(x)
    alike = all(chosen(cast, (c[0], c[-1]), impl) == "triton" for c in calls)
    if not alike or any(autograd.wants_grad(x, *call) for call in calls):
        return tuple(run(x, call, plan, max_rank, impl) for call in calls)
    for call in calls:
        contract.check(cast, *call, "triton")
    if len({_kind(call) for call in calls}) > 1:
        rule = "agree in dtype, form and number of adapters for all projections"
        raise invalid(OP, "lora_a, lora_b, row_start, ranks and base", rule, "a mix")
    flat = [contract.flatten(cast, *call) for call in calls]
    bound = max(
        plans.scratch_rank(a, start, plans.rank_bound(start, max_rank)) for a, _, start, *_ in calls
    )
    x, _, _, _, _, ids, weights, *_ = flat[0]
    a, b, start, ranks, _, _, scale, _, base = (list(t) for t in list(zip(*flat, strict=True))[1:])
    if any(s is not None for s in scale):
        scale = [
            weights.new_ones(_count(c)) if s is None else s
            for s, c in zip(scale, calls, strict=True)
        ]
    plan = _plan(plan, flat[0], b, bound, False)
    outs = torch.ops.lora_fused.mixture_lora_fwd_triton(
        x, a, b, _all(start), _all(ranks), ids, weights, _all(scale), row_mixture, _all(base),
        plan, bound,
    )  # fmt: skip
    return tuple(y.reshape(*cast.shape[:-1], y.shape[-1]) for y in outs)


def autocast(x: Tensor) -> Tensor:
    """x as autocast wants it."""
    device = x.device
    if (
        x.dtype in contract.STORAGE
        and torch.amp.is_autocast_available(device.type)
        and torch.is_autocast_enabled(device.type)
    ):
        return x.to(torch.get_autocast_dtype(device.type))
    return x


def without_autocast(x: Tensor) -> AbstractContextManager:
    """For the reference: autocast would round its intermediates."""
    device = x.device.type
    rounds = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if rounds else nullcontext()


def chosen(x: Tensor, others: tuple, impl: str, op: str = OP) -> str:
    """The implementation that will run on x and the other tensors, any of which may be None."""
    # float64 anywhere is the reference's: auto must not pick a kernel that then refuses it.
    wide = any(t is not None and t.dtype == torch.float64 for t in others)
    return choose(op, impl, x.device, torch.float64 if wide else x.dtype)


def _plan(plan, flat: tuple, lora_b: list, bound: int, for_backward: bool) -> tuple:
    """The plan's tensors for Triton; none where a single launch needs none."""
    x_ni, adapter_ids, row_mixture = flat[0], flat[5], flat[8]
    if plan is not None:
        plans.check_plan(plan, x_ni.shape[0], adapter_ids)
        return tuple(plan)
    if not for_backward and plans.is_one_launch(x_ni, lora_b, adapter_ids.shape[1], bound):
        return ()
    return tuple(plans.make_plan(adapter_ids, row_mixture, x_ni.shape[0]))


def is_eager_cpu(x: Tensor, base: Tensor | None) -> bool:
    """Whether the native kernel may be asked at once; it sees rows only, so base must line up."""
    return (
        ERRORS["native"] is None
        and x.is_cpu
        and (base is None or base.shape[:-1] == x.shape[:-1])
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def _count(call: tuple) -> int:
    lora_a, _, row_start, *_ = call
    return lora_a.shape[0] if row_start is None else row_start.numel() - 1


def _kind(call: tuple) -> tuple:
    lora_a, _, row_start, ranks, *_, base = call
    form = (row_start is None, ranks is None, base is None)
    return (*form, _count(call), lora_a.dtype, None if base is None else base.dtype)


def _all(tensors: list) -> list[Tensor]:
    return [] if tensors[0] is None else tensors
