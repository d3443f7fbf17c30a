"""A process group whose ranks hold different rows, or none: then every method is the identity."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """Sums over the ranks of ``group``; ranks must call the same methods in the same order."""

    def __init__(self, group: object | None):
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def sum(self, t: Tensor) -> Tensor:
        if self.size > 1:
            t = t.contiguous()
            dist.all_reduce(t, dist.ReduceOp.SUM, group=self.group)
        return t

    def largest(self, t: Tensor) -> Tensor:
        if self.size > 1:
            dist.all_reduce(t, dist.ReduceOp.MAX, group=self.group)
        return t

    def same(self, t: Tensor) -> Tensor:
        """The first rank's tensor: eigenvectors of equal matrices may differ between machines."""
        if self.size > 1:
            t = t.contiguous()
            dist.broadcast(t, group=self.group, group_src=0)
        return t

    def gather(self, t: Tensor) -> Tensor:
        """Tensors of one shape from all ranks, stacked in rank order [ranks, ...]."""
        if self.size == 1:
            return t[None]
        parts = [torch.empty_like(t) for _ in range(self.size)]
        dist.all_gather(parts, t.contiguous(), group=self.group)
        return torch.stack(parts)

    def together(self, work: Callable[[], Callable]) -> object:
        """Run work, then what it returns; if it fails on a rank, fail on all instead of hanging."""
        error, finish = None, None
        try:
            finish = work()
        except ValueError as raised:
            error = raised
        failed = self.largest(torch.tensor([float(error is not None)], device=self.device()))
        if error is not None:
            raise error
        if failed.item():
            raise ValueError("stacked_svd: stack must be sound on every rank, got an error on one")
        return finish()

    def device(self) -> torch.device:
        """Where tensors must lie to be exchanged."""
        nccl = self.size > 1 and dist.get_backend(self.group) == "nccl"
        return torch.device("cuda" if nccl else "cpu")
