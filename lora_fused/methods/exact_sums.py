"""The exact sums D = sum_k w_k s_k B_k A_k of layers, and what becomes of them from factors alone.

cat joins the factors, svd finds the best approximation of a rank, linear adds the factors; a matrix
of a layer's size is formed only where the factors are larger, and for its norm alone. Everything is
a batch of layers of equal sizes, in float64.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_fused.adapters import AdapterBank, AdapterStack
from lora_fused.checks import invalid

# Float64 values of a batch of modules. A CPU is fastest while they stay near its caches (28 modules
# of 2048: 0.20 s, 0.36 s in one batch), a GPU with few launches.
BATCH_VALUES, BATCH_VALUES_CPU = 2**26, 2**22
# One Cholesky pass leaves a basis orthonormal to eps * condition^2: 1e-8 at worst.
_WORST_CONDITION = 1e4


class Used(NamedTuple):
    """An adapter that takes part."""

    name: str
    id: int
    weight: float


class Sum(NamedTuple):
    """The exact sums of a batch of modules: lora_b^T diag(factor) lora_a, in float64."""

    lora_a: Tensor  # [L, T, I]
    lora_b: Tensor  # [L, T, O]
    factor: Tensor  # [L, T]: weight * scale of each rank row


class Part(NamedTuple):
    """Merged factors of a batch of modules, in their dtype; rows beyond a module's rank are 0."""

    lora_a: Tensor  # [L, R, I]
    lora_b: Tensor  # [L, R, O]
    scale: Tensor  # [L], float32 values
    ranks: list[int]
    norm: Tensor  # [L], of the sum
    error: Tensor  # [L], norm of merged - sum
    energy: Tensor | None  # [L]
    rule_norm: Tensor | None  # [L], of what the rank was cut from


class Basis(NamedTuple):
    """Orthonormal rows [L, Q, I] as lift [L, Q, T] @ rows [L, T, I], which need not be formed."""

    lift: Tensor
    rows: Tensor

    def times(self, left: Tensor) -> Tensor:
        """left [L, P, Q] @ the orthonormal rows."""
        return (left @ self.lift) @ self.rows


def modules_of(bank: AdapterBank, used: Sequence[Used]) -> list[str]:
    """The modules that adapters of a weight adapt."""
    ids = [one.id for one in used if one.weight]
    return [m for m, stack in bank.stacks.items() if any(stack.ranks[k] for k in ids)]


def batches(bank: AdapterBank, used: Sequence[Used], values: int = 0) -> Iterator[list[str]]:
    """The modules of ``modules_of`` in batches of equal sizes and ranks.

    ``values``: float64 values of a batch; default: what suits the device.
    """
    groups: dict[tuple, list[str]] = {}
    for module in modules_of(bank, used):
        stack = bank.stacks[module]
        ranks = tuple(stack.ranks[one.id] for one in used)
        key = (stack.in_features, stack.out_features, ranks)
        groups.setdefault(key, []).append(module)
    budget = values or (BATCH_VALUES_CPU if bank.device.type == "cpu" else BATCH_VALUES)
    for (size_in, size_out, ranks), modules in groups.items():
        most = max(1, budget // (sum(ranks) * (size_in + size_out)))
        for start in range(0, len(modules), most):
            yield modules[start : start + most]


def gather(bank: AdapterBank, modules: Sequence[str], used: Sequence[Used]) -> Sum:
    """The factors of these adapters, rank rows in their order; values must be finite."""
    first = bank.stacks[modules[0]]
    size = (len(modules), sum(first.ranks[one.id] for one in used))
    lora_a = first.lora_a.new_empty(*size, first.in_features, dtype=torch.float64)
    lora_b = first.lora_b.new_empty(*size, first.out_features, dtype=torch.float64)
    factors = []
    for i, module in enumerate(modules):
        stack = bank.stacks[module]
        held = [one for one in used if stack.ranks[one.id]]
        for side, rows in zip((lora_a, lora_b), stack.factors(), strict=True):
            torch.cat([rows[stack.rows(one.id)] for one in held], out=side[i])
            if not side[i].sum().isfinite():
                raise _non_finite(stack, module, held)
        # Scales are float32 already: float64 holds weight * scale to the last digit that matters.
        factor = stack.scale[[one.id for one in held]].double()
        factor *= torch.tensor([one.weight for one in held], dtype=factor.dtype).to(factor.device)
        ranks = torch.tensor([stack.ranks[one.id] for one in held], device=factor.device)
        factors.append(factor.repeat_interleave(ranks))
    return Sum(lora_a, lora_b, torch.stack(factors))


def cat(total: Sum, dtype: torch.dtype) -> Part:
    scale = total.factor.abs().amax(-1).float().double()
    ratio = total.factor / scale[:, None]
    exact = total.lora_b * total.factor[..., None]
    lora_a, lora_b = total.lora_a.to(dtype), (total.lora_b * ratio[..., None]).to(dtype)
    size = norm(exact, total.lora_a)
    left, right = lora_b.double() * scale[:, None, None] - exact, total.lora_a
    if dtype.itemsize < 4:  # A may have been rounded too
        right = lora_a.double()
        left, right = torch.cat([left, exact], 1), torch.cat([right, right - total.lora_a], 1)
    ranks, error = [lora_a.shape[1]] * len(lora_a), norm(left, right)
    return Part(lora_a, lora_b, scale, ranks, size, error, torch.ones_like(size), size)


def svd(total: Sum, rank: int | None, energy: float | None, dtype: torch.dtype) -> Part:
    coords_a, basis_a = row_basis(total.lora_a)
    coords_b, basis_b = row_basis(total.lora_b)
    core = (coords_b * total.factor[..., None]).mT @ coords_a
    cut = cut_core(core, basis_a, basis_b, rank, energy)
    lora_a, lora_b = cut.lora_a.to(dtype), cut.lora_b.to(dtype)
    stored_a, stored_b = lora_a.double(), lora_b.double()
    rounding = norm(
        torch.cat([stored_b - cut.lora_b, cut.lora_b], 1),
        torch.cat([stored_a, stored_a - cut.lora_a], 1),
    )
    # What is cut off is orthogonal to what is kept, and to the rounding up to its square.
    error = torch.hypot(cut.lost, rounding)
    scale = torch.ones_like(error)
    return Part(lora_a, lora_b, scale, cut.ranks, cut.norm, error, cut.energy, cut.norm)


def linear(total: Sum, adapters: int, dtype: torch.dtype) -> Part:
    root, sign = total.factor.abs().sqrt()[..., None], total.factor.sign()[..., None]
    lora_a, lora_b = (
        rows.unflatten(1, (adapters, -1)).sum(1)
        for rows in (total.lora_a * root * sign, total.lora_b * root)
    )
    return measured(total, lora_a, lora_b, dtype)


class Cut(NamedTuple):
    """The best approximations of a rank: lora_b^T lora_a, float64, singular values in halves."""

    lora_a: Tensor  # [L, R, I]
    lora_b: Tensor  # [L, R, O]
    ranks: list[int]
    norm: Tensor  # [L], of the whole
    lost: Tensor  # [L], norm of what was cut off
    energy: Tensor  # [L], share of norm^2 kept


def cut_core(
    core: Tensor, basis_a: Basis, basis_b: Basis, rank: int | None, energy: float | None
) -> Cut:
    """The best approximations of basis_b^T core basis_a, core [L, Q_b, Q_a]."""
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    energies = s.square()
    reached = energies.cumsum(-1)
    if energy is None:
        ranks = [min(rank, s.shape[-1])] * len(s)
    else:
        ranks = ((reached < energy * reached[:, -1:]).sum(-1) + 1).tolist()
    most = max(ranks)
    places = torch.arange(s.shape[-1], device=s.device)
    kept = places < torch.tensor(ranks, device=s.device)[:, None]
    root = (s * kept).sqrt()[:, :most, None]
    lora_a, lora_b = basis_a.times(root * vh[:, :most]), basis_b.times(root * u.mT[:, :most])
    whole = reached[:, -1]
    share = torch.where(whole > 0, (energies * kept).sum(-1) / whole, 1.0)
    return Cut(lora_a, lora_b, ranks, whole.sqrt(), (energies * ~kept).sum(-1).sqrt(), share)


def measured(
    total: Sum,
    lora_a: Tensor,
    lora_b: Tensor,
    dtype: torch.dtype,
    cut: Cut | None = None,
    scale: Tensor | None = None,
) -> Part:
    """Factors rounded to dtype, and how far they are from the exact sums; default scale: 1.

    Good to some 1e-8 of the sums.
    """
    lora_a, lora_b = lora_a.to(dtype), lora_b.to(dtype)
    exact = total.lora_b * total.factor[..., None]
    rank = lora_a.shape[1]
    scale = total.factor.new_ones(len(lora_a)) if scale is None else scale
    left = torch.cat([lora_b.double(), -exact], 1)
    right = torch.cat([lora_a.double() * scale[:, None, None], total.lora_a], 1)
    if _dense_is_cheaper(left, right):
        size, error = norm(exact, total.lora_a), norm(left, right)
    else:
        grams = gram(left) * gram(right)
        size, error = (_root(g) for g in (grams[:, rank:, rank:], grams))
    if cut is None:
        return Part(lora_a, lora_b, scale, [rank] * len(size), size, error, None, None)
    return Part(lora_a, lora_b, scale, cut.ranks, size, error, cut.energy, cut.norm)


def row_basis(rows: Tensor) -> tuple[Tensor, Basis]:
    """coords [L, T, Q] and orthonormal rows with rows [L, T, I] = coords @ them, Q = min(T, I).

    One Cholesky pass on the float64 Gram matrix of the normalised rows, four times as fast as
    Householder's QR; modules whose rows are too nearly dependent for it take Householder's.
    """
    if rows.shape[1] > rows.shape[2]:
        q, r = torch.linalg.qr(rows.mT)
        return r.mT, Basis(torch.eye(q.shape[-1]).to(rows), q.mT)
    products = gram(rows)
    size = products.diagonal(dim1=-2, dim2=-1).sqrt()[..., None]
    lower, fault = torch.linalg.cholesky_ex(products / (size * size.mT))
    unit = torch.eye(rows.shape[1]).to(rows)
    inverse = torch.linalg.solve_triangular(lower, unit.expand_as(lower), upper=False)
    condition = lower.norm(dim=(-2, -1)) * inverse.norm(dim=(-2, -1))
    coords, lift = lower * size, inverse / size.mT
    # Not "condition > worst": a row of zeros makes it NaN.
    weak = ~((condition <= _WORST_CONDITION) & (fault == 0))
    if weak.any():
        q, r = torch.linalg.qr(rows[weak].mT)
        rows = rows.clone()
        coords[weak], lift[weak], rows[weak] = r.mT, unit, q.mT
    return coords, Basis(lift, rows)


def gram(rows: Tensor) -> Tensor:
    return rows @ rows.mT


def norm(left: Tensor, right: Tensor) -> Tensor:
    """||left^T right||_F of [L, T, O] and [L, T, I], each [L].

    From Gram matrices, good to 1e-8 of its terms, or, of more rows than either side has, as it is.
    """
    if _dense_is_cheaper(left, right):
        return (left.mT @ right).norm(dim=(-2, -1))
    return _root(gram(left) * gram(right))


def _dense_is_cheaper(left: Tensor, right: Tensor) -> bool:
    sizes = left.shape[-1], right.shape[-1]
    return left.shape[1] * sum(sizes) > sizes[0] * sizes[1]


def _root(products: Tensor) -> Tensor:
    return products.sum((-2, -1)).clamp_min(0).sqrt()


def _non_finite(stack: AdapterStack, module: str, held: Sequence[Used]) -> ValueError:
    for one in held:
        for side, rows in zip(("lora_a", "lora_b"), stack.factors(), strict=True):
            if not rows[stack.rows(one.id)].isfinite().all():
                where = f"{side} of adapter {one.name!r} at {module!r}"
                return invalid("merge", where, "be finite", "non-finite values")
    raise AssertionError(f"no non-finite value found in {module}")
