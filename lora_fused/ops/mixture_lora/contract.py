"""What mixture_lora asks of its arguments: shapes always, values where reading them is free."""

import math

import torch
from torch import Tensor

from lora_fused.checks import invalid, shape

OP = "mixture_lora"
STORAGE = (torch.float32, torch.float16, torch.bfloat16)


def check(
    x, lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture, base, name: str
) -> None:
    """Raise the ValueError that names the first argument which does not fit; None if all do."""
    count = check_stack(x, lora_a, lora_b, row_start, ranks, scale, name)
    check_route(x, adapter_ids, weights, row_mixture, count)
    if base is not None:
        check_base(base, x, (*x.shape[:-1], lora_b.shape[-1]), name)


def flatten(
    x, lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture, base
) -> tuple:
    """The arguments as the implementations take them: rows [N, I], ids int32, weights float32."""
    adapter_ids, weights, scale = flatten_route(x, adapter_ids, weights, scale)
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    if base is not None and base.dim() != 2:
        base = base.reshape(-1, base.shape[-1])
    return x, lora_a, lora_b, row_start, ranks, adapter_ids, weights, scale, row_mixture, base


def flatten_route(x, adapter_ids, weights, scale) -> tuple:
    """Ids as int32, weights and scale as float32; as float64 where x is, which serves as truth."""
    if adapter_ids.dtype == torch.int64:  # a plain cast could wrap into a valid id
        adapter_ids = adapter_ids.clamp(-(2**31), 2**31 - 1).int()
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    if weights.dtype != compute:
        weights = _read_as(weights, compute)
    if scale is not None and scale.dtype != compute:
        scale = _read_as(scale, compute)
    return adapter_ids, weights, scale


def check_stack(
    x, lora_a, lora_b, row_start, ranks, scale, name: str, op: str = OP, letter: str = "I"
) -> int:
    """Check the adapters against x [..., I] and each other; return how many there are (K)."""
    allowed = stored(name)
    if x.dim() == 0 or x.dtype not in allowed:
        raise invalid(op, "x", f"be [..., I] of {dtypes(allowed)} for impl {name!r}", what(x))
    dims, form = (3, f"[K, R, {letter}]") if row_start is None else (2, f"[T, {letter}]")
    if lora_a.dim() != dims or lora_a.shape[-1] != x.shape[-1]:
        raise invalid(op, "lora_a", f"be {form} with {letter} = {x.shape[-1]}", shape(lora_a))
    if lora_b.dim() != dims or lora_b.shape[:-1] != lora_a.shape[:-1]:
        rule = f"have the rows of lora_a, {list(lora_a.shape[:-1])}"
        raise invalid(op, "lora_b", rule, shape(lora_b))
    if lora_a.dtype not in allowed or lora_b.dtype != lora_a.dtype:
        got = f"{lora_a.dtype} and {lora_b.dtype}"
        raise invalid(op, "lora_a and lora_b", f"share one of {dtypes(allowed)}", got)
    if row_start is not None and ranks is not None:
        raise invalid(op, "ranks", "be None for a packed stack (row_start given)", shape(ranks))
    count = lora_a.shape[0] if row_start is None else row_start.numel() - 1
    for label, t, size in (("row_start", row_start, max(count, 0) + 1), ("ranks", ranks, count)):
        if t is not None and (t.shape != (size,) or t.dtype != torch.int32):
            raise invalid(op, label, f"be int32 [{size}]", what(t))
    if scale is not None and (scale.shape != (count,) or not scale.is_floating_point()):
        raise invalid(op, "scale", f"be floating point [{count}]", what(scale))
    named = {"lora_a": lora_a, "lora_b": lora_b, "row_start": row_start, "ranks": ranks}
    check_device(op, x.device, **named, scale=scale)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        if row_start is not None and not _is_cover(row_start, lora_a.shape[0]):
            rule = f"rise from 0 to the {lora_a.shape[0]} rows of lora_a"
            raise invalid(op, "row_start", rule, row_start.tolist()[:8])
        if ranks is not None:
            _check_range(op, "ranks", ranks, 0, lora_a.shape[1] + 1)
    return count


def check_route(x, adapter_ids, weights, row_mixture, count: int, op: str = OP) -> None:
    """Check the routing against the rows of x [..., I] and the number of adapters."""
    if adapter_ids.dim() != 2 or adapter_ids.dtype not in (torch.int32, torch.int64):
        raise invalid(op, "adapter_ids", "be int32 or int64 [M, J]", what(adapter_ids))
    if weights.shape != adapter_ids.shape or not weights.is_floating_point():
        rule = f"be floating point {shape(adapter_ids)} like adapter_ids"
        raise invalid(op, "weights", rule, what(weights))
    mixtures, rows = adapter_ids.shape[0], math.prod(x.shape[:-1])
    if row_mixture is not None and (row_mixture.dim() != 1 or row_mixture.dtype != torch.int32):
        raise invalid(op, "row_mixture", "be int32 [S]", what(row_mixture))
    label = "adapter_ids" if row_mixture is None else "row_mixture"
    groups = mixtures if row_mixture is None else row_mixture.shape[0]
    if rows % groups if groups else rows:
        raise invalid(op, label, f"have a first size that divides the {rows} rows of x", groups)
    check_device(op, x.device, adapter_ids=adapter_ids, weights=weights, row_mixture=row_mixture)
    # A device tensor is not read (that would be a sync); a traced one cannot be.
    if adapter_ids.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(op, "adapter_ids", adapter_ids, -1, count)
        if row_mixture is not None:
            _check_range(op, "row_mixture", row_mixture, 0, mixtures)


def check_base(base: Tensor, x: Tensor, out_shape: tuple, name: str, op: str = OP) -> None:
    """Check the frozen layer's output against the shape of the update."""
    allowed = stored(name)
    if base.shape != out_shape or base.dtype not in allowed:
        rule = f"be {list(out_shape)} of {dtypes(allowed)} for impl {name!r}"
        raise invalid(op, "base", rule, what(base))
    check_device(op, x.device, base=base)


def _read_as(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() else t  # else left to be refused


def stored(name: str) -> tuple:
    return (*STORAGE, torch.float64) if name == "reference" else STORAGE


def _is_cover(row_start: Tensor, rows: int) -> bool:
    first, last = int(row_start[0]), int(row_start[-1])
    return first == 0 and last == rows and bool((row_start.diff() >= 0).all())


def _check_range(op: str, label: str, ids: Tensor, low: int, high: int) -> None:
    if ids.numel():
        least, most = (int(t) for t in ids.aminmax())
        if least < low or most >= high:
            got = least if least < low else most
            raise invalid(op, label, f"lie in [{low}, {high - 1}]", got)


def check_device(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    for label, t in tensors.items():
        if t is not None and t.device != device:
            raise invalid(op, label, f"be on {device} like x", t.device)


def what(t: Tensor) -> str:
    return f"{t.dtype} {shape(t)}"


def dtypes(kinds: tuple) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in kinds)
