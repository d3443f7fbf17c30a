"""Many adapters on a model in place: attach a bank, mix per batch, detach exactly."""

from lora_fused.nn.attach import Handle, attach, handle_of
from lora_fused.nn.linear import MixtureConv2d, MixtureEmbedding, MixtureLinear
from lora_fused.nn.merge import MergedBase, merge_into_base
from lora_fused.nn.prune import TokenPruning, prune_tokens

__all__ = [
    "Handle",
    "MergedBase",
    "MixtureConv2d",
    "MixtureEmbedding",
    "MixtureLinear",
    "TokenPruning",
    "attach",
    "handle_of",
    "merge_into_base",
    "prune_tokens",
]
