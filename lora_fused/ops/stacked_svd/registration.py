"""Schemas, shape functions and dispatch of stacked_svd's compiled implementations.

One operator is one pass over rows in memory: with a basis it projects, without one it sketches with
signs that it makes itself. Another adds up a Gram matrix. The op has no gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_fused.ops.stacked_svd import gram_matrix, reference

PASS = (
    "(Tensor x, Tensor? weights, Tensor? mean, Tensor? basis, Tensor scale, "
    "int seed, int width, bool want_y, bool want_z) -> (Tensor, Tensor)"
)
torch.library.define("lora_fused::stacked_svd_fwd_native", PASS)
torch.library.define("lora_fused::stacked_svd_fwd_triton", PASS)
torch.library.define(
    "lora_fused::stacked_svd_gram_native",
    "(Tensor(a!) g, Tensor x, Tensor? weights, Tensor? mean, Tensor scale, bool mirror) -> ()",
)


@torch.library.register_fake("lora_fused::stacked_svd_fwd_native")
@torch.library.register_fake("lora_fused::stacked_svd_fwd_triton")
def _fwd_fake(x, weights, mean, basis, scale, seed, width, want_y, want_z) -> tuple[Tensor, Tensor]:
    layers, rows, columns = x.shape
    width = width if basis is None else basis.shape[-1]
    y = x.new_empty((layers, rows, width) if want_y else (0,), dtype=torch.float32)
    z = x.new_empty((layers, width, columns) if want_z else (0,), dtype=torch.float32)
    return y, z


@torch.library.register_fake("lora_fused::stacked_svd_gram_native")
def _gram_fake(g, x, weights, mean, scale, mirror) -> None:
    return None


def has_kernel(impl: str, device: torch.device) -> bool:
    """Whether ``impl`` has an operator for tensors on this device."""
    if impl == "reference":
        return True
    key = {"cuda": "CUDA"}.get(device.type, "CPU")
    operator = getattr(torch.ops.lora_fused, f"stacked_svd_fwd_{impl}")
    return torch._C._dispatch_has_kernel_for_dispatch_key(operator.default.name(), key)


def forward(impl: str, *args) -> tuple[Tensor, Tensor]:
    """Run one pass; arguments as reference.forward."""
    if impl == "native":
        return torch.ops.lora_fused.stacked_svd_fwd_native(*args)
    if impl == "triton":
        return torch.ops.lora_fused.stacked_svd_fwd_triton(*args)
    return reference.forward(*args)


def gram(impl: str, *args) -> None:
    """Add to a Gram matrix; arguments as gram_matrix.add_gram, which is also what triton runs."""
    if impl == "native":
        torch.ops.lora_fused.stacked_svd_gram_native(*args)
    else:
        gram_matrix.add_gram(*args)


class Pass(NamedTuple):
    """An implementation: what multiplies the rows of a source."""

    impl: str

    def __call__(self, *args) -> tuple[Tensor, Tensor]:
        return forward(self.impl, *args)

    def gram(self, *args) -> None:
        gram(self.impl, *args)


# The launcher is imported on first use. On the CPU it runs in Triton's interpreter, for tests.
@torch.library.impl("lora_fused::stacked_svd_fwd_triton", ("cpu", "cuda"))
def _fwd_triton(*args):
    from lora_fused.ops.stacked_svd import triton_impl

    return triton_impl.forward(*args)
