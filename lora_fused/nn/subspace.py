"""The update of a layer whose adapters are cores in a shared basis. No maths here."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fused.adapters import AdapterStack
from lora_fused.methods.basis import SharedBasis
from lora_fused.methods.cores import diagonals
from lora_fused.mixture import Route
from lora_fused.ops import PairCores, subspace_lora
from lora_fused.ops.mixture_lora.plan import MixturePlan


def add_in_basis(
    x: Tensor,
    base: Tensor,
    basis_a: Tensor,
    basis_b: Tensor,
    stack: AdapterStack,
    route: Route,
    diagonal: Tensor | None,
    plan: MixturePlan | None,
    impl: str,
) -> Tensor:
    """base plus the update of x by the route's cores: pairs, or ``diagonal`` ones ``[K, P]``."""
    return subspace_lora(
        x,
        basis_a,
        basis_b,
        PairCores(*stack.factors(), stack.row_start) if diagonal is None else diagonal,
        route.adapter_ids,
        route.weights,
        scale=stack.scale,
        row_mixture=route.row_mixture,
        plan=plan,
        max_rank=stack.max_rank if diagonal is None else None,
        base=base,
        impl=impl,
    )


def add_of_tokens(tokens: Tensor, base: Tensor, basis: SharedBasis, *args) -> Tensor:
    """base plus the update of an embedding, whose coordinates are columns of basis_a."""
    z = F.embedding(tokens, basis.basis_a.mT)
    if base.dtype == torch.float64:  # it decides what is computed in, as x does elsewhere
        z = z.double()
    unit = torch.eye(z.shape[-1], dtype=basis.basis_a.dtype, device=z.device)
    with torch.autocast(z.device.type, enabled=False):  # it would round the intermediates
        return add_in_basis(z, base, unit, basis.basis_b, *args)


class Diagonals:
    """The diagonal cores of each module's stack.

    On the CPU those of a frozen stack are formed once, lest a decode step of one row cost as much
    as there are adapters. A stack that has changed since is another tensor, or another version.
    """

    def __init__(self):
        self._made: dict[str, tuple[tuple, Tensor]] = {}

    def of(self, name: str, stack: AdapterStack) -> Tensor:
        sides = (stack.lora_a, stack.lora_b)
        if torch.compiler.is_compiling() or stack.trained or not _is_counted(sides):
            return diagonals(stack)
        key = tuple((t, t._version) for t in sides)
        held = self._made.get(name)
        if held is None or not all(
            a is b and m == n for (a, m), (b, n) in zip(held[0], key, strict=True)
        ):
            with torch.inference_mode(False):  # what is made there, no backward pass can save
                held = self._made[name] = (key, diagonals(stack))
        return held[1]


def _is_counted(sides: tuple[Tensor, ...]) -> bool:
    """Whether edits in place raise a version, and no stream or graph may look at another time."""
    return all(t.device.type == "cpu" and not t.is_inference() for t in sides)
