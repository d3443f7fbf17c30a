"""The three forms of an adapter in a shared basis."""

from typing import NamedTuple

from torch import Tensor

from lora_fused.checks import invalid

OP = "subspace_lora"


class PairCores(NamedTuple):
    """Low-rank cores, M_k = lora_b[k]^T lora_a[k]: a packed AdapterStack in basis coordinates.

    Attributes:
        lora_a: ``[T, P]``, P of basis_a; one row per rank component, adapter after adapter.
        lora_b: ``[T, P]``, P of basis_b, dtype of ``lora_a``.
        row_start: first row of each adapter, ``[K + 1]`` int32.
    """

    lora_a: Tensor
    lora_b: Tensor
    row_start: Tensor


def split(cores: PairCores | Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(core_a, core_b, row_start) as operators take them: the last two None for a tensor."""
    if isinstance(cores, PairCores):
        if cores.row_start is None:
            raise invalid(OP, "row_start", "be int32 [K + 1] for PairCores", None)
        return tuple(cores)
    if isinstance(cores, Tensor) and cores.dim() in (2, 3):
        return cores, None, None
    rule = "be PairCores, or a tensor [K, P] (diagonal) or [K, P, P] (full)"
    got = list(cores.shape) if isinstance(cores, Tensor) else type(cores).__name__
    raise invalid(OP, "cores", rule, got)
