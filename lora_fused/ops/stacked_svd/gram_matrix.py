"""The Gram matrix of a stack's columns, and its leading eigenvectors."""

import torch
from torch import Tensor

from lora_fused.ops.stacked_svd.orthonormal import extend
from lora_fused.ops.stacked_svd.reference import blocks, signs

STEPS = 7  # of block Krylov on a matrix in memory, where a step costs little


def gram_pass(x, weights, mean, basis, scale, seed, width, want_y, want_z) -> tuple[Tensor, Tensor]:
    """As reference.forward with the identity as basis and no y: z [L, I, I] = scale * M^T M."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    plain = bool((scale == 1).all())
    step = max(-(-x.shape[2] // 2), 128)
    z_lii = x.new_zeros(x.shape[0], x.shape[2], x.shape[2], dtype=dtype)
    for l, t in blocks(x):
        m_lti = x[l, t].to(dtype)
        m_lti = m_lti if mean is None else m_lti - mean[l, None]
        m_lti = m_lti if weights is None else m_lti * weights[l, t, None]
        scaled_lti = m_lti if plain else m_lti * scale[l, None, None]
        for at in range(0, x.shape[2], step):  # without the lower left block
            band = slice(at, at + step)
            z_lii[l, : at + step, band] += scaled_lti[..., : at + step].mT @ m_lti[..., band]
    return x.new_empty(0, dtype=dtype), z_lii.triu() + z_lii.triu(1).mT


def leading_vectors(g: Tensor, count: int, seed: int) -> Tensor:
    """About the ``count`` leading eigenvectors of g [L, m, m]: block Krylov where m is large."""
    side = g.shape[-1]
    if side <= 4 * count:
        return torch.linalg.eigh(g).eigenvectors.flip(-1)[..., :count]
    width = -(-count // 24) * 8  # a third, in eights
    start = signs(seed, 0, side, width, g.device, g.dtype)
    basis = newest = extend(None, g @ start.expand(len(g), -1, -1))
    for _ in range(STEPS - 1):
        newest = extend(basis, (g @ newest)[..., : side - basis.shape[-1]])
        basis = torch.cat([basis, newest], -1)
    turn = torch.linalg.eigh(basis.mT @ (g @ basis)).eigenvectors.flip(-1)[..., :count]
    return basis @ turn
