"""What subspace_lora moves: the bases once, whatever the adapters, and of these the cores alone."""

import pytest
from support.traffic import assert_predicted

from lora_fused.testing import error

pytest.importorskip("triton")
from benchmarks.traffic import LaunchCounter, basis_model, count, works
from lora_fused.ops.subspace_lora.triton_impl.launch import PROJECT, tile_of

IN_BASIS = {work.name: work for work in works.WORKS if work.form}


@pytest.fixture(scope="module")
def counted() -> dict[str, tuple[works.BasisProblem, LaunchCounter]]:
    """Each work run once; a result that is wrong is not counted."""
    found = {}
    for name, work in IN_BASIS.items():
        problem = works.problem_of(work)
        run = works.ours()["triton"](problem)
        with count() as counter:
            y = run()
        truth = problem.truth()
        assert error(y, truth) <= 2**-8 * truth.abs().max(), name
        found[name] = (problem, counter)
    return found


def test_nothing_is_out_of_bounds_and_nothing_races(counted):
    for _, counter in counted.values():
        assert counter.total.out_of_bounds == counter.total.races == counter.total.atomics == 0


@pytest.mark.parametrize("form, launches", [("diagonal", 2), ("pairs", 3)])
def test_a_batch_moves_little_more_than_it_must(counted, form, launches):
    for name in ("distinct", "one", "four"):
        problem, counter = counted[f"{form}_{name}"]
        compulsory = problem.compulsory_read + problem.compulsory_written
        assert compulsory <= counter.total.dram_bytes <= 1.15 * compulsory
        assert counter.total.launches == launches and not counter.torch_ops.get("aten.sort")


@pytest.mark.parametrize("form, most", [("diagonal", 1.05), ("pairs", 1.5)])
def test_bytes_grow_with_the_cores_in_use_and_with_nothing_else(counted, form, most):
    """256 adapters against one. Pairs of rank 16 are 8 kB each: 1.5 is what they must come to."""
    (many, of_many), (one, of_one) = (counted[f"{form}_{name}"] for name in ("distinct", "one"))
    cores = many.core_bytes - one.core_bytes
    grown = of_many.total.dram_bytes - of_one.total.dram_bytes
    assert 0 <= grown - cores <= 0.001 * of_one.total.dram_bytes
    assert of_many.total.dram_bytes / of_one.total.dram_bytes <= most


@pytest.mark.parametrize("form, least", [("diagonal", 20), ("pairs", 8)])
def test_four_of_a_thousand_against_adapters_written_out(counted, form, least):
    """Against the least that mixture_lora can move: each adapter in use once (traffic.csv: 1.0)."""
    _, counter = counted[f"{form}_four"]
    (work,) = (work for work in works.WORKS if work.name == "written_out")
    rows = 2 * (work.N * (work.I + 2 * work.O))
    written_out = rows + 2 * work.K * work.R * (work.I + work.O)
    assert written_out / counter.total.dram_bytes >= least


@pytest.mark.parametrize("form", ["diagonal", "pairs"])
def test_the_model_moves_the_bytes_that_the_counter_sees(counted, form):
    problem, counter = counted[f"{form}_four"]
    work, used = problem.work, problem.ids.unique().numel()
    first, last = basis_model.shipped(work.N, work.I)
    expected = [first, basis_model.pairs(work.N, work.J, work.R, used), last]
    if form == "diagonal":
        tile = tile_of(PROJECT, work.N, False)
        first = basis_model.project(work.N, work.I, tile, work.I, work.J, used)
        expected = [first, last]
    assert_predicted(counter.launches, expected)


def test_the_tiles_of_the_model_are_printed():
    for lines in (basis_model.tiles("project", 2048), basis_model.tiles("lift", 4096)):
        table = list(lines)
        assert all(line.count("*") == 1 for line in (table[0], *table[2:]))
    assert len(list(basis_model.slices(8192))) == 6


def test_tiles_are_near_the_best_of_the_model():
    """At most a quarter above the best of those that were looked at, where a launch is not all."""
    for kernel in ("project", "lift"):
        for line in list(basis_model.tiles(kernel, 2048))[2:]:
            cells = line.split(")")[:-1]
            times = [float(c.split("(")[0].split()[-1].rstrip("*")) for c in cells]
            (shipped,) = (t for t, c in zip(times, cells, strict=True) if "*" in c)
            assert shipped + basis_model.LAUNCH <= 1.25 * (min(times) + basis_model.LAUNCH), line
