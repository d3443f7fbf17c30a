"""The leading part of a dense matrix: as good as a full SVD in float32, or a full one."""

import pytest
import torch
from torch import Tensor

from lora_fused.methods import dense_space
from lora_fused.testing import assert_within_budget


def matrix(rows: int, columns: int, spectrum: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sides = (torch.randn(n, len(spectrum), generator=generator).double() for n in (rows, columns))
    u, v = (torch.linalg.qr(side).Q for side in sides)
    return (u * spectrum @ v.mT).float()


SPECTRA = {
    "decay": 0.9 ** torch.arange(150).double(),
    "flat": torch.ones(150).double(),
    "step and noise": torch.cat([torch.full((12,), 5.0), torch.rand(138)]).double(),
    "close": 1 + 1e-4 * torch.arange(150).double(),
    "rank 3": torch.tensor([3.0, 2.0, 1.0]).double(),
    "tiny": 1e-20 * 0.8 ** torch.arange(150).double(),
}


def cut_off(m: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


@pytest.mark.parametrize("shape", [(210, 150), (150, 210), (40, 300)], ids=str)
@pytest.mark.parametrize("kind", SPECTRA)
def test_what_is_left_out_is_least(kind, shape):
    spectrum = SPECTRA[kind][: min(shape)]
    dense, rank = matrix(*shape, spectrum), 10
    cut = dense_space.leading(dense, rank, None)
    found = cut.lora_b[0].mT @ cut.lora_a[0]
    best, rounded = (cut_off(m, rank) for m in (dense.double(), dense))
    gap = (dense.double() - found).norm()[None]
    truth = (dense.double() - best).norm()[None]
    reference = (dense - rounded).norm()[None]
    if kind != "rank 3":  # there nothing is left out but rounding
        assert_within_budget(gap.float(), reference, truth, "what is left out")
    if kind in ("decay", "step and noise", "rank 3", "tiny"):  # one best approximation alone
        assert_within_budget(found.float(), rounded, best, "the approximation")
    share = best.square().sum() / dense.double().square().sum()
    assert float(cut.energy[0]) == pytest.approx(float(share), rel=1e-6)


def test_steps_that_do_not_suffice_end_in_a_full_svd(monkeypatch):
    dense = matrix(210, 150, SPECTRA["close"])
    seen = []
    full = torch.linalg.svd

    def watched(m, **options):
        seen.append(tuple(m.shape))
        return full(m, **options)

    monkeypatch.setattr(dense_space, "_STEPS", (0,))
    monkeypatch.setattr(torch.linalg, "svd", watched)
    cut = dense_space.leading(dense, 10, None)
    assert (210, 150) in seen
    best = cut_off(dense.double(), 10)
    assert_within_budget(cut.lora_b[0].mT @ cut.lora_a[0], best, best)
    seen.clear()
    monkeypatch.setattr(dense_space, "_STEPS", (8,))
    dense_space.leading(matrix(210, 150, SPECTRA["decay"]), 10, None)
    assert (210, 150) not in seen


def test_energy_finds_the_smallest_rank():
    dense = matrix(210, 150, SPECTRA["decay"])
    squares = torch.linalg.svdvals(dense.double()).square()
    cut = dense_space.leading(dense, None, 0.9)
    assert cut.ranks == [int((squares.cumsum(0) < 0.9 * squares.sum()).sum()) + 1]
    assert 0.9 <= float(cut.energy[0]) < 0.93
