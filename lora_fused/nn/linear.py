"""Drop-in layers: the frozen layer's own forward, then mixture_lora or subspace_lora. No maths."""

import functools

import torch
from torch import Tensor, nn

from lora_fused.adapters import AdapterStack
from lora_fused.checks import invalid
from lora_fused.mixture import Route
from lora_fused.nn.routing import Site, check_rows
from lora_fused.nn.subspace import add_in_basis, add_of_tokens
from lora_fused.ops import mixture_lora
from lora_fused.ops.mixture_lora import contract
from lora_fused.ops.mixture_lora.reference import embedding_update

CONV1D = ("transformers.pytorch_utils", "Conv1D")


class MixtureLayer:
    """What a layer class gains: base output plus the update of the mixture in force.

    Attributes (all absent from state_dict):
        lora_stack: the layer's AdapterStack, a submodule, so that model.to() moves it.
        lora_basis: its SharedBasis, where the model is attached to a Subspace; the stack's are
            cores then. Else there is no such attribute.
        lora_site: its place in an attached model; None in a layer that stands alone.
    """

    lora_site: Site | None = None

    def forward(self, x: Tensor, route: Route | None = None) -> Tensor:
        """The frozen layer and the update; ``route`` is for layers that stand alone."""
        site = self.lora_site
        name = type(self).__name__ if site is None else site.name
        shared = site is not None and route is None
        if route is not None:
            self._check_alone(name, route)
        if shared:
            # Compiled code cannot ask which backward pass it runs in, nor branch on "no adapter".
            if not torch.compiler.is_compiling():
                site.routing.watch(name)
                if site.routing.active.source is None:
                    return super().forward(x)
            route = site.routing.current(name, x)
        base = super().forward(x)
        if route is None:
            return base
        check_rows(name, route, base.shape[:-1])
        if route.weights.dim() == 3:
            index = None if site is None else site.routing.position.get(name)
            if index is None:  # compact() took the module out: no adapter has it any more
                return base
            route = route._replace(weights=route.weights[index])
        return self._add_update(x, base, route, shared)

    def _check_alone(self, name: str, route: object) -> None:
        if not isinstance(route, Route):
            rule = "be a Route (mixture.resolve(bank))"
            raise invalid(name, "route", rule, type(route).__name__)
        if not hasattr(self, "lora_stack"):
            raise invalid(name, "layer", "have adapters (see from_linear and attach)", "none")

    def _add_update(self, x: Tensor, base: Tensor, route: Route, shared: bool) -> Tensor:
        """base plus the update; ``shared``: by the route that all layers share."""
        stack, site = self.lora_stack, self.lora_site
        plan = site.routing.plan(site.name, x, route, stack) if shared else None
        impl = "auto" if site is None else site.routing.options.impl
        basis = getattr(self, "lora_basis", None)
        if basis is not None:
            bases, diagonal = (basis.basis_a, basis.basis_b), site.routing.diagonal(site.name)
            return add_in_basis(x, base, *bases, stack, route, diagonal, plan, impl)
        return mixture_lora(
            x,
            *stack.factors(),
            stack.row_start,
            route.adapter_ids,
            route.weights,
            scale=stack.scale,
            ranks=stack.slot_ranks,
            row_mixture=route.row_mixture,
            plan=plan,
            max_rank=stack.max_rank,
            base=base,
            impl=impl,
        )


class MixtureLinear(MixtureLayer, nn.Linear):
    """nn.Linear with a stack of adapters."""

    @classmethod
    def from_linear(cls, linear: nn.Linear, stack: AdapterStack) -> "MixtureLinear":
        """A layer of its own around ``linear``'s Parameters: ``layer(x, route)``."""
        sizes = (linear.in_features, linear.out_features)
        if (stack.in_features, stack.out_features) != sizes:
            got = f"{stack.in_features} and {stack.out_features}"
            raise invalid("MixtureLinear", "stack", f"have in and out features {sizes}", got)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = sizes
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.train(linear.training)
        layer.lora_stack = stack
        return layer


class MixtureEmbedding(MixtureLayer, nn.Embedding):
    """nn.Embedding with a stack of adapters: gathers columns of lora_a."""

    def _add_update(self, x: Tensor, base: Tensor, route: Route, shared: bool) -> Tensor:
        stack, rows = self.lora_stack, base.reshape(-1, base.shape[-1])
        basis = getattr(self, "lora_basis", None)
        if basis is not None:
            name, routing = self.lora_site
            options = (routing.diagonal(name), None, routing.options.impl)
            return add_of_tokens(x, base, basis, stack, route, *options)
        ids, weights, row_mixture = route[:3]
        contract.check_route(rows, ids, weights, row_mixture, len(stack))
        args = (stack.row_start, None, ids, weights, stack.scale, row_mixture, rows)
        _, a, b, row_start, _, *rest = contract.flatten(rows, *stack.factors(), *args)
        tokens, options = x.reshape(-1), (stack.max_rank, self.padding_idx)
        with torch.autocast(x.device.type, enabled=False):  # it would round the intermediates
            y = embedding_update(tokens, a, b, row_start, *rest, *options)
        return y.reshape(base.shape)


def layer_class(module: nn.Module) -> type | None:
    """The class that ``attach`` gives to a module of exactly this type; None: not supported."""
    kind = type(module)
    if kind is nn.Linear:
        return MixtureLinear
    if kind is nn.Embedding:
        return MixtureEmbedding
    if (kind.__module__, kind.__name__) == CONV1D:
        return _conv1d_class()
    return None


def layer_sizes(module: nn.Module) -> tuple[int, int]:
    """(I, O) of a supported module; for an embedding (vocabulary, width)."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return tuple(module.weight.shape)


@functools.cache
def _conv1d_class() -> type:
    from transformers.pytorch_utils import Conv1D

    doc = "transformers' Conv1D (weight [I, O]) with a stack of adapters."
    members = {"__doc__": doc, "__module__": __name__, "__qualname__": "MixtureConv1D"}
    return type("MixtureConv1D", (MixtureLayer, Conv1D), members)


def __getattr__(name: str):
    # By name too, so that an attached model can be pickled, and without importing transformers.
    if name == "MixtureConv1D":
        return _conv1d_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
