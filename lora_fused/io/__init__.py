"""Adapter files: the only part of the package that reads and writes weights."""

from lora_fused.io.peft import load_adapters, read_adapter

__all__ = ["load_adapters", "read_adapter"]
