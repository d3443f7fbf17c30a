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
        check_rows(name, route, self._rows(base))
        if route.weights.dim() == 3:
            index = None if site is None else site.routing.position.get(name)
            if index is None:  # compact() took the module out: no adapter has it any more
                return base
            route = route._replace(weights=route.weights[index])
        return self._add_update(x, base, route, shared)

    def _rows(self, base: Tensor) -> torch.Size:
        """The output's shape without features, samples first."""
        return base.shape[:-1]

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


class MixtureConv2d(MixtureLayer, nn.Conv2d):
    """A 1 x 1 nn.Conv2d, a linear layer over pixels, with a stack of adapters.

    Samples, and tokens, are counted in its output; a router is given x as it came. The output has
    the memory format of the convolution's own.
    """

    def _rows(self, base: Tensor) -> torch.Size:
        samples = base.shape[:-3] or torch.Size([1])
        return samples + base.shape[-2:]

    def _add_update(self, x: Tensor, base: Tensor, route: Route, shared: bool) -> Tensor:
        down, across = self.stride
        if (down, across) != (1, 1):
            x = x[..., ::down, ::across]
        x, out = x.movedim(-3, -1), base.movedim(-3, -1)
        y = super()._add_update(x, out, route, shared).movedim(-1, -3)
        if base.dim() == 4 and not base.is_contiguous():  # channels last, as y is
            return y
        return y.contiguous()


def conv_fault(module: nn.Conv2d) -> str | None:
    """What makes a convolution more than a linear layer over pixels; None: nothing does."""
    if tuple(module.kernel_size) != (1, 1):
        return f"a kernel of {' x '.join(map(str, module.kernel_size))}"
    if module.groups != 1:
        return f"{module.groups} groups"
    if module.padding not in ((0, 0), "valid", "same"):
        return f"padding {module.padding}"
    return None


def unsupported(module: nn.Module, why: str = "") -> tuple[str, str]:
    """Rule and finding of the error where ``layer_class`` has none; ``why`` follows the kinds."""
    kind = type(module)
    if kind is nn.Conv2d and conv_fault(module):
        rule = "be 1 x 1, in one group and without padding, for a convolution (a linear layer over"
        return f"{rule} pixels)", conv_fault(module)
    rule = "be exactly an nn.Linear, nn.Embedding, 1 x 1 nn.Conv2d or transformers Conv1D"
    return rule + why, f"{kind.__module__}.{kind.__qualname__}"


def layer_class(module: nn.Module) -> type | None:
    """The class that ``attach`` gives to a module of exactly this type; None: not supported."""
    kind = type(module)
    if kind is nn.Linear:
        return MixtureLinear
    if kind is nn.Embedding:
        return MixtureEmbedding
    if kind is nn.Conv2d:
        return MixtureConv2d if conv_fault(module) is None else None
    if (kind.__module__, kind.__name__) == CONV1D:
        return _conv1d_class()
    return None


def layer_sizes(module: nn.Module) -> tuple[int, int]:
    """(I, O) of a supported module; for an embedding (vocabulary, width)."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
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
