"""What backward makes of the routing: a factor for each pair, and the gradients of its parts."""

import functools

import torch
from torch import Tensor

from lora_fused.ops.mixture_lora import plan as plans
from lora_fused.ops.mixture_lora.triton_impl.launch import Call


class Routing:
    """The routing of a call with one projection; a pair is n * J + j."""

    def __init__(self, call: Call):
        self.call, ids = call, call.adapter_ids
        self.ids_sj, self.weights_sj, self.mixture_s = ids, call.weights, call.row_mixture
        if self.mixture_s is not None:  # a mixture out of range counts as none, as in forward
            there = (self.mixture_s >= 0) & (self.mixture_s < call.mixtures)
            at = torch.where(there, self.mixture_s, 0)
            self.ids_sj = torch.where(there[:, None], ids[at], -1)
            self.weights_sj = call.weights[at]
        in_range = (self.ids_sj >= 0) & (self.ids_sj < call.count)
        known = torch.where(in_range, self.ids_sj, 0).long()
        scale = call.scale[0][known] if call.scale and call.count else 1.0
        self.scale_sj = torch.where(in_range, scale, 0.0)
        self.of_rows = (call.groups, call.rows // max(call.groups, 1), call.per_row)

    @functools.cached_property
    def runs(self) -> tuple[Tensor, Tensor]:
        """Pairs in ascending order of their adapter, and where each adapter's begin."""
        return plans.adapter_runs(self.ids_sj, self.call.rows, self.call.count)

    @functools.cached_property
    def factor(self) -> Tensor:
        """weight * scale of each pair, zero without an adapter."""
        factor_sj = self.weights_sj * self.scale_sj
        # Kernels index it by pair: of one group with one adapter, reshape makes a view of stride 0.
        return factor_sj[:, None].expand(self.of_rows).reshape(-1).contiguous()

    def weight_gradient(self, dot: Tensor) -> Tensor:
        """Of each pair's product with the incoming gradient, float64 [N * J]: [M, J]."""
        grad_sj = dot.reshape(self.of_rows).sum(1) * self.scale_sj
        if self.mixture_s is not None:  # in a fixed order, which index_add has not
            indices = torch.arange(self.call.mixtures, device=dot.device)
            one_hot = indices[:, None] == self.mixture_s
            grad_sj = one_hot.double() @ grad_sj
        return grad_sj.float()

    def scale_gradient(self, dot: Tensor) -> Tensor:
        """Of the same products: [K]."""
        weighted = dot.reshape(self.of_rows) * self.weights_sj[:, None]
        return self.call.sum_runs(weighted.reshape(-1), self.runs)
