"""Fused operations on tensors. See README.md beside this file for the table."""

from lora_fused.ops.mixture_lora.api import mixture_lora, mixture_lora_group
from lora_fused.ops.stacked_svd.api import StackedSvd, stacked_svd
from lora_fused.ops.stacked_svd.factored import FactoredStack

__all__ = ["FactoredStack", "StackedSvd", "mixture_lora", "mixture_lora_group", "stacked_svd"]
