"""Adapter files: the only part of the package that reads and writes weights."""

from lora_fused.io.checkpoint import Checkpoint
from lora_fused.io.find import find_adapters
from lora_fused.io.load import load_adapters
from lora_fused.io.peft import read_adapter, write_adapter
from lora_fused.io.pool import load_pool, save_pool
from lora_fused.io.save import save_adapters
from lora_fused.io.subspace import load_subspace, save_subspace

__all__ = [
    "Checkpoint",
    "find_adapters",
    "load_adapters",
    "load_pool",
    "load_subspace",
    "read_adapter",
    "save_adapters",
    "save_pool",
    "save_subspace",
    "write_adapter",
]
