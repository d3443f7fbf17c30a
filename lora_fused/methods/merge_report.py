"""What a merge returns: the adapter, and how far it is from the exact sum."""

import dataclasses
import math
from typing import NamedTuple

from lora_fused.adapters import Adapter


class ModuleReport(NamedTuple):
    """What became of one module.

    Attributes:
        rank: of the merged factors.
        norm: Frobenius norm of the exact sum.
        energy: share that the rank keeps of the squared norm of what the rule gave; None where
            factors are combined, which is no projection.
        error_to_exact: ||merged - sum||_F / norm, of the factors as they are stored.
        rule_norm: Frobenius norm of what the rule gave, before the rank was cut; None as above.
    """

    rank: int
    norm: float
    energy: float | None
    error_to_exact: float
    rule_norm: float | None


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """How good a merge is; ``print`` shows the whole and the worst modules.

    Attributes:
        combination_type: as given.
        weights: as given.
        modules: module name -> ModuleReport.
        options: the options that the type has: rank, energy, density, majority_sign_method, seed.
    """

    combination_type: str
    weights: dict[str, float]
    modules: dict[str, ModuleReport]
    options: dict[str, int | float | str] = dataclasses.field(default_factory=dict)

    @property
    def energy(self) -> float | None:
        """Share of the squared norm of what the rule gave that was kept, over all modules."""
        parts = self.modules.values()
        if any(part.energy is None for part in parts):
            return None
        total = sum(part.rule_norm**2 for part in parts)
        return sum(part.energy * part.rule_norm**2 for part in parts) / total if total else 1.0

    @property
    def error_to_exact(self) -> float:
        """||merged - sum||_F / ||sum||_F over all modules."""
        parts = self.modules.values()
        if any(math.isinf(part.error_to_exact) for part in parts):
            return math.inf
        error = math.hypot(*(part.error_to_exact * part.norm for part in parts))
        return relative(error, math.hypot(*(part.norm for part in parts)))

    @property
    def ranks(self) -> tuple[int, int]:
        """The least and the largest rank of a module."""
        ranks = [part.rank for part in self.modules.values()]
        return min(ranks), max(ranks)

    def worst(self, count: int = 5) -> list[tuple[str, ModuleReport]]:
        """The modules furthest from the exact sum, first the worst."""
        return sorted(self.modules.items(), key=lambda item: -item[1].error_to_exact)[:count]

    def __str__(self) -> str:
        span = " to ".join(map(str, dict.fromkeys(self.ranks)))
        head = f"{self.combination_type} of {len(self.weights)} adapters, {len(self.modules)} "
        head += f"modules, rank {span}: {_figures(self.energy, self.error_to_exact)}"
        lines = [
            f"  {name}: rank {part.rank}, {_figures(part.energy, part.error_to_exact)}"
            for name, part in self.worst()
        ]
        return "\n".join([head, *lines])


class Merged(NamedTuple):
    """A merged adapter, for ``bank.add`` and ``write_adapter``, and how good it is."""

    adapter: Adapter
    report: MergeReport


def relative(error: float, norm: float) -> float:
    if error == 0:
        return 0.0
    return error / norm if norm else math.inf


def _figures(energy: float | None, error: float) -> str:
    kept = "" if energy is None else f"energy kept {energy:.4f}, "
    return f"{kept}error to the exact sum {error:.3g}"
