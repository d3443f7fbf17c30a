"""From subspace_lora's arguments to the implementation that runs."""

from contextlib import suppress

import torch
from torch import Tensor

from lora_fused.ops.mixture_lora.autograd import wants_grad
from lora_fused.ops.mixture_lora.dispatch import (
    autocast,
    chosen,
    is_eager_cpu,
    without_autocast,
)
from lora_fused.ops.mixture_lora.plan import rank_bound, scratch_rank
from lora_fused.ops.subspace_lora import autograd, contract, reference, registration
from lora_fused.ops.subspace_lora import plan as plans
from lora_fused.ops.subspace_lora.cores import OP

_ = registration  # defines the operators


def _has_kernel(impl: str, key: str) -> bool:
    name = f"lora_fused::{OP}_fwd_{impl}"
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


# What this build has: constants, decided at import like those of backends.
HAS_KERNEL = {
    "reference": True,
    "native": _has_kernel("native", "CPU"),
    "triton": _has_kernel("triton", "CUDA"),
}


def run(x: Tensor, args: tuple, plan, max_rank: int | None, impl: str) -> Tensor:
    """The result for x and (basis_a, ..., base), as reference.forward takes them."""
    basis_a, basis_b, core_a, *_, base = args
    if impl in ("auto", "native") and HAS_KERNEL["native"] and is_eager_cpu(x, base):
        contract.check_frozen(basis_a, basis_b)
        # The kernel refuses what does not fit, and what it refuses is explained or sent to the
        # reference below. Checking first would double the time of a decode step's call.
        with suppress(RuntimeError, IndexError):
            y = autograd.forward(*contract.flatten(x, *args))
            return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])
    x = autocast(x)
    name = _usable(chosen(x, (basis_a, core_a, base), impl, OP), impl)
    contract.check(x, *args, name)
    flat, out_shape = contract.flatten(x, *args), (*x.shape[:-1], basis_b.shape[1])
    if name == "native":
        return autograd.forward(*flat).reshape(out_shape)
    row_start = args[4]
    bound = rank_bound(row_start, max_rank, OP)
    if name == "triton":
        bound = 0 if row_start is None else scratch_rank(core_a, row_start, bound, OP)
        plan = plans.made_for(plan, flat, bound, wants_grad(*flat))
        return autograd.forward(*flat, impl=name, max_rank=bound, plan=plan).reshape(out_shape)
    with without_autocast(x):
        y = reference.forward(*flat, max_rank=bound)
    return y.reshape(out_shape)


def _usable(name: str, impl: str) -> str:
    """The implementation, where this build has its kernel; a named one never falls back."""
    if HAS_KERNEL[name]:
        return name
    if impl != "auto":
        reason = "this build has no such kernel of this op"
        raise RuntimeError(f"{OP}: impl must be usable here, got {impl!r}: {reason}")
    return "reference"
