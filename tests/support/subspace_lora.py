"""Problems for subspace_lora, an oracle that shares no code with reference.py, and gradients."""

import pytest
import torch
from torch import Tensor

from lora_fused import backends, testing
from lora_fused.ops import PairCores, subspace_lora
from lora_fused.ops.subspace_lora.dispatch import HAS_KERNEL
from support.mixture_lora import double, name

IMPLS = ("reference", "native", "triton")
FORMS = ("pairs", "full", "diagonal")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Of x, the bases and the cores.
DTYPES = ((F32, F32, F32), (BF16, BF16, BF16), (F16, F16, F32), (F32, BF16, F16), (BF16, F32, BF16))
LEAVES = ("x", "core_a", "core_b", "weights", "scale", "base")


def require(impl: str) -> None:
    """Skip with the reason that the error of this implementation would give."""
    reason = backends.ERRORS[impl] or (None if HAS_KERNEL[impl] else "no such kernel of this op")
    if reason is not None:
        pytest.skip(f"{impl}: {reason}")


def triple(dtypes) -> str:
    return "-".join(map(name, dtypes))


def problem(
    n: int,
    j: int,
    ranks: tuple,
    p: int,
    q: int,
    i: int,
    o: int,
    *,
    form: str = "pairs",
    dtypes: tuple = DTYPES[0],
    mixtures: int | None = None,
    row_mixture: list | None = None,
    seed: int = 0,
) -> dict:
    """What ``run`` takes: a quarter of the ids -1, a tenth of the weights 0; y is O(1)."""
    g = torch.Generator().manual_seed(seed)
    m, count = (n if mixtures is None else mixtures), len(ranks)
    q = p if form == "diagonal" else q
    stack = testing.make_stack(ranks, p, q, dtype=dtypes[2], seed=seed + 1)
    size = (count, p) if form == "diagonal" else (count, q, p)
    core = torch.randn(size, generator=g) * (1.0 if form == "diagonal" else max(p, 1) ** -0.5)
    none = torch.rand(m, j, generator=g) < 0.25
    drawn = torch.randint(max(count, 1), (m, j), generator=g)
    weights = torch.randn(m, j, generator=g) * max(j, 1) ** -0.5
    weights[torch.rand(m, j, generator=g) < 0.1] = 0.0
    basis_a = torch.randn(p, i, generator=g) * i**-0.5
    basis_b = torch.randn(q, o, generator=g) * max(q, 1) ** -0.5
    return {
        "x": torch.randn(n, i, generator=g).to(dtypes[0]),
        "basis_a": basis_a.to(dtypes[1]),
        "basis_b": basis_b.to(dtypes[1]),
        "core_a": stack.lora_a if form == "pairs" else core.to(dtypes[2]),
        "core_b": stack.lora_b if form == "pairs" else None,
        "row_start": stack.row_start if form == "pairs" else None,
        "adapter_ids": torch.where(none | (count == 0), -1, drawn).int(),
        "weights": weights,
        "scale": stack.scale,
        "row_mixture": None if row_mixture is None else torch.tensor(row_mixture).int(),
        "base": None,
    }


def call(function, p: dict, impl: str, **changes) -> Tensor:
    p = {**p, **changes}
    core_a, core_b, row_start = (p.pop(k) for k in ("core_a", "core_b", "row_start"))
    cores = core_a if core_b is None else PairCores(core_a, core_b, row_start)
    return function(**p, cores=cores, impl=impl)


def run(p: dict, impl: str, **changes) -> Tensor:
    return call(subspace_lora, p, impl, **changes)


def truth(p: dict, **changes) -> Tensor:
    return run(double({**p, **changes}), "reference")


def matrix(p: dict, k: int) -> Tensor:
    """M_k, whatever the form."""
    if p["core_b"] is not None:
        at = slice(int(p["row_start"][k]), int(p["row_start"][k + 1]))
        return p["core_b"][at].T @ p["core_a"][at]
    return p["core_a"][k].diag() if p["core_a"].dim() == 2 else p["core_a"][k]


def dense(p: dict, dtype: torch.dtype) -> Tensor:
    """The formula, one row and one adapter at a time; base is left out."""
    p = {k: t.to(dtype) if t is not None and t.is_floating_point() else t for k, t in p.items()}
    ids, weights, at = p["adapter_ids"], p["weights"], p["row_mixture"]
    y = torch.zeros(p["x"].shape[0], p["basis_b"].shape[1], dtype=dtype)
    groups = ids.shape[0] if at is None else at.shape[0]
    for n in range(y.shape[0]):
        s = n // (y.shape[0] // groups)
        m = s if at is None else int(at[s])
        for k, w in zip(ids[m].tolist(), weights[m], strict=True):
            if k >= 0:
                scale = 1.0 if p["scale"] is None else p["scale"][k]
                y[n] += w * scale * (p["basis_b"].T @ (matrix(p, k) @ (p["basis_a"] @ p["x"][n])))
    return y


def gradients(p: dict, impl: str, wanted: tuple = LEAVES, seed: int = 7) -> dict[str, Tensor]:
    """Gradients of <y, g> for a fixed random g; keys: those of ``wanted`` that p has."""
    leaves = {
        k: p[k].detach().requires_grad_() if k in wanted else p[k].detach()
        for k in LEAVES
        if p[k] is not None
    }
    y = run(p, impl, **leaves)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    y.backward(g.bfloat16().to(y.dtype))  # the same numbers in every dtype
    assert all((leaf.grad is not None) == (k in wanted) for k, leaf in leaves.items())
    return {k: leaves[k].grad for k in wanted if k in leaves}
