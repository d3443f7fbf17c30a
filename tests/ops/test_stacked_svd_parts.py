"""The parts of stacked_svd: Philox signs, orthonormal bases, reading in blocks."""

import pytest
import torch
from support.stacked_svd import matrix

from lora_fused.ops import stacked_svd
from lora_fused.ops.stacked_svd import orthonormal, reference
from lora_fused.ops.stacked_svd.group import Group

# Known answers that Random123 publishes for philox4x32-10: counter, key, result.
FULL = 0xFFFFFFFF
KNOWN = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL, FULL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_philox_known_answers(counter, key, words):
    found = reference.philox(key[1] << 32 | key[0], [torch.tensor([c]) for c in counter])
    assert tuple(int(w) for w in found) == words


def test_philox_is_the_one_in_plain_integers():
    g = torch.Generator().manual_seed(0)
    counters = [torch.randint(1 << 32, (50,), generator=g) for _ in range(4)]
    seed = 0x0123456789ABCDEF
    found = reference.philox(seed, counters)
    for n in range(50):
        c, key = [int(t[n]) for t in counters], [seed & FULL, seed >> 32]
        for _ in range(10):
            high0, low0 = divmod(0xD2511F53 * c[0], 1 << 32)
            high1, low1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
            c = [high1 ^ c[1] ^ key[0], low1, high0 ^ c[3] ^ key[1], low0]
            key = [(key[0] + 0x9E3779B9) & FULL, (key[1] + 0xBB67AE85) & FULL]
        assert [int(t[n]) for t in found] == c


def test_signs_are_bits_of_philox():
    signs = reference.signs(11, 0, 40, 300, "cpu", torch.float32)
    assert signs.shape == (40, 300) and set(signs.unique().tolist()) == {-1.0, 1.0}
    for i, q in ((0, 0), (3, 31), (7, 32), (39, 127), (20, 128), (20, 299)):
        counter = [torch.tensor([v]) for v in (i, 0, q // 128, 0)]
        word = int(reference.philox(11, counter)[q % 128 // 32])
        assert signs[i, q] == (-1 if word >> q % 32 & 1 else 1)
    assert torch.equal(reference.signs(11, 13, 40, 70, "cpu", torch.float32), signs[13:, :70])
    assert not torch.equal(reference.signs(12, 0, 40, 300, "cpu", torch.float32), signs)
    far = reference.signs(11, (1 << 32) + 3, (1 << 32) + 4, 300, "cpu", torch.float32)
    assert not torch.equal(far[0], signs[3]), "columns beyond 2^32 have words of their own"


def test_signs_look_random():
    signs = reference.signs(0, 0, 4096, 256, "cpu", torch.float64)
    correlation = signs.mT @ signs / 4096 - torch.eye(256)
    assert correlation.abs().max() < 6 / 64 and signs.mean().abs() < 5 / 1024
    assert (signs.mT @ signs.roll(1, 0) / 4096).abs().max() < 6 / 64


def test_a_wide_test_matrix_is_made_in_parts(monkeypatch):
    m = matrix("slow", 90, 120).float()
    for options in ({}, {"center": True, "weights": torch.rand(90) + 0.5}):
        kept = stacked_svd(m, rank=6, method="randomized", **options)
        monkeypatch.setattr(reference, "SIGNS_BYTES", 16 * 4 * 10)
        made = stacked_svd(m, rank=6, method="randomized", **options)
        monkeypatch.undo()
        assert torch.allclose(made.s, kept.s, rtol=1e-5)


def test_blocks_cover_each_row_once(monkeypatch):
    monkeypatch.setitem(reference.BLOCK_BYTES, "cpu", 64 * 10 * 4)
    for shape in ((1, 1, 10), (1, 200, 10), (5, 30, 10), (3, 130, 10), (2, 70, 100)):
        seen = torch.zeros(shape)
        for l, t in reference.blocks(seen):
            seen[l, t] += 1
        assert torch.all(seen == 1)


def overlap(q: torch.Tensor) -> float:
    eye = torch.eye(q.shape[-1], dtype=torch.float64)
    return float((q.double().mT @ q.double() - eye).abs().max())


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_cholesky_qr2(condition):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, 200, 12, generator=g) @ torch.diag(torch.logspace(0, 1, 12))
    u, _, vh = torch.linalg.svd(z, full_matrices=False)
    z = (u * torch.logspace(0, -torch.log10(torch.tensor(condition)), 12)) @ vh
    q, sound = orthonormal.cholesky_qr2(z)
    assert torch.all(sound)
    assert all(overlap(layer) < 1e-6 for layer in q)


@pytest.mark.parametrize("reflect", [True, False], ids=["reflections", "cholesky"])
def test_extend_falls_back_where_columns_are_dependent(reflect, monkeypatch):
    """CholeskyQR2 sees that it is unsound, of one layer of two, and reflections take over."""
    if not reflect:
        monkeypatch.setattr(orthonormal, "reflections", orthonormal.cholesky_qr2)
    g = torch.Generator().manual_seed(0)
    z = torch.randn(2, 60, 8, generator=g)
    z[1, :, 5] = z[1, :, 2]
    assert orthonormal.cholesky_qr2(z)[1].tolist() == [True, False]
    assert all(overlap(q) < 1e-5 for q in orthonormal.extend(None, z))
    basis = torch.linalg.qr(torch.randn(2, 60, 8, generator=g)).Q
    inside = basis @ torch.randn(2, 8, 8, generator=g)
    zero = torch.zeros(2, 60, 8)
    for fresh in (z, inside, zero, z + 1e6 * inside):
        both = torch.cat([basis, orthonormal.extend(basis, fresh)], -1)
        assert all(overlap(q) < 1e-5 for q in both)


def test_tall_qr_of_few_rows():
    y = torch.randn(2, 5, 8)
    q, r = orthonormal.tall_qr(y, Group(None))
    assert torch.allclose(q @ r, y, atol=1e-5)
