"""Entrywise rules in small spaces that hold all adapters of a layer without loss.

Core Space (arXiv:2509.17786) turns each update into a core M_k = U^T B_k A_k V, U and V the
singular vectors of all B and of all A stacked; KnOTS (arXiv:2410.19735) writes all updates side by
side as U S [V_1^T ... V_K^T]. Either applies a rule to the small tensors (M_k; V_k^T) and maps the
result back. **We compute** both from the factors, for any ranks, and cut the result to a rank.
**We differ**: directions that no adapter has are left out, so that a density counts entries that
can be other than zero. Entrywise rules do not commute with a change of basis: results are not
those of the dense rules, and those of Core Space depend on how an update is split into A and B.
"""

import torch
from torch import Tensor

from lora_fused.methods.entrywise import Entrywise
from lora_fused.methods.exact_sums import Basis, Part, Sum, cut_core, measured, row_basis
from lora_fused.methods.factor_space import Layer

# Singular values below this share of the largest are what rounding left of none.
_NONE = 1e-10


def merge_cores(
    layer: Layer,
    total: Sum,
    rule: Entrywise,
    rank: int | None,
    energy: float | None,
    dtype: torch.dtype,
) -> Part:
    """Core Space: cores [Q_b, Q_a] combined, then cut to a rank."""
    coords_a, basis_a = _singular_basis(total.lora_a)
    coords_b, basis_b = _singular_basis(total.lora_b)
    at = layer.rows()

    def rows(k: int, span: slice) -> Tensor:
        return coords_b[at[k], span].mT @ coords_a[at[k]] * layer.scales[k]

    shape = (coords_b.shape[1], coords_a.shape[1])
    core = rule.combine(rows, shape, layer.weights, layer.keys("core"))
    cut = cut_core(core[None], basis_a, basis_b, rank, energy)
    return measured(total, cut.lora_a, cut.lora_b, dtype, cut)


def merge_knots(
    layer: Layer,
    total: Sum,
    rule: Entrywise,
    rank: int | None,
    energy: float | None,
    dtype: torch.dtype,
) -> Part:
    """KnOTS: the right singular vectors [Q, I] of each adapter combined, then cut to a rank."""
    (coords_a,), basis_a = row_basis(total.lora_a)
    (coords_b,), basis_b = row_basis(total.lora_b)
    parts = [coords_a[at] for at in layer.rows()]
    left = [coords_b[at].mT * s for at, s in zip(layer.rows(), layer.scales, strict=True)]
    # Where a part is L q, q orthonormal, left @ L has the left vectors of left @ part.
    lower = [torch.linalg.qr(part.mT, mode="r").R.mT for part in parts]
    joined = torch.cat([b @ a for b, a in zip(left, lower, strict=True)], 1)
    u, s, _ = torch.linalg.svd(joined, full_matrices=False)
    u, s = (t[..., : _rank_of(s)] for t in (u, s))
    inverse = torch.where(s > 0, 1 / s, 0.0)[:, None]  # of updates that are all zero, too
    share = [inverse * (u.mT @ b) for b in left]

    def rows(k: int, span: slice) -> Tensor:
        return basis_a.times((share[k][span] @ parts[k])[None])[0].float()

    shape = (len(s), total.lora_a.shape[-1])
    vectors = rule.combine(rows, shape, layer.weights, layer.keys("knots"))
    coords, basis = row_basis(vectors.double()[None])
    core = (u * s)[None] @ coords
    cut = cut_core(core, basis, basis_b, rank, energy)
    return measured(total, cut.lora_a, cut.lora_b, dtype, cut)


def _singular_basis(rows: Tensor) -> tuple[Tensor, Basis]:
    """coords [T, Q] of rows [1, T, I] and their right singular vectors, null directions left out.

    An overall sign of a vector changes no result: rules treat both signs alike.
    """
    (coords,), basis = row_basis(rows)
    _, s, turn = torch.linalg.svd(coords, full_matrices=False)
    turn = turn[: _rank_of(s)]
    return coords @ turn.mT, Basis(turn @ basis.lift, basis.rows)


def _rank_of(s: Tensor) -> int:
    return max(int((s > _NONE * s[0]).sum()), 1)
