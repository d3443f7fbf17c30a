"""Batched LoRA in which every row has its own weighted set of adapters."""
