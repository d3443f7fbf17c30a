"""Methods on adapters: each file one paper or family, on stacks and banks, never on files."""

from lora_fused.methods import recycle, rpe
from lora_fused.methods.arrow import ArrowRouter, subtract_general
from lora_fused.methods.clusters import SubspaceClusters
from lora_fused.methods.composition import LearnedComposition, uniform
from lora_fused.methods.eigenlorax import fit_subspace, leave_one_out
from lora_fused.methods.fedex import FedexMerged, fedex
from lora_fused.methods.lorahub import LoraHub, lorahub, mix_factors
from lora_fused.methods.merge_report import Merged, MergeReport, ModuleReport
from lora_fused.methods.merging import merge
from lora_fused.methods.similarity import Similarity, compare_adapters, principal_angles
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
    "ArrowRouter",
    "FedexMerged",
    "FitOptions",
    "GaugeCheck",
    "LearnedComposition",
    "LoraHub",
    "MeanCheck",
    "MergeReport",
    "Merged",
    "ModuleReport",
    "Scree",
    "Similarity",
    "Subspace",
    "SubspaceClusters",
    "SubspaceErrors",
    "SubspaceReport",
    "Verdict",
    "compare_adapters",
    "fedex",
    "fit_subspace",
    "leave_one_out",
    "lorahub",
    "merge",
    "mix_factors",
    "principal_angles",
    "recycle",
    "rpe",
    "subspace_report",
    "subtract_general",
    "uniform",
]
