"""What the attached layers of one model share: the bank and the mixture in force."""

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_fused.adapters import AdapterBank, AdapterStack
from lora_fused.checks import invalid, shape
from lora_fused.methods.subspace import Subspace
from lora_fused.mixture import Route
from lora_fused.nn.plans import Plans, takes_plan
from lora_fused.nn.subspace import Diagonals
from lora_fused.ops.mixture_lora.plan import MixturePlan

# Modules with a fast path that reads their children's weights past the children's forward.
_BYPASSING = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclasses.dataclass(frozen=True, eq=False)
class Active:
    """What the layers read in a forward.

    Attributes:
        source: the Mixture or the router function in force; None: no adapter.
        route: of a mixture. With no adapter a route of -1, which only compiled code reads: a graph
            that saw None there would have to be compiled anew for the first mixture.
        router: ``fn(module_name, x) -> Route``, in place of ``route``.
        saved_rows: of saved modules that are applied; see lora_fused.nn.saved.saved_rows.
    """

    source: object
    route: Route | None
    router: Callable | None = None
    saved_rows: dict[int | None, Tensor | None] | None = None


class Options(NamedTuple):
    """What attach was told; ``left_out`` are the bank's modules that it was told not to attach."""

    saved_modules: str
    impl: str
    left_out: frozenset[str]


class Saved(NamedTuple):
    """An adapter's saved tensors as they stand in ``bank.saved``, and those that need a layer."""

    tensors: dict[str, Tensor]
    trained: dict[str, Tensor]


# id of a stack -> the Routing whose layers hold it, which keeps the stack alive as long as itself.
_HOLDERS: weakref.WeakValueDictionary[int, "Routing"] = weakref.WeakValueDictionary()


def holder(stack: AdapterStack) -> "Routing | None":
    """Who holds a stack; a copy of a stack is held by whoever copied its model."""
    return _HOLDERS.get(id(stack))


class Routing:
    """One plain object per model, held by all of its attached layers.

    Not a ContextVar (it breaks fullgraph compilation) and not a thread-local (a backward pass may
    recompute a layer in another thread).

    Attributes:
        stacks: module name -> the AdapterStack that its layer holds.
        names: of all attached modules.
        saved: the adapters' saved tensors that were looked at; none if they are ignored.
        subspace: whose cores the bank is; None: the bank is of adapters.
        position: module name -> its index in ``bank.modules``, the order of per-module weights.
    """

    def __init__(
        self,
        bank: AdapterBank,
        stacks: dict[str, AdapterStack],
        names: tuple[str, ...],
        options: Options,
        saved: list[Saved],
        subspace: Subspace | None = None,
    ):
        self.bank, self.stacks, self.names = bank, stacks, names
        self.options, self.saved, self.subspace = options, saved, subspace
        self.position = {name: i for i, name in enumerate(bank.modules)}
        self.attached = True
        _HOLDERS.update({id(stack): self for stack in stacks.values()})
        ids = torch.full((1, 1), -1, dtype=torch.int32, device=bank.device)
        weights = torch.zeros(1, 1, device=bank.device)
        self._none = Route(ids, weights, None, "sample", bank.version)
        self.active, self._plans = self._idle(), Plans()
        self._diagonals = Diagonals()
        self._open: list[Active] = []
        self._seen: list = []  # sources of forwards that a backward pass may yet recompute
        self._recomputed = False
        self._owner: int | None = None
        self._lock = threading.Lock()

    def __reduce__(self):
        # deepcopy and pickle take the bank along and leave the mixture in force behind.
        parts = (self.bank, self.stacks, self.names, self.options, self.saved, self.subspace)
        return Routing, parts

    def current(self, name: str, x: Tensor) -> Route:
        """The route of one module, on the device of its input."""
        active = self.active
        route = active.route if active.router is None else active.router(name, x)
        # A graph compiled while idle must not depend on the version, hence the second condition.
        if route.version != self.bank.version and active.source is not None:
            raise RuntimeError(
                f"mix: the mixture must be resolved against the bank as it is at {name!r}, got one "
                "from before remove() or compact(); enter handle.mix again"
            )
        return route if route.adapter_ids.device == x.device else route.to(x.device)

    def plan(self, name: str, x: Tensor, route: Route, stack: AdapterStack) -> MixturePlan | None:
        """The plan of one module's call under ``current``'s route; None: the op wants none."""
        in_basis = self.subspace is not None
        if not takes_plan(x, self.options.impl) or (in_basis and self.subspace.diagonal):
            return None
        active, origin = self.active, route
        if active.router is None:
            origin = active.route
        elif route.adapter_ids.is_inference():  # a router may reuse them, and no edit would show
            return None
        return self._plans.of(name, x, route, origin, stack, in_basis)

    def diagonal(self, name: str) -> Tensor | None:
        """A module's diagonal cores; None where the cores are pairs."""
        is_diagonal = self.subspace is not None and self.subspace.diagonal
        return self._diagonals.of(name, self.stacks[name]) if is_diagonal else None

    def enter(self, active: Active) -> None:
        """Put a mixture in force; a nested one overrides it until it is left."""
        self.check_attached("mix")
        me = threading.get_ident()
        with self._lock:
            if self.active.source is not None and self._owner != me:
                raise RuntimeError(
                    "mix: a model must have one mixture at a time, got a second one from another "
                    "thread; use one thread, or one deepcopy of the model per thread"
                )
            self._open.append(active)
            self.active, self._owner = active, me
            self._plans = Plans()

    def without(self) -> "Using":
        """A with block in which no adapter acts, whatever mixture is in force around it."""
        return Using(self, self._idle())

    def leave(self, active: Active) -> None:
        with self._lock:
            in_order = self._open[-1] is active
            self._open.remove(active)
            self.active = self._open[-1] if self._open else self._idle()
            self._plans = Plans()
        if not in_order:
            raise RuntimeError(
                "mix: mixtures must be left in reverse order of entering, got another order "
                "(two tasks of one thread that share a model?)"
            )

    def check_attached(self, op: str) -> None:
        if not self.attached:
            raise RuntimeError(f"{op}: the model must be attached, got a handle that was detached")

    def release(self) -> None:
        """Let go of the stacks: the model is detached."""
        self.attached = False
        for stack in self.stacks.values():
            _HOLDERS.pop(id(stack), None)

    def check_bank(self, op: str) -> None:
        """Check that the layers still fit the bank, which may have changed since ``attach``."""
        self.check_attached(op)
        for name, stack in self.bank.stacks.items():
            if self.stacks.get(name) is not stack and name not in self.options.left_out:
                raise RuntimeError(
                    f"{op}: the bank must hold the modules it had when it was attached, got "
                    f"{name!r} added since; detach and attach again"
                )
        self.position = {name: i for i, name in enumerate(self.bank.modules)}

    def watch(self, name: str) -> None:
        """Refuse a forward recomputed in a backward pass under another mixture than the original.

        Checkpointing runs a forward again from within the backward pass and reads whatever mixture
        is in force by then; were it another one, the gradients would be wrong without a word.
        """
        source = self.active.source
        if torch._C._current_graph_task_id() != -1:
            self._recomputed = True
            if any(seen is not source for seen in self._seen):
                self._seen.clear()
                raise RuntimeError(
                    f"mix: the mixture must stay open until backward() has recomputed {name!r} "
                    "(gradient checkpointing), got another or none; call backward() inside "
                    "handle.mix, before a checkpointed forward with another mixture"
                )
        elif _may_be_recomputed():
            if self._recomputed:
                self._seen.clear()
                self._recomputed = False
            # Two that differ are refused whatever comes next, so there is no need for a third.
            if len(self._seen) < 2 and all(seen is not source for seen in self._seen):
                self._seen.append(source)

    def _idle(self) -> Active:
        # Of the current version, lest the next mixture be compiled anew.
        return Active(None, self._none._replace(version=self.bank.version))


class Using(contextlib.AbstractContextManager):
    """The with block of one mixture, entered once."""

    def __init__(self, routing: Routing, active: Active):
        self._routing, self._active, self._entered = routing, active, False

    def __enter__(self) -> None:
        if self._entered:
            raise RuntimeError(
                "mix: a with block must be entered once, got one that was entered before; "
                "call handle.mix again"
            )
        self._routing.enter(self._active)
        self._entered = True

    def __exit__(self, *error) -> None:
        self._routing.leave(self._active)


class Site(NamedTuple):
    """One attached layer's place."""

    name: str
    routing: Routing


def _may_be_recomputed() -> bool:
    # Non-reentrant checkpointing runs the forward under saved-tensor hooks. Reentrant: inside an
    # autograd.Function's forward, where both gradient modes are off, unlike under no_grad.
    if torch.is_grad_enabled():
        return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    return not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled()


def check_rows(name: str, route: Route, rows: torch.Size) -> None:
    """Check that a route fits an input of this shape without features; a single row always does."""
    groups = route.groups
    if groups == 1:
        return
    if route.per == "sample":
        count, what = (rows[0] if len(rows) else 1), "samples (x.shape[0], per='sample')"
    else:
        count, what = rows.numel(), "tokens (rows of x, per='token')"
    if groups != count:
        rule = f"have one row or as many as {name!r} (attach(..., modules=...) can leave it out) "
        rule += f"gets {what}, {count}"
        raise invalid("mix", "mixture", rule, groups)


def check_routed(bank: AdapterBank, name: str, found: object) -> None:
    """Check what a router returned for a module; the op checks dtypes, sizes and the ids' range."""
    rule = "be a pair of tensors (ids, weights), both [M, J],"
    what = f"the router's result for {name!r}"
    parts = found if isinstance(found, (tuple, list)) else ()
    if len(parts) != 2 or not all(isinstance(t, Tensor) for t in parts):
        got = [type(t).__name__ for t in parts] or type(found).__name__
        raise invalid("route", what, rule, got)
    ids, weights = found
    if ids.dim() != 2 or ids.shape != weights.shape:
        raise invalid("route", what, rule, f"{shape(ids)} and {shape(weights)}")
    # Ids of removed adapters are in range, and add nothing without a word.
    removed = len(bank) < bank.count and not torch.compiler.is_compiling()
    if removed and ids.device.type == "cpu":
        dead = [k for k in ids.unique().tolist() if k != -1 and not bank.is_live(k)]
        if dead:
            raise invalid("route", f"ids for {name!r}", "be -1 or ids of loaded adapters", dead[:5])


def check_forward(op: str, what: str, name: str, modules: dict[str, nn.Module]) -> None:
    """Check that a changed forward of this module would run, and with real weights."""
    module = modules[name]
    if "forward" in vars(module):
        raise invalid(op, what, "have its class's forward", "one replaced on the instance")
    if any(p.is_meta for p in module.parameters(recurse=False)):
        raise invalid(op, what, "have its weights on a real device", "the meta device")
    while name:
        name = name.rpartition(".")[0]
        if isinstance(modules[name], _BYPASSING):
            rule = f"lie outside {type(modules[name]).__name__}, which reads its weights directly"
            raise invalid(op, what, rule, "a part of it")
