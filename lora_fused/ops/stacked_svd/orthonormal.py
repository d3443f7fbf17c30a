"""Orthonormal bases: CholeskyQR2 on a device, reflections on a CPU and where that is unsound."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fused.ops.stacked_svd.group import Group

# CholeskyQR squares the condition number; in float64 it holds up to about 1e8.
SMALLEST = 1e-7
TINY = 1e-30
OVERLAP = 1e-4  # its square, lost in lengths, is below a rounding step


def extend(basis: Tensor | None, z: Tensor) -> Tensor:
    """Orthonormal columns [L, I, Q] spanning z [L, I, Q] beyond the span of basis [L, I, D]."""
    if basis is not None:
        for _ in range(2):  # once leaves a part of the size of the rounding
            z = z - basis @ (basis.mT @ z)
    if z.is_cpu:  # LAPACK's reflections are faster than two float64 Gram matrices
        found, sound = reflections(z)
    else:
        found, sound = cholesky_qr2(z)
    if basis is not None:
        # Where little was new, scaling it up brought rounding in the basis' span up as well.
        overlap = basis.mT @ found
        found = found - basis @ overlap
        sound &= overlap.abs().amax((1, 2)) < OVERLAP
    if not bool(sound.all()):
        bad = (~sound).nonzero()[:, 0]
        fresh = z[bad] / torch.linalg.vector_norm(z[bad], dim=-2, keepdim=True).clamp_min(TINY)
        # With the basis in front: where z has nothing new, reflections still yield what is
        # orthogonal to it.
        known = fresh if basis is None else torch.cat([basis[bad], fresh], -1)
        found[bad] = torch.linalg.qr(known).Q[..., -z.shape[-1] :]
    return found


def reflections(z: Tensor) -> tuple[Tensor, Tensor]:
    return torch.linalg.qr(z).Q, torch.ones(len(z), dtype=torch.bool, device=z.device)


def cholesky_qr2(z: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal columns spanning z's, and for which layers the result may be used."""
    q = z.double()
    norm = torch.linalg.vector_norm(q, dim=-2, keepdim=True)
    tiny = norm.amax(-1, keepdim=True) * torch.finfo(z.dtype).eps
    sound = ((norm > tiny) & (norm > 0)).flatten(1).all(-1)
    q = q / torch.where(norm > 0, norm, 1.0)
    for _ in range(2):
        lower, info = torch.linalg.cholesky_ex(q.mT @ q)
        pivots = lower.diagonal(dim1=-2, dim2=-1)
        sound &= (info == 0) & (pivots.amin(-1) > SMALLEST * pivots.amax(-1))
        q = torch.linalg.solve_triangular(lower.mT, q, upper=True, left=False)
    return q.to(z.dtype), sound & q.isfinite().all(-1).all(-1)


def tall_qr(y: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Householder QR of the rows of all ranks, y [L, T here, Q]: the q of the rows here, and r."""
    q, r = torch.linalg.qr(y)
    if group.size > 1:
        width = y.shape[-1]
        r = F.pad(r, (0, 0, 0, width - r.shape[1]))
        top, r = torch.linalg.qr(group.gather(r).transpose(0, 1).flatten(1, 2))
        top, r = group.same(top), group.same(r)
        q = q @ top[:, group.rank * width :][:, : q.shape[-1]]
    return q, r
