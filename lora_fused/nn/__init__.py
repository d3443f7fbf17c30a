"""Many adapters on a model in place: attach a bank, mix per batch, detach exactly."""

from lora_fused.nn.attach import Handle, attach, handle_of
from lora_fused.nn.linear import MixtureEmbedding, MixtureLinear

__all__ = ["Handle", "MixtureEmbedding", "MixtureLinear", "attach", "handle_of"]
