"""Subspace: cores as a bank, round trips, incremental addition, new tasks, clusters."""

import pytest
import torch
from torch import Tensor

from lora_fused import Adapter, AdapterBank, LoraFactors, Mixture, read_adapter, write_adapter
from lora_fused.methods.clusters import cluster, similarity
from lora_fused.methods.eigenlorax import METHODS, fit_subspace
from lora_fused.ops import mixture_lora
from lora_fused.testing import assert_within_budget

SIZES = {"q": (96, 80), "v": (80, 96)}
EVERY = pytest.mark.parametrize("method", METHODS)


def make_bank(
    count=8, common=8, noise=0.25, seed=0, mean=0.3, groups=1, ranks=(4, 2)
) -> AdapterBank:
    """Adapters around common directions and a mean, which each group has of its own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=generator)

    falling = torch.arange(1, common + 1) ** -0.5
    shared = [
        {m: [(draw(common, n), mean * draw(1, n)) for n in SIZES[m]] for m in SIZES}
        for _ in range(groups)
    ]
    adapters = []
    for k in range(count):
        rank, parts = ranks[k % len(ranks)], {}
        for m, sides in shared[k % groups].items():
            a, b = (
                (draw(rank, common) * falling @ s + c + noise * draw(rank, s.shape[1])) / 9
                for s, c in sides
            )
            parts[m] = LoraFactors(a, b, 16 / rank)
        config = {"r": rank, "lora_alpha": 16, "peft_type": "LORA", "target_modules": list(SIZES)}
        adapters.append(Adapter(f"a{k}", parts, metadata={"config": config}))
    bank = AdapterBank()
    bank.add_many(adapters)
    return bank


def product(part: LoraFactors, dtype=torch.float64) -> Tensor:
    return part.scale * (part.lora_b.to(dtype).T @ part.lora_a.to(dtype))


@EVERY
def test_a_mixture_runs_in_the_basis(method):
    """y = basis_b^T mixture_lora(basis_a x) with the cores' stack is what reconstructions give."""
    bank = make_bank()
    subspace = fit_subspace(bank, rank=6, method=method)
    x = torch.randn(2, 96, generator=torch.Generator().manual_seed(1))
    weights = {"a0": 0.7, "a3": -0.4}
    route = Mixture.of(weights).resolve(subspace.cores)
    basis, stack = subspace.bases["q"], subspace.cores.stacks["q"]
    inside = x @ basis.basis_a.T
    if subspace.diagonal:
        cores = subspace.diagonals("q")[route.adapter_ids[0].long()]
        mixed = inside * (route.weights[0, :, None] * cores).sum(0)
    else:
        rows = (stack.lora_a, stack.lora_b, stack.row_start)
        mixed = mixture_lora(inside, *rows, *route[:2], scale=stack.scale)
    parts = [(subspace.reconstruct(n).modules["q"], w) for n, w in weights.items()]

    def through(parts, dtype):
        return sum(w * x.to(dtype) @ product(p, dtype).T for p, w in parts)

    truth, reference = (through(parts, d) for d in (torch.float64, torch.float32))
    assert_within_budget(mixed @ basis.basis_b, reference, truth, method)
    swapped = [(p, w) for (p, _), (_, w) in zip(parts, parts[::-1], strict=True)]
    truth, reference = (through(swapped, d) for d in (torch.float64, torch.float32))
    with pytest.raises(AssertionError):
        assert_within_budget(mixed @ basis.basis_b, reference, truth)


@EVERY
def test_projecting_stores_what_the_fit_stored(method):
    bank = make_bank()
    subspace = fit_subspace(bank, rank=6, method=method)
    core, held = subspace.project(bank.adapter("a3")), subspace.cores.adapter("a3")
    for module, part in core.modules.items():
        truth = product(held.modules[module])
        if subspace.diagonal:
            part, truth = LoraFactors(part.lora_a, part.lora_b, part.scale), truth
        assert (product(part) - truth).norm() <= 1e-5 * truth.norm()
        assert part.scale == bank.adapter("a3").modules[module].scale
    with pytest.raises(ValueError, match=r"adapter 'a0' at 'q' must have sizes .* \(96, 80\), got"):
        swapped = {"q": bank.adapter("a0").modules["v"]}
        subspace.project(Adapter("a0", swapped))
    with pytest.raises(ValueError, match="'k' must adapt modules of the subspace, got a module it"):
        subspace.project(Adapter("a0", {"k": bank.adapter("a0").modules["q"]}))


@EVERY
@pytest.mark.parametrize("rank", [None, 1, 3, 6])
def test_reconstruction_of_any_rank_keeps_alpha(method, rank, tmp_path):
    bank = make_bank()
    subspace = fit_subspace(bank, rank=6, method=method)
    plain, sized = subspace.reconstruct("a2"), subspace.reconstruct("a2", rank=rank)
    folder = tmp_path / "a2"
    write_adapter(sized, folder)
    back = read_adapter(folder, name="a2")
    assert back.metadata["config"]["lora_alpha"] == 16 or subspace.diagonal
    for module, part in back.modules.items():
        exact = product(plain.modules[module])
        best = torch.linalg.svd(exact, full_matrices=False)
        kept = part.lora_a.shape[0]
        values = torch.where(torch.arange(len(best.S)) < kept, best.S, 0)
        truth = best.U * values @ best.Vh
        assert (product(part) - truth).norm() <= 1e-5 * exact.norm(), module
        if rank is not None:
            assert kept == rank and part.lora_a.norm(dim=1).min() > 0, "every row of A can learn"
    with pytest.raises(ValueError, match=r"rank must be an integer from 1 to [67], .* got 99"):
        subspace.reconstruct("a2", rank=99)


def many_and_first():
    bank = make_bank(count=80, common=24, ranks=(16, 8))
    return bank, bank.subset(bank.names[:20])


@pytest.mark.parametrize("method", ["eigenlorax", "hosvd", "hooi"])
def test_adding_20_to_80_is_within_2_percent_of_a_fit_from_scratch(method):
    bank, first = many_and_first()
    scratch = fit_subspace(bank, rank=24, method=method).errors(bank).overall
    grown, single, frozen = (fit_subspace(first, rank=24, method=method) for _ in range(3))
    later = [bank.adapter(name) for name in bank.names[20:]]
    route = Mixture.uniform(["a1", "a5"]).resolve(grown.cores)
    assert grown.add_many(later) == list(range(20, 80))
    for adapter in later:
        single.add(adapter)
    frozen.cores.add_many([frozen.project(adapter) for adapter in later])
    assert grown.errors(bank).overall <= 1.02 * scratch
    assert single.errors(bank).overall <= 1.02 * scratch
    assert frozen.errors(bank).overall > 1.02 * scratch, "the negative control"
    assert route.version == grown.cores.version, "mixtures stay valid"
    size = len(grown.bases["q"].a)
    assert size == 24 + (method == "eigenlorax")
    gram = grown.bases["q"].basis_a @ grown.bases["q"].basis_a.T
    assert (gram - torch.eye(size)).abs().max() < 1e-5


@pytest.mark.parametrize("noise, mean", [(0.02, 0.0), (0.25, 0.0), (0.02, 1.0)])
def test_adding_one_by_one_beside_any_mean(noise, mean):
    """A small mean lies anywhere among the principal directions, a large one moves them."""
    bank = make_bank(count=80, common=24, ranks=(16, 8), noise=noise, mean=mean)
    scratch = fit_subspace(bank, rank=24).errors(bank).overall
    grown = fit_subspace(bank.subset(bank.names[:20]), rank=24)
    for name in bank.names[20:]:
        grown.add(bank.adapter(name))
    assert grown.errors(bank).overall <= 1.01 * scratch


@pytest.mark.parametrize("method", ["eigenlorax", "hosvd"])
def test_spare_directions_keep_growth_near_a_fit_from_scratch(method):
    """More common directions than are served; without spare ones the negative control."""
    bank = make_bank(count=80, common=40, ranks=(16, 8), noise=0.02, mean=0.0)
    scratch = fit_subspace(bank, rank=24, method=method).errors(bank).overall
    found = {}
    for rank in (24, 32):
        grown = fit_subspace(bank.subset(bank.names[:20]), rank=rank, method=method)
        for name in bank.names[20:]:
            grown.add(bank.adapter(name))
        served = grown.truncated(24)
        assert len(served.bases["q"].a) == 24 + (method == "eigenlorax")
        found[rank] = served.errors(bank).overall
    assert found[32] <= 1.01 * scratch < 1.02 * scratch < found[24]


@pytest.mark.parametrize("method", ["eigenlorax", "hosvd"])
def test_a_truncated_subspace_goes_on_growing(method):
    bank = make_bank(count=12)
    first = bank.subset(bank.names[:10])
    wide = fit_subspace(first, rank=9, method=method, augment=2)
    cut, direct = wide.truncated(6), fit_subspace(first, rank=6, method=method)
    assert cut.errors(first).overall < direct.errors(first).overall
    assert cut.options.rank == 6 and cut.truncated(99).bases["q"].a.basis.equal(
        cut.bases["q"].a.basis
    )
    both = [s.bases["q"].a for s in (cut, direct)]
    size = len(direct.bases["q"].a)
    assert len(both[0]) == size + 2 and both[0].spectrum[:size].tolist() == pytest.approx(
        both[1].spectrum.tolist(), rel=1e-4
    )
    for each in (cut, wide):
        each.add(bank.adapter("a11"))
    assert "a11" in wide and len(cut) == 11 and len(cut.bases["q"].a) == size + 2
    cut.new_task("mine")
    with pytest.raises(ValueError, match=r"Subspace\.truncated: cores must be frozen"):
        cut.truncated(2)
    with pytest.raises(ValueError, match="directions in order of their energy, got 'jd_diag'"):
        fit_subspace(bank, rank=6, method="jd_diag").truncated(2)


def test_adding_in_a_common_span_is_exact():
    bank = make_bank(count=12, noise=0.0, common=8, mean=0.0)
    for method in ("eigenlorax", "hosvd"):
        subspace = fit_subspace(bank.subset(bank.names[:6]), rank=8, method=method)
        basis = subspace.bases["q"]
        subspace.add_many([bank.adapter(name) for name in bank.names[6:]])
        assert subspace.errors(bank).overall < 1e-5
        assert subspace.bases["q"] is basis, "layers hold it"
    scratch = fit_subspace(bank, rank=8, method="hosvd").bases["q"].a.spectrum
    assert (subspace.bases["q"].a.spectrum - scratch).abs().max() < 1e-5 * scratch.max()


def test_energy_lets_the_basis_grow():
    bank = make_bank(count=30, common=24)
    subspace = fit_subspace(bank.subset(bank.names[:4]), energy=0.9, method="hosvd")
    before = len(subspace.bases["q"].a)
    subspace.add_many([bank.adapter(name) for name in bank.names[4:]])
    assert len(subspace.bases["q"].a) > before
    assert 1 - subspace.errors(bank).overall ** 2 > 0.85


def test_diagonal_and_augmented_bases_take_more_adapters():
    bank, first = many_and_first()
    diagonal = fit_subspace(first, rank=24, method="jd_diag")
    before = diagonal.errors(first).overall
    diagonal.add(bank.adapter("a30"))
    assert diagonal.errors(first).overall == before
    assert diagonal.errors(bank, ["a30"]).overall < 1
    wide = fit_subspace(first, rank=8, method="hosvd", augment=4)
    wide.add(bank.adapter("a30"))
    side = wide.bases["q"].a
    assert (side.principal, side.augmented) == (8, 4)
    assert (side.basis @ side.basis.T - torch.eye(12)).abs().max() < 1e-5


def test_a_refused_addition_changes_nothing():
    bank, first = many_and_first()
    subspace = fit_subspace(first, rank=8, method="hosvd")
    basis, core = subspace.bases["q"].basis_a.clone(), subspace.cores.stacks["q"].lora_a.clone()
    bad = Adapter("bad", {"q": LoraFactors(torch.full((2, 96), torch.nan), torch.ones(2, 80), 1.0)})
    taken = bank.adapter("a3")
    training = [bank.adapter("a30")]
    for adapters, text in (([bad], "finite"), ([bank.adapter("a31"), taken], "new, got 'a3'")):
        with pytest.raises(ValueError, match=text):
            subspace.add_many(adapters)
    subspace.cores.trainable(["a1"])
    with pytest.raises(ValueError, match=r"frozen while the bases change .*, got a task in train"):
        subspace.add_many(training)
    subspace.cores.freeze()
    assert subspace.bases["q"].basis_a.equal(basis)
    assert subspace.cores.stacks["q"].lora_a.equal(core) and len(subspace) == 20


def test_an_interrupted_addition_changes_nothing(monkeypatch):
    bank, first = many_and_first()
    subspace = fit_subspace(first, rank=8, method="hosvd")
    before = subspace.errors(bank).overall

    def interrupted(adapters):
        raise KeyboardInterrupt

    monkeypatch.setattr(subspace.cores, "add_many", interrupted)
    with pytest.raises(KeyboardInterrupt):
        subspace.add(bank.adapter("a30"))
    assert subspace.errors(bank).overall == before


@EVERY
def test_a_new_task_learns_coefficients_alone(method):
    """2 P r numbers per module reach an update of the span; the bases get no gradient."""
    bank = make_bank(mean=0.0)
    subspace = fit_subspace(bank, rank=6, method=method)
    target = product(subspace.reconstruct("a0").modules["q"], torch.float32)
    parameters = subspace.new_task("mine", rank=4, seed=2)
    rank, size = (1, 6) if method == "jd_diag" else (4, len(subspace.bases["q"].a))
    assert sum(p.numel() for p in parameters) == 2 * (2 * size * rank)
    assert subspace.errors(bank, ["a0"]).overall < 1
    k, basis = subspace.cores.id("mine"), subspace.bases["q"]
    losses, optimizer = [], torch.optim.Adam(parameters, lr=0.05)
    for _ in range(300):
        stack = subspace.cores.stacks["q"]
        if subspace.diagonal:
            core = subspace.diagonals("q")[k].diag()
        else:
            a, b = (rows[stack.rows(k)] for rows in stack.factors())
            core = stack.scale[k] * b.T @ a
        loss = (basis.basis_b.T @ core @ basis.basis_a - target).square().sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(float(target.square().sum()), rel=1e-6), "starts at zero"
    assert losses[-1] < 1e-3 * losses[0]
    assert not any(p.requires_grad for b in subspace.bases.values() for p in b.buffers())
    subspace.cores.freeze()
    assert (
        product(subspace.reconstruct("mine").modules["q"]) - target
    ).norm() < 0.05 * target.norm()


def test_where_a_new_task_starts():
    bank = make_bank()
    subspace = fit_subspace(bank, rank=6, method="hosvd")
    subspace.new_task("random", start="random", std=0.1, seed=1, modules=["v"])
    subspace.new_task("projected", start=bank.adapter("a3"))
    back = subspace.reconstruct("projected").modules["q"]
    gap = product(back) - product(subspace.reconstruct("a3").modules["q"])
    assert gap.norm() < 1e-5 * product(back).norm()
    random = subspace.cores.adapter("random")
    assert set(random.modules) == {"v"} and 0.05 < float(random.modules["v"].lora_b.std()) < 0.2
    assert [len(s.trained) for s in subspace.cores.stacks.values()] == [1, 1], "the last one alone"
    with pytest.raises(ValueError, match="start must be 'zero', 'random' or an Adapter, got 'pca'"):
        subspace.new_task("x", start="pca")
    with pytest.raises(ValueError, match="modules must be of the subspace, got \\['k'\\]"):
        subspace.new_task("x", modules=["k"])
    with pytest.raises(ValueError, match="rank must be an integer of at least 1, got 0"):
        subspace.new_task("x", rank=0)


def test_an_ordinary_adapter_begins_in_the_principal_directions(tmp_path):
    subspace = fit_subspace(make_bank(), rank=6, method="hosvd")
    zero, small = (subspace.initial_adapter("new", rank=3, strength=s) for s in (0.0, 0.1))
    for module, part in zero.modules.items():
        assert part.lora_a.equal(subspace.bases[module].basis_a[:3]) and not part.lora_b.any()
        assert small.modules[module].lora_b.equal(0.1 * subspace.bases[module].basis_b[:3])
    with pytest.raises(ValueError, match="rank must be an integer of at least 1, got 0"):
        subspace.initial_adapter("new", rank=0)
    write_adapter(small, tmp_path / "new")
    assert read_adapter(tmp_path / "new", name="new").modules["q"].lora_a.shape == (3, 96)


def test_diagonals_sum_the_rows_of_a_core_and_ask_for_the_method():
    subspace = fit_subspace(make_bank(), rank=6, method="jd_diag")
    stack = subspace.cores.stacks["q"]
    truth = (stack.lora_a * stack.lora_b * stack.scale[:, None]).double()
    assert_within_budget(subspace.diagonals("q"), truth.float(), truth, "one row each")
    subspace.cores.remove("a2")
    assert not subspace.diagonals("q")[2].any()
    with pytest.raises(
        ValueError, match="method must be 'jd_diag' for diagonal cores, got 'hosvd'"
    ):
        fit_subspace(make_bank(), rank=6, method="hosvd").diagonals("q")


def test_moving_keeps_it_usable():
    bank = make_bank()
    subspace = fit_subspace(bank, rank=6, method="hosvd")
    before = subspace.errors(bank).overall
    half = subspace.to(dtype=torch.bfloat16)
    assert half.bases["q"].basis_a.dtype == half.cores.dtype == torch.bfloat16
    assert subspace.errors(bank).overall == pytest.approx(before, rel=0.05)
    assert "8 adapters, 2 modules, 6 directions, hosvd" in repr(subspace)
    with pytest.raises(ValueError, match="bank must share adapters with the subspace, got none"):
        subspace.errors(AdapterBank())


def test_clusters_find_planted_groups():
    """Three families: told apart, and at the same P better than one basis for all."""
    bank = make_bank(count=18, groups=3, common=4, mean=1.0)
    cosines = similarity(bank)
    dense = torch.stack(
        [
            torch.cat([product(p).flatten() for p in bank.adapter(name).modules.values()])
            for name in bank.names
        ]
    )
    dense = torch.nn.functional.normalize(dense, dim=1)
    assert (cosines - dense @ dense.T).abs().max() < 1e-5
    groups = {frozenset(names) for names in cluster(bank, 3, seed=0)}
    assert groups == {frozenset(bank.names[g::3]) for g in range(3)}
    assert len(cluster(bank, 18)) == 18 and all(len(c) == 1 for c in cluster(bank, 18))
    one = fit_subspace(bank, rank=5, method="hosvd")
    three = fit_subspace(bank, rank=5, method="hosvd", clusters=3)
    assert three.errors(bank).overall < 0.7 * one.errors(bank).overall
    assert sorted(three.names) == sorted(bank.names) and len(three) == 18 and "a4" in three
    assert three.nearest(bank.adapter("a4")) is three.part_of("a4")
    assert product(three.reconstruct("a4").modules["q"]).any() and "3 parts" in repr(three)
    with pytest.raises(ValueError, match="name must be an adapter of a part, got 'a99'"):
        three.part_of("a99")


def test_a_refused_task_leaves_the_one_in_training_as_it_is():
    subspace = fit_subspace(make_bank(), rank=6, method="hosvd")
    parameters = subspace.new_task("mine", rank=2)
    with pytest.raises(ValueError, match="name must be new to the subspace, got 'a0'"):
        subspace.new_task("a0")
    for name, alpha, text in (("other", 0, "a scale that is finite"), ("", 8, "a non-empty")):
        with pytest.raises(ValueError, match=text):
            subspace.new_task(name, alpha=alpha)
    assert all(p.requires_grad for p in parameters)
    assert all(p is q for p, q in zip(parameters, subspace.cores.trainable(["mine"]), strict=True))


def test_a_model_in_half_precision_leaves_the_spectrum_exact():
    subspace = fit_subspace(make_bank(), rank=6, keep_mean=True)
    side = subspace.bases["q"].a
    spectrum, mean = side.spectrum.clone(), side.mean.clone()
    side.half()
    assert side.basis.dtype == torch.float16
    assert torch.equal(side.spectrum, spectrum) and torch.equal(side.mean, mean)
