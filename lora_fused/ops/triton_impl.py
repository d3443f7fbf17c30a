"""What the ops' Triton kernels and launchers share: the device's kind, and an exact product."""

import triton
import triton.language as tl

from lora_fused import backends


def capability() -> int:
    """The compute capability of the NVIDIA device; 0 elsewhere."""
    if backends.INTERPRETING:
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0


@triton.jit
def cut_dot(a, b, acc, TERMS: tl.constexpr):
    """acc + a @ b for float32 a and bfloat16 b, which is exact in tensor cores.

    a is cut into TERMS bfloat16 numbers of 8 bits each: three hold all 24 of its bits, in 3 passes
    at twice the rate of the 3 of TF32.
    """
    for _ in tl.static_range(TERMS):
        part = a.to(tl.bfloat16)
        acc = tl.dot(part, b, acc)
        a -= part.to(tl.float32)
    return acc
