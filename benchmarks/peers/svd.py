"""The leading singular vectors of [T, I] or a batch [L, T, I], as people find them, and ours.

A contender has knobs of its own, tried from cheap to dear (``ladders``), so that each can be timed
at the cheapest setting that is good enough. What takes no batch loops over it, as its users would.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_fused.ops import stacked_svd

Factors = tuple[Tensor, Tensor, Tensor]
ITERATIONS = (0, 1, 2, 3, 4, 5, 6, 8, 12)
METHODS = ("auto", "krylov", "randomized", "gram", "exact")


@dataclass(frozen=True)
class Contender:
    """One way to find u [T, R], s [R] and vh [R, I].

    Attributes:
        solve: ``solve(x, rank, **setting)``.
        ladders: settings, each ladder from cheap to dear.
        prepare: what is done to x beforehand, untimed.
        missing: why it cannot run here; "" where it can.
    """

    name: str
    solve: Callable[..., Factors]
    ladders: tuple[tuple[dict, ...], ...] = (({},),)
    ours: bool = False
    prepare: Callable[[Tensor], Tensor] = lambda x: x
    missing: str = ""


def svd_lowrank(x: Tensor, rank: int, oversampling: int, niter: int) -> Factors:
    torch.manual_seed(0)  # it takes no generator
    u, s, v = torch.svd_lowrank(x, q=rank + oversampling, niter=niter)
    return u[..., :rank], s[..., :rank], v[..., :rank].mT


def randomized_svd(x: Tensor, rank: int, n_oversamples: int, n_iter: int) -> Factors:
    from sklearn.utils.extmath import randomized_svd as of_sklearn

    options = {"n_oversamples": n_oversamples, "n_iter": n_iter, "random_state": 0}
    return tuple(torch.from_numpy(t) for t in of_sklearn(x.numpy(), rank, **options))


def linalg_svd(x: Tensor, rank: int) -> Factors:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u[..., :rank], s[..., :rank], vh[..., :rank, :]


def gram_eigh(x: Tensor, rank: int) -> Factors:
    """Eigenvectors of the smaller side's Gram matrix, then one product with them."""
    if x.shape[-2] < x.shape[-1]:
        v, s, uh = gram_eigh(x.mT, rank)
        return uh.mT, s, v.mT
    v = torch.linalg.eigh(x.mT @ x).eigenvectors[..., -rank:].flip(-1)
    y = x @ v
    s = torch.linalg.vector_norm(y, dim=-2)
    return y / s[..., None, :], s, v.mT


def each(solve: Callable[..., Factors]) -> Callable[..., Factors]:
    """A loop over the members of a batch."""

    def loop(x: Tensor, rank: int, **setting) -> Factors:
        parts = [solve(member, rank, **setting) for member in x]
        return tuple(torch.stack(t) for t in zip(*parts, strict=True))

    return loop


def in_float32(solve: Callable[..., Factors]) -> Callable[..., Factors]:
    """What takes no half precision is given a float32 copy, made each time."""
    return lambda x, rank, **setting: solve(x.float(), rank, **setting)


def ours(method: str) -> Callable[..., Factors]:
    def solve(x: Tensor, rank: int, **setting) -> Factors:
        return stacked_svd(x, rank=rank, method=method, **setting)[:3]

    return solve


def contenders(batched: bool, dtype: str, oversampling: tuple[int, ...]) -> list[Contender]:
    """Everyone who takes part in a case; ``oversampling``: the values that may be chosen from."""

    def ladders(columns: str, steps: str) -> tuple[tuple[dict, ...], ...]:
        return tuple(tuple({columns: o, steps: i} for i in ITERATIONS) for o in oversampling)

    named = {
        "svd_lowrank": (svd_lowrank, ladders("oversampling", "niter")),
        "linalg_svd": (linalg_svd, (({},),)),
        "sklearn_randomized": (randomized_svd, ladders("n_oversamples", "n_iter")),
        "gram_eigh": (gram_eigh, (({},),)),
    }
    absent = {} if _has("sklearn") else {"sklearn_randomized": "scikit-learn is not installed"}
    found = []
    for name, (solve, steps) in named.items():
        looped = each(solve) if batched else solve
        found.append(Contender(name, looped, steps, missing=absent.get(name, "")))
        if batched and name in ("svd_lowrank", "gram_eigh"):
            found.append(Contender(f"{name}_batched", solve, steps))
        if dtype != "float32":
            copied = in_float32(looped)
            found.append(Contender(f"{name}_f32copy", copied, steps, missing=absent.get(name, "")))
    steps = ladders("oversampling", "power_iterations")
    for method in METHODS:
        # exact has no knob that decides its error.
        mine = (({},),) if method == "exact" else steps
        found.append(Contender(method, ours(method), mine, ours=True))
    if dtype != "float32":  # what reading half the bytes costs or saves
        held = Contender("auto_on_float32", ours("auto"), steps, ours=True, prepare=Tensor.float)
        found.append(held)
    return found


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
