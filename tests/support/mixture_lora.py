"""Problems for mixture_lora, an oracle that shares no code with reference.py, and gradients."""

import pytest
import torch
from torch import Tensor

from lora_fused import backends, testing
from lora_fused.ops import mixture_lora

IMPLS = ("reference", "native", "triton")
FORMS = ("packed", "plain", "vllm")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAVES = ("x", "lora_a", "lora_b", "weights", "scale", "base")


def require(impl: str) -> None:
    """Skip with the reason that the error of this implementation would give."""
    if backends.ERRORS[impl] is not None:
        pytest.skip(f"{impl}: {backends.ERRORS[impl]}")


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def problem(
    n: int,
    j: int,
    ranks: tuple,
    i: int,
    o: int,
    *,
    x_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype = torch.float32,
    form: str = "packed",
    mixtures: int | None = None,
    row_mixture: list | None = None,
    seed: int = 0,
) -> dict:
    """Keyword arguments of mixture_lora: a quarter of the ids -1, a tenth of the weights 0."""
    g = torch.Generator().manual_seed(seed)
    m = n if mixtures is None else mixtures
    stack = testing.make_stack(ranks, i, o, dtype=dtype, seed=seed + 1)
    stack = stack if form == "packed" else testing.slotted(stack, layout=form)
    none = torch.rand(m, j, generator=g) < 0.25
    drawn = torch.randint(max(len(ranks), 1), (m, j), generator=g)
    ids = torch.where(none | (not ranks), -1, drawn).int()
    weights = torch.randn(m, j, generator=g) * max(j, 1) ** -0.5
    weights[torch.rand(m, j, generator=g) < 0.1] = 0.0
    return {
        "x": torch.randn(n, i, generator=g).to(x_dtype),
        "lora_a": stack.lora_a,
        "lora_b": stack.lora_b,
        "row_start": stack.row_start,
        "ranks": stack.slot_ranks,
        "adapter_ids": ids,
        "weights": weights,
        "scale": stack.scale,
        "row_mixture": None if row_mixture is None else torch.tensor(row_mixture).int(),
        "base": None,
    }


def run(p: dict, impl: str, **changes) -> Tensor:
    return mixture_lora(**{**p, **changes}, impl=impl)


def double(p: dict) -> dict:
    """The same numbers in float64: the reference on these is the truth."""
    floating = {k for k, t in p.items() if isinstance(t, Tensor) and t.is_floating_point()}
    return {k: t.double() if k in floating else t for k, t in p.items()}


def truth(p: dict, **changes) -> Tensor:
    return run(double({**p, **changes}), "reference")


def factors(p: dict, k: int) -> tuple[Tensor, Tensor]:
    """Both factors of adapter k, read off the storage form without any gathering."""
    if p["row_start"] is not None:
        at = slice(int(p["row_start"][k]), int(p["row_start"][k + 1]))
        return p["lora_a"][at], p["lora_b"][at]
    rank = p["lora_a"].shape[1] if p["ranks"] is None else int(p["ranks"][k])
    return p["lora_a"][k, :rank], p["lora_b"][k, :rank]


def dense(p: dict, dtype: torch.dtype) -> Tensor:
    """The formula, one row and one adapter at a time; base is left out."""
    x, ids, weights, at = p["x"].to(dtype), p["adapter_ids"], p["weights"], p["row_mixture"]
    y = torch.zeros(x.shape[0], p["lora_b"].shape[-1], dtype=dtype)
    groups = ids.shape[0] if at is None else at.shape[0]
    for n in range(x.shape[0]):
        s = n // (x.shape[0] // groups)
        m = s if at is None else int(at[s])
        for k, w in zip(ids[m].tolist(), weights[m].to(dtype), strict=True):
            if k >= 0:
                a, b = (t.to(dtype) for t in factors(p, k))
                scale = 1.0 if p["scale"] is None else p["scale"][k].to(dtype)
                y[n] += w * scale * (b.T @ (a @ x[n]))
    return y


def gradients(p: dict, impl: str, wanted: tuple = LEAVES, seed: int = 7) -> dict[str, Tensor]:
    """Gradients of <y, g> for a fixed random g; keys: those of ``wanted`` that p has."""
    leaves = {
        k: p[k].detach().requires_grad_() if k in wanted else p[k].detach()
        for k in LEAVES
        if p[k] is not None
    }
    y = mixture_lora(**{**p, **leaves}, impl=impl)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    y.backward(g.bfloat16().to(y.dtype))  # the same numbers in every dtype
    assert all((leaf.grad is not None) == (k in wanted) for k, leaf in leaves.items())
    return {k: leaves[k].grad for k in wanted if k in leaves}
