"""Batched LoRA in one shared basis: every row its own weighted set of small cores."""
