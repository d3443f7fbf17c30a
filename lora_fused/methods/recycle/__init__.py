"""LoRA Recycle: images from pre-tuned adapters, and one meta-LoRA from the images."""

from lora_fused.methods.recycle.distil import Distilled, distil
from lora_fused.methods.recycle.episodes import (
    Classified,
    Episodes,
    classify,
    draw_episodes,
    embed,
    evaluate,
    half_interval,
    score_episodes,
)
from lora_fused.methods.recycle.invert import invert
from lora_fused.methods.recycle.pool import Pool
from lora_fused.methods.recycle.priors import (
    FeatureStatistics,
    NoPrior,
    Prior,
    Statistics,
    TotalVariation,
    Weighted,
)
from lora_fused.methods.recycle.teachers import label_pool

__all__ = [
    "Classified",
    "Distilled",
    "Episodes",
    "FeatureStatistics",
    "NoPrior",
    "Pool",
    "Prior",
    "Statistics",
    "TotalVariation",
    "Weighted",
    "classify",
    "distil",
    "draw_episodes",
    "embed",
    "evaluate",
    "half_interval",
    "invert",
    "label_pool",
    "score_episodes",
]
