"""fit_subspace against dense oracles in float64: bases, errors, gauge, weights, energies."""

import dataclasses

import pytest
import torch
from torch import Tensor

from lora_fused import Adapter, AdapterBank, LoraFactors
from lora_fused.methods import products
from lora_fused.methods.eigenlorax import METHODS, FitOptions, fit_subspace, leave_one_out
from lora_fused.testing import assert_within_budget

SIZES = {"q": (48, 40), "v": (40, 56)}
RANKS = (4, 6, 3)
EVERY = pytest.mark.parametrize("method", METHODS)
EXACT = ("eigenlorax", "hosvd", "hooi")


def make_bank(count=9, common=6, noise=0.0, mean=0.0, seed=0, ranks=RANKS, dtype=torch.float32):
    """Mixed ranks and scales, ``common`` directions of each side that all share, a mean, noise."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    shared = {m: [(draw(common, n), mean * draw(1, n)) for n in SIZES[m]] for m in SIZES}
    bank = AdapterBank()
    for k in range(count):
        rank, parts = ranks[k % len(ranks)], {}
        for m, sides in shared.items():
            a, b = (
                (draw(rank, common) @ s / common**0.5 + c + noise * draw(rank, s.shape[1])) / 6
                for s, c in sides
            )
            parts[m] = LoraFactors(a.to(dtype), b.to(dtype), 2.0 / (1 + k % 4))
        if k == 1:
            del parts["v"]
        bank.add(Adapter(f"a{k}", parts))
    return bank


def regauged(bank: AdapterBank, seed=1) -> AdapterBank:
    """The same updates with every (A, B) as (M A, M^-T B), M random."""
    generator, other = torch.Generator().manual_seed(seed), AdapterBank()
    for name in bank.names:
        parts = {}
        for module, part in bank.adapter(name).modules.items():
            rank = part.lora_a.shape[0]
            turn = torch.randn(rank, rank, generator=generator, dtype=torch.float64)
            lora_b = torch.linalg.solve(turn.T, part.lora_b.double())
            lora_a = turn @ part.lora_a.double()
            parts[module] = LoraFactors(lora_a.float(), lora_b.float(), part.scale)
        other.add(Adapter(name, parts))
    return other


def dense(adapter: Adapter, module: str, dtype=torch.float64) -> Tensor:
    part = adapter.modules.get(module)
    if part is None:
        return torch.zeros(*reversed(SIZES[module]), dtype=dtype)
    return part.scale * (part.lora_b.to(dtype).T @ part.lora_a.to(dtype))


def stacked(bank: AdapterBank, module: str) -> Tensor:
    return torch.stack([dense(bank.adapter(name), module) for name in bank.names])


def overall(bank, subspace, dtype=torch.float64) -> Tensor:
    """The relative error from dense products."""
    gap = norm = 0.0
    for name in bank.names:
        back = subspace.reconstruct(name)
        for module in SIZES:
            exact = dense(bank.adapter(name), module, dtype)
            gap = gap + (dense(back, module, dtype) - exact).square().sum()
            norm = norm + exact.square().sum()
    return (gap / norm).sqrt()


def held(basis: Tensor, truth: Tensor) -> float:
    """How far the row space of basis is from truth's: 0 where it is the same."""
    basis, truth = basis.double(), truth.double()
    return float((truth - truth @ basis.T @ basis).norm())


@EVERY
def test_errors_are_the_dense_ones(method):
    bank = make_bank(noise=0.3)
    subspace = fit_subspace(bank, rank=5, method=method)
    errors, truth = subspace.errors(bank), overall(bank, subspace)
    rounded = overall(bank, subspace, torch.float32)
    found = torch.tensor([errors.overall])
    assert_within_budget(found, rounded[None], truth[None], "overall")
    assert 0.05 < errors.overall < 0.9
    assert errors.adapters["a1"] > 0 and errors.norms[1, 1] == 0, "a1 lacks v"
    assert set(errors.by_module) == set(SIZES) and "a1" in str(errors)


@pytest.mark.parametrize("method", EXACT)
def test_adapters_in_a_common_span_are_lossless(method):
    bank = make_bank(common=6)
    assert fit_subspace(bank, rank=6, method=method).errors(bank).overall < 1e-6
    assert fit_subspace(bank, rank=4, method=method).errors(bank).overall > 0.05


def test_hosvd_is_the_svd_of_the_stacked_updates():
    bank = make_bank(noise=0.3)
    subspace = fit_subspace(bank, rank=5, method="hosvd")
    for module, basis in subspace.bases.items():
        tall = stacked(bank, module)
        for side, matrix in ((basis.a, tall.flatten(0, 1)), (basis.b, tall.mT.flatten(0, 1))):
            _, s, vh = torch.linalg.svd(matrix, full_matrices=False)
            reference = torch.linalg.svdvals(matrix.float())
            assert_within_budget(side.spectrum, reference[:5], s[:5], module)
            assert held(side.basis, vh[:5]) < 1e-4 < held(side.basis, vh[1:6])
            share = (s[:5].square().cumsum(0) / s.square().sum()).float()
            assert (side.explained - share).abs().max() < 1e-6


def test_hooi_descends_to_the_least_error():
    bank = make_bank(noise=0.5, seed=3)
    hosvd, hooi = (fit_subspace(bank, rank=4, method=m).errors(bank).overall for m in EXACT[1:])
    lost = whole = 0.0
    for module in SIZES:  # dense turns, many of them
        tall = stacked(bank, module)
        v = torch.linalg.svd(tall.flatten(0, 1))[2][:4]
        for _ in range(200):
            u = torch.linalg.svd((tall @ v.T).mT.flatten(0, 1))[2][:4]
            v = torch.linalg.svd((u @ tall).flatten(0, 1))[2][:4]
        lost += float(tall.square().sum() - (u @ tall @ v.T).square().sum())
        whole += float(tall.square().sum())
    least = (lost / whole) ** 0.5
    assert least <= hooi * (1 + 1e-6) and hooi <= least * 1.002
    assert hooi < hosvd * 0.999, "or the turns would not show"


@pytest.mark.parametrize("method, bound", [("hosvd", 1e-4), ("hooi", 1e-4), ("jd_diag", 1e-3)])
def test_the_gauge_changes_nothing(method, bound):
    """Neither spectrum nor reconstruction; "eigenlorax" is the negative control."""
    bank = make_bank(noise=0.3)
    other = regauged(bank)

    def change(method):
        one, two = (fit_subspace(b, rank=5, method=method) for b in (bank, other))
        worst = 0.0
        for module in SIZES:
            for side in "ab":
                s, t = (getattr(f.bases[module], side).spectrum for f in (one, two))
                worst = max(worst, float((s - t).abs().max() / s.max()))
        for name in bank.names:
            for module in bank.adapter(name).modules:
                x, y = (dense(f.reconstruct(name), module) for f in (one, two))
                worst = max(worst, float((x - y).norm() / x.norm()))
        return worst

    assert change(method) < bound
    assert change("eigenlorax") > 0.05


def test_adapters_weigh_by_their_updates():
    """How A, B and the scale share an update's size changes "factors" alone."""
    bank, other = make_bank(noise=0.3), AdapterBank()
    for k, name in enumerate(bank.names):
        big = 4.0 ** (k % 3)
        parts = {
            m: LoraFactors(p.lora_a * big, p.lora_b / 2, p.scale * 2 / big)
            for m, p in bank.adapter(name).modules.items()
        }
        other.add(Adapter(name, parts))

    def spectra(bank, **options):
        fitted = fit_subspace(bank, rank=4, **options)
        return torch.cat([b.a.spectrum for b in fitted.bases.values()])

    for options in ({}, {"center": False}, {"method": "hosvd"}, {"weighting": "equal"}):
        one, two = spectra(bank, **options), spectra(other, **options)
        assert (one - two).abs().max() <= 1e-5 * one.max(), options
    one, two = (spectra(b, weighting="factors") for b in (bank, other))
    assert (one - two).abs().max() > 0.1 * one.max()


def test_equal_weighting_divides_by_the_norms():
    bank, unit = make_bank(noise=0.3), AdapterBank()
    for name in bank.names:
        k, parts = bank.id(name), {}
        for m, p in bank.adapter(name).modules.items():
            norm = float(products.norms(bank.stacks[m])[k])
            assert norm == pytest.approx(float(dense(bank.adapter(name), m).norm()), rel=1e-6)
            parts[m] = dataclasses.replace(p, scale=p.scale / norm)
        unit.add(Adapter(name, parts))
    one = fit_subspace(bank, rank=4, method="hosvd", weighting="equal").bases["q"].a
    two = fit_subspace(unit, rank=4, method="hosvd").bases["q"].a
    plain = fit_subspace(bank, rank=4, method="hosvd").bases["q"].a
    assert held(one.basis, two.basis) < 1e-4 < 1e-2 < held(one.basis, plain.basis)


def test_the_mean_is_kept_as_a_basis_vector():
    bank = make_bank(noise=0.2, mean=2.0)
    kept = fit_subspace(bank, rank=4)
    dropped = fit_subspace(bank, rank=4, keep_mean=False)
    side, stack = kept.bases["q"].a, bank.stacks["q"]
    assert len(side) == 5 and side.keeps_mean and len(dropped.bases["q"].a) == 4
    mean = products.Updates(stack).weighted_rows("a", "updates").double().mean(0)
    assert held(side.basis[:1], mean[None] / mean.norm()) < 1e-5
    assert (side.basis @ side.basis.T - torch.eye(5)).abs().max() < 1e-5
    assert kept.errors(bank).overall < 0.5 * dropped.errors(bank).overall
    uncentred = fit_subspace(bank, rank=5, center=False)
    assert kept.errors(bank).overall < 1.1 * uncentred.errors(bank).overall
    assert 0 < side.explained[0] < side.explained[-1] <= 1
    rows = products.Updates(stack).weighted_rows("a", "updates").double()
    along = rows @ side.basis.double().T
    assert (side.inside.T @ side.inside - along.T @ along).norm() < 1e-4 * along.square().sum()
    assert (side.spectrum - along.norm(dim=0)).abs().max() < 1e-4 * along.norm()
    beside = rows - along[:, :1] * side.basis[:1]
    best = torch.linalg.svdvals(beside)[:4]
    assert (side.spectrum[1:] - best).abs().max() < 1e-4 * best[0], "the best beside the mean"


@pytest.mark.parametrize("method", ["hosvd", "hooi"])
@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
def test_energy_is_what_the_products_keep(method, energy):
    bank = make_bank(noise=0.3)
    subspace = fit_subspace(bank, energy=energy, method=method)
    assert 1 - subspace.errors(bank).overall ** 2 >= energy - 1e-6
    less = fit_subspace(bank, energy=energy / 2, method=method)
    assert len(less.bases["q"].a) < len(subspace.bases["q"].a)


def test_energy_of_factors():
    subspace = fit_subspace(make_bank(noise=0.3), energy=0.8)
    for basis in subspace.bases.values():
        for side in (basis.a, basis.b):
            inside = side.spectrum[1:].double().square()
            beside = side.total - side.spectrum[0].double().square()  # what the mean leaves over
            assert inside.sum() >= 0.8 * beside > inside[:-1].sum()


def test_jd_diag_finds_joint_factors():
    """Updates that are U diag(d_k) V are recovered; each turn lowers the error."""
    generator = torch.Generator().manual_seed(5)
    v, u = (torch.randn(4, n, generator=generator) for n in SIZES["q"])
    bank = AdapterBank()
    for k in range(12):
        d = torch.rand(4, generator=generator) + 0.1
        bank.add(Adapter(f"a{k}", {"q": LoraFactors(d[:, None] * v / 6, u / 6, 2.0)}))
    subspace = fit_subspace(bank, rank=4, method="jd_diag")
    assert subspace.errors(bank).overall < 0.02
    full = make_bank(noise=0.3)
    diagonal, pairs = (fit_subspace(full, rank=5, method=m) for m in ("jd_diag", "hooi"))
    assert pairs.errors(full).overall < diagonal.errors(full).overall < 1
    assert diagonal.cores.stacks["q"].max_rank == 1


def test_augmented_directions_are_orthogonal_and_random():
    bank = make_bank(count=2)
    plain, one, two, other = (
        fit_subspace(bank, rank=4, method="hosvd", augment=n, seed=s)
        for n, s in ((0, 0), (8, 0), (8, 0), (8, 1))
    )
    side = one.bases["q"].a
    assert len(side) == 12 and side.augmented == 8 and side.principal == 4
    assert (side.basis @ side.basis.T - torch.eye(12)).abs().max() < 1e-5
    assert not side.spectrum[4:].any() and held(side.basis[:4], plain.bases["q"].a.basis) < 1e-5
    assert side.basis.equal(two.bases["q"].a.basis)
    assert not side.basis.equal(other.bases["q"].a.basis)
    with pytest.raises(ValueError, match=r"augment must leave room: .* 4 of 40 directions, got 37"):
        fit_subspace(bank, rank=4, method="hosvd", augment=37)


@EVERY
def test_banks_of_all_kinds(method):
    """Removed adapters, half precision, modules without an update, fewer rows than P."""
    bank = make_bank(noise=0.3, dtype=torch.bfloat16)
    bank.remove("a2")
    wide = make_bank(noise=0.3)
    wide.remove("a2")
    one, two = (fit_subspace(b, rank=8, method=method) for b in (bank, wide))
    assert one.names == bank.names and one.bases["q"].basis_a.dtype == torch.float32
    assert one.errors(bank).overall == pytest.approx(two.errors(wide).overall, rel=0.02)
    wide.stacks["v"].lora_b.zero_()
    assert fit_subspace(wide, rank=8, method=method).errors(wide).by_module["v"] == 0
    few = make_bank(count=1, ranks=(3,))
    subspace = fit_subspace(few, rank=3, method=method)
    assert subspace.errors(few).overall < (1e-5 if method != "eigenlorax" else 0.9)


def test_the_same_call_gives_the_same_and_adapters_in_training_count():
    bank = make_bank(noise=0.3)
    one, two = (fit_subspace(bank, rank=4, method="hooi", seed=3) for _ in range(2))
    assert one.bases["v"].basis_b.equal(two.bases["v"].basis_b)
    assert one.cores.stacks["v"].lora_a.equal(two.cores.stacks["v"].lora_a)
    with torch.no_grad():
        for parameter in bank.trainable(["a0"]):
            parameter.mul_(3)
    changed = fit_subspace(bank, rank=4, method="hooi", seed=3)
    assert held(changed.bases["q"].basis_a, one.bases["q"].basis_a) > 1e-3
    assert not changed.bases["q"].basis_a.requires_grad


def test_leaving_one_out():
    """In a common span a new adapter is lossless, alone it is lost."""
    options = FitOptions("hosvd", rank=6)
    assert leave_one_out(make_bank(common=6), options).overall < 1e-5
    lost = leave_one_out(make_bank(common=6, noise=30.0), options)
    assert lost.overall > 0.7 and lost.norms[1, 1] == 0
    alone = AdapterBank()
    alone.add(make_bank().adapter("a1"))
    alone.add(dataclasses.replace(make_bank().adapter("a0"), modules=_only(make_bank(), "v")))
    assert set(leave_one_out(alone, options).adapters.values()) == {1.0}
    with pytest.raises(ValueError, match="bank must hold at least two adapters, got 1"):
        leave_one_out(make_bank(count=1), options)


def _only(bank, module):
    return {module: bank.adapter("a0").modules[module]}


def test_progress_is_reported():
    calls = []
    bank = make_bank()
    fit_subspace(bank, rank=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 2), (2, 2)]


BAD = {
    "method": ({"method": "pca"}, r"method must be one of \('eigenlorax', .* got 'pca'"),
    "neither": ({"rank": None}, "rank and energy must be given one of the two, got None and None"),
    "both": ({"energy": 0.5}, "rank and energy must be given one of the two, got 4 and 0.5"),
    "rank 0": ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
    "rank 99": ({"rank": 99}, "rank must be at most 39, .*9 adapters of ranks 3 to 6 .* got 99"),
    "energy": ({"rank": None, "energy": 1.5}, r"energy must be a number in \(0, 1\], got 1.5"),
    "diagonal": ({"rank": None, "energy": 0.5, "method": "jd_diag"}, "energy must be left out"),
    "weighting": ({"weighting": "factors", "method": "hosvd"}, "weighting must be one of"),
    "mean": ({"keep_mean": False, "method": "hooi"}, "keep_mean and center must be left at True"),
    "seed": ({"seed": "x"}, "seed must be an integer, got 'x'"),
    "augment": ({"augment": -1}, "augment must be an integer of at least 0, got -1"),
    "clusters": ({"clusters": 10}, "clusters must be an integer from 1 to 9, the adapters, got 10"),
}


@pytest.mark.parametrize("change, text", BAD.values(), ids=BAD)
def test_rejects(change, text):
    with pytest.raises(ValueError, match=f"^fit_subspace: {text}"):
        fit_subspace(make_bank(), **{"rank": 4, **change})


@pytest.mark.parametrize("rank, count, why", [
    pytest.param(8, 3, r"at most 24, .*\(3 adapters of rank 8 have 24 in all\), got 99", id="rows"),
    pytest.param(20, 9, r"at most 56, .*\(its wider side is 56\), got 99", id="width"),
])  # fmt: skip
def test_a_rank_that_is_too_high_is_told_why(rank, count, why):
    with pytest.raises(ValueError, match=f"rank must be {why}"):
        fit_subspace(make_bank(count, ranks=(rank,)), rank=99)


@EVERY
def test_names_the_adapter_that_is_not_finite(method):
    bank = make_bank()
    bank.stacks["v"].lora_b[bank.stacks["v"].rows(3)] = torch.nan
    with pytest.raises(ValueError, match="adapter 'a3' at 'v' must be finite, got non-finite"):
        fit_subspace(bank, rank=4, method=method)


def test_rejects_other_banks():
    with pytest.raises(ValueError, match="bank must be an AdapterBank, got dict"):
        fit_subspace({}, rank=4)
    with pytest.raises(ValueError, match="bank must hold at least one adapter, got none"):
        fit_subspace(AdapterBank(), rank=4)
