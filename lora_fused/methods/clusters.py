"""Groups of similar adapters, each with a subspace of its own.

Compress-then-Serve (arXiv:2407.00066) gives more than some 100 adapters several bases. **We
compute** k-means on the updates at unit norm. **We differ**: distances come from the K x K matrix
of their inner products, so that no update is ever formed.
"""

import torch
from torch import Tensor

from lora_fused.adapters import Adapter, AdapterBank
from lora_fused.checks import invalid
from lora_fused.methods.subspace import Subspace

_BLOCK_ROWS = 2048
_TURNS, _STARTS = 100, 8


@torch.no_grad()
def similarity(bank: AdapterBank) -> Tensor:
    """Cosines of the adapters' updates over all modules, ``[K, K]`` float64, in ``names`` order.

    <D_j, D_k> / (||D_j|| ||D_k||); 0 where either is zero. Costs T^2 (I + O) per module.
    """
    ids = torch.tensor([bank.id(name) for name in bank.names])
    total = torch.zeros(bank.count, bank.count, dtype=torch.float64, device=bank.device)
    for stack in bank.stacks.values():
        lora_a, lora_b = (t.detach().float() for t in stack.factors())
        ranks = torch.tensor(stack.ranks, device=lora_a.device)
        owner = torch.arange(len(ranks), device=lora_a.device).repeat_interleave(ranks)
        lora_b = lora_b * stack.scale[owner, None]
        for first in range(0, len(lora_a), _BLOCK_ROWS):
            at = slice(first, first + _BLOCK_ROWS)
            found = (lora_a[at] @ lora_a.mT) * (lora_b[at] @ lora_b.mT)
            columns = found.new_zeros(len(found), bank.count).index_add_(1, owner, found)
            total.index_add_(0, owner[at], columns.double())
    total = total[ids][:, ids]
    size = total.diagonal().clamp_min(0).sqrt()
    unit = torch.where(size > 0, 1 / size.clamp_min(1e-300), 0.0)
    return total * unit * unit[:, None]


def cluster(bank: AdapterBank, count: int, *, seed: int = 0) -> list[list[str]]:
    """k-means of the adapters at unit norm: ``count`` lists of names, none empty."""
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= len(bank):
        rule = f"be an integer from 1 to {len(bank)}, the adapters"
        raise invalid("fit_subspace", "clusters", rule, repr(count))
    cosines = similarity(bank).cpu()
    generator = torch.Generator().manual_seed(seed)
    found = [_settled(cosines, _seeds(cosines, count, generator), count) for _ in range(_STARTS)]
    labels = min(found, key=lambda labels: float(_distances(cosines, labels, count)[1].sum()))
    names = bank.names
    return [[names[k] for k in (labels == c).nonzero().flatten().tolist()] for c in range(count)]


def _seeds(cosines: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Labels [K] with one adapter in each cluster, drawn far apart (k-means++); -1: none yet."""
    labels = torch.full((len(cosines),), -1)
    odds = torch.full((len(cosines),), 2.0, dtype=torch.float64)
    for c in range(count):
        drawn = int(torch.multinomial(odds, 1, generator=generator))
        labels[drawn] = c
        odds = torch.minimum(odds, (2 - 2 * cosines[drawn]).clamp_min(1e-12))
        odds[labels >= 0] = 0
    return labels


def _settled(cosines: Tensor, labels: Tensor, count: int) -> Tensor:
    """The labels that k-means ends with from these."""
    for _ in range(_TURNS):
        before, labels = labels, _nearest(cosines, labels, count)
        if labels.equal(before):
            break
    return labels


def _distances(cosines: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Squared distances to all centres [K, C] but for the adapter's own norm, and to its own."""
    member = torch.nn.functional.one_hot(labels.clamp_min(0), count).double()
    member *= (labels >= 0).double()[:, None]
    member /= member.sum(0)
    cross = cosines @ member
    found = (member * cross).sum(0) - 2 * cross
    return found, found.gather(1, labels.clamp_min(0)[:, None])[:, 0]


def _nearest(cosines: Tensor, labels: Tensor, count: int) -> Tensor:
    """Each adapter to the nearest centre of the labelled ones; no cluster is left empty."""
    distance, _ = _distances(cosines, labels, count)
    found = distance.argmin(1)
    for c in range(count):
        if not (found == c).any():  # the one that lies worst in a cluster of several
            several = torch.bincount(found, minlength=count)[found] > 1
            own = distance.gather(1, found[:, None])[:, 0]
            found[torch.where(several, own, -torch.inf).argmax()] = c
    return found


class SubspaceClusters:
    """One Subspace for each group of adapters; what asks for a name finds its group.

    Attributes:
        parts: the subspaces.
    """

    def __init__(self, parts: list[Subspace]):
        self.parts = tuple(parts)

    @property
    def names(self) -> list[str]:
        return [name for part in self.parts for name in part.names]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __contains__(self, name: str) -> bool:
        return any(name in part for part in self.parts)

    def __repr__(self) -> str:
        sizes = ", ".join(str(len(part)) for part in self.parts)
        return f"SubspaceClusters({len(self.parts)} parts of {sizes} adapters)"

    def part_of(self, name: str) -> Subspace:
        for part in self.parts:
            if name in part:
                return part
        raise invalid("SubspaceClusters", "name", "be an adapter of a part", repr(name))

    def reconstruct(self, name: str, *, rank: int | None = None) -> Adapter:
        """See Subspace.reconstruct."""
        return self.part_of(name).reconstruct(name, rank=rank)

    def nearest(self, adapter: Adapter) -> Subspace:
        """The part that reconstructs an adapter best: to ``project`` or ``add`` it there."""
        return min(self.parts, key=lambda part: part.distance(adapter))

    def errors(self, bank: AdapterBank):
        """Of all parts together; see Subspace.errors."""
        found = [part.errors(bank, part.names) for part in self.parts]
        names = tuple(name for errors in found for name in errors.names)
        gaps, norms = (torch.cat([getattr(e, f) for e in found]) for f in ("gaps", "norms"))
        return type(found[0])(names, bank.modules, gaps, norms)
