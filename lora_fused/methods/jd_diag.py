"""JD-Diag: directions in which every adapter's core is diagonal.

Compress-then-Serve (arXiv:2407.00066) minimises sum_k ||D_k - U diag(d_k) V||_F^2 over U, V and all
d_k. **We compute** the minimum over each in turn, in closed form, from the factors alone: it never
rises. **We differ** in the start: the mean of the hosvd cores made diagonal by its SVD, so that
column p of U and row p of V belong together from the first turn.
"""

import torch
from torch import Tensor

from lora_fused.methods.basis import Directions

_TURNS, _GAIN = 50, 1e-4


def diagonal_basis(updates, sides: list[Directions]) -> list[Directions]:
    """Unit rows V ``[P, I]`` and U ``[P, O]`` (not orthogonal), from the hosvd bases.

    Turns end when one lowers the squared error by less than 1e-4 of it, or after fifty.
    """
    v, u = _paired(updates, sides)
    owner = updates.per_row(torch.arange(len(updates.ranks), device=v.device))
    weight = updates.per_row(updates.scale).float()[:, None]
    lora_a, lora_b = updates.lora_a.float(), updates.lora_b.float()
    a, b = lora_a @ v.mT, (lora_b @ u.mT) * weight
    error = updates.energy
    for _ in range(_TURNS):
        moments = updates.sums(a * b)
        d = _solve(moments, _gram(v) * _gram(u))
        before, error = error, updates.energy - float((d.double() * moments).sum())
        v = _unit(_solve_rows((b * d[owner]).mT @ lora_a, _gram(d.mT) * _gram(u)))
        a = lora_a @ v.mT
        # The lengths of v are in d again: solved for the new v, so the error only falls.
        d = _solve(updates.sums(a * b), _gram(v) * _gram(u))
        u = _unit(_solve_rows((a * d[owner] * weight).mT @ lora_b, _gram(d.mT) * _gram(v)))
        b = (lora_b @ u.mT) * weight
        if before - error <= _GAIN * error:
            break
    return [_directions(rows, updates, d) for rows in (v, u)]


def _paired(updates, sides: list[Directions]) -> tuple[Tensor, Tensor]:
    size = min(len(sides[0]), len(sides[1]))
    a, b = sides[0].coordinates(updates.lora_a), sides[1].coordinates(updates.lora_b)
    mean = (b * updates.per_row(updates.scale)[:, None]).double().mT @ a.double()
    left, _, right = torch.linalg.svd(mean, full_matrices=False)
    v = right[:size].to(a) @ sides[0].basis
    return v, left[:, :size].mT.to(a) @ sides[1].basis


def _gram(rows: Tensor) -> Tensor:
    return rows.double() @ rows.double().mT


def _solve(moments: Tensor, both: Tensor) -> Tensor:
    return (moments.double() @ torch.linalg.pinv(both, hermitian=True)).float()


def _solve_rows(moments: Tensor, both: Tensor) -> Tensor:
    return (torch.linalg.pinv(both, hermitian=True) @ moments.double()).float()


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def _directions(rows: Tensor, updates, d: Tensor) -> Directions:
    spectrum = d.double().norm(dim=0).float()
    return Directions(rows.contiguous(), spectrum, updates.energy)
