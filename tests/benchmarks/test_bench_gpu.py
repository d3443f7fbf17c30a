"""The GPU bench with no GPU: its skip line, and every step on the CPU with a clock that is made up.

Nothing here says anything about time; what runs is the code that a GPU would run, interpreted.
"""

import csv
import importlib.util
import json
import types

import pytest
import torch
from support import ROOT

from benchmarks import bench_gpu
from benchmarks.bench_gpu import main
from benchmarks.harness import Result
from lora_fused import backends
from lora_fused.testing import assert_within_budget, error

CPU = torch.device("cpu")


def fake_clock(call) -> list[float]:
    call()
    return [1e-3, 2e-3, 3e-3]


def no_graph(call) -> list[float]:
    raise RuntimeError("operation not permitted when stream is capturing\nmore of it")


TIMERS = {"do_bench": fake_clock, "cudagraph": fake_clock}


@pytest.fixture
def field(monkeypatch):
    """The contenders on one tiny work."""
    if backends.ERRORS["triton"] is not None:
        pytest.skip(backends.ERRORS["triton"])
    from benchmarks.gpu import contenders

    work = contenders.Work("tiny", N=12, M=6, J=2, K=4, I=64, O=96, R=16)
    monkeypatch.setattr(contenders, "WORKS", [work])
    # Theirs take seconds in the interpreter; one test lets them in.
    monkeypatch.setattr(contenders, "peers", lambda download: ({}, ["a peer: not to be had"]))
    return contenders


def bench(
    tmp_path, timers=TIMERS, elsewhere=lambda name, options: {}, extra=()
) -> tuple[int, list]:
    path = tmp_path / "gpu.csv"
    options = bench_gpu._parse(["--offline", "--csv", str(path), *extra])
    code = bench_gpu.bench(options, CPU, timers, elsewhere)
    if not path.exists():
        return code, []
    with path.open(newline="") as file:
        return code, list(csv.DictReader(file))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_why(monkeypatch, capsys):
    monkeypatch.setitem(backends.ERRORS, "triton", "no CUDA device; and what to do")
    assert main([]) == 0
    assert capsys.readouterr().out == "bench-gpu: skipped, no CUDA device; and what to do\n"
    monkeypatch.setitem(backends.ERRORS, "triton", None)  # as where the interpreter is on
    assert main([]) == 0
    assert capsys.readouterr().out == "bench-gpu: skipped, no CUDA device\n"


def test_every_work_has_a_row_of_its_own():
    pytest.importorskip("triton")
    from benchmarks.gpu import contenders

    cases = [bench_gpu.case_of(work) for work in contenders.WORKS]
    assert len(set(cases)) == len(cases) == 7
    assert {work.I for work in contenders.WORKS} == {1024, 4096}


def test_a_dry_run_writes_a_row_for_each_contender_and_clock(field, tmp_path, capsys):
    code, rows = bench(tmp_path)
    assert code == 0
    ours = {"triton", "triton_plan_inside"}
    floors = {"gemms_one_adapter", "gemms_one_mixture", "copy"}
    found = {(row["impl"], row["clock"]) for row in rows}
    assert found >= {(name, clock) for name in ours | floors for clock in TIMERS}
    for row in rows:
        assert (row["workload"], row["N"], row["J"], row["R"]) == ("tiny", "12", "2", "16")
        assert row["device"] == "cpu, interpreted"
        assert (row["ms_p20"], row["ms_p50"], row["ms_p80"]) == ("1", "2", "3")
        assert row["floor_ms"] == "2" and row["status"] == "timed"
        assert row["rounds"] == str(3 * bench_gpu.ROUNDS)
        assert (row["impl"] in floors) == (row["max_error"] == "")
    by_name = {row["impl"]: row for row in rows if row["clock"] == "do_bench"}
    assert by_name["copy"]["baseline"] == by_name["gemms_one_adapter"]["speedup"] == ""
    printed = capsys.readouterr().out
    assert "skipped a peer: not to be had\n" in printed and "* triton_plan_inside" in printed
    assert printed.count("floor: copy") == 2 and "do_bench: the copy moves" in printed


def test_the_contenders_and_floors_compute_what_they_say(field):
    (work,) = field.WORKS
    problem = field.moved(field.works.Problem(work), CPU)
    bare = field.moved(problem, CPU, with_base=False)
    assert not bare.base.any() and problem.base.any()
    for build in field.ours().values():
        assert_within_budget(build(bare)(), field.rounded(bare), bare.truth())
    one, mixture, copy = field.floors(bare)
    for floor, adapters in ((one, 1), (mixture, work.J)):
        a, b = (t[: adapters * work.R].double() for t in (bare.lora_a, bare.lora_b))
        exact = bare.x.double() @ a.T @ b
        assert error(floor.run(), exact) < 0.02 * exact.abs().max()
        assert floor.flops == 2 * 12 * adapters * 16 * (64 + 96)
    # x, the base, y and one adapter's two sides, two bytes each
    assert one.traffic == 2 * (12 * (64 + 96 + 96) + 16 * (64 + 96))
    assert copy.run().numel() * 2 == copy.traffic == field.compulsory(bare)


def test_an_adapter_used_alone_needs_one_product(field):
    work = field.Work("alone", N=4, M=4, J=1, K=2, I=64, O=96, R=16)
    names = [floor.name for floor in field.floors(field.works.Problem(work))]
    assert names == ["gemms_one_adapter", "copy"]


def test_what_is_wrong_is_not_recorded_and_what_fails_is_skipped(field, tmp_path, monkeypatch):
    def build_wrong(problem):
        return lambda: field.ours()["triton"](problem)() * 1.1

    def build_failing(problem):
        raise RuntimeError("no kernel image is available\nfor execution")

    peers = {"wrong_peer": build_wrong, "failing_peer": build_failing}
    monkeypatch.setattr(field, "peers", lambda download: (peers, []))
    code, rows = bench(tmp_path, {"do_bench": fake_clock, "cudagraph": no_graph})
    status = {(row["impl"], row["clock"]): row for row in rows}
    assert code == 0
    assert status["wrong_peer", "do_bench"]["status"] == "wrong"
    assert "exceeds" in status["wrong_peer", "do_bench"]["reason"]
    failing = status["failing_peer", "do_bench"]
    assert failing["status"] == "skipped" and failing["ms_p50"] == ""
    assert failing["reason"] == "RuntimeError: no kernel image is available"
    captured = status["triton", "cudagraph"]
    assert captured["status"] == "skipped" and "capturing" in captured["reason"]
    assert status["triton", "do_bench"]["status"] == "timed"


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_ours_wrong_records_nothing(fault, field, tmp_path, monkeypatch, capsys):
    def build(problem):
        if fault == "raises":
            raise RuntimeError("no such kernel")
        return lambda: problem.base * 2 + 1

    monkeypatch.setattr(field, "ours", lambda: {"triton": build})
    assert bench(tmp_path) == (1, [])
    assert "NOT RECORDED" in capsys.readouterr().err


def test_variants_come_from_processes_of_their_own(field, tmp_path):
    path = tmp_path / "results.json"
    options = bench_gpu._parse(["--results", str(path)])
    assert bench_gpu.bench(options, CPU, TIMERS) == 0
    (raced,) = json.loads(path.read_text()).values()
    assert set(raced) == set(TIMERS) and [r["name"] for r in raced["do_bench"]] == ["triton"]
    read = bench_gpu.read_results(path, "triton_pdl")
    assert isinstance(read["tiny"]["cudagraph"][0], Result)
    code, rows = bench(tmp_path, elsewhere=lambda name, options: bench_gpu.read_results(path, name))
    assert code == 0
    for name in ("triton_batch_invariant", "triton_pdl"):
        assert [row["clock"] for row in rows if row["impl"] == name] == list(TIMERS)


def test_a_failing_process_costs_its_row_alone(monkeypatch, capsys):
    monkeypatch.setattr(bench_gpu.sys, "executable", "false")
    options = bench_gpu._parse(["--work", "decode"])
    assert bench_gpu._in_fresh_process("triton_pdl", options) == {}
    assert "skipped triton_pdl: its process ended with 1" in capsys.readouterr().out


def test_the_variables_are_those_that_the_package_reads():
    text = (ROOT / "lora_fused" / "backends.py").read_text()
    assert all(f'"{variable}"' in text for variable in bench_gpu.VARIANTS.values())


def test_an_unknown_work_is_refused(field, tmp_path):
    with pytest.raises(SystemExit, match="--work must be one of tiny, got 'decod'"):
        bench(tmp_path, extra=("--work", "decod"))


def test_vllm_and_sglang_take_part_where_they_are_unpacked(field, tmp_path, monkeypatch):
    peers, reasons = field.works.peers(download=False)
    if not peers:
        pytest.skip("; ".join(reasons))
    monkeypatch.setattr(field, "peers", lambda download: (peers, reasons))
    _, rows = bench(tmp_path, {"do_bench": lambda call: [1e-3]})  # the gate runs them once
    timed = {row["impl"] for row in rows if row["status"] == "timed"}
    assert timed >= {"triton", *peers}
    assert {row["baseline"] for row in rows if row["impl"] == "triton"} <= set(peers)


def stand_in_for_flashinfer(sides: list) -> types.SimpleNamespace:
    """Its four functions as documented, in torch; a table's address is an index into ``sides``."""

    def fill_w_ptr(table, weights, experts, part):
        sides.append(weights[0])
        table[part, :experts] = len(sides) - 1
        return weights.stride(0)

    def shrink(h, x, table, row, expert, lora, stride):
        h[0] += torch.einsum("pi,pri->pr", x[row], sides[int(table[0, 0])][expert]).to(h.dtype)

    def expand(y, h, table, row, expert, weights, lora, starts, widths, stride):
        update = torch.einsum("pr,por->po", h[0], sides[int(table[0, 0])][expert]).float()
        y.index_add_(0, row, update * weights[:, None])

    return types.SimpleNamespace(
        has_bgmv_moe=lambda: True,
        fill_w_ptr=fill_w_ptr,
        bgmv_moe_shrink=shrink,
        bgmv_moe_expand=expand,
    )


def test_flashinfer_is_asked_for_the_whole_mixture_in_one_call(monkeypatch):
    pytest.importorskip("triton")
    from benchmarks.gpu import contenders as field

    assert field._why_no_flashinfer() is not None or importlib.util.find_spec("flashinfer")
    kernels = stand_in_for_flashinfer([])
    monkeypatch.setattr(field.importlib.util, "find_spec", lambda name: kernels)
    monkeypatch.setattr(field.importlib, "import_module", lambda name: kernels)
    found, reasons = field.peers(download=False)
    assert not [reason for reason in reasons if reason.startswith("flashinfer")]
    work = field.Work("tiny", N=12, M=6, J=2, K=4, I=64, O=96, R=16)
    problem = field.works.Problem(work)
    truth = problem.truth()
    actual = found["flashinfer"](problem)()
    assert actual.dtype == torch.bfloat16
    assert error(actual, truth) <= 2 * 2**-8 * truth.abs().max()
    kernels.has_bgmv_moe = lambda: False
    assert field.peers(download=False)[1][-1].startswith("flashinfer: its bgmv_moe extension")
