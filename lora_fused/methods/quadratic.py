"""Weights that sum to one and minimise w' G w + c' w, thousands of small problems at a time.

**We compute** in float64, after scaling each problem to O(1): ``affine`` in closed form (the
pseudo-inverse of G on the plane sum w = 0); ``simplex`` (w >= 0) and ``lasso`` (+ l1 * ||w||_1) by
a primal-dual interior-point method in which all problems take their steps together, each step one
batched Cholesky factorisation of N x N, then one exact solve on the support that it has found, so
that zeros are zeros. Where many weights are as good, no one is preferred to its equal: duplicates
get the same weight.
Source: Mehrotra, SIAM J. Optim. 2(4), 1992, for the predictor and corrector.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_STEPS = 60
_GAP = 1e-14  # of scaled problems: far below what float32 weights can hold
_LEAST_GAP = 1e-6  # a result beyond this is refused; only weights of some 10^8 come near it
# Squared lengths below this part of the largest are directions that float32 points do not have.
_RCOND = 1e-12


def affine(gram: Tensor, linear: Tensor) -> Tensor:
    """argmin w' G w + c' w, sum w = 1: G ``[Q, N, N]``, c ``[Q, N]``; the shortest such w."""
    gram, linear, _ = _scaled(gram, linear)
    start = torch.full_like(linear, 1 / linear.shape[-1])
    w = _corrected(gram, linear, start, torch.ones_like(start))
    # What is left of a zero by rounding would take part in a mixture.
    return _summing_to_one(w.where(w.abs() > 1e-14 * w.abs().amax(-1, keepdim=True), 0.0))


def simplex(gram: Tensor, linear: Tensor) -> Tensor:
    """argmin w' G w + c' w, sum w = 1, w >= 0. RuntimeError where no step leads there."""
    gram, linear, _ = _scaled(gram, linear)
    return _polished(gram, linear, 0.0 * linear[:, :1], _interior(gram, linear, None))


def lasso(gram: Tensor, linear: Tensor, l1: Tensor) -> Tensor:
    """argmin w' G w + c' w + l1 ||w||_1, sum w = 1: l1 ``[Q]``, not negative."""
    w = simplex(gram, linear)
    slope = 2 * _times(gram, w) + linear
    # Weights leave zero for the negative side where that gains more than both signs' l1.
    gain = slope.amax(-1) - torch.where(w > 0, slope, torch.inf).amin(-1)
    left = (gain > 2 * l1).nonzero()[:, 0]
    without = left[l1[left] == 0]
    left = left[l1[left] > 0]
    if len(without):
        w[without] = affine(gram[without], linear[without])
    if len(left):
        parts = _scaled(gram[left], linear[left], l1[left])
        w[left] = _polished(*parts, _interior(*parts))
    return w


def _scaled(gram: Tensor, linear: Tensor, l1: Tensor | None = None):
    """The problem in units in which its largest number is 1, and with sum c = 0."""
    linear = linear - linear.mean(-1, keepdim=True)
    size = torch.maximum(gram.diagonal(0, -2, -1).amax(-1), linear.abs().amax(-1))
    size = torch.where(size > 0, size, 1.0)[:, None]
    return gram / size[..., None], linear / size, None if l1 is None else l1[:, None] / size


def _times(gram: Tensor, w: Tensor) -> Tensor:
    return (gram @ w[..., None])[..., 0]


def _summing_to_one(w: Tensor) -> Tensor:
    return w / w.sum(-1, keepdim=True)


class _Point(NamedTuple):
    """An interior point: v > 0 are the positive parts, then, for the lasso, the negative ones."""

    v: Tensor  # [Q, N] or [Q, 2 N]
    u: Tensor  # their multipliers
    level: Tensor  # [Q, 1], the multiplier of sum w = 1


def _signed(v: Tensor, count: int) -> Tensor:
    """Positive less negative parts."""
    return v if v.shape[-1] == count else v[..., :count] - v[..., count:]


def _both(t: Tensor, width: int) -> Tensor:
    """t, or (t, -t): the transpose of ``_signed``."""
    return t if t.shape[-1] == width else torch.cat((t, -t), -1)


def _interior(gram: Tensor, linear: Tensor, l1: Tensor | None) -> _Point:
    """Optimal weights, strictly inside; RuntimeError where the gap does not close."""
    count = linear.shape[-1]
    v = torch.full_like(linear, 1 / count)
    if l1 is not None:
        v = torch.cat((v + 1, torch.ones_like(v)), -1)
    point = _Point(v, torch.ones_like(v), torch.zeros_like(linear[:, :1]))
    cost = 0.0 if l1 is None else l1
    best, best_gap = point, torch.full_like(linear[:, 0], torch.inf)
    for _ in range(_STEPS):
        w = _signed(point.v, count)
        slope = _both(2 * _times(gram, w) + linear - point.level, point.v.shape[-1]) + cost
        gap = _gap(point, slope, w)
        better = gap < best_gap
        best = _Point(
            *(torch.where(better[:, None], *pair) for pair in zip(point, best, strict=True))
        )
        best_gap = torch.where(better, gap, best_gap)
        if bool(((best_gap < _GAP) | ~gap.isfinite()).all()):
            break
        point = _step(gram, point, slope, w)
    if not bool((best_gap < _LEAST_GAP).all()):
        worst = float(best_gap.max())
        raise RuntimeError(f"weights: the gap must close to {_LEAST_GAP:g}, got {worst:.3g}")
    return best


def _gap(point: _Point, slope: Tensor, w: Tensor) -> Tensor:
    """How far a point is from the optimum; per unit of weight where weights are large."""
    size = w.abs().amax(-1).clamp_min(1)
    short = (point.v * point.u).mean(-1) + (w.sum(-1) - 1).abs()
    return (slope - point.u).abs().amax(-1) + short / size


def _step(gram: Tensor, point: _Point, slope: Tensor, w: Tensor) -> _Point:
    """Mehrotra's predictor and corrector from one factorisation."""
    v, u = point.v, point.u
    count, width = w.shape[-1], v.shape[-1]
    ratio = v / u
    room = ratio if width == count else ratio[..., :count] + ratio[..., count:]
    # G may be singular, on sum w = 1 and across it: the 1 changes the multiplier alone, which is
    # put right below, and the last term bends moves by far less than the gap.
    system = 2 * gram + 1 + torch.diag_embed(1 / room + 1e-13)
    factor, _ = torch.linalg.cholesky_ex(system)
    flat = torch.cholesky_solve(torch.ones_like(w)[..., None], factor)[..., 0]

    def towards(target: Tensor) -> _Point:
        """The Newton direction to v * u = target."""
        pull = target / v - slope  # of u = slope and v * u = target together
        right = _signed(ratio * pull, count) / room
        solved = torch.cholesky_solve(right[..., None], factor)[..., 0]
        missing = 1 - w.sum(-1, keepdim=True) - solved.sum(-1, keepdim=True)
        rise = missing / flat.sum(-1, keepdim=True)
        move = solved + flat * rise
        rise = rise - move.sum(-1, keepdim=True)
        change = _both(rise - 2 * _times(gram, move), width)
        dv = _parts(move, ratio * (pull + change), ratio)
        return _Point(dv, (target - u * dv) / v - u, rise)

    now = (v * u).mean(-1, keepdim=True)
    guess = towards(torch.zeros_like(v))
    size = _longest(point, guess)
    then = ((v + size * guess.v) * (u + size * guess.u)).mean(-1, keepdim=True)
    centre = (then / now).clamp(0, 1) ** 3 * now
    move = towards(centre - guess.v * guess.u)
    size = (0.995 * _longest(point, move)).clamp_max(1.0)
    return _Point(*(t + size * d for t, d in zip(point, move, strict=True)))


def _parts(move: Tensor, dv: Tensor, ratio: Tensor) -> Tensor:
    """dv such that its signed sum is ``move``: a large ratio has blown up dv's rounding errors."""
    count = move.shape[-1]
    if dv.shape[-1] == count:
        return move
    small = ratio[..., :count] < ratio[..., count:]
    up, down = dv[..., :count], dv[..., count:]
    return torch.cat((torch.where(small, up, move + down), torch.where(small, up - move, down)), -1)


def _longest(point: _Point, move: _Point) -> Tensor:
    """How far a direction can be followed with v and u positive, at most 1."""
    pairs = ((point.v, move.v), (point.u, move.u))
    bounds = [torch.where(d < 0, -t / d, torch.inf).amin(-1, keepdim=True) for t, d in pairs]
    return torch.minimum(*bounds).clamp_max(1.0)


def _polished(gram: Tensor, linear: Tensor, l1: Tensor, point: _Point) -> Tensor:
    """The point's weights with exact zeros, and exact on its support where signs stay."""
    count = linear.shape[-1]
    held = (point.v > point.u).to(linear)
    sign = _signed(held, count)
    w = _signed(point.v, count)
    rough = torch.where(w.abs() > 1e-10, w, 0.0)
    rough = _summing_to_one(rough)
    cost = linear + l1 * sign
    # A support can come out empty where all is alike to rounding; then nothing is polished.
    start = torch.where(sign != 0, w, 0.0)
    total = start.sum(-1, keepdim=True)
    start = start / torch.where(total.abs() > 0.5, total, torch.inf)
    exact = _corrected(gram, cost, start, sign.abs())
    total = exact.sum(-1, keepdim=True)
    valid = (exact * sign >= 0).all(-1) & ((total - 1).abs() < 1e-9)[:, 0]

    def value(w: Tensor) -> Tensor:
        return (w * (_times(gram, w) + linear) + l1 * w.abs()).sum(-1)

    valid &= value(exact) <= value(rough) + 1e-13
    return torch.where(valid[:, None], _summing_to_one(exact), rough)


def _corrected(gram: Tensor, linear: Tensor, start: Tensor, member: Tensor) -> Tensor:
    """The minimum nearest to ``start`` of those with its sum and zeros outside ``member``."""
    size = member.sum(-1, keepdim=True).clamp_min(1)
    plane = torch.diag_embed(member) - member[:, :, None] * (member / size)[:, None]
    values, vectors = torch.linalg.eigh(plane @ gram @ plane)
    kept = values > _RCOND * values[:, -1:].clamp_min(0)
    inverse = torch.where(kept & (values > 0), 1 / values, 0.0)
    slope = _times(plane, _times(gram, start) + linear / 2)
    # Vectors of small values mix with what lies outside the plane, hence the second projection.
    return start - _times(plane, _times(vectors, inverse * _times(vectors.mT, slope))) * member
