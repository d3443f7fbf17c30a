"""Run and mix many LoRA adapters on one frozen model."""

from lora_fused.adapters import BASE, Adapter, AdapterBank, AdapterStack, LoraFactors
from lora_fused.io import (
    load_adapters,
    load_subspace,
    read_adapter,
    save_adapters,
    save_subspace,
    write_adapter,
)
from lora_fused.mixture import Mixture
from lora_fused.new import new_adapter
from lora_fused.nn import attach, handle_of, merge_into_base

__version__ = "0.1.0"
__all__ = [
    "BASE",
    "Adapter",
    "AdapterBank",
    "AdapterStack",
    "LoraFactors",
    "Mixture",
    "attach",
    "handle_of",
    "load_adapters",
    "load_subspace",
    "merge_into_base",
    "new_adapter",
    "read_adapter",
    "save_adapters",
    "save_subspace",
    "write_adapter",
]
