"""Repairs of Triton's interpreter, which computes bfloat16 wrongly and without an error.

The interpreter holds bfloat16 values as uint16 bit patterns. Unrepaired, ``tl.dot``, arithmetic and
comparisons work on the patterns, float32 is truncated instead of rounded to nearest even, integers
and float16 are taken for patterns, and a bfloat16 constant raises (seen in Triton 3.6 to 3.9).
Repaired, each computes in float32 and rounds its result once. float8 stays as it was.

Beside that, a jit function called by a kernel no longer patches ``triton.language`` anew on each
call (1 to 2 ms), only once per launch.

TRITON_INTERPRET=1 must be set before Triton is imported; install() belongs right after.
"""

import inspect
from collections.abc import Callable

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)


def install() -> None:
    """Repair the interpreter of this process. A second call changes nothing."""
    if hasattr(InterpreterBuilder, "lora_fused_repaired"):
        return
    InterpreterBuilder.lora_fused_repaired = True
    for name, repair in _REPAIRS.items():
        setattr(InterpreterBuilder, name, repair(getattr(InterpreterBuilder, name)))
    if not hasattr(InterpreterBuilder, "get_bf16"):  # Triton 3.7 has no bfloat16 constants
        InterpreterBuilder.get_bf16 = lambda self, value: _rounded(np.array([value], np.float32))
    interpreter.ReduceOps.sum = _sum(interpreter.ReduceOps.sum)
    interpreter._patch_lang = _once_per_launch(interpreter._patch_lang)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns (uint16) as the float32 values that they stand for."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 values as bfloat16 bit patterns (uint16), rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    high = bits >> np.uint32(16)
    rounded = (bits + np.uint32(0x7FFF) + (high & np.uint32(1))) >> np.uint32(16)
    # A carry out of a NaN's payload would turn it into an infinity or a number.
    return np.where(np.isnan(values), high | np.uint32(0x40), rounded).astype(np.uint16)


def _is_bfloat16(*handles: TensorHandle) -> bool:
    return any(h.dtype.scalar == tl.bfloat16 and h.data.dtype == np.uint16 for h in handles)


def _values(handle: TensorHandle) -> np.ndarray:
    if not _is_bfloat16(handle):
        return handle.data
    return widen(handle.data).reshape(handle.data.shape)


def _rounded(values: np.ndarray) -> TensorHandle:
    bits = round_to_bfloat16(np.asarray(values, dtype=np.float32))
    return TensorHandle(bits.reshape(np.shape(values)), tl.bfloat16)


def _dot(stock: Callable) -> Callable:
    def create_dot(self, a, b, acc, *rest):
        if not _is_bfloat16(a, b, acc):
            return stock(self, a, b, acc, *rest)
        sums = np.matmul(_values(a), _values(b), dtype=np.float32) + _values(acc)
        if _is_bfloat16(acc):
            return _rounded(sums)
        return TensorHandle(sums.astype(acc.data.dtype), acc.dtype.scalar)

    return create_dot


def _unary(stock: Callable) -> Callable:
    def unary_op(self, arg, op):
        return _rounded(op(_values(arg))) if _is_bfloat16(arg) else stock(self, arg, op)

    return unary_op


def _binary(stock: Callable) -> Callable:
    def binary_op(self, lhs, rhs, op):
        if op in _BITWISE or not _is_bfloat16(lhs, rhs):
            return stock(self, lhs, rhs, op)
        result = op(_values(lhs), _values(rhs))
        if result.dtype == np.bool_:  # a comparison; the caller makes it int1
            return TensorHandle(result, lhs.dtype.scalar)
        return _rounded(result)

    return binary_op


def _ternary(stock: Callable) -> Callable:
    def ternary_op(self, first, second, third, op):
        if op is np.where or not _is_bfloat16(first, second, third):  # where moves patterns whole
            return stock(self, first, second, third, op)
        return _rounded(op(_values(first), _values(second), _values(third)))

    return ternary_op


def _fma(stock: Callable) -> Callable:
    def create_fma(self, x, y, z):
        if not _is_bfloat16(x, y, z):
            return stock(self, x, y, z)
        return _rounded(_values(x) * _values(y) + _values(z))

    return create_fma


def _cast(stock: Callable) -> Callable:
    def cast_impl(self, source, target):
        if source.dtype.scalar == target.scalar or _is_float8(source.dtype, target):
            return stock(self, source, target)
        if target.scalar == tl.bfloat16:
            return _rounded(source.data.astype(np.float32))
        if _is_bfloat16(source):
            return TensorHandle(
                _values(source).astype(interpreter._get_np_dtype(target)), target.scalar
            )
        return stock(self, source, target)

    return cast_impl


def _float_to_float(stock: Callable) -> Callable:
    def create_fp_to_fp(self, source, target, rounding):
        types = (source.dtype.scalar, target.scalar)
        to_zero = rounding == interpreter._ir.ROUNDING_MODE.RTZ
        if to_zero or tl.bfloat16 not in types or _is_float8(*types):
            return stock(self, source, target, rounding)
        return self.cast_impl(source, target)

    return create_fp_to_fp


def _sum(stock: Callable) -> Callable:
    def sum_(self, x):
        if not _is_bfloat16(x.handle):
            return stock(self, x)
        shape = list(x.handle.data.shape)
        wide = TensorHandle(_values(x.handle), tl.float32)
        total = stock(self, tl.core.tensor(wide, tl.block_type(tl.float32, shape)))
        block = total.type.is_block()
        kind = tl.block_type(tl.bfloat16, list(total.type.shape)) if block else tl.bfloat16
        return tl.core.tensor(_rounded(total.handle.data), kind)

    return sum_


def _is_float8(*types: tl.dtype) -> bool:
    return any(t.scalar.is_floating() and t.scalar.primitive_bitwidth == 8 for t in types)


_REPAIRS = {
    "create_dot": _dot,
    "unary_op": _unary,
    "binary_op": _binary,
    "ternary_op": _ternary,
    "create_fma": _fma,
    "cast_impl": _cast,
    "create_fp_to_fp": _float_to_float,
}


def _once_per_launch(stock: Callable) -> Callable:
    """Patch triton.language for a launch and for what it calls, each module only once.

    The interpreter undoes the patches of the kernel itself when the launch ends and ignores those
    of the functions that it calls; here the end of the launch also forgets what was patched.
    """
    patched: set[str] = set()

    def patch_lang(fn):
        if not patched:
            scope = stock(fn)
            restore = scope.restore

            def restore_and_forget():
                patched.clear()
                restore()

            scope.restore = restore_and_forget
        elif _languages(fn) <= patched:
            return None
        else:
            scope = stock(fn)
        patched.update(_languages(fn))
        return scope

    return patch_lang


def _languages(fn: Callable) -> frozenset[str]:
    """The names of triton.language and its core, as far as the function's module holds them."""
    if fn not in _LANGUAGES:
        held = [m for m in fn.__globals__.values() if inspect.ismodule(m)]
        _LANGUAGES[fn] = frozenset(m.__name__ for m in held if m in (tl, tl.core))
    return _LANGUAGES[fn]


_LANGUAGES: dict[Callable, frozenset[str]] = {}
