"""What subspace_lora asks of its arguments; routing, base and pairs are held to mixture_lora's."""

import torch

from lora_fused.checks import invalid, shape
from lora_fused.ops.mixture_lora import contract as of_mixture
from lora_fused.ops.mixture_lora.contract import check_device, dtypes, stored, what
from lora_fused.ops.subspace_lora.cores import OP


def check(
    x, basis_a, basis_b, core_a, core_b, row_start, adapter_ids, weights, scale, row_mixture, base,
    name: str,
) -> None:  # fmt: skip
    """Raise the ValueError that names the first argument which does not fit; None if all do."""
    check_bases(x, basis_a, basis_b, name)
    directions = (basis_a.shape[0], basis_b.shape[0])
    if row_start is not None:
        count = check_pairs(basis_a, core_a, core_b, row_start, scale, name, directions)
    else:
        count = check_dense(core_a, scale, name, directions)
        check_device(OP, x.device, cores=core_a, scale=scale)
    of_mixture.check_route(x, adapter_ids, weights, row_mixture, count, OP)
    if base is not None:
        of_mixture.check_base(base, x, (*x.shape[:-1], basis_b.shape[1]), name, OP)


def check_bases(x, basis_a, basis_b, name: str) -> None:
    """Check x and the bases, which are frozen: a gradient asked of them would be left out."""
    allowed = stored(name)
    if x.dim() == 0 or x.dtype not in allowed:
        raise invalid(OP, "x", f"be [..., I] of {dtypes(allowed)} for impl {name!r}", what(x))
    if basis_a.dim() != 2 or basis_a.shape[1] != x.shape[-1]:
        raise invalid(OP, "basis_a", f"be [P, I] with I = {x.shape[-1]}", shape(basis_a))
    if basis_b.dim() != 2:
        raise invalid(OP, "basis_b", "be [P, O]", shape(basis_b))
    if basis_a.dtype not in allowed or basis_b.dtype != basis_a.dtype:
        got = f"{basis_a.dtype} and {basis_b.dtype}"
        raise invalid(OP, "basis_a and basis_b", f"share one of {dtypes(allowed)}", got)
    check_device(OP, x.device, basis_a=basis_a, basis_b=basis_b)
    check_frozen(basis_a, basis_b)


def check_frozen(basis_a, basis_b) -> None:
    """Refuse bases that ask for a gradient: they have none."""
    if torch.is_grad_enabled() and (basis_a.requires_grad or basis_b.requires_grad):
        label = "basis_a" if basis_a.requires_grad else "basis_b"
        raise invalid(OP, label, "be frozen (detach it)", "requires_grad=True")


def check_pairs(basis_a, lora_a, lora_b, row_start, scale, name: str, directions: tuple) -> int:
    """Check cores [T, P] and [T, P]; return how many adapters there are (K)."""
    # To the stack of pairs, rows are what basis_a makes of x: P wide.
    stack = (lora_a, lora_b, row_start, None, scale)
    count = of_mixture.check_stack(basis_a.T, *stack, name, OP, "P")
    if lora_b.shape[1] != directions[1]:
        raise invalid(OP, "lora_b", f"be [T, P] with P = {directions[1]}", shape(lora_b))
    return count


def check_dense(cores, scale, name: str, directions: tuple) -> int:
    """Check cores [K, P] or [K, P of basis_b, P of basis_a]; return K."""
    p, q = directions
    if cores.dtype not in stored(name):
        rule = f"be {dtypes(stored(name))} for impl {name!r}"
        raise invalid(OP, "cores", rule, cores.dtype)
    if cores.dim() == 2 and p != q:
        raise invalid(OP, "cores", f"be [K, {q}, {p}], for the bases differ in P", shape(cores))
    wanted = (p,) if cores.dim() == 2 else (q, p)
    if cores.shape[1:] != wanted:
        sizes = ", ".join(map(str, wanted))
        raise invalid(OP, "cores", f"be [K, {sizes}] like the bases", shape(cores))
    if scale is not None and (scale.shape != cores.shape[:1] or not scale.is_floating_point()):
        raise invalid(OP, "scale", f"be floating point [{cores.shape[0]}]", what(scale))
    return cores.shape[0]


def flatten(
    x, basis_a, basis_b, core_a, core_b, row_start, adapter_ids, weights, scale, row_mixture, base
) -> tuple:
    """The arguments as the implementations take them: rows [N, I], ids int32, weights float32."""
    adapter_ids, weights, scale = of_mixture.flatten_route(x, adapter_ids, weights, scale)
    if x.dim() != 2:  # -1 has no size where there are no columns
        x = x.reshape(-1, x.shape[-1])
    if base is not None and base.dim() != 2:
        base = base.reshape(-1, base.shape[-1])
    route = (adapter_ids, weights, scale, row_mixture)
    return x, basis_a, basis_b, core_a, core_b, row_start, *route, base
