"""The definition of stacked_svd's work in plain torch: one pass over the rows of a stack.

    M = diag(weights) (x - mean)        y = scale * M @ basis        z = y^T @ M

Everything else of the op is small linear algebra on y and z (subspace.py). Without a basis, the
basis is the test matrix of random signs. Axes: l layers, t rows, i columns, q sketch columns.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = {"cpu": 2 << 20}  # of float32, so that a block is still in cache for its second use
DEVICE_BLOCK_BYTES = 1 << 30  # elsewhere: few launches
SIGNS_BYTES = 4 << 20  # a wider test matrix is made in parts and not kept
SIGN_ROWS = 1024  # made at a time: bits are int64 on the way


def forward(
    x: Tensor,
    weights: Tensor | None,
    mean: Tensor | None,
    basis: Tensor | None,
    scale: Tensor,
    seed: int,
    width: int,
    want_y: bool,
    want_z: bool,
) -> tuple[Tensor, Tensor]:
    """Compute y [L, T, Q] and z [L, Q, I] for x [L, T, I]; what is not wanted comes back empty.

    weights [L, T], mean [L, I], basis [L, I, Q] and scale [L] are float32 (float64 where x is);
    x is read block by block, each block once. Without a basis, Q = width.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    layers, rows, columns = x.shape
    width = width if basis is None else basis.shape[-1]
    sketched = x.new_empty(0, dtype=dtype)
    if basis is None and columns * width * 4 > SIGNS_BYTES:
        sketched = _sketch_in_parts(x, seed, width, dtype)
    elif basis is None:
        basis = signs(seed, 0, columns, width, x.device, dtype).expand(layers, -1, -1)
    y_ltq = x.new_empty((layers, rows, width) if want_y else (0,), dtype=dtype)
    z_lqi = x.new_zeros((layers, width, columns) if want_z else (0,), dtype=dtype)
    shift_l1q = None if mean is None else _shift(mean, basis, seed, width)
    for l, t in blocks(x):
        x_lti = x[l, t].to(dtype)
        part_ltq = _product(x_lti, basis[l]) if basis is not None else sketched[l, t]
        if shift_l1q is not None:
            part_ltq = part_ltq - shift_l1q[l]
        weight_lt1 = None if weights is None else weights[l, t, None]
        if weight_lt1 is not None:
            part_ltq = part_ltq * weight_lt1
        part_ltq = part_ltq * scale[l, None, None]
        if want_y:
            y_ltq[l, t] = part_ltq
        if want_z:
            part_ltq = part_ltq if weight_lt1 is None else part_ltq * weight_lt1
            z_lqi[l].baddbmm_(part_ltq.mT, x_lti)
            if mean is not None:
                z_lqi[l] -= part_ltq.sum(1)[..., None] * mean[l, None]
    return y_ltq, z_lqi


def _product(x_lti: Tensor, basis_liq: Tensor) -> Tensor:
    if x_lti.stride(-1) == 1:
        return x_lti @ basis_liq
    return (basis_liq.mT @ x_lti.mT).mT  # for a turned stack, twice as fast


def blocks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut [L, T, I] into layers and rows whose float32 copies are small."""
    layers, rows, columns = x.shape
    budget = BLOCK_BYTES.get(x.device.type, DEVICE_BLOCK_BYTES) // (4 * max(columns, 1))
    tall = max(min(rows, budget // 64 * 64 or 64), 1)
    wide = max(budget // tall, 1)
    for l in range(0, layers, wide):
        for t in range(0, rows, tall):
            yield slice(l, l + wide), slice(t, t + tall)


def signs(seed: int, start: int, stop: int, width: int, device, dtype) -> Tensor:
    """Rows start to stop of the test matrix [I, Q], entries +-1, the same on every backend.

    Column q of row i is bit q % 32 of word q % 128 // 32 of Philox4x32-10 with the seed as key and
    the counter (i mod 2^32, i >> 32, q // 128, 0); a set bit means -1.
    """
    found_iq = torch.empty(stop - start, width, device=device, dtype=dtype)
    block = torch.arange(-(-width // 128), device=device)[None, :]
    zero = torch.zeros_like(block)
    shifts = torch.arange(32, device=device)
    for first in range(start, stop, SIGN_ROWS):
        i = torch.arange(first, min(first + SIGN_ROWS, stop), device=device)[:, None]
        words = philox(seed, [(i & MASK) + zero, (i >> 32) + zero, block + 0 * i, zero + 0 * i])
        words_iqw = torch.stack(words, -1)  # [i, blocks of 128, 4]
        bits_iq = ((words_iqw[..., None] >> shifts) & 1).flatten(1)[:, :width]
        found_iq[first - start : first - start + len(i)] = 1 - 2 * bits_iq
    return found_iq


MASK = (1 << 32) - 1
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(seed: int, counter: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) of a 64-bit seed and four words in int64 tensors."""
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & MASK, (k1 + KEY_STEPS[1]) & MASK
    return [c0, c1, c2, c3]


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 64-bit product, in halves: int64 has no unsigned product."""
    low = constant * (word & 0xFFFF)
    high = constant * (word >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _parts(columns: int, width: int) -> Iterator[tuple[int, int]]:
    step = max(SIGNS_BYTES // (4 * width), 1)
    for start in range(0, columns, step):
        yield start, min(start + step, columns)


def _sketch_in_parts(x: Tensor, seed: int, width: int, dtype: torch.dtype) -> Tensor:
    y_ltq = x.new_zeros(*x.shape[:2], width, dtype=dtype)
    for start, stop in _parts(x.shape[2], width):
        part_iq = signs(seed, start, stop, width, x.device, dtype)
        for l, t in blocks(x):
            y_ltq[l, t] += x[l, t, start:stop].to(dtype) @ part_iq
    return y_ltq


def _shift(mean: Tensor, basis: Tensor | None, seed: int, width: int) -> Tensor:
    if basis is not None:
        return mean[:, None] @ basis
    return _sketch_in_parts(mean[:, None], seed, width, mean.dtype)
