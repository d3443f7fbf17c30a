"""Methods on adapters: each file one paper or family, on stacks and banks, never on files."""

from lora_fused.methods.clusters import SubspaceClusters
from lora_fused.methods.eigenlorax import fit_subspace, leave_one_out
from lora_fused.methods.merging import Merged, MergeReport, ModuleReport, merge
from lora_fused.methods.subspace import FitOptions, Subspace
from lora_fused.methods.subspace_errors import SubspaceErrors
from lora_fused.methods.subspace_report import (
    GaugeCheck,
    MeanCheck,
    Scree,
    SubspaceReport,
    subspace_report,
)
from lora_fused.methods.subspace_verdict import Verdict

__all__ = [
    "FitOptions",
    "GaugeCheck",
    "MeanCheck",
    "MergeReport",
    "Merged",
    "ModuleReport",
    "Scree",
    "Subspace",
    "SubspaceClusters",
    "SubspaceErrors",
    "SubspaceReport",
    "Verdict",
    "fit_subspace",
    "leave_one_out",
    "merge",
    "subspace_report",
]
