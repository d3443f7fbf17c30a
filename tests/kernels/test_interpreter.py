"""The repaired interpreter computes bfloat16 as a GPU does; the stock one does not."""

import math
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from support import interpreter  # noqa: E402

SIZE = 64
OPERATORS = ("add", "sub", "mul", "truediv", "lt", "le", "eq", "ne", "gt", "ge")


@triton.jit
def _binary_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr, OP: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    if OP == "add":
        out = x + y
    elif OP == "sub":
        out = x - y
    elif OP == "mul":
        out = x * y
    elif OP == "truediv":
        out = (x / y).to(tl.bfloat16)
    elif OP == "lt":
        out = x < y
    elif OP == "le":
        out = x <= y
    elif OP == "eq":
        out = x == y
    elif OP == "ne":
        out = x != y
    elif OP == "gt":
        out = x > y
    else:
        out = x >= y
    tl.store(out_ptr + at, out)


@triton.jit
def _cast_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def _round_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at).to(tl.bfloat16, fp_downcast_rounding="rtne")
    tl.store(out_ptr + at, x)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    rows, cols = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    a, b = tl.load(a_ptr + rows * SIZE + cols), tl.load(b_ptr + rows * SIZE + cols)
    tl.store(out_ptr + rows * SIZE + cols, tl.dot(a, b))


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE))
    square = tl.reshape(x, (8, SIZE // 8))
    tl.store(out_ptr + tl.arange(0, 8), tl.sum(square, axis=1))
    tl.store(out_ptr + 8, tl.max(x, axis=0))
    tl.store(out_ptr + 9, tl.min(x, axis=0))
    tl.store(out_ptr + 10, tl.sum(x.to(tl.float32), axis=0))
    tl.store(out_ptr + 11, tl.sum(x, axis=0))


@triton.jit
def _where_kernel(x_ptr, y_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(x_ptr + at), tl.load(y_ptr + at)
    tl.store(out_ptr + at, tl.where(x > 0, -x, tl.abs(y)))


@triton.jit
def _constant_kernel(out_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, SIZE), tl.full((SIZE,), 1.5, tl.bfloat16))


@triton.jit
def _double(x):
    return x + x


@triton.jit
def _nested_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    for _ in range(tl.cdiv(SIZE, 32)):
        x = _double(x)
    tl.store(out_ptr + at, x)


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(SIZE, generator=generator).bfloat16() for _ in range(2))
    y[::4] = x[::4]
    return x, y


def binary(name: str) -> bool:
    x, y = _inputs()
    expected = getattr(operator, name)(x, y)
    out = torch.empty_like(expected)
    _binary_kernel[(1,)](x, y, out, SIZE, name)
    return torch.equal(out, expected)


def cast(source: torch.dtype, target: torch.dtype) -> bool:
    x = (torch.arange(SIZE) * 37.25 - 900).to(source)
    out = torch.empty(SIZE, dtype=target)
    _cast_kernel[(1,)](x, out, SIZE)
    return torch.equal(out, x.to(target))


def rounding(kernel) -> bool:
    """Ties go to the even neighbour, both ways; NaN, infinities and overflow stay what they are."""
    special = [math.inf, -math.inf, 3.4e38, -3.4e38, 1e-40, 0.0, -0.0]
    ties = 1 + torch.arange(SIZE - len(special)) / 512
    x = torch.cat([ties, torch.tensor(special)])
    out = torch.empty(SIZE, dtype=torch.bfloat16)
    kernel[(1,)](x, out, SIZE)
    right = torch.equal(out, x.bfloat16())
    x.view(torch.int32).fill_(0x7FFFFFFF)  # a NaN whose payload would carry into the sign
    kernel[(1,)](x, out, SIZE)
    return right and bool(out.isnan().all())


def dot() -> bool:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(16, 16, generator=generator).bfloat16() for _ in range(2))
    out = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, out, 16)
    return torch.allclose(out.double(), a.double() @ b.double(), rtol=0, atol=1e-5)


def reduction() -> bool:
    x = _inputs()[0]
    out = torch.empty(12)
    _reduce_kernel[(1,)](x, out, SIZE)
    x = x.float()
    total = x.sum()
    parts = x.view(8, -1).sum(dim=1).bfloat16().float()
    expected = [*parts, x.max(), x.min(), total, total.bfloat16().float()]
    return torch.allclose(out, torch.stack(expected), rtol=1e-6, atol=1e-6)


def where() -> bool:
    x, y = _inputs()
    out = torch.empty_like(x)
    _where_kernel[(1,)](x, y, out, SIZE)
    return torch.equal(out, torch.where(x > 0, -x, y.abs()))


def constant() -> bool:
    out = torch.empty(SIZE, dtype=torch.bfloat16)
    _constant_kernel[(1,)](out, SIZE)
    return bool((out == 1.5).all())


def nested() -> bool:
    x = _inputs()[0]
    out = torch.empty_like(x)
    _nested_kernel[(1,)](x, out, SIZE)
    return torch.equal(out, 4 * x)


CHECKS = {
    **{name: (binary, name) for name in OPERATORS},
    "bfloat16 to float32": (cast, torch.bfloat16, torch.float32),
    "float32 to bfloat16": (cast, torch.float32, torch.bfloat16),
    "bfloat16 to float16": (cast, torch.bfloat16, torch.float16),
    "float16 to bfloat16": (cast, torch.float16, torch.bfloat16),
    "int32 to bfloat16": (cast, torch.int32, torch.bfloat16),
    "bfloat16 to int32": (cast, torch.bfloat16, torch.int32),
    "rounding": (rounding, _cast_kernel),
    "named rounding": (rounding, _round_kernel),
    "dot": (dot,),
    "reduction": (reduction,),
    "where": (where,),
    "constant": (constant,),
    "nested": (nested,),
}
# What the stock interpreter of every supported Triton gets wrong.
FAULTS = {"add", "sub", "mul", "truediv", "lt", "le", "gt", "ge", "rounding", "named rounding"}
FAULTS |= {"int32 to bfloat16", "float16 to bfloat16", "dot", "reduction", "where", "nested"}


@pytest.mark.parametrize("name", CHECKS)
def test_bfloat16_is_right(name):
    check, *args = CHECKS[name]
    assert check(*args)


def test_the_stock_interpreter_is_wrong():
    """Negative control: the same checks, in a process that does not install the repair."""
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, Path(__file__)]
    stock = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert set(stock.splitlines()) >= FAULTS


def test_install_twice_changes_nothing():
    builder = interpreter.InterpreterBuilder
    interpreter.install()
    before = dict(vars(builder))
    interpreter.install()
    assert dict(vars(builder)) == before


def test_the_language_is_restored_after_a_launch_that_fails():
    before = tl.load
    with pytest.raises(triton.runtime.errors.InterpreterError):
        _cast_kernel[(1,)](torch.empty(3), "no pointer", 4)
    assert tl.load is before
    assert nested()


def _wrong() -> list[str]:
    wrong = []
    for name, (check, *args) in CHECKS.items():
        try:
            right = check(*args)
        except Exception:  # whatever the stock interpreter raises
            right = False
        if not right:
            wrong.append(name)
    return wrong


if __name__ == "__main__":
    print("\n".join(_wrong()))
