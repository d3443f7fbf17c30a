"""The Gram matrix of a stack's columns, and its leading eigenvectors."""

import torch
from torch import Tensor

from lora_fused.ops.stacked_svd.orthonormal import extend
from lora_fused.ops.stacked_svd.reference import blocks, signs


def add_gram(g, x, weights, mean, scale, mirror: bool) -> None:
    """g [L, I, I] += N^T N, of N = scale * diag(weights) (x - mean); arguments as of forward.

    The upper triangle of g alone is right, until a call with ``mirror`` fills in the lower one; x
    [L, T, I] may have no rows.
    """
    step = max(-(-x.shape[2] // 2), 128)
    for l, t in blocks(x):
        m_lti = x[l, t].to(g.dtype)
        m_lti = m_lti if mean is None else m_lti - mean[l, None]
        factor_lt1 = scale[l, None, None]
        factor_lt1 = factor_lt1 if weights is None else factor_lt1 * weights[l, t, None]
        m_lti = m_lti * factor_lt1
        for at in range(0, x.shape[2], step):  # without the lower left block
            band = slice(at, at + step)
            g[l, : at + step, band] += m_lti[..., : at + step].mT @ m_lti[..., band]
    if mirror:
        g.copy_(g.triu() + g.triu(1).mT)


def leading_vectors(g: Tensor, count: int, steps: int, seed: int) -> Tensor:
    """About the ``count`` leading eigenvectors of g [L, m, m]: block Krylov where m is large."""
    side = g.shape[-1]
    width = -(-count // 24) * 8  # a third, in eights
    if side <= max(4 * count, width * steps):
        return torch.linalg.eigh(g).eigenvectors[..., -count:].flip(-1)
    newest = extend(None, g @ signs(seed, 0, side, width, g.device, g.dtype).expand(len(g), -1, -1))
    room = newest.new_empty(2, len(g), side, width * steps)
    for step in range(steps):
        used, at = slice(0, step * width), slice(step * width, (step + 1) * width)
        newest = newest if step == 0 else extend(room[0, :, :, used], newest)
        room[0, :, :, at] = newest
        room[1, :, :, at] = newest = g @ newest
    basis, multiplied = room
    turn = torch.linalg.eigh(basis.mT @ multiplied).eigenvectors[..., -count:].flip(-1)
    return basis @ turn
