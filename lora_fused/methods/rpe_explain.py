"""Why a request gets the ensemble that it gets, and whether the library knows such requests."""

import dataclasses
import json

import torch
from torch import Tensor

from lora_fused.checks import invalid
from lora_fused.methods.prototypes import Prototypes
from lora_fused.methods.retrieval import Retrieved, Weighted, retrieve, weigh

_OP = "explain"
_MOST = 200  # left-out prototypes: enough for a quantile, 2 s among 10^5


@dataclasses.dataclass(frozen=True)
class Explanation:
    """One query's ensemble; ``str`` prints it, ``to_json`` writes it.

    Attributes:
        rule: how weights were found.
        adapters: the retrieved, nearest first.
        distances: from the query to their prototypes, not squared.
        weights: theirs, sum one.
        negative_mass: the sum of the negative weights' sizes.
        residual: ||z - sum_k w_k z_k||, what the ensemble's prototype misses of the query.
        hull_distance: from the query to the nearest convex combination of these prototypes.
        nearer, of: so many of so many reference points are nearer to their hull; of = 0: none.
        outside: the out-of-library warning, which a part 1 - level of known queries gets at most.
            None where the reference has too few points for that, or there is none.
    """

    rule: str
    adapters: tuple[str, ...]
    distances: tuple[float, ...]
    weights: tuple[float, ...]
    negative_mass: float
    residual: float
    hull_distance: float
    nearer: int
    of: int
    outside: bool | None

    def __str__(self) -> str:
        width = max(len("adapter"), *map(len, self.adapters))
        lines = [f"{'adapter':{width}}  distance   weight"]
        for row in zip(self.adapters, self.distances, self.weights, strict=True):
            lines.append(f"{row[0]:{width}}  {row[1]:8.4g}  {row[2]:+7.4f}")
        facts = (
            ("rule", self.rule),
            ("negative mass", f"{self.negative_mass:.4g}"),
            ("missed by the ensemble", f"{self.residual:.4g}"),
            ("distance to the hull", f"{self.hull_distance:.4g}, {self._place()}"),
        )
        lines += [f"{label}: {value}" for label, value in facts]
        if self.outside:
            lines.append(
                "WARNING: the library holds nothing like it (of single inputs, see reference=)"
            )
        return "\n".join(lines)

    def _place(self) -> str:
        if not self.of:
            return "nothing to compare it with (give reference=)"
        few = " (too few points for a warning)" if self.outside is None else ""
        return f"more than {self.nearer} of {self.of} reference points have{few}"

    def to_json(self, **options) -> str:
        """All attributes; ``options`` are json.dumps's (indent=2)."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False, **options)


@torch.no_grad()
def explain(
    chosen: Weighted, *, reference: Tensor | None = None, level: float = 0.95
) -> list[Explanation]:
    """Adapters, distances, weights and an out-of-library warning for each query.

    Args:
        chosen: By ``weigh``.
        reference: Features ``[n, E]`` of queries that the library is known to serve, of the kind
            at hand. Default: the library's own prototypes, each against the adapters other than
            its own. That fits queries that are means over a task; single inputs scatter more, so
            give others of theirs. Without a reference, what a library's ``retrieve`` found in a
            part of itself is compared with nothing: that part says nothing of the others.
        level: One less the part of known queries that may be warned of falsely. The query's rank
            among n reference points decides, (n - nearer + 1) / (n + 1) <= 1 - level; 0.95 takes
            19 points.

    Returns:
        One Explanation per query.

    Example:
        >>> for one in explain(weigh(retrieve(queries, prototypes), "l1")):
        ...     print(one)
    """
    if not isinstance(chosen, Weighted):
        raise invalid(_OP, "chosen", "be what weigh gives", type(chosen).__name__)
    if not isinstance(level, (int, float)) or not 0 < level < 1:
        raise invalid(_OP, "level", "be in (0, 1)", repr(level))
    found = chosen.found
    k = found.adapters.shape[1]
    if reference is None:
        known = None if found.narrowed else _left_out(found.prototypes, k)
    else:
        known = retrieve(reference, found.prototypes, k=k)
    usual = torch.zeros(0) if known is None else _misses(known, weigh(known, "simplex").weights)
    hull = _misses(found, weigh(found, "simplex").weights)
    missed = _misses(found, chosen.weights)
    nearer = (usual.cpu() < hull.cpu()[:, None]).sum(1).tolist()
    rows = zip(
        found.distances.sqrt().tolist(),
        chosen.weights.tolist(),
        chosen.weights.clamp_max(0).sum(1).abs().tolist(),
        missed.tolist(),
        hull.tolist(),
        nearer,
        strict=True,
    )
    of = len(usual)
    most = (1 - level) * (of + 1) + 1e-9  # of the rank from above, 1 on, that is still a warning
    return [
        Explanation(
            rule=chosen.rule,
            adapters=tuple(found.names(q)),
            distances=tuple(distances),
            weights=tuple(weights),
            negative_mass=negative,
            residual=residual,
            hull_distance=distance,
            nearer=count,
            of=of,
            outside=of - count + 1 <= most if of and most >= 1 else None,
        )
        for q, (distances, weights, negative, residual, distance, count) in enumerate(rows)
    ]


def _left_out(prototypes: Prototypes, k: int) -> Retrieved | None:
    """Prototypes, and for each the nearest adapters but its own; None where there is one."""
    if len(prototypes) == 1:
        return None
    count = len(prototypes.vectors)
    rows = torch.linspace(0, count - 1, min(count, _MOST)).round().long()
    rows = rows.to(prototypes.vectors.device)
    found = retrieve(prototypes.vectors[rows], prototypes, k=k + 1)
    own = found.adapters == prototypes.owners[rows, None]
    # Where k + 1 others are as near as a copy, its own may be missing: drop the farthest then.
    own[:, -1] |= ~own.any(1)
    shape = (len(rows), found.adapters.shape[1] - 1)
    parts = (t[~own].reshape(shape) for t in (found.adapters, found.rows, found.distances))
    return Retrieved(found.queries, prototypes, *parts)


def _misses(found: Retrieved, weights: Tensor) -> Tensor:
    """||z - sum_k w_k z_k|| of each query, ``[Q]`` float64."""
    parts = []
    for part, w in zip(_split(found), weights.split(256), strict=True):
        away = part.prototypes.vectors.double()[part.rows] - part.queries.double()[:, None]
        parts.append((w[:, None] @ away)[:, 0].norm(dim=1))
    return torch.cat(parts)


def _split(found: Retrieved) -> list[Retrieved]:
    return [found.take(slice(i, i + 256)) for i in range(0, len(found), 256)]
