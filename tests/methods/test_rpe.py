"""RPE: the paper's toy, retrieval, weights, and one forward with an ensemble per request."""

import itertools

import pytest
import torch
from support.models import Net, adapter, row_by_row, tokens

from lora_fused import AdapterBank, Mixture
from lora_fused.methods import rpe
from lora_fused.methods.retrieval import WEIGHTS
from lora_fused.nn import attach
from lora_fused.testing import assert_within_budget

TOY = rpe.Prototypes(("A", "B", "C"), torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def library(count=12, size=16, seed=0) -> rpe.Prototypes:
    return rpe.Prototypes(tuple(f"a{i}" for i in range(count)), normal(count, size, seed=seed))


def by_name(chosen: rpe.Weighted, query: int = 0) -> dict[str, float]:
    return dict(zip(chosen.found.names(query), chosen.weights[query].tolist(), strict=True))


def weights_of(queries, prototypes, rule, k=8, **options) -> torch.Tensor:
    return rpe.weigh(rpe.retrieve(queries, prototypes, k=k), rule, **options).weights


@pytest.mark.parametrize(
    "rule, expected",
    [
        ("similarity", (0.155, 0.422, 0.422)),
        ("linear", (-1.0, 1.0, 1.0)),
        ("uniform", (1 / 3, 1 / 3, 1 / 3)),
        ("simplex", (0.0, 0.5, 0.5)),
        ("nearest", (0.0, 1.0, 0.0)),  # of two as near, the first
    ],
)
def test_figure_2_of_the_paper(rule, expected):
    found = by_name(rpe.weigh(rpe.retrieve(torch.zeros(2), TOY), rule))
    for name, value in zip("ABC", expected, strict=True):
        assert abs(found[name] - value) < 5e-4, (name, found)


@pytest.mark.parametrize(
    "l1, negative", [(0.0, 1.0), (0.25, 0.5), (0.4, 0.2), (0.5, 0.0), (9, 0.0)]
)
def test_figure_2_with_l1_by_hand(l1, negative):
    """w = (-a, (1 + a) / 2, (1 + a) / 2): (1 - a)^2 / 2 + l1 (1 + 2 a) is least at a = 1 - 2 l1."""
    found = by_name(rpe.weigh(rpe.retrieve(torch.zeros(2), TOY), "l1", l1=l1))
    assert abs(found["A"] + negative) < 1e-9 and abs(found["B"] - (1 + negative) / 2) < 1e-9


def test_retrieves_the_nearest_in_squared_distance():
    prototypes, queries = library(200), normal(50, 16, seed=1)
    found = rpe.retrieve(queries, prototypes, k=7)
    truth = (queries[:, None].double() - prototypes.vectors.double()).square().sum(-1)
    expected = truth.sort(dim=1)
    assert torch.equal(found.adapters, expected.indices[:, :7])
    assert torch.equal(found.rows, found.adapters)
    assert (found.distances - expected.values[:, :7]).abs().max() < 1e-12
    assert rpe.retrieve(queries[0], prototypes, k=999).adapters.shape == (1, 200)


def test_close_distances_far_from_the_origin_are_told_apart():
    """In float32, ||q||^2 - 2 q z + ||z||^2 would be rounding alone here."""
    vectors = 1000 + 0.01 * normal(30, 8)
    query = vectors[4] + 1e-3
    found = rpe.retrieve(query, rpe.Prototypes(tuple(map(str, range(30))), vectors), k=30)
    truth = (query.double() - vectors.double()).square().sum(-1)
    assert torch.equal(found.adapters[0], truth.argsort()) and found.names(0)[0] == "4"
    plain = query.square().sum() - 2 * vectors @ query + vectors.square().sum(-1)
    assert not torch.equal(plain.argsort(), truth.argsort())


def test_an_adapter_counts_once_by_its_nearest_prototype():
    vectors = torch.tensor([[0.0], [10.0], [4.0], [11.0], [5.0]])
    made = rpe.Prototypes(("a", "b", "c"), vectors, torch.tensor([0, 0, 1, 2, 2]))
    found = rpe.retrieve(torch.tensor([[9.0], [4.4]]), made, k=2)
    assert found.names(0) == ["a", "c"] and found.rows.tolist() == [[1, 3], [2, 4]]
    assert found.names(1) == ["b", "c"]
    assert torch.allclose(found.distances, torch.tensor([[1, 4], [0.16, 0.36]]).double())


def test_adapters_of_very_different_numbers_of_prototypes():
    """Against each adapter's rows taken alone; of rows that are the same the first counts."""
    owners = torch.cat((torch.arange(40), torch.full((50,), 7), torch.full((3,), 11)))
    owners = owners[torch.randperm(93, generator=torch.Generator().manual_seed(2))]
    vectors, queries = normal(93, 5, seed=3), normal(30, 5, seed=4)
    vectors[owners == 11] = vectors[owners == 11][:1].clone()
    found = rpe.retrieve(queries, rpe.Prototypes(tuple(map(str, range(40))), vectors, owners), k=9)
    for q, z in enumerate(queries.double()):
        far = (z - vectors.double()).square().sum(1)
        nearest = {}
        for k in range(40):
            own = (owners == k).nonzero()[:, 0]
            nearest[k] = int(own[far[own].argmin()])
        order = sorted(nearest, key=lambda k: float(far[nearest[k]]))[:9]
        assert found.adapters[q].tolist() == order
        assert found.rows[q].tolist() == [nearest[k] for k in order]
        assert torch.equal(found.distances[q], far[found.rows[q]])


def test_a_narrowed_library_gives_the_same():
    """As after a vector index: the union of all queries' hits is enough."""
    prototypes, queries = library(300), normal(20, 16, seed=1)
    found = rpe.retrieve(queries, prototypes, k=5)
    hits = [prototypes.names[k] for k in found.adapters.unique().tolist()]
    assert len(hits) < 100
    again = rpe.retrieve(queries, prototypes.subset(hits), k=5)
    assert [again.names(q) for q in range(20)] == [found.names(q) for q in range(20)]
    for rule in WEIGHTS:
        gap = rpe.weigh(found, rule).weights - rpe.weigh(again, rule).weights
        assert gap.abs().max() < 1e-9


@pytest.mark.parametrize("rule", WEIGHTS)
@pytest.mark.parametrize("limit", [None, 1, 3, 20])
def test_weights_sum_to_one_and_keep_to_the_limit(rule, limit):
    weights = weights_of(normal(40, 16, seed=1), library(), rule, max_adapters=limit)
    assert weights.isfinite().all() and (weights.sum(1) - 1).abs().max() < 1e-12
    most = {None: 8, 1: 1, 3: 3, 20: 8}[limit]
    assert (weights != 0).sum(1).max() <= (1 if rule == "nearest" else most)
    if rule not in ("linear", "l1"):
        assert (weights >= 0).all()


def test_a_limit_weighs_anew_and_comes_near_the_best_set():
    queries, prototypes = 0.5 * normal(60, 16, seed=1), library()
    found = rpe.retrieve(queries, prototypes, k=8)
    vectors = prototypes.vectors.double()[found.rows]

    def misses(weights):
        return (queries - (weights[:, None] @ vectors)[:, 0]).norm(dim=1)

    full, limited = (rpe.weigh(found, "simplex", max_adapters=m).weights for m in (None, 3))
    best = torch.full((60,), torch.inf, dtype=torch.float64)
    for kept in itertools.combinations(range(8), 3):
        part = rpe.Retrieved(
            queries,
            prototypes,
            *(t[:, list(kept)] for t in (found.adapters, found.rows, found.distances)),
        )
        weights = torch.zeros_like(full)
        weights[:, list(kept)] = rpe.weigh(part, "simplex").weights
        best = torch.minimum(best, misses(weights))
    cut = full * (full >= full.topk(3).values[:, 2:])
    cut /= cut.sum(1, keepdim=True)
    assert (misses(limited) >= best - 1e-9).all()
    assert misses(limited).mean() < 1.01 * best.mean()
    assert misses(limited).mean() < misses(cut).mean()  # to cut alone is worse


def test_of_equal_weights_the_nearer_stay():
    found = by_name(rpe.weigh(rpe.retrieve(torch.zeros(2), TOY), "linear", max_adapters=2))
    assert found == {"B": 0.5, "C": 0.5, "A": 0.0}


def test_units_of_the_median_do_not_know_the_features_scale():
    queries, prototypes = normal(30, 16, seed=1), library()
    large = rpe.Prototypes(prototypes.names, 40 * prototypes.vectors)
    for rule, options in (("similarity", {"temperature": 0.3}), ("l1", {"l1": 0.05})):
        raw, scaled = (
            weights_of(queries, prototypes, rule, units=u, **options) for u in ("raw", "median")
        )
        assert (raw - scaled).abs().max() > 1e-3
        moved = weights_of(40 * queries, large, rule, units="median", **options)
        assert (scaled - moved).abs().max() < 1e-6
        moved = weights_of(40 * queries, large, rule, **options)
        assert (raw - moved).abs().max() > 1e-2  # raw units do
    one = weights_of(queries[:1], prototypes, "l1", l1=0.7, units="median")
    unit = rpe.retrieve(queries[:1], prototypes).distances.sqrt().quantile(0.5) ** 2
    assert torch.equal(one, weights_of(queries[:1], prototypes, "l1", l1=float(0.7 * unit)))
    # The unit stays that of all the neighbours where only some are kept.
    few = {"k": 8, "max_adapters": 3}
    one = weights_of(5 * queries[1:2], prototypes, "l1", l1=0.01, units="median", **few)
    unit = rpe.retrieve(5 * queries[1:2], prototypes).distances.sqrt().quantile(0.5) ** 2
    assert torch.equal(
        one, weights_of(5 * queries[1:2], prototypes, "l1", l1=float(0.01 * unit), **few)
    )
    assert (one < 0).any()


@pytest.mark.parametrize("rule", WEIGHTS)
@pytest.mark.parametrize("units", ["raw", "median"])
def test_degenerate_libraries(rule, units):
    one = library(1)
    alike = rpe.Prototypes(("a", "b", "c"), one.vectors.expand(3, 16).clone())
    crowd = library(40, 3)
    for prototypes, query in (
        (one, normal(16, seed=1)),
        (one, one.vectors[0]),
        (alike, normal(16, seed=1)),
        (alike, alike.vectors[0]),
        (crowd, normal(3, seed=1)),
        (crowd, crowd.vectors[5]),
        (library(), library().vectors[3]),
        (library(), 1e4 * normal(16, seed=1)),
    ):
        weights = weights_of(query, prototypes, rule, k=40, units=units)
        assert weights.isfinite().all()
        assert (weights.sum(1) - 1).abs().max() < 1e-12 * float(weights.abs().sum())
    if rule in ("linear", "l1", "simplex"):
        found = by_name(rpe.weigh(rpe.retrieve(library().vectors[3], library()), rule))
        assert abs(found["a3"] - 1) < 1e-9
        same = weights_of(normal(16, seed=1), alike, rule)
        assert (same - 1 / 3).abs().max() < 1e-12


def test_thousands_of_queries_are_weighed_as_one_is():
    """More than one block: 3000 x 16 x 128 numbers and above."""
    queries, prototypes = normal(3000, 128, seed=1), library(64, 128)
    found = rpe.retrieve(queries, prototypes, k=16)
    assert len(found) * 16 * 128 > 1 << 22
    weights = rpe.weigh(found, "l1", l1=3.0, max_adapters=6).weights
    for q in (0, 1234, 2999):
        alone = rpe.weigh(rpe.retrieve(queries[q], prototypes, k=16), "l1", l1=3.0, max_adapters=6)
        assert alone.found.adapters.tolist() == found.adapters[q : q + 1].tolist()
        assert (alone.weights - weights[q]).abs().max() < 1e-9


def bank_for(prototypes: rpe.Prototypes) -> tuple[AdapterBank, list]:
    bank, adapters = AdapterBank(), [adapter(n, i) for i, n in enumerate(prototypes.names)]
    bank.add_many(reversed(adapters))  # ids other than the library's indices
    return bank, adapters


@pytest.mark.parametrize("rule", ["l1", "linear", "similarity"])
def test_a_batch_gets_an_ensemble_each_in_one_forward(rule):
    prototypes, queries, x = library(10), 0.5 * normal(9, 16, seed=1), tokens(9)
    bank, adapters = bank_for(prototypes)
    chosen = rpe.weigh(rpe.retrieve(queries, prototypes, k=6), rule, l1=0.3, max_adapters=4)
    mixture = rpe.ensemble(queries, prototypes, k=6, weights=rule, l1=0.3, max_adapters=4)
    assert isinstance(mixture, Mixture) and len(mixture) == 9 and mixture.weights.shape[1] <= 4
    rows = [by_name(chosen, q) for q in range(9)]
    assert len({tuple(sorted(row)) for row in rows}) > 3
    model = Net()
    truth, base = row_by_row(Net(), adapters, rows, x), Net().double()(x)
    handle = attach(model, bank)
    with torch.no_grad():
        plain = model(x)
        with handle.mix(mixture):
            together = model(x)
        alone = []
        for q in range(9):
            with handle.mix(
                rpe.ensemble(queries[q], prototypes, k=6, weights=rule, l1=0.3, max_adapters=4)
            ):
                alone.append(model(x[q : q + 1]))
        with handle.mix(rpe.ensemble(queries.flip(0), prototypes, k=6, weights=rule)):
            other = model(x)
    alone = torch.cat(alone)
    assert_within_budget(together - plain, alone - plain, truth - base)
    with pytest.raises(AssertionError, match="error"):  # other rows' ensembles are seen
        assert_within_budget(other - plain, alone - plain, truth - base)


def test_the_mixture_leaves_zeros_out():
    mixture = rpe.ensemble(torch.zeros(2), TOY, weights="simplex")
    assert mixture.adapters == (("B", "C"),) and mixture.weights.tolist() == [[0.5, 0.5]]
    both = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    mixture = rpe.ensemble(both, TOY, weights="simplex", per="token")
    assert mixture.adapters == (("B", "C"), ("A", None)) and mixture.per == "token"
    assert mixture.weights.tolist() == [[0.5, 0.5], [1.0, 0.0]]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"queries": torch.zeros(3)}, r"retrieve: queries must have the prototypes' size 2, got"),
        ({"queries": torch.full((2,), torch.nan)}, "retrieve: queries must be finite"),
        ({"queries": torch.zeros(0, 2)}, r"retrieve: queries must be \[n, E\], not empty"),
        ({"prototypes": torch.zeros(3, 2)}, "retrieve: prototypes must be Prototypes, got Tensor"),
        ({"k": 0}, "retrieve: k must be an integer of at least 1, got 0"),
        ({"weights": "lasso"}, r"weigh: weights must be one of \('uniform', .*, got 'lasso'"),
        ({"units": "mean"}, r"weigh: units must be one of \('raw', 'median'\), got 'mean'"),
        ({"max_adapters": 0}, "weigh: max_adapters must be an integer of at least 1, got 0"),
        ({"temperature": 0.0}, "weigh: temperature must be a number, positive, got 0.0"),
        ({"l1": -1.0}, "weigh: l1 must be a number, not negative, got -1.0"),
        ({"l1": float("nan")}, "weigh: l1 must be a number, not negative, got nan"),
        ({"per": "row"}, "Mixture: per must be 'sample' or 'token', got 'row'"),
    ],
)
def test_rejects(options, message):
    options = {"queries": torch.zeros(2), "prototypes": TOY} | options
    with pytest.raises(ValueError, match=f"^{message}"):
        rpe.ensemble(options.pop("queries"), options.pop("prototypes"), **options)
