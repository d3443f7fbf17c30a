"""What times us must itself be right: every form computes mixture_lora, the gate refuses what does
not, rows survive a stopped run."""

import csv
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_mixture_lora as bench
from benchmarks import harness, machine, run, table
from benchmarks.harness import Case, Competitor, Gate, Problem, Result, race
from benchmarks.peers import torch_forms
from lora_fused.backends import ERRORS
from lora_fused.ops import mixture_lora
from lora_fused.testing import assert_within_budget

SMALL = replace(bench.MIDDLE, N=12, K=6, J=3, R=5, I=33, O=47)
CASES = [
    SMALL,
    replace(SMALL, N=1),
    replace(SMALL, N=1, J=1),
    replace(SMALL, K=2),  # fewer adapters than a row uses: ids repeat within a row
    replace(SMALL, K=64),  # adapters lie apart: dense_active must copy
    replace(SMALL, workload="identical"),
    replace(SMALL, workload="skewed"),
    replace(SMALL, direction="backward"),
    replace(SMALL, direction="backward", workload="identical"),
    replace(SMALL, dtype="bfloat16"),
    replace(SMALL, dtype="float16", workload="identical"),
]


@pytest.fixture(autouse=True)
def one_quick_thread(monkeypatch):
    monkeypatch.setattr(machine, "PROBE_SECONDS", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference(case: Case, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    given = {
        name: t.to(dtype) if t.is_floating_point() else t for name, t in bench.inputs(case).items()
    }
    if case.direction == "forward":
        return (mixture_lora(**given, impl="reference"),)
    leaves = bench._leaves(given)
    y = mixture_lora(**{**given, **leaves}, impl="reference")
    return bench._gradient(y, leaves)()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_competitor_computes_the_op(case):
    dtype = getattr(torch, case.dtype)
    truth, rounded = reference(case, torch.float64), reference(case, dtype)
    problem = bench.problem(case, ours=("reference",))
    names = [c.name for c in problem.competitors]
    assert set(bench.applicable(case)) < set(names)
    with torch.set_grad_enabled(problem.gradients):
        for competitor in problem.competitors:
            outputs = competitor.build()()
            for actual, r, t in zip(outputs, rounded, truth, strict=True):
                if case.dtype == "float32" or not _in_storage_dtype(competitor.name):
                    assert_within_budget(actual, r, t, competitor.name)


def _in_storage_dtype(name: str) -> bool:
    # Forms that round the rank-wide part to 16 bits may or may not meet the budget on a given
    # input; the gate of a race decides. All others keep float32 and must.
    return name in torch_forms.FORMS


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_truth_of_a_race_is_the_reference(case):
    problem = bench.problem(case, ours=())
    truth, expected = problem.truth(), reference(case, torch.float64)
    for t, e in zip(truth, expected, strict=True):
        assert t.dtype == torch.float64
        assert (t - e).abs().max() <= 1e-12 * max(float(e.abs().max()), 1.0)
    for r, t in zip(problem.rounded(), truth, strict=True):
        assert r.dtype == getattr(torch, case.dtype) and r.shape == t.shape
        assert_within_budget(r, r, t)


@pytest.mark.parametrize("name", torch_forms.FORMS)
def test_forms_notice_swapped_adapters(name):
    given = bench.inputs(SMALL)
    gate = Gate(reference(SMALL, torch.float64), reference(SMALL, torch.float32))
    swapped = given | {"adapter_ids": (given["adapter_ids"] + 1) % SMALL.K}
    for routing, right in ((given, True), (swapped, False)):
        run_form = bench._form(routing, torch_forms.FORMS[name], SMALL, torch.float32)
        worst, fault = gate.check(run_form())
        assert (fault == "") is right
        assert (worst < 1e-3) is right


def test_a_wrong_competitor_is_named_and_not_timed():
    right = torch.linspace(0, 1, 8)

    def entrant(name, outputs):
        return Competitor(name, lambda: lambda: (outputs,))

    problem = Problem(
        [
            entrant("right", right),
            entrant("off", right + 1e-5),
            entrant("nan", right * math.nan),
            entrant("short", right[:4]),
        ],
        truth=lambda: (right.double(),),
        rounded=lambda: (right,),
    )
    results = {r.name: r for r in race(problem, budget=0.01)}
    assert results["right"].status == "timed"
    assert len(results["right"].seconds) >= harness.MIN_ROUNDS
    for name in ("off", "nan", "short"):
        assert results[name].status == "wrong" and not results[name].seconds
    assert "error 1e-05 exceeds" in results["off"].reason
    assert results["short"].reason == "output 0 has shape [4], not [8]"


def test_ours_is_held_to_the_budget_and_peers_to_twice_that():
    right = torch.ones(4)
    gate = Gate((right.double(),), (right,))
    within, beyond = (right + f * gate.budget[0] for f in (1.5, 2.5))
    assert gate.check((within,), ours=True)[1] and not gate.check((within,), ours=False)[1]
    assert gate.check((beyond,), ours=False)[1]


def test_what_does_not_fit_is_skipped_with_the_reason(monkeypatch):
    one = (torch.ones(1),)
    huge = Competitor("huge", lambda: pytest.fail("built"), memory=3 * 2**30)
    slow = Competitor("slow", lambda: lambda: one)
    problem = Problem([huge, slow], truth=lambda: (torch.ones(1).double(),), rounded=lambda: one)
    monkeypatch.setattr(harness, "COMPETITOR_SECONDS", 0.0)
    by_memory, by_time = race(problem, budget=0.01)
    assert (by_memory.status, by_memory.reason) == ("skipped", "needs 3.0 GiB beside the inputs")
    assert by_time.status == "skipped" and "rounds would take" in by_time.reason
    assert "GiB" in bench.oversized(replace(SMALL, K=2**20, I=4096, O=4096))
    assert bench.oversized(SMALL) == ""


def test_competitors_take_turns_and_far_slower_ones_leave(monkeypatch):
    monkeypatch.setattr(harness, "MAX_ROUNDS", 9)
    order, one = [], (torch.ones(1),)
    ticks = {"fast": 1, "near": 1.5, "far": 9.0}
    clock = [0.0]

    def entrant(name):
        def run_once():
            order.append(name)
            clock[0] += ticks[name]
            return one

        return Competitor(name, lambda: run_once)

    monkeypatch.setitem(harness.CLOCKS, "cpu", lambda: clock[0])
    problem = Problem(
        [entrant(name) for name in ticks],
        truth=lambda: (torch.ones(1).double(),),
        rounded=lambda: one,
    )
    monkeypatch.setattr(harness, "COMPETITOR_SECONDS", 100.0)
    fast, near, far = race(problem, budget=60.0, clock="cpu")
    assert [len(r.seconds) for r in (fast, near, far)] == [9, 9, harness.MIN_ROUNDS]
    turns = order[-len(ticks) * harness.MIN_ROUNDS - 2 * 4 : -2 * 4]
    rounds = [tuple(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert all(set(turn) == set(ticks) for turn in rounds) and len(set(rounds)) > 1
    assert [r.quantile(0.5) for r in (fast, near, far)] == [1, 1.5, 9]


def test_the_cpu_clock_is_for_one_thread():
    torch.set_num_threads(2)
    problem = bench.problem(SMALL, ours=())
    with pytest.raises(ValueError, match="clock must be 'wall' at 2 threads"):
        race(problem, clock="cpu")


def test_quantiles_are_linear_between_samples():
    result = Result("any", False, seconds=[3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    assert [result.quantile(q) for q in (0.2, 0.5, 0.8)] == [2.0, 3.5, 5.0]
    assert math.isnan(Result("any", False).quantile(0.5))


def _rows(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _run(path, *more: str) -> int:
    arguments = ["mixture_lora", "--smoke", "--impl", "reference", "--budget", "0.001"]
    return run.main([*arguments, "--csv", str(path), *more])


def test_a_stopped_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "commit", lambda: "first")
    path = tmp_path / "deep" / "rows.csv"
    assert _run(path, "--filter", "N=1") == 0
    first = _rows(path)
    assert {row["N"] for row in first} == {"1"}
    assert _run(path, "--filter", "dtype=float32", "direction=forward") == 0
    assert "3 cases" not in capsys.readouterr().out
    both = _rows(path)
    assert both[: len(first)] == first
    assert {row["N"] for row in both} == {"1", "8"}
    # Another commit measures anew, in place of the old rows, unless told to keep them.
    monkeypatch.setattr(machine, "commit", lambda: "second")
    assert _run(path, "--filter", "N=1", "--resume") == 0
    assert _rows(path) == both
    assert _run(path, "--filter", "N=1") == 0
    assert [row["commit"] for row in _rows(path) if row["N"] == "1"] == ["second"] * len(first)
    assert len(_rows(path)) == len(both)


def test_rows_have_the_fields_and_the_ratio(tmp_path):
    path = tmp_path / "rows.csv"
    assert _run(path, "--filter", "N=1") == 0
    assert path.read_text().splitlines()[0].split(",") == list(table.FIELDS)
    rows = {row["impl"]: row for row in _rows(path)}
    best = min((r for r in rows.values() if r["impl"] != "reference"), key=_median)
    for row in rows.values():
        assert row["baseline"] == best["impl"] and row["threads"] == "1"
        assert row["commit"] and row["machine"] and row["isa"] and row["date"]
        assert float(row["speedup"]) == pytest.approx(_median(best) / _median(row), rel=2e-3)
        assert float(row["ms_p20"]) <= _median(row) <= float(row["ms_p80"])


def _median(row: dict) -> float:
    return float(row["ms_p50"])


def test_no_row_is_written_where_ours_is_wrong(tmp_path, monkeypatch, capsys):
    def zeros(x, lora_b, **_):
        return x.new_zeros(x.shape[0], lora_b.shape[1])

    monkeypatch.setattr(bench, "mixture_lora", zeros)
    path = tmp_path / "rows.csv"
    assert _run(path, "--filter", "N=1") == 1
    assert not path.exists()
    assert "NOT RECORDED" in capsys.readouterr().err


def test_a_skipped_case_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "oversized", lambda case: "too large")
    path = tmp_path / "rows.csv"
    assert _run(path, "--filter", "N=1") == 0
    (row,) = _rows(path)
    assert (row["status"], row["reason"], row["N"]) == ("skipped", "too large", "1")


def test_a_foreign_csv_is_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="--csv must have the fields of this version"):
        _run(path)
    assert path.read_text() == "a,b\n1,2\n"


def test_the_grid_is_the_one_promised():
    grid = bench.GRID
    assert len(grid) == len(set(grid)) == 5 * 3 * 3 * 3 * 3
    assert len(bench.CHOSEN) == 12
    every = bench.SELECTIONS["grid"]
    assert len(set(every)) == len(every) and set(bench.CHOSEN) <= set(every)
    for case, form in bench.CHOSEN.items():
        narrow = bench.problem(replace(case, I=16, O=16), ours=())
        assert form in [c.name for c in narrow.competitors]


def test_native_is_raced_when_it_is_built():
    names = [c.name for c in bench.problem(SMALL).competitors if c.ours]
    assert names == [name for name in bench.OURS if ERRORS[name] is None]
