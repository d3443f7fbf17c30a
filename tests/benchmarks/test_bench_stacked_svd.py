"""The race of stacked_svd judges results by their error, its rows say at which setting, and the
example runs under torchrun."""

import csv
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_stacked_svd as bench
from benchmarks import machine, memory, run, table
from benchmarks.harness import CLOCKS
from benchmarks.peers import svd

CASE = replace(bench.LARGE, N=200, I=120, R=8)
BATCH = replace(CASE, K=3)
OPTIONS = Namespace(clock="wall", quick=True, memory=False, rounds=1, impl=None)


@pytest.fixture(autouse=True)
def one_quick_thread(monkeypatch):
    monkeypatch.setattr(machine, "PROBE_SECONDS", 0.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def exact_factors(case) -> tuple[torch.Tensor, svd.Factors]:
    x = bench.matrix(case)
    return x, svd.linalg_svd(x.double(), case.R)


@pytest.mark.parametrize("case", [CASE, BATCH, replace(CASE, workload="flat")], ids=str)
def test_the_best_has_no_excess_and_worse_ones_have_theirs(case):
    x, (u, s, vh) = exact_factors(case)
    problem = bench.Problem(x, case.R)
    best = problem.judge((u, s, vh))
    assert abs(best.excess) < 1e-12 and abs(best.held - 1) < 1e-12 and best.weakest > 1 - 1e-12
    # Singular values 1 % off, of the last member alone: ||M - M'||^2 = rest + (0.01)^2 top.
    off = s.clone()
    off[-1] *= 0.99 if case.K > 1 else 1.0
    off = off if case.K > 1 else s * 0.99
    expected = (1 + 1e-4 * problem.top[-1].sum() / problem.rest[-1]).sqrt() - 1
    assert problem.judge((u, off, vh)).excess == pytest.approx(float(expected), rel=1e-6)
    assert float(expected) > 1e-6


def test_captured_energy_sees_what_the_error_hides():
    """On a flat spectrum the wrong directions have a small excess."""
    case = replace(CASE, workload="flat", N=900, I=600)
    x, _ = exact_factors(case)
    v = torch.linalg.qr(torch.randn(600, 8, generator=torch.Generator().manual_seed(1))).Q
    y = x @ v
    left, s, turn = torch.linalg.svd(y, full_matrices=False)
    verdict = bench.Problem(x, 8).judge((left, s, turn @ v.mT))
    assert verdict.excess < 0.02 and verdict.held < 0.5 and verdict.weakest < 0.5


def test_matrices_have_their_spectrum():
    s = torch.linalg.svdvals(bench.matrix(CASE))
    assert torch.allclose(s, torch.arange(1, 121) ** -1.0, rtol=1e-3)
    batch = bench.matrix(BATCH)
    assert batch.shape == (3, 200, 120) and not torch.equal(batch[0], batch[1])
    assert bench.matrix(replace(CASE, dtype="bfloat16")).dtype == torch.bfloat16


@pytest.mark.parametrize("case", [CASE, BATCH, replace(CASE, N=90)], ids=str)
def test_every_contender_settles_on_what_is_good_enough(case):
    problem = bench.Problem(bench.matrix(case), case.R)
    for contender in svd.contenders(case.K > 1, "float32", (10,)):
        result, setting = bench.settle(contender, problem, CLOCKS["wall"])
        if contender.missing:
            assert setting is None and contender.missing in result.reason
            continue
        assert result.status == "timed" and result.max_error <= bench.LIMIT, contender.name
        assert problem.judge(contender.solve(problem.x, case.R, **setting)).excess <= bench.LIMIT
        for name, value in setting.items():
            assert f"{name}={value}" in result.reason


def test_too_cheap_settings_are_not_taken():
    """Negative control of the search: the first step of the ladder is not good enough."""
    problem = bench.Problem(bench.matrix(replace(CASE, workload="flat")), CASE.R)
    steps = tuple({"oversampling": 4, "niter": i} for i in (0, 1, 2, 4, 8, 16))
    few = svd.Contender("few", svd.svd_lowrank, (steps[:1],))
    enough = svd.Contender("enough", svd.svd_lowrank, (steps,))
    result, setting = bench.settle(few, problem, CLOCKS["wall"])
    assert result.status == "missed" and setting is None and "at best" in result.reason
    result, setting = bench.settle(enough, problem, CLOCKS["wall"])
    assert result.status == "timed" and setting["niter"] > 0
    wrong = replace(few, name="auto", ours=True)
    assert bench.settle(wrong, problem, CLOCKS["wall"])[0].status == "wrong"


def test_bf16_is_refused_by_torch_and_taken_by_us():
    raced = bench.race(replace(CASE, dtype="bfloat16"), bench.matrix(CASE).bfloat16(), OPTIONS)
    results = {r.name: r for r in raced}
    for name in ("svd_lowrank", "linalg_svd", "gram_eigh"):
        assert results[name].status == "skipped" and "refused: " in results[name].reason
        assert results[f"{name}_f32copy"].status == "timed"
    assert all(results[name].status == "timed" for name in svd.METHODS)


def test_an_error_of_ours_is_not_a_refusal():
    def fails(*_, **__):
        raise RuntimeError("broken")

    problem = bench.Problem(bench.matrix(CASE), CASE.R)
    ours = svd.Contender("auto", fails, ours=True)
    with pytest.raises(RuntimeError, match="broken"):
        bench.settle(ours, problem, CLOCKS["wall"])


@pytest.mark.skipif(bool(memory.missing()), reason=memory.missing())
def test_the_meter_sees_what_is_allocated():
    size = 64 << 20
    assert memory.extra(lambda: None) < size / 16
    kept = memory.extra(lambda: torch.ones(size // 4))
    assert size * 0.9 < kept < size * 1.1
    freed = memory.extra(lambda: float(torch.ones(size // 4).sum()))
    assert size * 0.9 < freed < size * 1.1, "a peak, also of what is gone at the end"


@pytest.mark.skipif(bool(memory.missing()), reason=memory.missing())
def test_memory_is_measured_in_a_process_of_its_own():
    case = replace(CASE, N=6000, I=2000)
    setting = {"oversampling": 10, "niter": 1}
    copied = bench.peak(replace(case, dtype="bfloat16"), "svd_lowrank_f32copy", setting)
    assert copied > 0.9 * 4 * case.N * case.I
    assert bench.peak(case, "randomized", {"power_iterations": 1}) < case.N * case.I


def test_a_quick_run_leaves_rows(tmp_path, capsys):
    path = tmp_path / "rows.csv"
    asked = ["stacked_svd", "--quick", "--only", "flat", "chunks", "energy", "--csv", str(path)]
    assert run.main(asked) == 0
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        assert tuple(reader.fieldnames) == table.FIELDS
    assert {r["direction"] for r in rows} == {"rank", "chunks", "energy"}
    for row in rows:
        assert row["op"] == "stacked_svd" and row["commit"] and row["threads"] == "1"
        if row["status"] == "timed" and row["direction"] == "rank":
            assert float(row["max_error"]) <= bench.LIMIT and "held" in row["reason"]
            assert float(row["ms_p50"]) > 0
    (auto,) = (r for r in rows if r["direction"] == "energy" and r["impl"] == "auto")
    assert float(auto["max_error"]) <= bench.RANKS_OFF
    assert "* auto" in capsys.readouterr().out


def test_nothing_is_recorded_where_ours_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ROUNDING", 0.0)
    path = tmp_path / "rows.csv"
    assert bench.main(["--quick", "--only", "chunks", "--csv", str(path)]) == 1
    assert not path.exists() and "NOT RECORDED" in capsys.readouterr().err


def test_absent_real_data_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "DATA", tmp_path)
    assert bench.main(["--quick", "--only", "nothing"]) == 0
    assert "real adapters: skipped" in capsys.readouterr().out


@pytest.mark.skipif(not (bench.DATA / "adapters").is_dir(), reason="no public adapters here")
def test_real_stacks_are_those_of_one_base():
    a, b = (bench.real_stack("distilbert", side) for side in "ab")
    assert a.shape[1] == b.shape[1] == 768 and a.dtype == torch.float32
    s_a, s_b = (torch.linalg.svdvals(m).square().cumsum(0) for m in (a, b))
    rank_a, rank_b = (int((s < 0.9 * s[-1]).sum()) for s in (s_a, s_b))
    assert rank_b < rank_a, "B compresses, A does not"


def test_the_example_runs_under_torchrun():
    script = machine.ROOT / "examples" / "stacked_svd_torchrun.py"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(script), "--rank", "8"],
        cwd=machine.ROOT,
        env={**os.environ, "PYTHONPATH": str(machine.ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert "rank 1 of 2 held 2000 rows and found u [2000, 8]" in said and said[-1] == "equal"
