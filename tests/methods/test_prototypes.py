"""Prototypes: means, clusters, the least count of examples, and noise that can be seen."""

import pytest
import torch

from lora_fused.methods.prototypes import Prototypes, k_means, make_prototypes


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def blobs(sizes=(30, 20, 12), size=6, spread=0.1):
    """Points around distant centres, shuffled, and which centre each has."""
    centres = 5 * normal(len(sizes), size, seed=1)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(2))]
    return centres[labels] + spread * normal(len(labels), size, seed=3), labels


def test_a_prototype_is_the_mean():
    features = {"a": normal(40, 6), "b": normal(10, 6, seed=1).half()}
    made = make_prototypes(features)
    assert made.names == ("a", "b") and len(made) == 2 and made.noise is None
    assert made.owners.tolist() == [0, 1] and made.counts.tolist() == [40, 10]
    for vector, own in zip(made.vectors, features.values(), strict=True):
        assert torch.equal(vector, own.double().mean(0).float())
    assert repr(made) == "Prototypes(2 adapters, 2 vectors of 6)"


def test_means_of_large_features_keep_their_digits():
    """A sum in float32 would not: the features' own offset is 1e4 times their spread."""
    own = 1e4 + normal(20000, 4, seed=5)
    vector = make_prototypes({"a": own}).vectors[0]
    truth = own.double().mean(0)
    assert (vector - truth).abs().max() <= torch.finfo(torch.float32).eps * 1e4
    naive = torch.zeros(4)
    for row in own:
        naive += row
    assert (naive / len(own) - truth).abs().max() > 0.004


def test_k_means_finds_what_is_apart_and_repeats():
    points, labels = blobs()
    found = k_means(points, 3)
    pairs = set(zip(found.tolist(), labels.tolist(), strict=True))
    assert len(pairs) == 3  # one to one
    assert torch.equal(found, k_means(points, 3))
    near = k_means(normal(60, 6), 4, seed=0)
    assert not torch.equal(near, k_means(normal(60, 6), 4, seed=1))  # seeds matter where unclear
    assert k_means(points, 1).unique().tolist() == [0]


def test_several_prototypes_are_the_means_of_clusters():
    points, labels = blobs()
    made = make_prototypes({"a": points, "b": normal(15, 6)}, per_adapter=3, minimum=5)
    own = made.vectors[made.owners == 0]
    assert len(own) == 3 and sorted(made.counts[made.owners == 0].tolist()) == [12, 20, 30]
    for blob in range(3):
        mean = points[labels == blob].double().mean(0).float()
        assert (own - mean).norm(dim=1).min() < 1e-6
    assert int(made.counts.sum()) == 62 + 15


def test_small_clusters_are_dissolved():
    points, _ = blobs(sizes=(30, 20, 4))
    made = make_prototypes({"a": points}, per_adapter=3, minimum=5)
    assert sorted(made.counts.tolist()) in ([20, 34], [24, 30])
    assert len(make_prototypes({"a": points}, per_adapter=3, minimum=4).names) == 1
    assert len(make_prototypes({"a": points}, per_adapter=3, minimum=4).vectors) == 3
    for count in (1, 2, 5, 54):  # whatever is asked for, every mean has enough examples
        made = make_prototypes({"a": points}, per_adapter=count, minimum=7)
        assert made.counts.min() >= 7 and made.counts.sum() == 54


def test_points_that_are_alike_make_one_cluster():
    made = make_prototypes({"a": torch.ones(12, 3)}, per_adapter=4, minimum=1)
    assert made.counts.tolist() == [12] and torch.equal(made.vectors, torch.ones(1, 3))


def test_few_examples_are_refused_unless_told():
    features = {"a": normal(40, 6), "rare": normal(9, 6)}
    message = r"make_prototypes: features of 'rare' must have at least 10 examples .*, got 9"
    with pytest.raises(ValueError, match=message):
        make_prototypes(features)
    assert make_prototypes(features, minimum=9).counts.tolist() == [40, 9]
    assert make_prototypes({"a": normal(1, 6)}, minimum=1).counts.tolist() == [1]


def test_noise_moves_prototypes_as_the_report_says():
    features = {
        f"task {i}": normal(50, 64, seed=i) + 3 * normal(64, seed=100 + i) for i in range(20)
    }
    plain = make_prototypes(features)
    little = make_prototypes(features, noise=0.01, noise_seed=0)
    moved = (little.vectors - plain.vectors).norm(dim=1)
    assert abs(float(moved.median()) - little.noise.moved) < 1e-5
    assert abs(little.noise.moved / (0.01 * 64**0.5) - 1) < 0.2
    assert little.noise.kept == 1.0
    gaps = torch.cdist(plain.vectors.double(), plain.vectors.double())
    gaps = gaps.fill_diagonal_(torch.inf).amin(1)
    assert abs(little.noise.spacing - float(gaps.median())) < 1e-9
    reach = max(2 * float(own.norm(dim=1).max()) / 50 for own in features.values())
    assert abs(little.noise.ratio - 0.01 / reach) < 1e-9
    # Noise as large as the library: neighbours are lost, and the report says so.
    much = make_prototypes(features, noise=30.0, noise_seed=0)
    assert much.noise.kept < 0.5 and much.noise.moved > much.noise.spacing
    assert "kept their nearest neighbour" in str(much.noise) and "\n" not in str(much.noise)


def test_neighbours_in_the_report_are_other_adapters():
    points, _ = blobs(sizes=(20, 20))
    made = make_prototypes({"a": points, "b": 50 + points}, per_adapter=2)
    gaps = torch.cdist(made.vectors[:2].double(), made.vectors[2:].double())
    within = (made.vectors[0] - made.vectors[1]).norm()
    noisy = make_prototypes({"a": points, "b": 50 + points}, per_adapter=2, noise=0.1)
    spacing = torch.cat((gaps.amin(0), gaps.amin(1))).median()
    assert abs(noisy.noise.spacing - float(spacing)) < 1e-4 and spacing > 2 * within


def test_noise_cannot_be_taken_off_by_a_known_seed():
    features = {"a": normal(50, 6), "b": normal(50, 6, seed=1)}
    one, other = (make_prototypes(features, noise=0.1).vectors for _ in range(2))
    assert not torch.equal(one, other)
    one, other = (make_prototypes(features, noise=0.1, noise_seed=3).vectors for _ in range(2))
    assert torch.equal(one, other)


def test_noise_on_one_adapter_has_a_report_too():
    report = make_prototypes({"a": normal(50, 6)}, noise=0.1, noise_seed=0).noise
    assert report.spacing != report.spacing and report.moved > 0 and str(report)


def test_subsets_are_those_of_a_search_for_each_name():
    generator = torch.Generator().manual_seed(4)
    owners = torch.cat((torch.arange(9), torch.randint(0, 9, (30,), generator=generator)))
    owners = owners[torch.randperm(39, generator=generator)]
    names, vectors = tuple("abcdefghi"), torch.randn(39, 3, generator=generator)
    made = Prototypes(names, vectors, owners, torch.arange(39))
    for chosen in ("hca", "ihgfedcba", "e"):
        part = made.subset(list(chosen))
        rows = torch.cat([(owners == names.index(name)).nonzero()[:, 0] for name in chosen])
        assert part.names == tuple(chosen) and part.counts.equal(rows)
        assert part.vectors.equal(vectors[rows])
        assert [chosen[k] for k in part.owners] == [names[k] for k in owners[rows]]


def test_subsets_keep_vectors_counts_and_order():
    points, _ = blobs()
    features = {"a": points, "b": normal(15, 6), "c": normal(20, 6, seed=4)}
    made = make_prototypes(features, per_adapter=3, minimum=5)
    part = made.subset(["c", "a"])
    assert part.names == ("c", "a")
    for k, name in enumerate(part.names):
        own = made.owners == made.names.index(name)
        assert torch.equal(part.vectors[part.owners == k], made.vectors[own])
        assert torch.equal(part.counts[part.owners == k], made.counts[own])
    with pytest.raises(ValueError, match="names must be adapters of these, got 'd'"):
        made.subset(["a", "d"])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"per_adapter": 0}, "per_adapter must be an integer of at least 1, got 0"),
        ({"minimum": True}, "minimum must be an integer of at least 1, got True"),
        ({"noise": -1.0}, "noise must be a number, not negative, got -1.0"),
        ({"noise": float("nan")}, "noise must be a number, not negative, got nan"),
        ({"features": {}}, "features must be a dict of adapters' features, not empty, got dict"),
        ({"features": {"a": torch.ones(3)}}, r"features of 'a' must be \[n, E\], not empty"),
        ({"features": {"a": torch.ones(12, 3).int()}}, "'a' must be a floating point tensor"),
        ({"features": {"a": torch.full((12, 3), torch.inf)}}, "'a' must be finite in float32"),
        (
            {"features": {"a": torch.ones(12, 3), "b": torch.ones(12, 4)}},
            r"features must have one size E, got \{'a': 3, 'b': 4\}",
        ),
    ],
)
def test_rejects(options, message):
    options = {"features": {"a": normal(12, 3)}} | options
    with pytest.raises(ValueError, match=f"make_prototypes: .*{message}"):
        make_prototypes(options.pop("features"), **options)


@pytest.mark.parametrize(
    "parts, message",
    [
        ((("a", "a"), torch.ones(2, 3)), "names must be distinct"),
        (("ab", torch.ones(2, 3)), "names must be distinct"),
        ((("a", "b"), torch.ones(1, 3)), "owners must name each of the 2 adapters"),
        ((("a",), torch.ones(2, 3), torch.tensor([0, 1])), "owners must name each of the 1"),
        ((("a",), torch.ones(2, 3), torch.tensor([0.0, 0.0])), r"owners must be integers \[2\]"),
        ((("a",), torch.ones(1, 3), None, torch.ones(3).int()), r"counts must be integers \[1\]"),
        ((("a",), torch.full((1, 3), torch.nan)), "vectors must be finite"),
    ],
)
def test_prototypes_reject(parts, message):
    with pytest.raises(ValueError, match=f"Prototypes: {message}"):
        Prototypes(*parts)
