"""Fused operations on tensors. See README.md beside this file for the table."""

from lora_fused.ops.mixture_lora.api import mixture_lora, mixture_lora_group
from lora_fused.ops.stacked_svd.api import StackedSvd, stacked_svd
from lora_fused.ops.stacked_svd.factored import FactoredStack
from lora_fused.ops.subspace_lora.api import subspace_lora
from lora_fused.ops.subspace_lora.cores import PairCores

__all__ = [
    "FactoredStack",
    "PairCores",
    "StackedSvd",
    "mixture_lora",
    "mixture_lora_group",
    "stacked_svd",
    "subspace_lora",
]
