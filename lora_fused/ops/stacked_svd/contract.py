"""What stacked_svd asks of its arguments; what only reading the rows can tell is in sources.py."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lora_fused.checks import invalid, shape

OP = "stacked_svd"
STORAGE = (torch.float32, torch.float16, torch.bfloat16)
METHODS = ("auto", "randomized", "krylov", "gram", "exact")


def check_options(rank, energy, oversampling, power_iterations, method) -> None:
    """Check what does not depend on the stack."""
    if (rank is None) == (energy is None):
        raise invalid(OP, "rank and energy", "be given one of the two", f"{rank} and {energy}")
    if rank is not None and (not _is_int(rank) or rank < 1):
        raise invalid(OP, "rank", "be an integer of at least 1", rank)
    if energy is not None and not 0 < energy <= 1:
        raise invalid(OP, "energy", "lie in (0, 1]", energy)
    for label, value in (("oversampling", oversampling), ("power_iterations", power_iterations)):
        if not _is_int(value) or value < 0:
            raise invalid(OP, label, "be an integer of at least 0", value)
    if method not in METHODS:
        raise invalid(OP, "method", f"be one of {', '.join(METHODS)}", repr(method))


def check_tensor(stack: Tensor) -> None:
    if stack.dim() not in (2, 3):
        raise invalid(OP, "stack", "be [T, I] or [L, T, I]", shape(stack))
    if stack.dtype not in (*STORAGE, torch.float64):
        raise invalid(OP, "stack", f"be of {names((*STORAGE, torch.float64))}", stack.dtype)
    if 0 in stack.shape:
        raise invalid(OP, "stack", "have no empty dimension", shape(stack))


def check_weights(weights: Tensor | None, stack: object, device: torch.device) -> None:
    """Rows' or adapters' weights: [T], or [L, T] for a batch."""
    if weights is None:
        return
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise invalid(OP, "weights", "be a floating point tensor", type(weights).__name__)
    if isinstance(stack, Tensor):
        allowed = [stack.shape[-2:-1], stack.shape[:-1]]
        rule = " or ".join(str(list(size)) for size in dict.fromkeys(allowed))
    else:
        allowed, rule = [weights.shape] if weights.dim() == 1 else [], "[T]"
    if weights.shape not in allowed:
        raise invalid(OP, "weights", f"be {rule}", shape(weights))
    if weights.device != device:
        raise invalid(OP, "weights", f"be on {device} like stack", weights.device)
    if not bool(weights.isfinite().all()):
        raise invalid(OP, "weights", "be finite", f"not, at {_first_bad(weights)}")


def check_stream(stack: object, power_iterations: int, energy, center: bool, method: str) -> None:
    if not isinstance(stack, Iterable):
        rule = "be a tensor, an iterable of chunks or a FactoredStack"
        raise invalid(OP, "stack", rule, type(stack).__name__)
    if isinstance(stack, Iterator):
        once = power_iterations == 0 and energy is None and not center
        if not once or method not in ("auto", "randomized"):
            rule = "be re-iterable unless power_iterations=0 with rank= and center=False"
            raise invalid(OP, "stack", rule, f"a one-shot {type(stack).__name__}")


def check_factors(stack, center: bool, group: object | None, forms: tuple) -> list[int]:
    """Check a FactoredStack; return row_start on the host."""
    a, b, start, scale = stack.lora_a, stack.lora_b, stack.row_start, stack.scale
    if stack.form not in forms:
        raise invalid(OP, "form", f"be one of {', '.join(forms)}", repr(stack.form))
    if a.dim() != 2 or 0 in a.shape:
        raise invalid(OP, "lora_a", "be [T, I] and not empty", shape(a))
    if b.dim() != 2 or len(b) != len(a) or 0 in b.shape:
        raise invalid(OP, "lora_b", f"be [T, O] with T = {len(a)}", shape(b))
    if a.dtype not in (*STORAGE, torch.float64) or b.dtype != a.dtype:
        raise invalid(
            OP, "lora_a and lora_b", "share a floating point type", f"{a.dtype}, {b.dtype}"
        )
    starts = start.tolist() if start.dim() == 1 and len(start) > 1 else [-1]
    if starts[0] != 0 or starts[-1] != len(a) or sorted(starts) != starts:
        raise invalid(OP, "row_start", f"rise from 0 to the {len(a)} rows of lora_a", starts[:8])
    if scale is not None and scale.shape != (len(starts) - 1,):
        raise invalid(OP, "scale", f"be [{len(starts) - 1}]", shape(scale))
    for label, t in (("lora_b", b), ("row_start", start), ("scale", scale)):
        if t is not None and t.device != a.device:
            raise invalid(OP, label, f"be on {a.device} like lora_a", t.device)
    for label, t in (("lora_a", a), ("lora_b", b)):
        if not bool(torch.linalg.vector_norm(t, torch.inf).isfinite()):
            row = (~t.isfinite()).any(1).nonzero()[0].item()
            k = next(k for k in range(len(starts) - 1) if starts[k + 1] > row)
            raise invalid(OP, label, "be finite", f"a value that is not in adapter {k}")
    if scale is not None and not bool(scale.isfinite().all()):
        raise invalid(OP, "scale", "be finite", f"not, at adapter {_first_bad(scale)[0]}")
    if center:
        raise invalid(OP, "center", "be False for a FactoredStack", center)
    if group is not None and stack.form != "rows":
        raise invalid(OP, "group", "be None unless form is 'rows'", f"form {stack.form!r}")
    return starts


def check_rank(rank: int | None, rows: int, columns: int) -> None:
    if rank is not None and rank > min(rows, columns):
        rule = f"be at most {min(rows, columns)}, the smaller side of [{rows}, {columns}]"
        raise invalid(OP, "rank", rule, rank)


def names(dtypes: tuple) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _first_bad(t: Tensor) -> list[int]:
    return (~t.isfinite()).nonzero()[0].tolist()


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
