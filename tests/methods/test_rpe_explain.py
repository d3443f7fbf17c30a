"""explain: what was chosen and why, and a warning where the library knows nothing alike."""

import json

import pytest
import torch

from lora_fused.methods import rpe


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def library(count=60, size=32) -> rpe.Prototypes:
    """Tasks around a common place: what one base's features look like."""
    return rpe.Prototypes(tuple(f"task {i}" for i in range(count)), 3 + normal(count, size))


def explained(queries, prototypes, rule="l1", k=8, reference=None, **options):
    chosen = rpe.weigh(rpe.retrieve(queries, prototypes, k=k), rule, **options)
    return rpe.explain(chosen, reference=reference)


def test_says_what_was_chosen_and_what_it_misses():
    triangle = rpe.Prototypes(("A", "B", "C"), torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))
    (one,) = explained(torch.zeros(2), triangle, "l1", l1=0.25)
    assert one.adapters == ("B", "C", "A") and one.rule == "l1"
    assert one.distances == pytest.approx((1, 1, 2**0.5))
    assert one.weights == pytest.approx((0.75, 0.75, -0.5))
    assert one.negative_mass == pytest.approx(0.5)
    assert one.residual == pytest.approx(0.25 * 2**0.5)
    assert one.hull_distance == pytest.approx(0.5**0.5)
    (inside,) = explained(torch.tensor([0.7, 0.6]), triangle, "nearest")
    assert inside.hull_distance < 1e-12 and inside.negative_mass == 0
    assert inside.residual == inside.distances[0]


def test_warns_outside_the_library_and_only_there():
    prototypes = library()
    known = 3 + normal(40, 32, seed=1)  # tasks of the same kind that it does not hold
    strange = known + 12 * torch.nn.functional.normalize(normal(40, 32, seed=2), dim=1)
    away = [one.outside for one in explained(strange, prototypes)]
    inside = [one.outside for one in explained(known, prototypes)]
    own = [one.outside for one in explained(prototypes.vectors, prototypes)]
    assert sum(away) >= 30 and sum(inside) <= 6 and not any(own)
    assert sum(explained(100 * known, prototypes)[i].outside for i in range(40)) == 40


def test_single_inputs_have_a_reference_of_their_own():
    """They scatter more than means do: the library's own prototypes would warn of each."""
    prototypes = library()

    def inputs(seed):
        owners = torch.arange(200) % 60
        return prototypes.vectors[owners] + 2 * normal(200, 32, seed=seed)

    against_means = [one.outside for one in explained(inputs(5), prototypes)]
    against_inputs = explained(inputs(5), prototypes, reference=inputs(6))
    assert sum(against_means) > 150
    assert sum(one.outside for one in against_inputs) < 25
    assert against_inputs[0].of == 200
    far = explained(inputs(5) + 5, prototypes, reference=inputs(6))
    assert sum(one.outside for one in far) > 190


def test_a_prototype_is_left_out_against_the_other_adapters():
    """Two prototypes of one adapter close together must not count as its own reference."""
    vectors = torch.tensor([[0.0, 0.0], [0.1, 0.0], [4.0, 0.0], [0.0, 4.0]])
    made = rpe.Prototypes(("a", "b", "c"), vectors, torch.tensor([0, 0, 1, 2]))
    (one,) = explained(torch.tensor([-1.0, -1.0]), made, "nearest")
    # Left out, (0, 0) and (0.1, 0) are 2.83 and 2.76 from the others' line; these 3.9 and more.
    assert (one.nearer, one.of, one.outside) == (0, 4, None)
    (one,) = explained(torch.tensor([-2.1, -2.1]), made, "nearest")
    assert (one.nearer, one.of) == (2, 4)
    twins = rpe.Prototypes(("a", "b", "c", "d"), torch.zeros(4, 2))
    (one,) = explained(torch.zeros(2), twins, k=2)
    assert one.hull_distance == 0 and one.outside is None and one.of == 4


def test_the_reference_has_as_many_neighbours_as_the_query():
    line = rpe.Prototypes(("a", "b", "c"), torch.tensor([[0.0], [1.0], [3.0]]))
    (one,) = explained(torch.tensor([4.5]), line, k=1)  # left out: 1, 1 and 2 to the nearest
    assert (one.nearer, one.of, one.outside) == (2, 3, None)
    (one,) = explained(torch.tensor([4.5]), line, k=2)  # to the hull of two: 1, 0 and 2
    assert (one.nearer, one.hull_distance) == (2, 1.5)
    (one,) = explained(torch.tensor([2.1]), line, k=2)
    assert (one.nearer, one.hull_distance) == (0, 0)


def test_warns_by_rank_and_not_of_too_few():
    far = torch.full((2,), 50.0)
    assert explained(far, library(19, 2))[0].outside is True
    (one,) = explained(far, library(18, 2))
    assert one.nearer == one.of == 18 and one.outside is None
    told = "more than 18 of 18 reference points have (too few points for a warning)"
    assert f"{one.hull_distance:.4g}, {told}" in str(one)
    chosen = rpe.weigh(rpe.retrieve(far, library(18, 2)))
    assert rpe.explain(chosen, level=0.9)[0].outside is True
    # Queries like the reference are warned of as often as the level says, not more.
    like = explained(normal(2000, 2, seed=3), library(19, 2), reference=normal(99, 2, seed=4))
    assert 0.01 < sum(one.outside for one in like) / 2000 < 0.1


def test_a_library_of_one_has_nothing_to_compare_with():
    (one,) = explained(torch.ones(32), library(1))
    assert one.outside is None and one.of == 0 and one.weights == (1.0,)
    assert "nothing to compare it with" in str(one) and json.loads(one.to_json())["outside"] is None


def test_prints_and_writes_json():
    one, other = explained(
        torch.stack([torch.full((32,), 3.0), torch.full((32,), 40.0)]), library()
    )
    lines = str(one).splitlines()
    assert len(lines) == 1 + 8 + 4 and lines[1].startswith(one.adapters[0])
    assert len({len(line) for line in lines[:9]}) == 1  # columns stand below each other
    assert "WARNING" not in str(one) and "WARNING" in str(other)
    assert f"of {one.of} reference points" in str(one)
    read = json.loads(other.to_json(indent=2))
    assert read["adapters"] == list(other.adapters) and read["outside"] is True
    assert read["weights"] == list(other.weights)


def test_large_libraries_give_a_reference_of_two_hundred():
    (one,) = explained(normal(8, seed=1), library(500, 8))
    assert one.of == 200


@pytest.mark.parametrize(
    "options, message",
    [
        ({"chosen": None}, "explain: chosen must be what weigh gives, got NoneType"),
        ({"level": 0.0}, r"explain: level must be in \(0, 1\), got 0.0"),
        ({"reference": torch.ones(2, 3)}, "retrieve: queries must have the prototypes' size 32"),
    ],
)
def test_rejects(options, message):
    chosen = rpe.weigh(rpe.retrieve(torch.ones(32), library()))
    with pytest.raises(ValueError, match=f"^{message}"):
        rpe.explain(**({"chosen": chosen} | options))
