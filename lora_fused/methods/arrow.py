"""Arrow: every token picks its adapters in every layer, by the directions that they react to.

**The paper says** (Ostapenko et al. 2024, arXiv 2405.11157): adapter k's prototype in a layer is
v_k, the top right singular vector of B_k A_k, the input that it changes most. A token x takes the
top k by |x . v_k| and mixes them by a softmax of these scores.
**We compute** that with PEFT's formula: softmax(|x . v_k| / T) over the chosen alone, x and scores
as they are, without normalisation. Prototypes come from factors: an eigenvector of R x R.
**We differ**: the chosen adapters run in one mixture_lora, top_k of K and not all K; ranks may
differ; adapters that lack a layer are no candidates there. PEFT finds v_k by 15 power iterations,
which leave a part (s_2 / s_1)^30 of the second direction, 4 % where s_2 = 0.9 s_1; ours is exact.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lora_fused.adapters import Adapter, AdapterBank, AdapterStack, LoraFactors
from lora_fused.checks import check_whole, invalid
from lora_fused.methods.composition import chosen_names
from lora_fused.methods.products import blocks, gram

_OP = "ArrowRouter"
_GENERAL = "subtract_general"


class ArrowRouter:
    """Routes tokens to adapters by their prototypes; for ``handle.route``.

    weights[n] = softmax over the top_k of |x[n] . v_k| / temperature

    Args:
        bank: The adapters, of linear layers only.
        names: Those to choose from. Default: all.
        top_k: Adapters per token; all of a layer's where it has fewer.
        temperature: PEFT's ``router_temperature``. Smaller: nearer to the best one alone.

    Attributes:
        prototypes: layer -> ``[K, I]`` unit vectors in the factors' dtype; K are the layer's
            candidates, whose ids in the bank are ``candidates[layer]``.

    Raises:
        ValueError: a wrong argument, an unknown name, an embedding, NaN in an adapter in training.
            RuntimeError, when called: the bank has changed since; adapters added to layers that it
            had are no candidates.

    Numerics:
        Prototypes in float64, rounded once. Scores in the factors' dtype, as PEFT has them, and
        differentiable in x. The sign of v_k does not matter.

    Cost:
        K * I multiply-adds per token and layer to choose, top_k * R * (I + O) to run.

    Source:
        arXiv 2405.11157; peft.create_arrow_model.

    Example:
        >>> with handle.route(ArrowRouter(bank, top_k=3)):
        ...     model(**batch)
    """

    def __init__(
        self,
        bank: AdapterBank,
        names: Sequence[str] | None = None,
        *,
        top_k: int = 3,
        temperature: float = 1.0,
    ):
        if not isinstance(bank, AdapterBank) or not len(bank):
            raise invalid(_OP, "bank", "be an AdapterBank with adapters", repr(bank))
        wanted = sorted(map(bank.id, chosen_names(_OP, bank, names)))
        check_whole(_OP, "top_k", top_k)
        if not isinstance(temperature, (int, float)) or not 0 < temperature < float("inf"):
            raise invalid(_OP, "temperature", "be a positive number", repr(temperature))
        embedding = next((m for m, s in bank.stacks.items() if s.embedding), None)
        if embedding is not None:
            rule = "adapt linear layers only, for tokens have no direction"
            raise invalid(_OP, "bank", rule, f"the embedding {embedding!r}")
        self.bank, self.top_k, self.temperature = bank, top_k, float(temperature)
        self._version = bank.version
        self.candidates: dict[str, Tensor] = {}
        self.prototypes: dict[str, Tensor] = {}
        for layer, stack in bank.stacks.items():
            ids = [k for k in wanted if stack.ranks[k]]
            self.prototypes[layer] = prototypes(stack, ids)
            held = torch.tensor(ids, dtype=torch.int32, device=stack.lora_a.device)
            self.candidates[layer] = held

    def __call__(self, layer: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and weights ``[N, top_k]`` of x's N tokens."""
        if self.bank.version != self._version or layer not in self.prototypes:
            raise RuntimeError(
                f"{_OP}: the bank must be as it was, got one after remove(), compact() or add() "
                f"of a new layer (at {layer!r}); make a new router"
            )
        held, ids = self._on(layer, x)
        tokens = x.reshape(-1, x.shape[-1]).to(held.dtype)
        score, best = (tokens @ held.mT).abs().topk(min(self.top_k, len(ids)), dim=-1)
        return ids[best], (score / self.temperature).softmax(-1)

    def _on(self, layer: str, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.prototypes[layer].device != x.device:  # the model has moved
            for table in (self.prototypes, self.candidates):
                table[layer] = table[layer].to(x.device)
        return self.prototypes[layer], self.candidates[layer]


@torch.no_grad()
def prototypes(stack: AdapterStack, ids: Sequence[int]) -> Tensor:
    """Top right singular vectors of the adapters' updates, ``[len(ids), I]``, of unit length.

    B A = B L Q with A = L Q, Q's rows orthonormal: v = Q^T u for the top right singular vector u
    of B L, found in L^T (B^T B) L, as small as the rank. An update of zero has the vector zero.
    """
    found = torch.zeros(len(ids), stack.in_features, dtype=torch.float64)
    found = found.to(stack.lora_a.device)
    place = {k: i for i, k in enumerate(ids)}
    for part in blocks(stack, ids):
        q, r = torch.linalg.qr(part.lora_a.mT)
        lower = r.mT
        core = lower.mT @ gram(part.lora_b) @ lower
        if not core.isfinite().all():
            raise invalid(_OP, "adapters", "be finite", f"NaN or infinity among ids {part.ids}")
        power, turn = torch.linalg.eigh(core)
        vectors = (q @ turn[..., -1:])[..., 0] * (power[:, -1:] > 0)
        found[[place[k] for k in part.ids]] = vectors
    return found.to(stack.lora_a.dtype)


@torch.no_grad()
def subtract_general(
    bank: AdapterBank, general: Sequence[str], names: Sequence[str] | None = None
) -> AdapterBank:
    """Adapters without what general ones have in common: PEFT's ``use_gks``, in a new bank.

    A_k - mean(A_g) and B_k - mean(B_g), factor by factor, as PEFT has it (GenKnowSub, ACL
    2025, short papers 54); so it depends on how factors were initialised, and ranks must agree.

    Args:
        bank: Holds both; it stays as it is.
        general: Names of the general adapters.
        names: Those to subtract from. Default: all others.

    Example:
        >>> router = ArrowRouter(subtract_general(bank, ["wiki_en", "wiki_de"]))
    """
    if isinstance(general, str) or not general:
        raise invalid(_GENERAL, "general", "be a list of at least one name", repr(general))
    general = [bank.adapter(name) for name in general]
    spared = {one.name for one in general}
    names = [n for n in bank.names if n not in spared] if names is None else list(names)
    if not names:
        raise invalid(_GENERAL, "names", "leave an adapter to subtract from", "none")
    mean = {
        layer: tuple(
            torch.stack([getattr(one.modules[layer], side) for one in general]).float().mean(0)
            for side in ("lora_a", "lora_b")
        )
        for layer in _shared_layers(general)
    }
    purified = AdapterBank(dtype=bank.dtype, device=bank.device)
    purified.add_many(_subtracted(bank.adapter(name), mean) for name in names)
    return purified


def _shared_layers(adapters: Sequence[Adapter]) -> list[str]:
    first = adapters[0]
    for one in adapters[1:]:
        sizes = [{m: p.lora_a.shape for m, p in a.modules.items()} for a in (first, one)]
        if sizes[0] != sizes[1]:
            rule = "have the layers and ranks of the others"
            raise invalid(_GENERAL, f"adapter {one.name!r}", rule, "others")
    return list(first.modules)


def _subtracted(adapter: Adapter, mean: dict[str, tuple[Tensor, Tensor]]) -> Adapter:
    modules = {}
    for layer, part in adapter.modules.items():
        less = mean.get(layer)
        if less is None or less[0].shape != part.lora_a.shape:
            got = f"rank {part.lora_a.shape[0]} at {layer!r}"
            rule = "have the layers and ranks of the general ones"
            raise invalid(_GENERAL, f"adapter {adapter.name!r}", rule, got)
        sides = (part.lora_a.float() - less[0], part.lora_b.float() - less[1])
        modules[layer] = LoraFactors(*sides, part.scale, part.embedding)
    return replace(adapter, modules=modules)
