"""Drop tokens of a vision transformer by the attention that its CLS token pays them.

Hooks alone do it: they read the outputs of a block's q and k layers and shorten its output. The
model's own code runs unchanged, whatever attention it uses, so that dropping nothing is the
unpruned network bit for bit, and each residual is the network's own.
"""

import contextlib
import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_fused.checks import invalid, shape
from lora_fused.nn.vit import Encoder, encoder_of

_OP = "prune_tokens"
_START = -1  # the "layer" of tokens that are dropped before the first block


def prune_tokens(
    model: nn.Module,
    ratios: Mapping[int, float] | None = None,
    *,
    keep: Tensor | Mapping[int, Tensor] | None = None,
) -> "TokenPruning":
    """Run a ViT on fewer tokens inside a with block: on those that CLS looks at, or on given ones.

    Of the n patch tokens that reach the end of block l, floor(ratios[l] * n) leave: those with the
    least attention from CLS in that block, softmax(q_CLS k^T / sqrt(head size)) over all tokens,
    averaged over heads. Later blocks see what is left, so ratios multiply. Every row of a batch
    keeps as many tokens as any other. CLS and other tokens in front (registers) always stay.

    Args:
        model: Holds one ViT with a CLS token: timm's VisionTransformer, transformers' ViTModel or
            CLIPVisionModel, or a module with ``patch``, ``cls``, ``pos`` and ``blocks`` of ``q``,
            ``k`` and ``heads`` (examples/small_vit.py). Adapters may be attached, before or inside.
        ratios: block number (from 0) -> share of the tokens still there to drop after it, in
            [0, 1). Blocks left out drop nothing.
        keep: In place of ratios, what a run kept: ``[B, n]`` int64 numbers of patches, in each row
            distinct; all blocks run on these alone. Or the ``steps`` of a run, to drop the same
            tokens after the same blocks. Positions are added before in either case.

    Returns:
        The context. In it the model prunes; at its end every hook is gone. ``kept`` ``[B, n]`` are
        the patches that reached the end in the last forward, ascending; ``steps`` those that were
        left after each block that dropped any (-1: before the first).

    Raises:
        ValueError: an unknown layout, a model without CLS, a block that is not there, a ratio
            outside [0, 1), indices that are no patches; both or none of ratios and keep.
        RuntimeError: the model is being pruned already; at the end of the block, no forward was
            pruned; the model runs compiled (with graph breaks allowed it runs uncompiled instead).

    Notes:
        - The choice has no gradient; pixels get theirs through tokens that were kept, and through
          dropped ones as far as blocks before the drop read them.
        - A Mixture must be per="sample": tokens are fewer behind each drop.
        - Not for what needs every patch: an attention mask fails by its shape, but a decoder of
          pixels may take the patches left for those of a smaller image.
        - Gradient checkpointing: call backward() inside the with block.

    Numerics:
        No attention implementation is changed or asked for its probabilities, which the fused ones
        do not have: the CLS row alone is computed anew from q and k (adapters' updates included),
        in float32, float64 for such models. Of equal tokens the first stays.

    Cost:
        S * E multiply-adds per image and dropping block of width E with S tokens; one gather.

    Example:
        >>> with prune_tokens(model, {1: 0.5, 3: 0.5}) as pruning:  # 75 % leave by block 3
        ...     model(images)
        >>> with prune_tokens(model, keep=pruning.kept):
        ...     features = model(images)
    """
    encoder = encoder_of(_OP, model)
    if (ratios is None) == (keep is None):
        got = "both" if keep is not None else "none"
        raise invalid(_OP, "ratios or keep", "be given, one of them", got)
    if ratios is not None:
        return TokenPruning(encoder, _checked_ratios(ratios, len(encoder.blocks)), {})
    return TokenPruning(encoder, {}, _replays(keep, len(encoder.blocks)))


class _Replay(NamedTuple):
    """Tokens to keep at one place: their numbers among those that are there, and in the grid."""

    local: Tensor
    largest: int


class TokenPruning(contextlib.AbstractContextManager):
    """The with block of ``prune_tokens``."""

    def __init__(self, encoder: Encoder, ratios: dict[int, float], replays: dict[int, _Replay]):
        self._encoder, self._ratios, self._replays = encoder, ratios, replays
        self._hooks: list = []
        self._seen: dict[tuple[int, str], Tensor] = {}
        self._now: Tensor | None = None  # patches still there in the forward that runs
        self._steps: dict[int, Tensor] = {}
        self._due: set[int] = set()  # places that this forward has yet to come by

    def __repr__(self) -> str:
        what = f"ratios {self._ratios}" if not self._replays else f"kept at {list(self._replays)}"
        return f"TokenPruning({self._encoder.layout}, {what})"

    @property
    def kept(self) -> Tensor:
        """``[B, n]`` int64: the patches at the end of the last forward, ascending in each row."""
        if self._now is None:
            raise RuntimeError(
                "kept: the model must have run inside the with block, got no forward"
            )
        return self._now

    @property
    def steps(self) -> dict[int, Tensor]:
        """Block -> the patches left after it, of the last forward; blocks that dropped some."""
        self._check_ran("steps")
        return dict(self._steps)

    def _check_ran(self, op: str) -> None:
        if self._now is None:
            raise RuntimeError(f"{op}: the model must have run in the with block, got no forward")
        if self._due:
            got = f"none past block {min(self._due)}"
            raise RuntimeError(f"{op}: the model must have run to its end, got {got}")

    def __enter__(self) -> "TokenPruning":
        blocks = self._encoder.blocks
        others = [getattr(hook, "__self__", None) for hook in blocks[0]._forward_pre_hooks.values()]
        if any(isinstance(other, TokenPruning) for other in others):
            raise RuntimeError("prune_tokens: a model must be pruned once at a time, got a second")
        self._now, self._steps, self._due = None, {}, set()
        self._hooks = [blocks[0].register_forward_pre_hook(self._start, with_kwargs=True)]
        for layer in self._ratios:
            for side, module in zip("qk", self._encoder.projections(layer), strict=True):
                see = functools.partial(self._see, layer, side)
                self._hooks.append(module.register_forward_hook(see))
        for layer in (*self._ratios, *self._replays):
            if layer != _START:
                hook = functools.partial(self._end, layer)
                self._hooks.append(blocks[layer].register_forward_hook(hook))
        return self

    def __exit__(self, kind: type | None, *error) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._seen.clear()
        if kind is None and (self._now is None or self._due):
            raise RuntimeError(
                "prune_tokens: the model must have run in the with block, all of it uncompiled, "
                "got no forward that came by every block to prune (what was compiled before runs "
                "on without)"
            )

    def _start(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before the first block: what the grid is; tokens that never enter leave here."""
        _refuse_compiled()
        x = args[0] if args else kwargs["hidden_states"]
        count = x.shape[1] - self._encoder.prefix
        if not _in_backward():
            self._steps, self._due = {}, {*self._ratios, *self._replays}
            self._now = torch.arange(count, device=x.device).expand(len(x), -1)
            largest = max((replay.largest for replay in self._replays.values()), default=0)
            if largest >= count:
                raise invalid(_OP, "keep", f"hold patches of the image's {count}", largest)
        if _START not in self._replays:
            return None
        x = self._shortened(x, _START)
        return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})

    def _see(self, layer: int, side: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        _refuse_compiled()
        x = output.detach()
        if x.dim() == 3:
            x = x.unflatten(-1, (self._encoder.heads(layer), -1)).transpose(1, 2)
        self._seen[layer, side] = x if side == "k" else x[:, :, :1]

    def _end(self, layer: int, block: nn.Module, args: tuple, output: Tensor | tuple):
        if isinstance(output, tuple):
            return (self._shortened(output[0], layer), *output[1:])
        return self._shortened(output, layer)

    def _shortened(self, x: Tensor, layer: int) -> Tensor:
        _refuse_compiled()
        if self._now is None:  # a recomputation that began under another pruning, or none
            raise RuntimeError(
                "prune_tokens: backward() must be called inside the with block of its forward "
                "(gradient checkpointing), got another one"
            )
        prefix = self._encoder.prefix
        if layer in self._replays:
            local = self._replays[layer].local.to(x.device)
            if len(local) != len(x):
                raise invalid(_OP, "keep", f"have a row per image, {len(x)}", shape(local))
        else:
            q, k = (self._seen.pop((layer, side)) for side in "qk")
            local = _most_seen(q, k, prefix, self._ratios[layer])
        if not _in_backward():
            self._due.discard(layer)
        if local.shape[1] == x.shape[1] - prefix:
            return x
        if not _in_backward():
            self._steps[layer] = self._now = self._now.gather(1, local)
        front = torch.arange(prefix, device=x.device).expand(len(x), -1)
        index = torch.cat([front, local + prefix], 1)
        return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


@torch.no_grad()
def _most_seen(q: Tensor, k: Tensor, prefix: int, ratio: float) -> Tensor:
    """Of q ``[B, H, 1, D]`` and k ``[B, H, S, D]``: the tokens to keep, ``[B, n]``, ascending."""
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    with torch.autocast(k.device.type, enabled=False):
        scores = (q.to(dtype) * q.shape[-1] ** -0.5) @ k.to(dtype).transpose(2, 3)
        attention = scores.softmax(-1)[:, :, 0, prefix:].mean(1)
    order = attention.sort(dim=1, descending=True, stable=True).indices
    return order[:, : _left(attention.shape[1], ratio)].sort(dim=1).values


def _left(count: int, ratio: float) -> int:
    # Of 100 tokens 0.29 is 29, though the product is 28.999999999999996.
    return max(1, count - math.floor(ratio * count + 1e-6))


def _refuse_compiled() -> None:
    # A graph would keep these hooks when they are gone: its guards leave out hooks.
    if torch.compiler.is_compiling():
        raise RuntimeError("prune_tokens: the model must run uncompiled, got a compiled one")


def _in_backward() -> bool:
    # Checkpointing runs a forward again in the backward pass; it must not pass for a new one.
    return torch._C._current_graph_task_id() != -1


def _checked_ratios(ratios: Mapping[int, float], depth: int) -> dict[int, float]:
    if not isinstance(ratios, Mapping):
        rule = "be a dict from block number to the share that is dropped after it"
        raise invalid(_OP, "ratios", rule, type(ratios).__name__)
    for layer, ratio in ratios.items():
        _check_layer("ratios", layer, range(depth))
        number = isinstance(ratio, (int, float)) and not isinstance(ratio, bool)
        if not number or not 0 <= ratio < 1:
            raise invalid(_OP, f"ratio of block {layer}", "lie in [0, 1)", repr(ratio))
    return {layer: float(ratios[layer]) for layer in sorted(ratios) if ratios[layer] > 0}


def _check_layer(what: str, layer: object, layers: range) -> None:
    if not isinstance(layer, int) or isinstance(layer, bool) or layer not in layers:
        rule = f"name blocks from {layers[0]} to {layers[-1]}"
        raise invalid(_OP, what, rule, repr(layer))


def _replays(keep: Tensor | Mapping[int, Tensor], depth: int) -> dict[int, _Replay]:
    """keep, checked, as places among the tokens that are there."""
    if not isinstance(keep, Mapping):
        keep = {_START: keep}
    for layer in keep:
        _check_layer("keep", layer, range(_START, depth))
    found, before = {}, None
    for layer in sorted(keep):
        patches = _checked_patches(keep[layer])
        local = patches
        if before is not None:
            if len(patches) != len(before):
                rule = f"have as many rows for block {layer} as before it, {len(before)}"
                raise invalid(_OP, "keep", rule, len(patches))
            local = torch.searchsorted(before, patches).clamp(max=before.shape[1] - 1)
            if not torch.equal(before.gather(1, local), patches):
                rule = f"keep after block {layer} only what was there"
                raise invalid(_OP, "keep", rule, "patches dropped before it")
        found[layer], before = _Replay(local, int(patches.max())), patches
    return found


def _checked_patches(keep: object) -> Tensor:
    """Numbers of patches, ascending in each row."""
    rule = "be int64 [B, n] with n >= 1 (or steps: block -> such a tensor)"
    if not isinstance(keep, Tensor):
        raise invalid(_OP, "keep", rule, type(keep).__name__)
    if keep.dtype != torch.int64 or keep.dim() != 2 or not keep.numel():
        raise invalid(_OP, "keep", rule, f"{keep.dtype} {shape(keep)}")
    keep = keep.sort(dim=1).values
    if int(keep.min()) < 0 or bool((keep[:, 1:] == keep[:, :-1]).any()):
        got = "a negative one" if int(keep.min()) < 0 else "one twice in a row"
        raise invalid(_OP, "keep", "hold distinct numbers of patches from 0", got)
    return keep
