"""Run, mix, retrieve, compress and recycle many LoRA adapters on one frozen model."""

from lora_fused.adapters import BASE, Adapter, AdapterBank, AdapterStack, LoraFactors
from lora_fused.mixture import Mixture

__version__ = "0.1.0"
__all__ = ["BASE", "Adapter", "AdapterBank", "AdapterStack", "LoraFactors", "Mixture"]
