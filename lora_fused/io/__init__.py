"""Adapter files: the only part of the package that reads and writes weights."""

from lora_fused.io.find import find_adapters
from lora_fused.io.load import load_adapters
from lora_fused.io.peft import read_adapter, write_adapter
from lora_fused.io.save import save_adapters

__all__ = ["find_adapters", "load_adapters", "read_adapter", "save_adapters", "write_adapter"]
