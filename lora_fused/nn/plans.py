"""One MixturePlan for all layers of a forward."""

import torch
from torch import Tensor

from lora_fused.adapters import AdapterStack
from lora_fused.backends import choose
from lora_fused.mixture import Route
from lora_fused.ops.mixture_lora import contract
from lora_fused.ops.mixture_lora import plan as plans
from lora_fused.ops.subspace_lora import plan as of_cores


def takes_plan(x: Tensor, impl: str) -> bool:
    """Whether mixture_lora uses a plan made here: Triton does, outside of compiled code.

    In compiled code each layer makes its own, and the compiler merges the equal ones where it
    differentiates. A graph that stored or read one here would depend on what is stored, and be
    compiled anew whenever that changes.
    """
    # First what is cheapest: on the CPU every layer asks, for nothing.
    if not (x.is_cuda or impl == "triton") or torch.compiler.is_compiling():
        return False
    return choose(contract.OP, impl, x.device, x.dtype) == "triton"


class Plans:
    """The plans of the forward that runs, each made at the first layer that needs it.

    A plan depends on ids, row_mixture and the number of rows alone, so layers that agree in these
    share one. A layer that comes a second time opens another forward, for which all are made anew:
    a layer used twice, or recomputed in a backward pass, costs a plan, but none outlives an edit of
    the ids in place, and a CUDA graph holds the making of every plan that it uses.
    """

    def __init__(self):
        self._served: set[str] = set()
        # The tensors are kept beside their plan, so that no others take their place in memory.
        self._made: dict[tuple, tuple[plans.MixturePlan, Route]] = {}

    def of(
        self,
        name: str,
        x: Tensor,
        route: Route,
        origin: Route,
        stack: AdapterStack,
        in_basis: bool = False,
    ) -> plans.MixturePlan | None:
        """The plan of module ``name`` for its input x; None where the kernel needs none.

        ``route`` lies on x's device, ``origin`` is what it was moved from. ``in_basis``: the call
        is subspace_lora's, with pairs for cores.
        """
        if name in self._served:
            self._served.clear()
            self._made.clear()
        self._served.add(name)
        if not torch.is_grad_enabled() and _is_one_launch(x, route, stack, in_basis):
            return None
        key = (x.shape[:-1].numel(), *_place(x), *_stamp(origin))
        if key not in self._made:
            self._made[key] = (_make(x, route, len(stack)), origin)
        return self._made[key][0]


def _is_one_launch(x: Tensor, route: Route, stack: AdapterStack, in_basis: bool) -> bool:
    # The buffers: factors() would join those in training, for their sizes alone.
    rank = plans.scratch_rank(stack.lora_a, stack.row_start, stack.max_rank)
    x_ni, per_row = x.reshape(-1, x.shape[-1]), route.adapter_ids.shape[1]
    if in_basis:
        sides = (stack.lora_a, stack.lora_b)
        return of_cores.is_one_launch(x_ni.shape[0], per_row, rank, *sides)
    return plans.is_one_launch(x_ni, [stack.lora_b], per_row, rank)


def _make(x: Tensor, route: Route, count: int) -> plans.MixturePlan:
    ids, row_mixture = route.adapter_ids, route.row_mixture
    # The op would say it too, but only after a plan of ids that do not fit.
    contract.check_route(x, ids, route.weights, row_mixture, count)
    if ids.dtype == torch.int64:
        ids = ids.clamp(-(2**31), 2**31 - 1).int()  # as mixture_lora reads them
    return plans.make_plan(ids, row_mixture, x.shape[:-1].numel())


def _place(x: Tensor) -> tuple:
    """Where plans are good: one stream may not read at once what another one writes."""
    inference = torch.is_inference_mode_enabled()  # autograd cannot save what is made there
    if not x.is_cuda:
        return x.device, inference
    stream = torch.cuda.current_stream(x.device).cuda_stream
    return x.device, inference, stream, torch.cuda.is_current_stream_capturing()


def _stamp(route: Route) -> tuple:
    """Which ids a route holds now; edits in place count, where PyTorch counts them."""
    tensors = (route.adapter_ids, route.row_mixture)
    return tuple((id(t), _version(t)) for t in tensors if t is not None)


def _version(t: Tensor) -> int | None:
    return None if t.is_inference() else t._version
