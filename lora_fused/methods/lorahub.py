"""LoraHub: weights for adapters from a few examples, without gradients.

**The paper says** (Huang et al. 2023, arXiv 2307.13269): one weight per adapter in [-1.5, 1.5],
from 0, by a gradient-free optimiser on the loss of a few examples plus 0.05 * L1, in 40 steps. Its
code adds the factors, (sum_k w_k B_k) (sum_k w_k A_k), takes the mean of |w| for the L1 norm, and
loads each candidate into the model in turn.
**We compute** the same search by CMA-ES (the package cma), the mean of |w| as well.
**We differ**: products are mixed by default, sum_k w_k s_k B_k A_k, which have no cross terms of
adapters and are what a Mixture runs (``mix="factors"`` is the code's sum); all candidates of a
generation run in one batch, a row each per example, so nothing is loaded; the start, which is the
base model, is a candidate, so the result is never worse on the examples than that.
"""

import contextlib
import dataclasses
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lora_fused.adapters import Adapter, AdapterBank, LoraFactors, pointwise_of
from lora_fused.checks import check_whole, invalid, shape
from lora_fused.methods.composition import chosen_names
from lora_fused.methods.products import rows_of
from lora_fused.methods.progress import show
from lora_fused.mixture import Mixture

_OP = "lorahub"
MIXES = ("products", "factors")


@dataclasses.dataclass(frozen=True)
class LoraHub:
    """What ``lorahub`` found.

    Attributes:
        weights: adapter -> weight, of the candidate with the lowest loss + l1 * mean |w|.
        loss: its mean loss over the examples, without the L1 term.
        candidates: ``[C, J]`` all weights tried, in order; the first is the start.
        losses: ``[C]`` their mean losses.
        adapter: mix="factors" only: the mixed factors, for ``bank.add`` and ``write_adapter``.
    """

    weights: dict[str, float]
    loss: float
    candidates: Tensor
    losses: Tensor
    adapter: Adapter | None

    def mixture(self) -> Mixture:
        """The weights as a Mixture of products (``merge(bank, found.weights)`` merges them)."""
        if self.adapter is not None:
            rule = "be 'products'; add found.adapter to a bank instead"
            raise invalid(_OP, "mix", rule, "'factors'")
        return Mixture.of(self.weights)


@torch.no_grad()
def lorahub(
    handle,
    losses: Callable[[object], Tensor],
    examples: object,
    *,
    names: Sequence[str] | None = None,
    candidates: int = 40,
    mix: str = "products",
    bound: float = 1.5,
    l1: float = 0.05,
    step: float = 0.5,
    population: int | None = None,
    max_rows: int = 64,
    seed: int,
    progress: bool | Callable[[int, int], None] = True,
) -> LoraHub:
    """Search for weights of adapters by the losses of a few examples.

    Args:
        handle: Of the model, attached to the adapters and in eval mode.
        losses: ``losses(batch)``: one loss for each row of a batch, ``[rows]``; it runs the model.
            A batch is ``examples``, or a part, repeated along the first axis.
        examples: A tensor, or a dict, list or tuple of tensors with one first axis.
        names: Adapters to weigh. Default: all.
        candidates: Evaluations at most (LoraHub's max_inference_step); a search that has
            converged ends before.
        mix: ``"products"``, or ``"factors"`` for parity with the paper's code; ranks and scales
            must agree then. The bank holds a few adapters more meanwhile; its version changes.
        bound: Weights stay within [-bound, bound].
        l1: Factor of the mean of |w|.
        step: Standard deviation of the first generation about 0.
        population: Candidates of a generation. Default: 4 + 3 ln J; more use a large batch better.
        max_rows: Rows (candidates times examples) of one forward: what memory allows. A CPU gains
            from more up to some 1000 tokens, and loses a little beyond 2000.
        seed: Of the search. One seed, population and max_rows: the same result, bit for bit.
        progress: True: a line on stderr where that is a terminal; or called as
            progress(done, total) after each generation.

    Raises:
        ValueError: a wrong argument, a model in train mode, losses that are no [rows] or not
            finite. RuntimeError: cma is not installed.

    Source:
        arXiv 2307.13269; CMA-ES: Hansen, arXiv 1604.00772.

    Example:
        >>> found = lorahub(handle, losses, {"input_ids": ids, "labels": labels}, seed=0)
        >>> with handle.mix(found.mixture()):
        ...     model.generate(**batch)
    """
    cma, numpy = _packages()
    bank, names = _checked(handle, names, mix)
    check_whole(_OP, "candidates", candidates)
    if population is not None:
        check_whole(_OP, "population", population, least=2)
    check_whole(_OP, "max_rows", max_rows)
    check_whole(_OP, "seed", seed, least=0)
    _check_sizes(bound=bound, step=step, l1=l1)
    evaluate = _Evaluation(bank, handle, losses, examples, names, max_rows)
    draw = numpy.random.default_rng(seed)
    options = {
        "bounds": [-bound, bound],
        # Its own stream: cma would reseed numpy's, which others share.
        "randn": lambda *size: draw.standard_normal(size),
        "seed": numpy.nan,
        "verbose": -9,
        "verb_log": 0,
        **({} if population is None else {"popsize": population}),
    }
    search = cma.CMAEvolutionStrategy(numpy.zeros(len(names)), step, options)
    tried, found = [torch.zeros(1, len(names))], []
    with _candidates(evaluate, mix) as mean_losses:
        found.append(mean_losses(tried[0]))
        done = 1
        while done < candidates and not search.stop():
            asked = search.ask()
            weights = torch.tensor(numpy.array(asked[: candidates - done]), dtype=torch.float32)
            tried.append(weights)
            found.append(mean_losses(weights))
            done += len(weights)
            if len(weights) == len(asked):
                scores = found[-1] + l1 * weights.double().abs().mean(-1)
                search.tell(asked, scores.tolist())
            total = done if search.stop() else candidates
            show(progress, done, total, f"{_OP}: {done} of {total} candidates")
    tried, found = torch.cat(tried), torch.cat(found)
    best = int((found + l1 * tried.double().abs().mean(-1)).argmin())
    weights = dict(zip(names, tried[best].tolist(), strict=True))
    adapter = mix_factors(bank, weights) if mix == "factors" else None
    return LoraHub(weights, float(found[best]), tried, found, adapter)


@torch.no_grad()
def mix_factors(bank: AdapterBank, weights: Mapping[str, float], name: str = "lorahub") -> Adapter:
    """(sum_k w_k B_k) (sum_k w_k A_k) with the scale that all share: the sum of LoraHub's code.

    Fully trained modules (modules_to_save) are left out.
    """
    names = tuple(weights)
    _check_factors(bank, names)
    values = torch.tensor([list(weights.values())], dtype=torch.float32)
    modules = {}
    for layer, stack in bank.stacks.items():
        first = next((k for name in names if stack.ranks[k := bank.id(name)]), None)
        if first is not None:
            sides = (side[0] for side in _mixed(bank, layer, names, values))
            modules[layer] = LoraFactors(*sides, float(stack.scale[first]), stack.embedding)
    config = bank.metadata[names[0]].get("config")
    if config is not None and any(one in bank.saved for one in names):
        # A task type would make PEFT look for the head that was left out.
        config = config | {"task_type": None}
    metadata = {} if config is None else {"config": dict(config)}
    return Adapter(name, modules, metadata=metadata | pointwise_of(bank, modules))


class _Evaluation:
    """Losses of the examples under many mixtures at once."""

    def __init__(self, bank, handle, losses, examples, names, max_rows: int):
        self.bank, self.names = bank, names
        self._handle, self._losses, self._examples = handle, losses, examples
        self.rows = _rows(examples)
        self._slice = min(self.rows, max_rows)
        self.at_once = max(1, max_rows // self.rows)  # candidates of one forward

    def __call__(self, ids: Tensor, weights: Tensor) -> Tensor:
        """Mean losses ``[C]`` of C <= at_once mixtures, ids and weights ``[C, J]``."""
        parts = []
        for first in range(0, self.rows, self._slice):
            count = min(self._slice, self.rows - first)
            batch = _repeated(self._examples, first, count, len(ids))
            with self._handle.mix(Mixture.top_k(ids, weights).repeat(count)):
                found = self._losses(batch)
            rows = len(ids) * count
            if not isinstance(found, Tensor) or found.shape != (rows,):
                got = shape(found) if isinstance(found, Tensor) else type(found).__name__
                raise invalid(_OP, "losses", f"return one loss per row, [{rows}]", got)
            if not found.isfinite().all():
                raise invalid(_OP, "losses", "be finite", "NaN or infinity")
            parts.append(found.double().cpu().reshape(len(ids), count))
        return torch.cat(parts, 1).mean(1)


@contextlib.contextmanager
def _candidates(evaluate: _Evaluation, mix: str) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function from weights ``[C, J]`` to mean losses ``[C]``."""
    bank, names = evaluate.bank, evaluate.names
    if mix == "products":
        ids = torch.tensor([[bank.id(name) for name in names]])

        def of_chunk(weights: Tensor) -> Tensor:
            return evaluate(ids.expand(len(weights), -1), weights)

        yield lambda weights: torch.cat([*map(of_chunk, weights.split(evaluate.at_once))])
        return
    held = _Mixed(bank, names)
    try:
        yield lambda weights: torch.cat(
            [evaluate(*held.put(part)) for part in weights.split(evaluate.at_once)]
        )
    finally:
        held.remove()


class _Mixed:
    """Adapters of the bank, for a while, whose factors are mixtures of the others'."""

    def __init__(self, bank: AdapterBank, names: tuple[str, ...]):
        _check_factors(bank, names)
        self._bank, self._names = bank, names
        self._ids: list[int] = []

    def put(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Write these candidates; return their ids and weights of 1, ``[C, 1]``."""
        bank = self._bank
        if len(self._ids) < len(weights):
            start = mix_factors(bank, dict.fromkeys(self._names, 0.0))
            spare = [f"__lorahub_{i}__" for i in range(len(self._ids), len(weights))]
            self._ids += bank.add_many(dataclasses.replace(start, name=name) for name in spare)
        for layer, stack in bank.stacks.items():
            if stack.ranks[self._ids[0]]:
                sides = _mixed(bank, layer, self._names, weights)
                for k, lora_a, lora_b in zip(self._ids, *sides, strict=False):
                    stack.lora_a[stack.rows(k)] = lora_a
                    stack.lora_b[stack.rows(k)] = lora_b
        ids = torch.tensor(self._ids[: len(weights)])[:, None]
        return ids, torch.ones(ids.shape)

    def remove(self) -> None:
        for i in range(len(self._ids)):
            self._bank.remove(f"__lorahub_{i}__")


def _mixed(
    bank: AdapterBank, layer: str, names: tuple[str, ...], weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Mixed factors ``[C, R, I]`` and ``[C, R, O]`` of weights ``[C, J]``, in the bank's dtype."""
    stack, ids = bank.stacks[layer], [bank.id(name) for name in names]
    held = [j for j, k in enumerate(ids) if stack.ranks[k]]  # the others add 0
    ids, sides = [ids[j] for j in held], []
    for rows in stack.factors():
        own = rows_of(stack, rows.detach(), ids).float()
        sides.append(torch.tensordot(weights[:, held].to(own), own, 1).to(rows.dtype))
    return tuple(sides)


def _check_factors(bank: AdapterBank, names: tuple[str, ...]) -> None:
    ids = [bank.id(name) for name in names]
    for layer, stack in bank.stacks.items():
        facts = {(stack.ranks[k], float(stack.scale[k])) for k in ids if stack.ranks[k]}
        if len(facts) > 1:
            rule = "be 'products' where ranks or scales differ"
            raise invalid(_OP, "mix", rule, f"'factors' at {layer!r}, {sorted(facts)}")


def _checked(handle, names, mix: str) -> tuple[AdapterBank, tuple[str, ...]]:
    bank = getattr(handle, "bank", None)
    if not isinstance(bank, AdapterBank):
        raise invalid(_OP, "handle", "be that of an attached model", type(handle).__name__)
    names = chosen_names(_OP, bank, names)
    if handle.model.training:
        rule = "be in eval mode (model.eval()), for dropout would drown the candidates' losses"
        raise invalid(_OP, "model", rule, "train mode")
    if mix not in MIXES:
        raise invalid(_OP, "mix", f"be one of {MIXES}", repr(mix))
    return bank, names


def _check_sizes(**values: float) -> None:
    for label, value in values.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        rule = "be 0 or a positive number" if label == "l1" else "be a positive number"
        if not number or not 0 <= value < float("inf") or (not value and label != "l1"):
            raise invalid(_OP, label, rule, repr(value))


def _packages() -> tuple:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # cma: of matplotlib, which it would plot with
            return importlib.import_module("cma"), importlib.import_module("numpy")
    except ImportError as error:
        raise RuntimeError(
            f"{_OP}: cma must be installed, got none ({error}); pip install cma numpy"
        ) from None


def _leaves(examples: object) -> list[Tensor]:
    if isinstance(examples, Tensor):
        return [examples]
    if isinstance(examples, Mapping):
        examples = list(examples.values())
    if not isinstance(examples, (list, tuple)):
        rule = "be a tensor, or a dict, list or tuple of tensors"
        raise invalid(_OP, "examples", rule, type(examples).__name__)
    return [leaf for part in examples for leaf in _leaves(part)]


def _rows(examples: object) -> int:
    leaves = _leaves(examples)
    sizes = {t.shape[0] if t.dim() else 0 for t in leaves}
    if len(sizes) != 1 or not min(sizes):
        rule = "have tensors of one first axis, a row per example"
        raise invalid(_OP, "examples", rule, [list(t.shape) for t in leaves])
    return sizes.pop()


def _repeated(examples: object, first: int, count: int, times: int) -> object:
    """Rows of the examples, the whole ``times`` times over; a row's mixture is its repetition's."""
    if isinstance(examples, Tensor):
        return examples[first : first + count].repeat(times, *[1] * (examples.dim() - 1))
    if isinstance(examples, Mapping):
        return {k: _repeated(v, first, count, times) for k, v in examples.items()}
    return type(examples)([_repeated(v, first, count, times) for v in examples])
