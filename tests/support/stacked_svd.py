"""Matrices of known spectrum for stacked_svd, and what a result is worth, all in float64."""

import torch
from torch import Tensor

from lora_fused import backends
from lora_fused.ops import FactoredStack, StackedSvd
from lora_fused.ops.stacked_svd import registration

IMPLS = ("reference", "native", "triton")
METHODS = ("randomized", "krylov", "gram", "exact")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def missing(impl: str) -> str | None:
    """Why an implementation cannot run on CPU tensors here; None where it can."""
    if backends.ERRORS[impl] is not None:
        return f"{impl}: {backends.ERRORS[impl]}"
    if not registration.has_kernel(impl, torch.device("cpu")):
        return f"{impl}: this build has no such kernel"
    return None


def spectrum(kind: str, count: int) -> Tensor:
    j = torch.arange(1, count + 1, dtype=torch.float64)
    return {
        "inverse": 1 / j,
        "slow": j**-0.5,
        "steep": torch.exp(-j / 4),
        "flat": torch.ones_like(j),
        "gap": torch.where(j <= 10, 1 / j, 1e-3 / j),
    }[kind]


def matrix(kind: str, rows: int, columns: int, *, seed: int = 0, count: int | None = None):
    """A float64 matrix of this spectrum, cut after ``count`` singular values."""
    g = torch.Generator().manual_seed(seed)
    side = min(rows, columns)
    s = spectrum(kind, side)
    if count is not None:
        s[count:] = 0
    left, right = (
        torch.linalg.qr(torch.randn(n, side, generator=g, dtype=torch.float64)).Q
        for n in (rows, columns)
    )
    return (left * s) @ right.mT


def product(found: StackedSvd) -> Tensor:
    u, s, vh = (t.double() for t in found[:3])
    return (u * s[..., None, :]) @ vh


def true_error(m: Tensor, found: StackedSvd) -> Tensor:
    return torch.linalg.matrix_norm(m.double() - product(found))


def excess(m: Tensor, found: StackedSvd) -> float:
    """Error relative to the best of the same rank, less one; for a batch the worst."""
    s = torch.linalg.svdvals(m.double())[..., found.s.shape[-1] :]
    return float((true_error(m, found) / s.square().sum(-1).sqrt() - 1).max())


def assert_is_svd(found: StackedSvd, tolerance: float = 2e-5) -> None:
    """Orthonormal, descending, signs fixed. The tolerance is of a float32 SVD's own size."""
    assert torch.all(found.s.diff() <= 0) and torch.all(found.s >= 0)
    for rows in (found.u.mT.double(), found.vh.double()):
        eye = torch.eye(rows.shape[-2], dtype=torch.float64)
        assert float((rows @ rows.mT - eye).abs().max()) < tolerance
    largest = found.vh.abs().argmax(-1, keepdim=True)
    assert torch.all(found.vh.gather(-1, largest) > 0)


def stack_of(form: str, ranks: tuple = (4, 1, 3, 4, 8, 0, 2), dtype=torch.float32, seed: int = 0):
    """A FactoredStack with one adapter of zeros, and the same matrix formed, in float64."""
    g = torch.Generator().manual_seed(seed)
    rows, i, o = sum(ranks), 40, 56
    a = torch.randn(rows, i, generator=g).to(dtype)
    b = torch.randn(rows, o, generator=g).to(dtype)
    start = torch.tensor([0, *ranks]).cumsum(0).int()
    b[start[2] : start[3]] = 0
    scale = torch.rand(len(ranks), generator=g) + 0.5
    spans = zip(start.tolist()[:-1], start.tolist()[1:], strict=True)
    updates = torch.stack(
        [scale[k].double() * b[s:e].mT.double() @ a[s:e].double() for k, (s, e) in enumerate(spans)]
    )
    return FactoredStack(a, b, start, scale, form), multiplied(updates, form)


def multiplied(updates: Tensor, form: str) -> Tensor:
    """Updates [K, O, I] below one another, side by side, or summed."""
    if form == "rows":
        return updates.flatten(0, 1)
    return updates.transpose(0, 1).flatten(1) if form == "columns" else updates.sum(0)


class Again:
    """Chunks that are made anew at each iteration, and that count the iterations."""

    def __init__(self, chunks):
        self.chunks, self.passes = chunks, 0

    def __iter__(self):
        self.passes += 1
        for chunk in self.chunks:
            yield chunk.clone()
