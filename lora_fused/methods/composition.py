"""Adapters composed at run time, with one weight per adapter and layer: uniform, or learned.

**The paper says** (Asadi et al. 2024, arXiv 2402.15414): a layer becomes W + sum_k p_k B_k A_k,
with p = 1 / K, or p = softmax(v) for a vector v of each adapted layer's own, trained by
back-propagation on the few examples of a new task, together with its head; A, B and W are frozen.
**We compute** just that, each update with its scale s_k, in one mixture_lora per layer that takes
p as a tensor: dp_k = s_k <dY B_k, x A_k^T>, dv = p * (dp - <dp, p>). Nothing is merged, so rows of
other tasks can share the batch, and what a step saves does not grow with K.
**We differ**: the public code detaches the softmax's denominator, which leaves dv = p * dp, no
gradient of the loss; it also runs K adapter paths one after the other. Weights may also be
unconstrained or lie on the simplex with exact zeros, and an entropy or an L1 term can be added.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_fused.adapters import Adapter, AdapterBank
from lora_fused.checks import invalid
from lora_fused.methods.merging import Merged, merge
from lora_fused.methods.progress import show
from lora_fused.mixture import Mixture

_OP = "LearnedComposition"
_FIT = "LearnedComposition.fit"
CONSTRAINTS = ("softmax", "simplex", "none")


def uniform(bank: AdapterBank) -> Mixture:
    """The mean of all updates of a bank, in every layer; an adapter without a layer adds 0 to it.

    Example:
        >>> with handle.mix(uniform(bank)):
        ...     model(**batch)
    """
    if not isinstance(bank, AdapterBank) or not len(bank):
        raise invalid("uniform", "bank", "be an AdapterBank with adapters", repr(bank))
    return Mixture.uniform(bank.names)


class Fit(NamedTuple):
    """What ``LearnedComposition.fit`` did; lists by epoch.

    Attributes:
        losses: means over the batches, without penalties, as they were while training.
        validation: means over the validation batches after each epoch; empty without them.
        best: the epoch whose values were kept.
    """

    losses: list[float]
    validation: list[float]
    best: int


class LearnedComposition(nn.Module):
    """One trainable weight per adapter and layer, starting at the uniform composition.

    p[l] = softmax(logits[l]) for each of the bank's L modules; the layer adds
    sum_k p[l, k] * scale[k] * B_k A_k x.

    Args:
        bank: The adapters; they stay as they are.
        names: Those that take part. Default: all. An adapter that lacks a module adds 0 there,
            though its weight counts.
        constraint: ``"softmax"``: positive, sum 1. ``"simplex"``: not negative, sum 1, the
            Euclidean projection of ``logits``: adapters can drop out exactly (sparsemax, arXiv
            1602.02068). ``"none"``: any numbers, ``logits`` themselves.

    Attributes:
        logits: ``[L, J]``, the only Parameter: L modules in the order of ``bank.modules``, J names.
        names, layers, constraint: names of adapters and of modules; a state_dict holds them, and
            loading checks them.

    Raises:
        ValueError: an unknown name or constraint; a state_dict of other names, layers or
            constraint, before anything is loaded.

    Numerics:
        The gradient is that of the loss (finite differences agree). Weights are read as float32.

    Cost:
        One mixture_lora per layer and direction. A kernel saves each layer's x and refers to the
        bank, whatever K; the reference saves rank-wide intermediates besides.

    Source:
        arXiv 2402.15414; see the module's docstring for where we differ.

    Example:
        >>> model.requires_grad_(False)
        >>> handle, composition = attach(model, bank), LearnedComposition(bank)
        >>> optimizer = torch.optim.Adam([*composition.parameters(), *head.parameters()], lr=0.05)
        >>> for batch, labels in batches:
        ...     with handle.mix(composition.mixture()):
        ...         loss = F.cross_entropy(head(model(**batch).pooler_output), labels)
        ...     optimizer.zero_grad()
        ...     (loss + 0.01 * composition.entropy()).backward()
        ...     optimizer.step()
    """

    def __init__(
        self,
        bank: AdapterBank,
        names: Sequence[str] | None = None,
        *,
        constraint: str = "softmax",
    ):
        super().__init__()
        if not isinstance(bank, AdapterBank):
            raise invalid(_OP, "bank", "be an AdapterBank", type(bank).__name__)
        names = chosen_names(_OP, bank, names)
        if constraint not in CONSTRAINTS:
            raise invalid(_OP, "constraint", f"be one of {CONSTRAINTS}", repr(constraint))
        self.bank, self.names, self.layers, self.constraint = bank, names, bank.modules, constraint
        start = 1 / len(names) if constraint == "none" else 0.0
        size = (len(bank.modules), len(names))
        self.logits = nn.Parameter(torch.full(size, start, device=bank.device))
        self.register_load_state_dict_pre_hook(_check_facts)

    def forward(self) -> Tensor:
        """The weights ``[L, J]``, with gradients for ``logits``."""
        if self.constraint == "softmax":
            return self.logits.softmax(-1)
        return _onto_simplex(self.logits) if self.constraint == "simplex" else self.logits

    def mixture(self) -> Mixture:
        """The weights as a Mixture for ``handle.mix``, with gradients where they are on."""
        if self.bank.modules != self.layers:
            raise RuntimeError(
                f"{_OP}: the bank must have the modules it had, {len(self.layers)}, got "
                f"{len(self.bank.modules)} after compact() or add(); make a new composition"
            )
        return Mixture.of(self.names, self())

    def entropy(self) -> Tensor:
        """-sum p log p, the mean over layers, in nats: added to a loss it asks for few adapters."""
        if self.constraint == "none":
            rule = "be 'softmax' or 'simplex', whose weights are a distribution"
            raise invalid(f"{_OP}.entropy", "constraint", rule, "'none'")
        p = self()
        # Of an exact zero the derivative is infinite, though what it adds is 0.
        return torch.special.entr(torch.where(p > 0, p, 1.0)).sum(-1).mean()

    def l1(self) -> Tensor:
        """sum |p|, the mean over layers; only unconstrained weights have one that varies."""
        if self.constraint != "none":
            rule = "be 'none' (else the weights' absolute values always sum to 1)"
            raise invalid(f"{_OP}.l1", "constraint", rule, repr(self.constraint))
        return self().abs().sum(-1).mean()

    @torch.no_grad()
    def weights(self) -> dict[str, dict[str, float]]:
        """Layer -> adapter -> weight."""
        table = self().float().tolist()
        return {
            layer: dict(zip(self.names, row, strict=True))
            for layer, row in zip(self.layers, table, strict=True)
        }

    def merged(
        self,
        *,
        combination_type: str = "cat",
        rank: int | None = None,
        energy: float | None = None,
        name: str = "composition",
        dtype: torch.dtype | None = None,
        saved_modules: str = "error",
    ) -> Merged:
        """One adapter that does what the composition does; options as ``merge`` has them.

        ``"cat"``: exact, of the sum of the ranks; ``"svd"`` with ``rank`` or ``energy``: smaller.
        To merge into the base weights instead: ``merge_into_base(model, bank, self.mixture())``.
        """
        weights = self.weights()
        parts = AdapterBank(dtype=self.bank.dtype, device=self.bank.device)
        adapters = [self._weighted(one, weights) for one in self.names]
        parts.add_many([adapter for adapter in adapters if adapter.modules])
        if not len(parts):
            rule = "hold one other than 0 where its adapter has the layer"
            raise invalid(f"{_OP}.merged", "weights", rule, "none")
        options = {"combination_type": combination_type, "rank": rank, "energy": energy}
        options |= {"name": name, "dtype": dtype, "saved_modules": saved_modules}
        merged = merge(parts, dict.fromkeys(parts.names, 1.0), **options)
        merged.adapter.metadata["merge"]["weights"] = weights
        return merged

    def _weighted(self, name: str, weights: dict[str, dict[str, float]]) -> Adapter:
        """An adapter with its weights in its scales, without the layers where they are 0."""
        adapter = self.bank.adapter(name)
        modules = {
            layer: replace(part, scale=part.scale * weights[layer][name])
            for layer, part in adapter.modules.items()
            if weights[layer][name]
        }
        return replace(adapter, modules=modules)

    def fit(
        self,
        handle,
        loss: Callable[[object], Tensor],
        batches: Iterable,
        *,
        train: Iterable[nn.Parameter] = (),
        epochs: int = 10,
        learning_rate: float = 0.05,
        entropy: float = 0.0,
        l1: float = 0.0,
        validation: Iterable | None = None,
        patience: int | None = None,
        progress: bool | Callable[[int, int], None] = True,
    ) -> Fit:
        """Train by Adam; the class's docstring shows the same as a plain loop.

        Args:
            handle: Of the model, attached to this bank. The model's parameters are frozen
                meanwhile, but for those in ``train``; its modes (train, eval) stay.
            loss: ``loss(batch)``, a scalar; it runs the model, inside ``handle.mix``.
            batches: Anything that can be iterated once per epoch.
            train: What trains beside the weights: ``head.parameters()``.
            epochs: At most.
            learning_rate: Of all; the knob to turn first.
            entropy: Factor of ``entropy()``. Positive: few adapters per layer.
            l1: Factor of ``l1()``.
            validation: Batches whose mean loss decides which epoch's values are kept; without
                them, the last one's.
            patience: Stop after so many epochs without a better validation.
            progress: True: a line on stderr where that is a terminal; or called as
                progress(done, total) after each epoch.

        Returns:
            Losses by epoch. Weights and ``train`` then hold the values of the best epoch, also
            after an interrupt or an error.

        Raises:
            ValueError: a wrong argument; a loss or a gradient that is not finite.
        """
        train = list(train)
        _check_fit(self, handle, batches, train, epochs, validation, patience, l1)
        values = [*self.parameters(), *train]
        optimizer = torch.optim.Adam(values, learning_rate)

        def step(batch) -> float:
            with handle.mix(self.mixture()):
                found = _scalar(loss(batch))
                total = found + entropy * self.entropy() if entropy else found
                total = total + l1 * self.l1() if l1 else total
                optimizer.zero_grad()
                total.backward()
            optimizer.step()
            return found.item()

        with _frozen(handle.model, but=train), _Kept(values) as kept:
            fit = Fit([], [], -1)
            for epoch in range(epochs):
                fit.losses.append(_mean(step(batch) for batch in batches))
                if not all(p.isfinite().all() for p in values):
                    raise invalid(_FIT, "loss", "have finite gradients", "NaN or infinity")
                if validation is not None:
                    with torch.no_grad(), handle.mix(self.mixture()):
                        fit.validation.append(_mean(_scalar(loss(b)).item() for b in validation))
                earlier = fit.validation[:-1]
                if not earlier or fit.validation[-1] < min(earlier):
                    fit = fit._replace(best=epoch)
                    kept.update()
                stops = patience is not None and epoch - fit.best >= patience
                done = epoch + 1
                show(progress, done, epochs, _line(done, epochs, fit), ends=stops or done == epochs)
                if stops:
                    break
        optimizer.zero_grad()
        return fit

    def extra_repr(self) -> str:
        size = f"{len(self.names)} adapters, {len(self.layers)} layers"
        return f"{size}, constraint={self.constraint!r}"

    def get_extra_state(self) -> Tensor:
        """Names, layers and constraint, as a tensor, so that safetensors can hold them too."""
        facts = {"names": self.names, "layers": self.layers, "constraint": self.constraint}
        return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: what it says was compared before the tensors were loaded."""


def _check_facts(module: LearnedComposition, state_dict: dict, prefix: str, *_) -> None:
    held = state_dict.get(f"{prefix}_extra_state")
    if held is None:
        return  # a missing key, which load_state_dict reports in its own way
    facts = json.loads(bytes(held.tolist()))
    own = json.loads(bytes(module.get_extra_state().tolist()))
    for label, value in own.items():
        if facts.get(label) != value:
            got = facts.get(label)
            rule = f"have this composition's {label} {_few(value)}"
            raise invalid(f"{_OP}.load_state_dict", "state_dict", rule, _few(got))


def _few(value: object) -> str:
    if not isinstance(value, list) or len(value) <= 6:
        return repr(value)
    return f"{value[:6]} and {len(value) - 6} more"


def chosen_names(op: str, bank: AdapterBank, names: Sequence[str] | None) -> tuple[str, ...]:
    """The names asked for, or all of the bank's; each known and there once."""
    if isinstance(names, str):
        raise invalid(op, "names", "be a list of names", repr(names))
    names = tuple(bank.names if names is None else names)
    for name in names:
        bank.id(name)
    if not names or len(set(names)) < len(names):
        raise invalid(op, "names", "be distinct, and at least one", list(names))
    return names


def _onto_simplex(values: Tensor) -> Tensor:
    """The nearest point of the simplex, row by row: (v - t)_+ with the t that makes it sum to 1."""
    ordered = values.sort(-1, descending=True).values
    excess = ordered.cumsum(-1) - 1
    count = torch.arange(1, values.shape[-1] + 1, device=values.device)
    size = (ordered * count > excess).sum(-1, keepdim=True)
    return (values - excess.gather(-1, size - 1) / size).clamp_min(0)


def _check_fit(composition, handle, batches, train, epochs, validation, patience, l1) -> None:
    if getattr(handle, "bank", None) is not composition.bank:
        rule = "be that of a model attached to the composition's own bank"
        raise invalid(_FIT, "handle", rule, repr(handle))
    if not all(isinstance(p, nn.Parameter) and p.requires_grad for p in train):
        rule = "hold Parameters that require grad (head.requires_grad_(True))"
        raise invalid(_FIT, "train", rule, "others")
    for label, value in (("epochs", epochs), ("patience", patience)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise invalid(_FIT, label, "be an integer of at least 1", repr(value))
    for label, value in (("batches", batches), ("validation", validation)):
        if value is not None and iter(value) is value:
            rule = "be iterable once per epoch (a list, a DataLoader)"
            raise invalid(_FIT, label, rule, type(value).__name__)
    if patience is not None and validation is None:
        raise invalid(_FIT, "patience", "be given with validation only", patience)
    if l1 and composition.constraint != "none":
        composition.l1()  # says why


def _scalar(loss: object) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise invalid(_FIT, "loss", "return a scalar tensor", got)
    if not loss.isfinite():
        raise invalid(_FIT, "loss", "stay finite", loss.item())
    return loss


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    if not values:
        raise invalid(_FIT, "batches and validation", "hold at least one batch", "none")
    return math.fsum(values) / len(values)


@contextlib.contextmanager
def _frozen(model: nn.Module, but: list[nn.Parameter]):
    spared = {id(p) for p in but}
    held = [p for p in model.parameters() if p.requires_grad and id(p) not in spared]
    try:
        for p in held:
            p.requires_grad_(False)
        yield
    finally:
        for p in held:
            p.requires_grad_(True)


class _Kept(contextlib.AbstractContextManager):
    """Puts back the values of the last ``update``, at first the present ones, whatever happens."""

    def __init__(self, parameters: list[nn.Parameter]):
        self._parameters = parameters
        self.update()

    def update(self) -> None:
        self._values = [p.detach().clone() for p in self._parameters]

    @torch.no_grad()
    def __exit__(self, *error) -> None:
        for p, value in zip(self._parameters, self._values, strict=True):
            p.copy_(value)


def _line(done: int, total: int, fit: Fit) -> str:
    last = f", validation {fit.validation[-1]:.4f}" if fit.validation else ""
    return f"epoch {done} of {total}, loss {fit.losses[-1]:.4f}{last}"
