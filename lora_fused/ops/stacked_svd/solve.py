"""From checked arguments to the result: the source, the method, signs and the certificate."""

import torch
from torch import Tensor

from lora_fused.backends import ERRORS, choose
from lora_fused.ops.stacked_svd import contract, registration, subspace
from lora_fused.ops.stacked_svd.factored import (
    FORMS,
    FactoredRows,
    FactoredStack,
    FactoredSum,
    core_of_sum,
)
from lora_fused.ops.stacked_svd.plan import choose_method
from lora_fused.ops.stacked_svd.sources import Chunks, Rows

METHODS = {
    "randomized": subspace.randomized,
    "krylov": subspace.krylov,
    "gram": subspace.gram,
    "exact": subspace.exact,
}
# Below this share of ||M||, what ||M||^2 - ||s||^2 leaves is rounding: the rest is measured.
MEASURED = 1e-2
SLACK = 1e-3  # relative room for rounding in the certificate
LAYERS_BYTES = 32 << 20
ONE_PASS = 4e-4  # share of ||M||^2 that one pass cannot see


def solve(
    stack,
    rank,
    energy,
    oversampling,
    iterations,
    weights,
    center,
    method,
    seed,
    group,
    impl,
    progress,
) -> tuple:
    """u, s, vh, energy, residual and method of a stack in any of its forms."""
    wanted = subspace.Wanted(rank, energy, oversampling, iterations)
    if isinstance(stack, FactoredStack):
        return _factored(stack, wanted, weights, center, method, seed, group, impl)
    if isinstance(stack, Tensor):
        contract.check_tensor(stack)
        run = _pass_of(impl, stack.device, stack.dtype)
        contract.check_weights(weights, stack, stack.device)
        x = stack if stack.dim() == 3 else stack[None]
        out = _tensor(x, wanted, _expand(weights, x), center, method, seed, group, run, progress)
        return out if stack.dim() == 3 else _first_layer(*out)
    contract.check_stream(stack, iterations, energy, center, method)
    source = Chunks(stack, None, None, seed, group)
    source.run = _pass_of(impl, source.device, source.like.dtype)
    contract.check_weights(weights, stack, source.device)
    source.weights = None if weights is None else weights[None].to(source.dtype)
    return _first_layer(*_found(source, wanted, center, method, False))


def _tensor(x: Tensor, wanted, weights, center, method, seed, group, run, progress) -> tuple:
    """A batch, on a CPU a few layers at a time: what is made of them then stays in cache."""
    few = max(LAYERS_BYTES // (4 * x[0].numel()), 1)
    if not x.is_cpu or wanted.rank is None or few >= len(x):
        few = len(x)
    parts = []
    for l in range(0, len(x), few):
        part = None if weights is None else weights[l : l + few]
        source = Rows(x[l : l + few], part, run, seed, group, first_layer=l)
        plain = weights is None and not center and group.size == 1
        parts.append(_found(source, wanted, center, method, plain))
        if progress is not None:
            progress(min(l + few, len(x)), len(x))
    *tensors, methods = zip(*parts, strict=True)
    return *(t[0] if len(t) == 1 else torch.cat(t) for t in tensors), methods[0]


def _found(source: Rows, wanted, center: bool, method: str, plain: bool) -> tuple:
    """Run a method and certify it; ``plain``: rows and columns may change places."""
    source.rank = wanted.rank
    if center:
        source.center()
    width = None if wanted.rank is None else wanted.rank + wanted.oversampling
    if method == "auto":
        # Ranks must choose alike, and a rank's rows say little about all.
        rows = source.rows if source.group.size == 1 else None
        method = choose_method(rows, source.columns, width, wanted.iterations, plain)
    turned = method == "gram" and plain and source.rows < source.columns
    if turned:
        source = Rows(source.x.mT, None, source.run, source.seed, source.group)
    u, s, vh = METHODS[method](source, wanted)
    residual, energy = _certificate(source, u, s, vh)
    u, vh = (vh.mT, u.mT) if turned else (u, vh)
    u, vh = _fix_signs(u, vh)
    s = (s.double() / source.scale[:, None].double()).to(s.dtype)
    return u, s, vh, energy, residual, method


def _certificate(source: Rows, u: Tensor, s: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """A bound of ||M - u diag(s) vh||_F, and the share of each component, per layer."""
    total = source.total * source.scale.double() ** 2
    squares = s.double().square()
    rest = (total - squares.sum(-1)).clamp_min(0)
    if source.once:
        rest = rest + ONE_PASS * total
    elif bool((rest < MEASURED**2 * total).any()):
        rest = source.residual(u, s, vh)
    bound = rest.sqrt() * (1 + SLACK) / source.scale.double()
    shares = squares / torch.where(total > 0, total, 1.0)[:, None]
    return bound.to(s.dtype), shares.to(s.dtype)


def _factored(stack: FactoredStack, wanted, weights, center, method, seed, group, impl) -> tuple:
    starts = contract.check_factors(stack, center, group.group, FORMS)
    run = _pass_of(impl, stack.lora_a.device, stack.lora_a.dtype)
    contract.check_weights(weights, stack, stack.lora_a.device)
    count, (inner, outer) = len(starts) - 1, (stack.lora_a, stack.lora_b)
    if weights is not None and len(weights) != count:
        raise contract.invalid(contract.OP, "weights", f"be [{count}]", list(weights.shape))
    scale = torch.ones(count, device=inner.device) if stack.scale is None else stack.scale
    scale = scale if weights is None else scale.double() * weights.double()
    if stack.form == "sum":
        return _summed(inner, outer, starts, scale, wanted, method, seed, group, run)
    if stack.form == "columns":
        inner, outer = outer, inner
    source = FactoredRows(inner, outer, starts, scale, run, seed, group)
    u, s, vh, *rest = _found(source, wanted, False, method, False)
    u = source.lift(u)
    if stack.form == "columns":
        u, vh = _fix_signs(vh.mT, u.mT)
    return _first_layer(u, s, vh, *rest)


def _summed(inner, outer, starts, scale, wanted, method, seed, group, run) -> tuple:
    contract.check_rank(wanted.rank, min(len(inner), outer.shape[1]), inner.shape[1])
    repeats = torch.tensor(starts, device=inner.device).diff()
    row_scale = torch.repeat_interleave(scale, repeats)
    if len(inner) > min(inner.shape[1], outer.shape[1]):
        source = FactoredSum(inner, outer, row_scale, run, seed, group)
        return _first_layer(*_found(source, wanted, False, method, False))
    q_out, q_in, core = core_of_sum(inner, outer, row_scale)
    source = Rows(core[None], None, run, seed, group)
    u, s, vh, *rest = _found(source, wanted, False, method, True)
    u, vh = _fix_signs(q_out @ u, vh @ q_in.mT)
    return _first_layer(u, s, vh, *rest)


def _fix_signs(u: Tensor, vh: Tensor) -> tuple[Tensor, Tensor]:
    """Make the entry of largest magnitude in each row of vh positive."""
    # argmax of what is turned takes several times as long.
    sign = torch.where(-vh.amin(-1) > vh.amax(-1), -1.0, 1.0).to(vh.dtype)
    return u * sign[:, None], vh * sign[..., None]


def _first_layer(u, s, vh, energy, residual, method) -> tuple:
    return u[0], s[0], vh[0], energy[0], residual[0], method


def _expand(weights: Tensor | None, x: Tensor) -> Tensor | None:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return None if weights is None else weights.to(dtype).expand(x.shape[:2])


def _pass_of(impl: str, device: torch.device, dtype: torch.dtype) -> registration.Pass:
    """The implementation's pass over rows."""
    name = choose(contract.OP, impl, device, dtype)
    if name != "reference" and not registration.has_kernel(name, device):
        if impl != "auto":
            rule = f"{contract.OP}: impl must be usable here, got {impl!r}"
            raise RuntimeError(f"{rule}: {ERRORS[name] or 'this build has no such kernel'}")
        name = "reference"
    if name != "reference" and dtype not in contract.STORAGE:
        rule = f"be of {contract.names(contract.STORAGE)} for impl {name!r}"
        raise contract.invalid(contract.OP, "stack", rule, dtype)
    return registration.Pass(name)
