"""merge_into_base(model, bank, mixture): a mixture in the base weights, and the exact way back."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_fused.adapters import AdapterBank, AdapterStack
from lora_fused.checks import invalid
from lora_fused.mixture import Mixture, Route, Row
from lora_fused.nn.fit import check_base, check_distinct, check_present
from lora_fused.nn.linear import MixtureLayer, layer_class, layer_sizes, unsupported
from lora_fused.nn.saved import saved_of

_OP = "merge_into_base"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def merge_into_base(
    model: nn.Module,
    bank: AdapterBank,
    mixture: Mixture | Row,
    *,
    tied: str = "error",
    saved_modules: str = "error",
) -> "MergedBase":
    """Add a mixture's updates to the model's weights, in place, until ``undo()``.

    W[l] becomes W[l] + sum_k weights[l, k] * scale[k] * B_k A_k for each module l that an adapter
    of the mixture has. The model then runs without any cost of adapters, for all rows alike.

    Args:
        model: Detached, with the bank's modules under the bank's names, each exactly an nn.Linear,
            an nn.Embedding, a 1 x 1 nn.Conv2d or transformers' Conv1D with ordinary weights.
        bank: The adapters, packed; also one that is attached to another model.
        mixture: Of a single row: a Mixture (with weights per layer too, as a learned composition
            has), a dict of weights or one name.
        tied: What to do about a weight that another module uses as well (an embedding that is the
            head too). ``"error"``: refuse it by name; ``"untie"``: until the undo the adapted
            module has a Parameter of its own, and the other one stays as it is.
        saved_modules: Of the adapters used, fully trained modules (modules_to_save) that differ
            from the model's: ``"error"``, or ``"ignore"`` to keep the model's own.

    Returns:
        The handle that undoes it; with ``with`` the end of the block does.

    Raises:
        ValueError: a module is missing, quantised, of another class or size, attached, tied, or
            gets values that are not finite; more than one row; an unknown adapter. The model is
            then as it was, bit for bit.

    Warns:
        UserWarning: an adapter's config names another base model than ``model.config``.

    Numerics:
        Update and sum in float32 (float64 for float64 weights), one rounding to the weight's dtype.
        The undo is bitwise: it copies the original values back.

    Cost:
        A copy of every merged weight, held by what is returned and freed with it: dropping that
        makes the merge permanent.

    Example:
        >>> with merge_into_base(model, bank, {"math": 0.7, "code": -0.2}):
        ...     model.generate(**batch)
    """
    _check_words(tied, saved_modules)
    route = _resolve(bank, mixture)
    named = dict(model.named_modules(remove_duplicate=False))
    targets = _targets(bank, named, route)
    _check_saved(bank, named, route, saved_modules)
    shared = _tied(named, targets)
    if shared and tied == "error":
        rule = "have weights that no other module uses (or pass tied='untie')"
        raise invalid(_OP, "model", rule, shared)
    check_base(bank, model, _OP)
    merged = MergedBase(model)
    # What is made in inference mode, autograd could not use later.
    with torch.inference_mode(False), torch.no_grad():
        try:
            for name, module in targets.items():
                terms = _of_layer(route, bank, name)
                weight = _merged_weight(name, module, bank.stacks[name], terms)
                merged._put(name, module, weight, untie=name in shared)
        except BaseException:
            merged._put_back()
            raise
    return merged


class _Original(NamedTuple):
    """A module's weight from before, and how the merge left it."""

    module: nn.Module
    parameter: nn.Parameter
    values: Tensor | None  # a copy; None: the Parameter was replaced, not written to
    merged: nn.Parameter
    checksum: tuple


class MergedBase(contextlib.AbstractContextManager):
    """A model with a mixture in its weights; ``undo()`` takes it out, bit for bit."""

    def __init__(self, model: nn.Module):
        self.model = model
        self._originals: dict[str, _Original] = {}
        self._undone = False

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules whose weights changed."""
        return tuple(self._originals)

    @property
    def nbytes(self) -> int:
        """Memory that the way back costs: the original weights."""
        return sum(one.parameter.nbytes for one in self._originals.values())

    def __repr__(self) -> str:
        state = "undone" if self._undone else f"{self.nbytes / 2**20:.1f} MiB of originals held"
        return f"MergedBase({len(self._originals)} modules, {state})"

    def __exit__(self, *error) -> None:
        self.undo()

    def undo(self) -> None:
        """Put every original weight back, bit for bit.

        Raises RuntimeError, having changed nothing, if it was undone before or a weight is no
        longer what the merge made of it: trained, converted, or merged into once more.
        """
        if self._undone:
            raise RuntimeError("undo: the mixture must be in the weights, got one taken out before")
        for name, one in self._originals.items():
            if one.module.weight is not one.merged or _checksum(one.merged) != one.checksum:
                raise RuntimeError(
                    f"undo: the weight of {name!r} must be as merge_into_base left it, got one "
                    "changed since (undo later merges first; training or converting the model "
                    "makes a merge permanent)"
                )
        with torch.inference_mode(False), torch.no_grad():
            self._put_back()

    def _put(self, name: str, module: nn.Module, weight: Tensor, *, untie: bool) -> None:
        parameter = module.weight
        if untie:
            merged, values = nn.Parameter(weight, parameter.requires_grad), None
            merged.grad = parameter.grad
        else:
            merged, values = parameter, parameter.detach().clone()
        # Recorded before it is written, so that an interrupt in between is undone too.
        self._originals[name] = _Original(module, parameter, values, merged, ())
        if untie:
            module.weight = merged
        else:
            parameter.copy_(weight)
        self._originals[name] = self._originals[name]._replace(checksum=_checksum(merged))

    def _put_back(self) -> None:
        for one in self._originals.values():
            if one.values is None:
                one.module.weight = one.parameter
            else:
                one.parameter.copy_(one.values)
        self._undone = True


def _checksum(parameter: nn.Parameter) -> tuple[torch.dtype, int, int]:
    """What changes when values do or trade places: sums of bit patterns, rows and columns numbered.

    Integers, so no order of summation matters. Not the version counter: views of one storage share
    theirs, and a later merge that was undone raises it too.
    """
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
    rows, columns = [], 0
    table = parameter.detach().flatten(1).view(bits)
    for part in table.split(64):  # in cache: a third of one sum's time
        part = part.long()
        rows.append(part.sum(1))
        columns = columns + part.sum(0)
    return parameter.dtype, *(
        int((s * torch.arange(1, len(s) + 1).to(s)).sum()) for s in (torch.cat(rows), columns)
    )


def _merged_weight(name: str, module: nn.Module, stack: AdapterStack, terms: dict) -> Tensor:
    """The weight with the update, in its own dtype, checked to be finite."""
    weight = module.weight
    compute = torch.float64 if weight.dtype == torch.float64 else torch.float32
    factors = [t.detach().to(weight.device) for t in stack.factors()]
    rows = torch.cat([torch.arange(stack.rows(k).start, stack.rows(k).stop) for k in terms])
    rows = rows.to(weight.device)
    lora_a, lora_b = (t.index_select(0, rows).to(compute) for t in factors)
    values = [float(stack.scale[k]) * w for k, w in terms.items()]
    factor = torch.tensor(values, dtype=compute)
    factor = factor.repeat_interleave(torch.tensor([stack.ranks[k] for k in terms]))
    lora_b = lora_b * factor.to(weight.device)[:, None]
    transposed = not isinstance(module, (nn.Linear, nn.Conv2d))
    left, right = (lora_a, lora_b) if transposed else (lora_b, lora_a)
    flat = weight.flatten(1).to(compute)  # of a 1 x 1 convolution [O, I, 1, 1]
    merged = torch.addmm(flat, left.T, right).to(weight.dtype).view(weight.shape)
    if not merged.isfinite().all():
        what = "values beyond it"
        if not weight.isfinite().all():
            what = "non-finite weights in the model"
        elif not (lora_a.isfinite().all() and lora_b.isfinite().all()):
            what = "non-finite values in an adapter"
        raise invalid(_OP, f"weight of {name!r}", f"stay finite in {weight.dtype}", what)
    return merged


def _resolve(bank: AdapterBank, mixture: Mixture | Row) -> Route:
    if not isinstance(bank, AdapterBank):
        rule = "be an AdapterBank (of a subspace: subspace.reconstruct)"
        raise invalid(_OP, "bank", rule, type(bank).__name__)
    if isinstance(mixture, (str, Mapping)):
        mixture = Mixture.rows([mixture])
    if not isinstance(mixture, Mixture):
        got = f"{len(mixture)} rows" if isinstance(mixture, Sequence) else type(mixture).__name__
        rule = "be a Mixture of a single row, a dict of weights or one name"
        raise invalid(_OP, "mixture", rule, got)
    if len(mixture) != 1:
        rule = "have a single row, for weights are the same for all inputs"
        raise invalid(_OP, "mixture", rule, f"{len(mixture)} rows")
    route = mixture.resolve(bank, "cpu")
    row = 0 if route.row_mixture is None else int(route.row_mixture[0])
    ids, weights = route.adapter_ids[row : row + 1], route.weights[..., row : row + 1, :].detach()
    if not weights.isfinite().all():
        raise invalid(_OP, "mixture", "have finite weights", "NaN or infinity")
    return route._replace(adapter_ids=ids, weights=weights, row_mixture=None)


def _of_layer(route: Route, bank: AdapterBank, name: str) -> dict[int, float]:
    """The ids that change a module, each with its weight there."""
    weights = route.weights
    if weights.dim() == 3:
        weights = weights[bank.modules.index(name)]
    found: dict[int, float] = {}
    for k, weight in zip(route.adapter_ids[0].tolist(), weights[0].tolist(), strict=True):
        if k >= 0 and weight and bank.stacks[name].ranks[k]:
            found[k] = found.get(k, 0.0) + weight
    return found


def _targets(bank: AdapterBank, named: dict[str, nn.Module], route: Route) -> dict[str, nn.Module]:
    """The modules that the mixture changes, each checked."""
    names = [name for name in bank.modules if _of_layer(route, bank, name)]
    if not names:
        raise invalid(_OP, "mixture", "change at least one module", "weights of 0 or no adapter")
    check_present(names, named, "the adapters", _OP)
    for name in names:
        _check_module(name, named[name], bank.stacks[name])
    check_distinct({name: named[name] for name in names}, _OP)
    return {name: named[name] for name in names}


def _check_module(name: str, module: nn.Module, stack: AdapterStack) -> None:
    what = f"module {name!r}"
    if isinstance(module, MixtureLayer):
        raise invalid(_OP, what, "be detached first (handle.detach())", "an attached layer")
    if layer_class(module) is None:
        why = " (quantised and wrapped layers have no weight to add to)"
        raise invalid(_OP, what, *unsupported(module, why))
    weight = module._parameters.get("weight")
    if weight is None:
        rule = "have its weight as a Parameter (remove weight_norm and the like)"
        raise invalid(_OP, what, rule, "one computed from others")
    # Of a quantised tensor subclass, in a plain nn.Linear, the dtype can be that of its dequantised
    # values.
    plain = type(weight.data) is Tensor and weight.layout == torch.strided
    if not plain or weight.dtype not in _DTYPES:
        got = f"{type(weight.data).__name__} of {weight.dtype}, {weight.layout}"
        raise invalid(_OP, what, "have an ordinary floating-point weight", got)
    if weight.is_meta or weight.is_inference():
        got = "the meta device" if weight.is_meta else "a tensor made in inference mode"
        raise invalid(_OP, what, "have a weight that can be written to", got)
    if stack.embedding != isinstance(module, nn.Embedding):
        kinds = ("a linear layer", "an embedding")
        raise invalid(_OP, what, f"be {kinds[stack.embedding]}, as the adapters are", module)
    sizes = (stack.in_features, stack.out_features)
    if layer_sizes(module) != sizes:
        rule = f"have the adapters' in and out features {sizes}"
        raise invalid(_OP, what, rule, layer_sizes(module))
    if stack.row_start is None:
        raise invalid(_OP, f"adapters of {name!r}", "be packed", "padded slots, which a host owns")


def _tied(named: dict[str, nn.Module], targets: dict[str, nn.Module]) -> dict[str, list[str]]:
    """Target -> tensors of other modules that lie in the same memory."""
    spans: dict[int, list[tuple[int, int, int, str]]] = {}
    seen = set()
    for name, module in named.items():
        if id(module) in seen:
            continue
        seen.add(id(module))
        for leaf, t in (*module._parameters.items(), *module._buffers.items()):
            if isinstance(t, Tensor) and not t.is_meta and type(t.data) is Tensor and t.numel():
                place = (*_span(t), id(module), f"{name}.{leaf}")
                spans.setdefault(t.untyped_storage().data_ptr(), []).append(place)
    found = {}
    for name, module in targets.items():
        first, last = _span(module.weight)
        others = spans[module.weight.untyped_storage().data_ptr()]
        shared = [
            leaf for a, b, owner, leaf in others if a < last and first < b and owner != id(module)
        ]
        if shared:
            found[name] = shared
    return found


def _span(t: Tensor) -> tuple[int, int]:
    """First byte and end of what a tensor can reach in its storage."""
    reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1
    first = t.storage_offset() * t.element_size()
    return first, first + reach * t.element_size()


def _check_saved(bank: AdapterBank, named: dict, route: Route, policy: str) -> None:
    used = set(route.adapter_ids.flatten().tolist())
    others = {id(tensors) for name, tensors in bank.saved.items() if bank.id(name) not in used}
    found = [] if policy == "ignore" else saved_of(_OP, bank, named, "apply", others)
    trained = sorted({path.rpartition(".")[0] for saved in found for path in saved.trained})
    if trained:
        rule = "have no saved modules (pass saved_modules='ignore' to keep the model's own)"
        raise invalid(_OP, "adapters", rule, trained)


def _check_words(tied: str, saved_modules: str) -> None:
    words = {"tied": (tied, "untie"), "saved_modules": (saved_modules, "ignore")}
    for label, (word, other) in words.items():
        if word not in ("error", other):
            raise invalid(_OP, label, f"be 'error' or {other!r}", repr(word))
