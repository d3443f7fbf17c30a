"""Adapters whose A's descend from one random initialisation: what they share is the seed."""

from collections import Counter

import torch
from torch import Tensor

from lora_fused.adapters import Adapter


def shared_initialisations(adapters: list[Adapter]) -> list[dict]:
    """Groups of adapters whose A's descend from one random initialisation.

    Two independent random A's of n values in all have a cosine of about 1 / sqrt(n). Adapters are
    linked from 10 times that on, and from 0.1 on at the least; a group is what links connect. Only
    equally shaped, equally ordered A's can be recognised.
    """
    cosines, chance = _cosines(adapters)
    linked = cosines.abs() >= (10 * chance).clamp(min=0.1)
    groups = _connected(linked)
    found = []
    for label, size in Counter(groups).items():
        members = [i for i, g in enumerate(groups) if g == label]
        if size > 1:
            inside = cosines[members][:, members].abs()
            pairs = inside[torch.ones_like(inside).triu(1) > 0]
            pairs = pairs[pairs > 0]
            names = [adapters[i].name for i in members]
            found.append({"adapters": names, "median_cosine": float(pairs.median())})
    return found


def _connected(linked: Tensor) -> list[int]:
    """Of each, the first one that links lead to."""
    own = torch.arange(len(linked))
    linked = linked | torch.eye(len(linked)).bool()
    while len(own) and not own.equal(found := torch.where(linked, own, len(own)).amin(1)):
        own = found
    return own.tolist()


def _cosines(adapters: list[Adapter]) -> tuple[Tensor, Tensor]:
    """Cosines of the A's over the modules that two adapters share, and what chance gives."""
    count = len(adapters)
    dot, values = torch.zeros(count, count).double(), torch.zeros(count, count).double()
    left = torch.zeros(count, count).double()  # squared norm of i over what it shares with j
    for module in dict.fromkeys(m for adapter in adapters for m in adapter.modules):
        shapes: dict[tuple, list[int]] = {}
        for i, adapter in enumerate(adapters):
            if module in adapter.modules and not adapter.modules[module].embedding:
                shapes.setdefault(tuple(adapter.modules[module].lora_a.shape), []).append(i)
        for members in shapes.values():
            rows = [adapters[i].modules[module].lora_a.float().flatten() for i in members]
            at = torch.tensor(members)
            stacked = torch.stack(rows)
            gram = (stacked @ stacked.mT).double()
            dot[at[:, None], at] += gram
            left[at[:, None], at] += gram.diagonal()[:, None]
            values[at[:, None], at] += stacked.shape[1]
    norm = (left * left.mT).sqrt()
    cosines = torch.where(norm > 0, dot / norm.clamp(min=torch.finfo(torch.double).tiny), 0.0)
    return cosines, values.clamp(min=1).rsqrt()
