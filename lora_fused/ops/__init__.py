"""Fused operations on tensors. See README.md beside this file for the table."""

from lora_fused.ops.mixture_lora.api import mixture_lora, mixture_lora_group

__all__ = ["mixture_lora", "mixture_lora_group"]
