"""Which adapters, with which weights, for which rows: the one routing object all layers share."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, SupportsFloat

import torch
from torch import Tensor

from lora_fused.adapters import BASE, AdapterBank
from lora_fused.checks import invalid, shape

_OP = "Mixture"
_LARGEST = torch.finfo(torch.float32).max
Row = Mapping[str, float] | str | None


class Route(NamedTuple):
    """A mixture resolved against one bank: what the kernels read.

    Attributes:
        adapter_ids: ``[M, J]`` int32, -1 = none.
        weights: ``[M, J]`` float32, or ``[L, M, J]`` with one slice per module of the bank.
        row_mixture: ``[S]`` int32 or None (arange(M)).
        per: what S counts, "sample" or "token".
        version: of the bank when it was resolved.
    """

    adapter_ids: Tensor
    weights: Tensor
    row_mixture: Tensor | None
    per: str
    version: int

    @property
    def groups(self) -> int:
        """S: how many samples or tokens the mixture speaks of (1 fits any input)."""
        return (self.adapter_ids if self.row_mixture is None else self.row_mixture).shape[0]

    def to(self, device: torch.device) -> "Route":
        tensors = (self.adapter_ids, self.weights, self.row_mixture)
        return Route(*(t if t is None else t.to(device) for t in tensors), *self[3:])


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
    """Adapters and weights for the rows of a batch; build it with one of the class methods.

    Weights need not sum to one and may be negative; nothing is normalised. ``"__base__"`` and None
    mean no adapter. ``per`` says what a row of the mixture is: a sample (``x.shape[0]`` of them) or
    a token (a row of x flattened to ``[N, I]``); it is never guessed. A mixture of a single row
    fits any input. Per sample, the first axis of every adapted layer's input must be the batch.

    Attributes:
        adapters: names, M rows of J (None = no adapter), or ids ``[M, J]`` as a tensor.
        weights: ``[M, J]`` or ``[L, M, J]`` (L modules, in the order of ``bank.modules``).
        per: "sample" or "token".
        row_mixture: ``[S]`` int32: row s of the batch uses row ``row_mixture[s]`` of the mixture.

    Example:
        >>> Mixture.of({"math": 0.7, "code": 0.3})
        >>> Mixture.rows([{"math": 1.0}, None, {"math": 0.5, "code": -0.2}])
    """

    adapters: tuple[tuple[str | None, ...], ...] | Tensor
    weights: Tensor
    per: str = "sample"
    row_mixture: Tensor | None = None

    def __post_init__(self):
        if self.per not in ("sample", "token"):
            raise invalid(_OP, "per", "be 'sample' or 'token'", repr(self.per))
        if isinstance(self.adapters, Tensor):
            if self.adapters.dim() != 2 or self.adapters.dtype not in (torch.int32, torch.int64):
                got = f"{self.adapters.dtype} {shape(self.adapters)}"
                raise invalid(_OP, "ids", "be int32 or int64 [M, J]", got)
            table = tuple(self.adapters.shape)
        else:
            table = (len(self.adapters), len(self.adapters[0]) if self.adapters else 0)
        weights = _weights(self.weights)
        if weights.dim() not in (2, 3) or tuple(weights.shape[-2:]) != table:
            rule = f"be {list(table)} like ids, or one such slice per module"
            raise invalid(_OP, "weights", rule, shape(weights))
        rows = self.row_mixture
        if rows is not None and (rows.dim() != 1 or rows.dtype != torch.int32):
            raise invalid(_OP, "row_mixture", "be int32 [S]", f"{rows.dtype} {shape(rows)}")
        object.__setattr__(self, "weights", weights)

    @classmethod
    def uniform(cls, names: Sequence[str]) -> "Mixture":
        """All rows: the mean of these adapters' updates (weights 1 / len(names))."""
        if isinstance(names, str) or not len(names):
            raise invalid("Mixture.uniform", "names", "be a list of at least one name", repr(names))
        return cls.of({name: 1.0 / len(names) for name in _distinct(names)})

    @classmethod
    def of(cls, weights: Mapping[str, float] | Sequence[str], values: Tensor | None = None):
        """All rows: one weighted set, ``{"math": 0.7}``, or names with a tensor of weights.

        ``values`` is ``[J]``, or ``[L, J]`` for weights of each module's own; gradients reach it.
        """
        if values is None:
            return cls.rows([weights])
        names = _distinct(weights)
        values = values if isinstance(values, Tensor) else torch.tensor(values)
        if values.dim() not in (1, 2) or values.shape[-1] != len(names):
            rule = f"be [{len(names)}] or [L, {len(names)}] for {len(names)} names"
            raise invalid("Mixture.of", "values", rule, shape(values))
        return cls((tuple(_name(n) for n in names),), values.unsqueeze(-2))

    @classmethod
    def rows(cls, rows: Sequence[Row], *, per: str = "sample") -> "Mixture":
        """Row by row: a dict of weights, one name (weight 1), or None / ``"__base__"``."""
        if rows is None or isinstance(rows, Mapping | str | Tensor):
            rule = "be a list with one entry per row (for all rows alike: Mixture.of)"
            raise invalid("Mixture.rows", "rows", rule, repr(rows))
        table = [_row(row, i) for i, row in enumerate(rows)]
        width = max((len(row) for row in table), default=0)
        table = [row + [(None, 0.0)] * (width - len(row)) for row in table]
        names = tuple(tuple(name for name, _ in row) for row in table)
        weights = torch.tensor([[w for _, w in row] for row in table], dtype=torch.float32)
        return cls(names, weights.reshape(len(table), width), per)

    @classmethod
    def top_k(cls, ids: Tensor, weights: Tensor, *, per: str = "sample") -> "Mixture":
        """From tensors: ids ``[M, J]`` (-1 = none), weights ``[M, J]`` or ``[L, M, J]``."""
        for label, t in (("ids", ids), ("weights", weights)):
            if not isinstance(t, Tensor):
                raise invalid("Mixture.top_k", label, "be a tensor", type(t).__name__)
        return cls(ids, weights, per)

    def repeat(self, times: int) -> "Mixture":
        """Every row ``times`` times in succession, as generate orders beams and samples."""
        if times < 1:
            raise invalid("Mixture.repeat", "times", "be at least 1", times)
        rows = self.row_mixture
        if len(self) == 1:
            return self  # a single row fits any input already
        if rows is None:
            rows = torch.arange(len(self.adapters), dtype=torch.int32, device=self.weights.device)
        return dataclasses.replace(self, row_mixture=rows.repeat_interleave(times))

    def __len__(self) -> int:
        return len(self.adapters) if self.row_mixture is None else len(self.row_mixture)

    def resolve(self, bank: AdapterBank, device: torch.device | str | None = None) -> Route:
        """Turn names into the bank's ids, on ``device`` (default: the bank's).

        Raises ValueError for an unknown name (listing the close ones), an id that the bank does not
        hold, or a number of per-module weights other than the bank's modules.
        """
        device = bank.device if device is None else torch.device(device)
        if self.weights.dim() == 3 and self.weights.shape[0] != len(bank.stacks):
            rule = f"have one slice per module of the bank, {len(bank.stacks)}"
            raise invalid(_OP, "weights", rule, shape(self.weights))
        if isinstance(self.adapters, Tensor):
            ids = self.adapters
            if ids.device.type == "cpu":
                dead = [k for k in ids.unique().tolist() if k != -1 and not bank.is_live(k)]
                if dead:
                    raise invalid(_OP, "ids", "be -1 or ids of loaded adapters", dead[:5])
        else:
            table = [
                [-1 if name is None else bank.id(name) for name in row] for row in self.adapters
            ]
            ids = torch.tensor(table, dtype=torch.int32).reshape(self.weights.shape[-2:])
        ids = ids.clamp(-1, 2**31 - 1).int()
        return Route(ids, self.weights, self.row_mixture, self.per, bank.version).to(device)


def _row(row: Row, i: int) -> list[tuple[str | None, float]]:
    if row is None or isinstance(row, str):
        row = {BASE if row is None else row: 1.0}
    if not isinstance(row, Mapping):
        rule = "be a dict of weights, a name or None"
        raise invalid("Mixture.rows", f"row {i}", rule, type(row).__name__)
    for name, weight in row.items():
        where = f"row {i}, weight of {name!r}"
        if isinstance(weight, Tensor) and weight.requires_grad:
            rule = "be a number (a gradient would be lost; use Mixture.of(names, values) or top_k)"
            raise invalid("Mixture.rows", where, rule, "a tensor that requires grad")
        if not isinstance(weight, SupportsFloat) or isinstance(weight, str):
            raise invalid("Mixture.rows", where, "be a number", repr(weight))
        if not abs(float(weight)) <= _LARGEST:
            raise invalid("Mixture.rows", where, "be finite in float32", weight)
    return [(_name(name), float(weight)) for name, weight in row.items()]


def _name(name: str | None) -> str | None:
    return None if name == BASE else name


def _distinct(names: Sequence[str]) -> list[str]:
    names = list(names)
    if len(set(names)) != len(names):
        raise invalid(_OP, "names", "be distinct", names)
    return names


def _weights(weights: Tensor) -> Tensor:
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise invalid(_OP, "weights", "be a floating point tensor", got)
    weights = weights.float()
    # Free on a CPU; on a device it would be a sync, so a NaN there reaches the output instead.
    if weights.device.type == "cpu" and not bool(weights.detach().isfinite().all()):
        raise invalid(_OP, "weights", "be finite in float32", "NaN or infinity")
    return weights
