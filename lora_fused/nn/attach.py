"""attach(model, bank): give layers their adapters in place, and take them back exactly."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from difflib import get_close_matches

from torch import Tensor, nn

from lora_fused.adapters import AdapterBank, AdapterStack
from lora_fused.checks import invalid
from lora_fused.mixture import Mixture, Route, Row
from lora_fused.nn.linear import MixtureLayer, layer_class, layer_sizes
from lora_fused.nn.routing import Active, Routing, Site, Using, check_forward, check_routed
from lora_fused.nn.saved import SavedLayer, check_saved, equip, owners, saved_rows

_OP = "attach"


def attach(model: nn.Module, bank: AdapterBank, *, saved_modules: str = "error") -> "Handle":
    """Give every module that the bank adapts its adapters, in place.

    Each module keeps its identity, Parameters, hooks and state_dict keys: only its class changes,
    to a subclass whose forward adds the update of the mixture in force. Adapters never enter
    ``model.state_dict()``; ``lora_fused.io`` saves them. The bank's stacks move to their modules'
    devices. Without a mixture the model computes exactly what it did before.

    Args:
        model: with the bank's modules under the bank's names, each exactly an nn.Linear, an
            nn.Embedding or transformers' Conv1D.
        bank: at least one adapter. Adapters of the same modules may be added later.
        saved_modules: what to do about fully trained modules (PEFT's modules_to_save) in the bank.
            ``"error"``: refuse them by name; ``"ignore"``: use the model's own; ``"apply"``: rows
            with one adapter run its copy of the module, rows with none the model's own.

    Returns:
        The handle that mixes and detaches; ``handle_of(model)`` finds it again, also on a deepcopy,
        which has its own copy of the bank.

    Raises:
        ValueError: a module is missing, of another type or size, on the meta device, or inside
            nn.MultiheadAttention or nn.TransformerEncoderLayer, whose fast paths skip it; the model
            is attached already; the bank is empty or has saved modules. Nothing has changed then.

    Example:
        >>> handle = attach(model, bank)
        >>> with handle.mix(Mixture.rows([{"math": 0.7, "code": 0.3}, None])):
        ...     model.generate(**batch)
        >>> handle.detach()
    """
    if saved_modules not in ("error", "ignore", "apply"):
        rule = "be 'error', 'ignore' or 'apply'"
        raise invalid(_OP, "saved_modules", rule, repr(saved_modules))
    if any(_site(module) for module in model.modules()):
        raise invalid(_OP, "model", "be detached", "an attached model (see handle_of)")
    if not len(bank):
        raise invalid(_OP, "bank", "hold at least one adapter", "an empty bank")
    check_saved_policy(_OP, bank, saved_modules)
    modules = dict(model.named_modules(remove_duplicate=False))
    targets = _targets(bank, modules)
    heads = check_saved(_OP, bank, modules) if saved_modules == "apply" else {}
    layers = {**targets, **heads}
    _check_distinct(layers)
    for name, module in targets.items():
        bank.stacks[name].to(module.weight.device)
    saved = list(bank.saved.values()) if heads else []
    routing = Routing(bank, dict(bank.stacks), tuple(layers), saved_modules, saved)
    for name, module in heads.items():
        equip(module, name, routing)
    for name, module in targets.items():
        module.__class__ = layer_class(module)
        module.lora_stack = bank.stacks[name]
        module.lora_site = Site(name, routing)
    return Handle(model, routing, tuple(layers.values()))


def handle_of(model: nn.Module) -> "Handle":
    """The handle of an attached model; a deepcopy has its own."""
    layers = {s.name: m for m in model.modules() if (s := _site(m)) is not None}
    routing = next((_site(m).routing for m in layers.values()), None)
    if routing is None or len(layers) != len(routing.names):
        what = "one that is not" if routing is None else "a part of one"
        raise invalid("handle_of", "model", "be an attached model", what)
    return Handle(model, routing, tuple(layers.values()))


class Handle:
    """An attached model: mix adapters into its forwards, or detach it."""

    def __init__(self, model: nn.Module, routing: Routing, layers: Sequence[MixtureLayer]):
        self.model, self._routing, self._layers = model, routing, layers

    @property
    def bank(self) -> AdapterBank:
        return self._routing.bank

    def mix(self, mixture: Mixture | Row | Sequence[Row]) -> AbstractContextManager[None]:
        """Put a mixture in force for the forwards (and backwards) inside the with block.

        A dict of weights, one name or None stands for all rows; a list of these has one per sample.
        A nested one overrides it. One thread at a time; after ``bank.remove`` or ``compact`` enter
        again. ValueError where the rows of a batch do not fit, naming the module.

        Gradient checkpointing: call backward() inside the with block; anything else raises, but for
        a compiled layer inside an uncompiled checkpoint, which cannot tell.
        """
        self._routing.check_bank("mix")
        check_saved_policy("mix", self.bank, self._routing.saved_modules)
        mixture = _as_mixture(mixture)
        route = mixture.resolve(self.bank)
        rows = None
        if self._routing.saved_modules == "apply" and self.bank.saved:
            rows = saved_rows(self._routing, route)
        return Using(self._routing, Active(mixture, route, saved_rows=rows))

    def route(
        self, fn: Callable[[str, Tensor], tuple[Tensor, Tensor]], *, per: str = "token"
    ) -> AbstractContextManager[None]:
        """Ask ``fn(module_name, x) -> (ids, weights)`` in every layer: a router (Arrow).

        ids and weights are ``[M, J]``, M the tokens (or samples, by ``per``) of x, or 1.
        """
        if per not in ("sample", "token"):
            raise invalid("route", "per", "be 'sample' or 'token'", repr(per))
        self._routing.check_bank("route")
        check_saved_policy("route", self.bank, self._routing.saved_modules)
        if self._routing.saved:
            rule = "be 'error' or 'ignore' for a router, which picks no single adapter per row"
            raise invalid("route", "saved_modules", rule, "'apply'")
        bank, version = self.bank, self.bank.version

        def router(name: str, x: Tensor) -> Route:
            found = fn(name, x)
            check_routed(bank, name, found)
            return Route(*found, None, per, version)

        return Using(self._routing, Active(fn, None, router))

    def detach(self) -> None:
        """Restore the model exactly; the bank keeps its adapters."""
        routing = self._routing
        routing.check_attached("detach")
        if routing.active.source is not None:
            raise RuntimeError("detach: the mixture must be closed first, got one in force")
        for layer in self._layers:
            if type(layer).__mro__[1] not in (MixtureLayer, SavedLayer):
                raise RuntimeError(
                    f"detach: module {layer.lora_site.name!r} must have the class that attach gave "
                    f"it, got {type(layer).__qualname__} (undo its parametrisation first)"
                )
        for layer in self._layers:
            for name in ("lora_stack", "lora_saved", "lora_held"):
                if hasattr(layer, name):
                    delattr(layer, name)
            del layer.lora_site
            layer.__class__ = type(layer).__mro__[2]  # after our class and its mixin
        routing.attached = False


def check_saved_policy(op: str, bank: AdapterBank, policy: str) -> None:
    """Refuse saved modules where nobody said what to do with them."""
    if policy == "error" and bank.saved:
        found = {name: sorted(owners(tensors)) for name, tensors in bank.saved.items()}
        rule = "have no saved modules (pass saved_modules='ignore' or 'apply')"
        raise invalid(op, "bank", rule, found)


def _as_mixture(mixture: object) -> Mixture:
    if isinstance(mixture, Mixture):
        return mixture
    if isinstance(mixture, (list, tuple)):
        return Mixture.rows(mixture)
    if mixture is None or isinstance(mixture, (str, Mapping)):
        return Mixture.rows([mixture])
    rule = "be a Mixture, a dict of weights, a name, None or a list of these"
    raise invalid("mix", "mixture", rule, type(mixture).__name__)


def _site(module: nn.Module) -> Site | None:
    return getattr(module, "lora_site", None)


def _targets(bank: AdapterBank, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The model's modules under the bank's names, each checked."""
    missing = [name for name in bank.stacks if name not in modules]
    if missing:
        raise invalid(_OP, "model", "have every module of the bank", _missing(missing, modules))
    for name, stack in bank.stacks.items():
        _check_target(f"module {name!r}", modules[name], stack)
        check_forward(_OP, f"module {name!r}", name, modules)
    return {name: modules[name] for name in bank.stacks}


def _check_distinct(layers: dict[str, nn.Module]) -> None:
    first: dict[int, str] = {}
    for name, module in layers.items():
        other = first.setdefault(id(module), name)
        if other != name:
            rule = "be adapted under one name"
            raise invalid(_OP, f"module {name!r}", rule, f"the same module as {other!r}")


def _check_target(what: str, module: nn.Module, stack: AdapterStack) -> None:
    if layer_class(module) is None:
        rule = "be exactly an nn.Linear, nn.Embedding or transformers Conv1D"
        raise invalid(_OP, what, rule, f"{type(module).__module__}.{type(module).__qualname__}")
    embedding = isinstance(module, nn.Embedding)
    if embedding != stack.embedding:
        kinds = ("a linear layer", "an embedding")
        rule = f"be {kinds[stack.embedding]}, as the bank's adapters of it are"
        raise invalid(_OP, what, rule, kinds[embedding])
    if embedding and (module.max_norm is not None or module.scale_grad_by_freq):
        raise invalid(_OP, what, "have no max_norm and no scale_grad_by_freq", module)
    if stack.row_start is None and embedding:
        raise invalid(_OP, what, "have a packed stack", "a slotted one")
    sizes = (stack.in_features, stack.out_features)
    if layer_sizes(module) != sizes:
        rule = f"have the adapters' in and out features {sizes}"
        raise invalid(_OP, what, rule, layer_sizes(module))


def _missing(names: list[str], modules: dict[str, nn.Module]) -> str:
    known = [name for name, module in modules.items() if layer_class(module) is not None]
    lines = []
    for name in names[:5]:
        close = get_close_matches(name, known, n=2, cutoff=0.5)
        lines.append(f"{name!r} (close: {', '.join(map(repr, close)) or 'none'})")
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"no {', '.join(lines)}{more}"
