"""Retrieval-based parameter ensembles: a request finds its adapters, and gets its mixture of them.

**The paper says** (Jin et al., arXiv 2410.09908): a library holds pairs of an adapter and z_k, the
mean of the frozen base's features over the adapter's data. A task's unlabelled inputs give z in the
same way; its k nearest z_k in squared L2 are retrieved, and theta_0 + sum_k w_k D_k is used, one w
for all layers with sum w = 1: softmax(-lambda_1 d^2) (similarity), argmin ||z - sum w_k z_k||^2
(linear), or that plus lambda_2 ||w||_1, its own proposal.
**We compute** these, and beside them the nearest adapter, the uniform mean and w >= 0 ("simplex"),
which is what a large lambda_2 comes to: as sum w = 1, ||w||_1 = 1 + 2 * (negative mass).
**We differ**: each row of a batch may have an ensemble of its own, by a Mixture, and nothing is
merged; an adapter may have several prototypes; the number of adapters can be limited, for that is
what a forward costs; lambdas can be in units of the median distance, where raw units (the paper's,
and the default) mean something else for every base; affinely dependent prototypes get the shortest
of the weights that fit, not those of a small ridge; ``explain`` warns where the library has nothing
like the request, in which case the paper's own figures show ensembles far below the nearest adapter
or the base.
"""

from torch import Tensor

from lora_fused.methods.embedding import embed
from lora_fused.methods.prototypes import NoiseReport, Prototypes, make_prototypes
from lora_fused.methods.retrieval import Retrieved, Weighted, retrieve, weigh
from lora_fused.methods.rpe_explain import Explanation, explain
from lora_fused.mixture import Mixture

__all__ = [
    "Explanation",
    "NoiseReport",
    "Prototypes",
    "Retrieved",
    "Weighted",
    "embed",
    "ensemble",
    "explain",
    "make_prototypes",
    "retrieve",
    "weigh",
]


def ensemble(
    queries: Tensor,
    prototypes: Prototypes,
    *,
    k: int = 8,
    weights: str = "l1",
    max_adapters: int | None = None,
    temperature: float = 1.0,
    l1: float = 1.0,
    units: str = "raw",
    per: str = "sample",
) -> Mixture:
    """Retrieve and weigh in one call: each query's own ensemble, as a Mixture.

    Args:
        queries: ``[Q, E]``, a row of the Mixture each; or ``[E]``, a task's mean, for all rows.
        prototypes: The library's; the bank of the attached model must hold their adapters.
        k: See ``retrieve``; other options: see ``weigh``.
        per: What a row of a batch is; see Mixture.

    Example:
        >>> features = rpe.embed(model, requests, tokenizer=tokenizer)
        >>> with handle.mix(rpe.ensemble(features, prototypes, k=8, max_adapters=4)):
        ...     model(**tokenizer(requests, padding=True, return_tensors="pt"))
    """
    options = {"max_adapters": max_adapters, "temperature": temperature, "l1": l1, "units": units}
    return weigh(retrieve(queries, prototypes, k=k), weights, **options).mixture(per=per)
