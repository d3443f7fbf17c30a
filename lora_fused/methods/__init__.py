"""Methods on adapters: each file one paper or family, on stacks and banks, never on files."""

from lora_fused.methods.merging import Merged, MergeReport, ModuleReport, merge

__all__ = ["MergeReport", "Merged", "ModuleReport", "merge"]
