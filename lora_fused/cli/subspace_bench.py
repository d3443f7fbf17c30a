"""What a subspace saves: parameters stored, bytes that a batch reads, and time on this CPU."""

import statistics
import time

import torch
from torch import Tensor

from lora_fused.adapters import AdapterStack
from lora_fused.methods import Subspace
from lora_fused.ops import PairCores, mixture_lora, subspace_lora


def stored(subspace: Subspace) -> dict[str, int]:
    """How many parameters the subspace holds, and the adapters that it stands for."""
    inside = outside = 0
    for module, basis in subspace.bases.items():
        inside += basis.basis_a.numel() + basis.basis_b.numel()
        if module in subspace.cores.stacks:
            stack = subspace.cores.stacks[module]
            held = stack.lora_a.numel() + stack.lora_b.numel()
            inside += stack.lora_a.numel() if subspace.diagonal else held
            width = basis.basis_a.shape[1] + basis.basis_b.shape[1]
            outside += sum(_ranks(subspace, module)) * width
    return {"subspace": inside, "adapters": outside}


def compare(subspace: Subspace, rows: int, per_row: int, repeat: int, seed: int) -> dict:
    """One batch through the widest layer, in the basis and with uncompressed adapters."""
    module = max(subspace.cores.stacks, key=lambda m: _width(subspace, m))
    stack, generator = subspace.cores.stacks[module], torch.Generator().manual_seed(seed)
    live = [k for k, rank in enumerate(stack.ranks) if rank]
    per_row = min(per_row, len(live))
    odds = torch.ones(rows, len(live))
    drawn = torch.multinomial(odds, per_row, generator=generator)
    ids = torch.tensor(live)[drawn].int()
    weights = torch.rand(rows, per_row, generator=generator)
    x = torch.randn(rows, subspace.bases[module].basis_a.shape[1], generator=generator)
    plain = _uncompressed(subspace, module, generator)
    calls = {
        "adapters": lambda: mixture_lora(
            x, plain.lora_a, plain.lora_b, plain.row_start, ids, weights, scale=plain.scale
        ),
        "subspace": _in_basis(subspace, module, x, ids, weights),
    }
    times = {side: [] for side in calls}
    for _ in range(repeat + 2):  # two to warm up
        for side, call in calls.items():
            start = time.perf_counter()
            call()
            times[side].append(1e3 * (time.perf_counter() - start))
    used = ids.unique().tolist()
    size = stack.lora_a.element_size()
    numbers = stored(subspace)
    read = {side: n * size for side, n in _read(subspace, module, plain, used).items()}
    return {
        "module": module,
        "rows": rows,
        "per_row": per_row,
        "adapters": len(live),
        "threads": torch.get_num_threads(),
        "stored_bytes": _with_ratio({side: n * size for side, n in numbers.items()}),
        "read_bytes": _with_ratio(read),
        "milliseconds": _with_ratio({s: statistics.median(t[2:]) for s, t in times.items()}),
    }


def _width(subspace: Subspace, module: str) -> int:
    basis = subspace.bases[module]
    return 0 if basis.embedding else basis.basis_a.shape[1] + basis.basis_b.shape[1]


def _ranks(subspace: Subspace, module: str) -> list[int]:
    """Ranks of the adapters as they were; of a diagonal core its config knows, else P."""
    stack, cores = subspace.cores.stacks[module], subspace.cores
    ranks = list(stack.ranks)
    if subspace.diagonal:
        for name in cores.names:
            known = (cores.metadata[name].get("config") or {}).get("r", stack.in_features)
            ranks[cores.id(name)] *= known
    return ranks


def _uncompressed(subspace: Subspace, module: str, generator) -> AdapterStack:
    """Adapters of these ranks; time does not depend on their values."""
    ranks, basis = _ranks(subspace, module), subspace.bases[module]
    sizes = (basis.basis_a.shape[1], basis.basis_b.shape[1])
    lora_a, lora_b = (torch.randn(sum(ranks), n, generator=generator) for n in sizes)
    return AdapterStack(lora_a, lora_b, subspace.cores.stacks[module].scale, ranks=ranks)


def _in_basis(subspace: Subspace, module: str, x: Tensor, ids: Tensor, weights: Tensor):
    basis, stack = subspace.bases[module], subspace.cores.stacks[module]
    if subspace.diagonal:
        cores, scale = subspace.diagonals(module), None
    else:
        cores, scale = PairCores(stack.lora_a, stack.lora_b, stack.row_start), stack.scale
    sides = (basis.basis_a, basis.basis_b)
    return lambda: subspace_lora(x, *sides, cores, ids, weights, scale=scale)


def _read(subspace: Subspace, module: str, plain: AdapterStack, used: list[int]) -> dict[str, int]:
    """Numbers that a batch needs which uses these adapters."""
    basis, stack = subspace.bases[module], subspace.cores.stacks[module]
    per_rank = stack.in_features + (0 if subspace.diagonal else stack.out_features)
    inside = basis.basis_a.numel() + basis.basis_b.numel()
    inside += sum(stack.ranks[k] for k in used) * per_rank
    width = plain.in_features + plain.out_features
    return {"adapters": sum(plain.ranks[k] for k in used) * width, "subspace": inside}


def _with_ratio(found: dict) -> dict:
    return {**found, "ratio": found["adapters"] / found["subspace"]}
