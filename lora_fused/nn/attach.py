"""attach(model, bank): give layers their adapters in place, and take them back exactly.

With a Subspace the bank is that of its cores, and each layer also gets its basis.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn

from lora_fused.adapters import AdapterBank
from lora_fused.checks import invalid
from lora_fused.methods.subspace import Subspace
from lora_fused.mixture import Mixture, Route, Row
from lora_fused.nn.fit import (
    check_base,
    check_distinct,
    check_missing,
    check_words,
    chooser,
    parts_of,
    targets,
)
from lora_fused.nn.linear import MixtureLayer, layer_class
from lora_fused.nn.routing import Active, Options, Routing, Site, Using, check_routed
from lora_fused.nn.saved import SavedLayer, check_saved, equip, saved_of, saved_rows

_OP = "attach"


def attach(
    model: nn.Module,
    bank: AdapterBank | Subspace,
    *,
    modules: Iterable[str] | Callable[[str], bool] | None = None,
    saved_modules: str = "error",
    missing: str = "error",
    impl: str = "auto",
) -> "Handle":
    """Give every module that the bank adapts its adapters, in place.

    Each module keeps its identity, Parameters, hooks and state_dict keys: only its class changes,
    to a subclass whose forward adds the update of the mixture in force. Adapters never enter
    ``model.state_dict()``; ``lora_fused.io`` saves them. The bank's stacks move to their modules'
    devices. Without a mixture the model computes exactly what it did before.

    Args:
        model: with the bank's modules under the bank's names, each exactly an nn.Linear, an
            nn.Embedding, transformers' Conv1D or a 1 x 1 nn.Conv2d (one group, no padding), to
            which every pixel of its output is a row.
        bank: at least one adapter, attached to no other model. Adapters of the same modules may be
            added later. A Subspace is served in its bases: the layers run subspace_lora, and
            ``handle.bank`` is its ``cores``. Its ``add`` and ``new_task`` reach the layers too.
        modules: names of the bank's modules, or a function of a name, where not all are meant: the
            others are left as they are, and no adapter has an effect there.
        saved_modules: what to do about fully trained modules (PEFT's modules_to_save) in the bank.
            ``"error"``: refuse them by name; ``"ignore"``: use the model's own; ``"apply"``: rows
            with one adapter run its copy of the module, rows with none the model's own. Copies
            equal to the model's own, as PEFT writes of embeddings, do not count.
        missing: what to do where an adapter's config targets a module of the model for which it has
            no factors. ``"error"``: refuse it if the adapter has the same module of another layer,
            else warn; ``"warn"``: warn; ``"ignore"``: nothing.
        impl: of the op in every layer; a bank's embeddings have the reference alone.

    Returns:
        The handle that mixes and detaches; ``handle_of(model)`` finds it again, also on a deepcopy,
        which has its own copy of the bank.

    Raises:
        ValueError: ``bank`` is neither; a module is missing, of another type or size, on the meta
            device, or inside nn.MultiheadAttention or nn.TransformerEncoderLayer, whose fast paths
            skip it; the model or the bank is attached already; the bank is empty or has saved
            modules; an adapter lacks a layer. Nothing has changed then.

    Warns:
        UserWarning: an adapter's config names another base model than ``model.config``.

    Notes:
        - The base is not frozen: ``requires_grad`` stays as it is. To train adapters alone:
          ``model.requires_grad_(False)``, then ``optimizer = AdamW(bank.trainable(names))``.
        - The ``lora_dropout`` of a config is not applied, in training either.
        - A mixture is the model's: every forward inside the with block uses it, in any thread.
        - With per="sample" the first axis of every module's input must be the batch.
        - Code that reads ``module.weight`` instead of calling the module gets no update.
        - ``model.half()`` and the like also round the bank, for good, and a subspace's bases.
        - Gradients of cores take in an embedding's padding token, which a bank's lora_a leaves out.

    Example:
        >>> handle = attach(model, bank)
        >>> with handle.mix([{"math": 0.7, "code": 0.3}, None]):
        ...     model.generate(**batch)
        >>> handle.detach()
    """
    check_words(saved_modules, missing, impl)
    subspace = bank if isinstance(bank, Subspace) else None
    bank, bases = parts_of(bank)
    if any(_site(module) for module in model.modules()):
        raise invalid(_OP, "model", "be detached", "an attached model (see handle_of)")
    if not len(bank):
        raise invalid(_OP, "bank", "hold at least one adapter", "an empty bank")
    named, wanted = dict(model.named_modules(remove_duplicate=False)), chooser(bank, modules)
    saved = saved_of(_OP, bank, named, saved_modules)
    adapted = targets(bank, named, wanted, bases)
    heads = check_saved(_OP, bank, saved, named) if saved_modules == "apply" else {}
    layers = {**adapted, **heads}
    check_distinct(layers)
    check_missing(bank, named, wanted, missing)
    check_base(bank, model)
    for name, module in adapted.items():
        bank.stacks[name].to(module.weight.device)
    stacks = {name: bank.stacks[name] for name in adapted}
    options = Options(saved_modules, impl, frozenset(bank.stacks.keys() - stacks.keys()))
    routing = Routing(bank, stacks, tuple(layers), options, saved, subspace)
    for name, module in heads.items():
        equip(module, name, routing)
    for name, module in adapted.items():
        module.__class__ = layer_class(module)
        module.lora_stack = bank.stacks[name]
        if bases is not None:
            module.lora_basis = bases[name].to(module.weight.device)
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

    @property
    def subspace(self) -> Subspace | None:
        """What the model is attached to, where that is a subspace; ``bank`` are its cores."""
        return self._routing.subspace

    def __repr__(self) -> str:
        names, source = self.bank.names, self._routing.active.source
        shown = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
        state = "idle" if self._routing.attached else "detached"
        if isinstance(source, Mixture):
            rows = f"{len(source)} {source.per}s" if len(source) > 1 else "all rows"
            state = f"a Mixture for {rows} in force"
        elif source is not None:
            state = f"router {getattr(source, '__qualname__', type(source).__name__)} in force"
        return f"Handle({len(names)} adapters ({shown}), {len(self._layers)} modules, {state})"

    def mix(self, mixture: Mixture | Row | Sequence[Row]) -> AbstractContextManager[None]:
        """Put a mixture in force for the forwards (and backwards) inside the with block.

        A dict of weights, one name or None stands for all rows; a list of these has one per sample.
        A nested one overrides it. One thread at a time; after ``bank.remove`` or ``compact`` enter
        again. ValueError where the rows of a batch do not fit, naming the module.

        Gradient checkpointing: call backward() inside the with block; anything else raises, but for
        a compiled layer inside an uncompiled checkpoint, which cannot tell.

        CUDA graphs: capture whole forwards inside the with block. A replay reads float32 weights
        and row_mixture on the device as they are by then, but the ids of entering.
        """
        self._routing.check_bank("mix")
        self._check_saved("mix")
        mixture = _as_mixture(mixture)
        route = mixture.resolve(self.bank)
        rows = None
        if self._routing.options.saved_modules == "apply" and self.bank.saved:
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
        self._check_saved("route")
        if any(saved.trained for saved in self._routing.saved):
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
            for name in ("lora_stack", "lora_basis", "lora_saved", "lora_held"):
                if hasattr(layer, name):
                    delattr(layer, name)
            del layer.lora_site
            layer.__class__ = type(layer).__mro__[2]  # after our class and its mixin
        routing.release()

    def _check_saved(self, op: str) -> None:
        routing = self._routing
        known = {id(saved.tensors) for saved in routing.saved}
        if any(id(tensors) not in known for tensors in self.bank.saved.values()):
            modules = dict(self.model.named_modules(remove_duplicate=False))
            later = saved_of(op, self.bank, modules, routing.options.saved_modules, known)
            # A trained copy that came later has no layer to run in; saved_rows refuses its rows.
            routing.saved += [saved for saved in later if not saved.trained]


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
