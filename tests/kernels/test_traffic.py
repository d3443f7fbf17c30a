"""The counts of kernels small enough to count by hand."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from benchmarks.traffic import Bytes, count, report  # noqa: E402


@triton.jit
def _copy_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < N), mask=at < N)


@triton.jit
def _matmul_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    cols = tl.program_id(1) * BN + tl.arange(0, BN)[None, :]
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BK):
        inner = start + tl.arange(0, BK)
        a = tl.load(a_ptr + rows * K + inner[None, :], mask=rows < M, other=0.0)
        b = tl.load(b_ptr + inner[:, None] * N + cols, mask=cols < N, other=0.0)
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + rows * N + cols, acc, mask=(rows < M) & (cols < N))


@triton.jit
def _broadcast_kernel(x_ptr, y_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    i, j = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    tl.store(y_ptr + i * COLS + j, tl.load(x_ptr + i + 0 * j))


@triton.jit
def _strided_kernel(x_ptr, y_ptr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at * STRIDE))


@triton.jit
def _shift_kernel(x_ptr, SHIFT, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + at, tl.load(x_ptr + at + SHIFT))


@triton.jit
def _scatter_add_kernel(x_ptr, sums_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(sums_ptr + at % 4, tl.load(x_ptr + at, mask=at < N, other=0.0), mask=at < N)


@triton.jit
def _through_address_kernel(addresses_ptr, y_ptr, BLOCK: tl.constexpr):
    x_ptr = tl.load(addresses_ptr).to(tl.pointer_type(tl.float32))
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


def test_copy():
    x, y = torch.randn(1000), torch.empty(1000)
    with count() as counter:
        _copy_kernel[(8,)](x, y, 1000, BLOCK=128)
    (launch,) = counter.launches
    assert torch.equal(x, y)
    assert (launch.kernel, launch.grid) == ("_copy_kernel", (8, 1, 1))
    assert (launch.launches, launch.programs, launch.storing_programs) == (1, 8, 8)
    assert (launch.loads, launch.stores, launch.atomics) == (8, 8, 0)
    assert launch.read == launch.written == Bytes(4000, 4000, 4000, 4000, 4000)
    assert (launch.lanes, launch.masked_lanes) == (2 * 1024, 2 * 24)
    assert launch.largest_program == 2 * 128 * 4
    assert (launch.dram_bytes, launch.l2_bytes) == (8000, 8000)
    assert (launch.out_of_bounds, launch.races) == (0, 0)
    assert launch.arguments["x_ptr"]["read"].launch == 4000
    assert launch.arguments["y_ptr"]["written"].launch == 4000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matmul_reads_each_operand_once_per_block_of_the_other(dtype):
    m, n, k, size = 32, 48, 64, torch.finfo(dtype).bits // 8
    a, b, c = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype), torch.empty(m, n)
    with count() as counter:
        _matmul_kernel[(2, 3)](a, b, c, m, n, k, 16, 16, 32)
    (launch,) = counter.launches
    assert torch.allclose(c, a.float() @ b.float(), atol=1e-4)
    assert launch.read.program == (m * k * 3 + k * n * 2) * size
    assert launch.read.launch == (m * k + k * n) * size
    assert launch.written == Bytes(*[m * n * 4] * 5)
    assert (launch.dots, launch.dot_flops) == (2 * 6, 2 * m * n * k)
    assert launch.arguments["a_ptr"]["read"].program == 3 * m * k * size
    assert launch.races == 0


def test_several_launches_add_up():
    x, y = torch.randn(64), torch.empty(64)
    with count() as counter:
        _copy_kernel[(1,)](x, y, 64, BLOCK=64)
        torch.add(x, y).zero_()
        x.view(8, 8)
        _copy_kernel[(2,)](x, y, 64, BLOCK=32)
    total = counter.total
    assert (total.launches, total.programs, total.largest_program) == (2, 3, 512)
    assert total.read == Bytes(*[2 * 256] * 5)
    assert counter.torch_ops == {"aten.add": 1, "aten.zero_": 1}  # a view is no kernel
    assert len(report.launches(counter).splitlines()) == 1 + 2 + 1
    assert "x_ptr" in report.arguments(counter)


def test_an_element_asked_for_twice_by_one_load_counts_once():
    x, y = torch.randn(16), torch.empty(16, 8)
    with count() as counter:
        _broadcast_kernel[(1,)](x, y, 16, 8)
    assert counter.total.read == Bytes(lane=16 * 8 * 4, op=64, sector=64, program=64, launch=64)


def test_a_stride_wastes_sectors():
    x, y = torch.randn(16 * 8), torch.empty(16)
    with count() as counter:
        _strided_kernel[(1,)](x, y, 8, 16)
    assert counter.total.read == Bytes(lane=64, op=64, sector=16 * 32, program=64, launch=64)


def test_atomics():
    x, sums = torch.ones(50), torch.zeros(4)
    with count() as counter:
        _scatter_add_kernel[(4,)](x, sums, 50, BLOCK=16)
    total = counter.total
    assert sums.sum() == 50
    assert (total.atomics, total.races) == (4, 0)
    assert total.atomic == Bytes(lane=200, op=56, sector=128, program=56, launch=16)
    assert total.dram_bytes == 200 + 2 * 16


def test_programs_that_store_the_same_elements_race():
    x, y = torch.randn(16), torch.empty(16, 8)
    with count() as counter:
        _broadcast_kernel[(3,)](x, y, 16, 8)
    assert (counter.total.write_races, counter.total.read_write_races) == (2 * 16 * 8, 0)
    assert counter.total.read.program == 3 * counter.total.read.launch


@pytest.mark.parametrize(("shift", "races"), [(0, 0), (16, 16), (-16, 16)])
def test_a_program_that_reads_what_another_stores_races(shift, races):
    x = torch.randn(64)
    with count() as counter:
        _shift_kernel[(2,)](x[16:], shift, BLOCK=16)
    assert (counter.total.write_races, counter.total.read_write_races) == (0, races)


def test_lanes_out_of_bounds_are_counted_and_not_performed():
    memory = torch.zeros(64)
    x, y = torch.arange(24.0), memory[:32].clone()
    with count() as counter:
        _copy_kernel[(1,)](x, y, 40, BLOCK=64)
    total = counter.total
    assert total.out_of_bounds == (40 - 24) + (40 - 32)
    assert (total.read.launch, total.written.launch) == (24 * 4, 32 * 4)
    assert torch.equal(y[:24], x) and not y[24:].any()
    assert counter.launches[0].arguments["?"]["read"].lane == 16 * 4


def test_tensors_behind_addresses_must_be_named():
    x, y = torch.randn(16), torch.empty(16)
    addresses = torch.tensor([x.data_ptr()])
    with count({"x": x}) as counter:
        _through_address_kernel[(1,)](addresses, y, 16)
    assert torch.equal(x, y) and counter.total.out_of_bounds == 0
    assert counter.launches[0].arguments["x"]["read"].launch == 64
    with count() as counter:
        _through_address_kernel[(1,)](addresses, y, 16)
    assert counter.total.out_of_bounds == 16


def test_nothing_is_counted_outside_the_block():
    x, y = torch.randn(64), torch.empty(64)
    with count() as counter:
        pass
    _copy_kernel[(1,)](x, y, 64, BLOCK=64)
    assert counter.launches == [] and not counter.torch_ops and torch.equal(x, y)
