"""Features of inputs from a frozen base model: what adapters and requests are compared by.

**The paper says** (RPE, arXiv 2410.09908): features of the frozen base, averaged over a task's
data. Its code takes a layer's output and the mean over tokens.
**We compute** that for any torch model, pooled in float32.
**We differ**: tokens outside the attention mask do not count; other layers and poolings by option;
adapters that are on the model are off meanwhile.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lora_fused.checks import check_whole, invalid, shape
from lora_fused.methods.progress import show

_OP = "embed"
POOLINGS = ("mean", "first", "last", "max")
Pooling = str | Callable[[Tensor, Tensor | None], Tensor] | None


@torch.no_grad()
def embed(
    model,
    inputs: object,
    *,
    layer: str | int | None = None,
    pooling: Pooling = None,
    tokenizer: Callable | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    normalize: bool = False,
    progress: bool | Callable[[int, int | None], None] = True,
) -> Tensor:
    """One feature vector per input, by the model without adapters.

    mean: z[i] = sum_t mask[i, t] h[i, t] / sum_t mask[i, t]

    Args:
        model: Any module, or its handle. An attached model, or a PeftModel, runs without adapters
            meanwhile; afterwards it is as it was, with modes (train, eval) and mixture.
        inputs: Texts, with a ``tokenizer``; a tensor, or a dict of tensors with one first axis,
            which is cut into batches; or an iterable of such batches, run as they are.
        layer: Where to read. A module's name: its output. A number: of ``hidden_states``, as
            transformers count them (-1: the last). Default: the model's output, or its
            ``last_hidden_state``.
        pooling: Of features ``[S, N, E]``: ``"mean"`` (default), ``"first"``, ``"last"`` or
            ``"max"``, each over the tokens of the batch's ``attention_mask``; or a function of
            features and mask (or None). Features ``[S, E]`` are taken as they are.
        tokenizer: Of transformers, or anything called like one; it needs a padding token.
        batch_size: Inputs per forward, where it is embed that makes the batches.
        max_length: Of the tokenizer's truncation. Default: the tokenizer's own.
        normalize: Divide each vector by its length. The paper does not.
        progress: True: a line on stderr where that is a terminal; or called as
            progress(done, total) after each batch, total None where inputs have no length.

    Returns:
        ``[n, E]`` float32, on the CPU. Its mean over n stands for a task, its rows for requests.

    Raises:
        ValueError: a wrong argument; an output without features; features not finite. RuntimeError:
            adapters that cannot be put off. The model is as it was then, too.

    Numerics:
        Pooled in float32 whatever the model's dtype. Vectors depend on the padding of their batch
        as far as the model's do.

    Example:
        >>> request = embed(model, texts, tokenizer=tokenizer)
    """
    model = model if isinstance(model, nn.Module) else getattr(model, "model", model)
    if not isinstance(model, nn.Module):
        raise invalid(_OP, "model", "be a module or a handle", type(model).__name__)
    if not (pooling is None or callable(pooling) or pooling in POOLINGS):
        raise invalid(_OP, "pooling", f"be one of {POOLINGS} or a function", repr(pooling))
    check_whole(_OP, "batch_size", batch_size)
    batches, total = _batches(inputs, tokenizer, batch_size, max_length)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found, done = [], 0
    with _frozen(model), _reader(model, layer) as read:
        for batch in batches:
            batch = _moved(batch, device)
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            features = _pooled(read(batch), mask, pooling)
            if not bool(features.isfinite().all()):
                rule = f"be finite, and each input have a token (inputs from {done} on)"
                raise invalid(_OP, "features", rule, "NaN or infinity")
            found.append(features.cpu())
            done += len(features)
            of = "" if total is None else f" of {total}"
            show(progress, done, total, f"embedded {done}{of}")
    if not found:
        raise invalid(_OP, "inputs", "hold at least one", "none")
    z = torch.cat(found)
    return torch.nn.functional.normalize(z, dim=1) if normalize else z


def _batches(
    inputs: object, tokenizer: Callable | None, size: int, max_length: int | None
) -> tuple[Iterable, int | None]:
    """Batches, and how many inputs they hold if that can be known."""
    if isinstance(inputs, str):
        raise invalid(_OP, "inputs", "be a list of texts", repr(inputs[:40]))
    if isinstance(inputs, Sequence) and inputs and isinstance(inputs[0], str):
        if tokenizer is None:
            raise invalid(_OP, "tokenizer", "be given with texts", None)
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        options |= {} if max_length is None else {"max_length": max_length}
        parts = (list(inputs[i : i + size]) for i in range(0, len(inputs), size))
        return (tokenizer(part, **options) for part in parts), len(inputs)
    if tokenizer is not None:
        rule = "be a list of texts where a tokenizer is given"
        raise invalid(_OP, "inputs", rule, type(inputs).__name__)
    if isinstance(inputs, (Tensor, Mapping)):
        rows = _rows(inputs)
        return (_cut(inputs, i, size) for i in range(0, rows, size)), rows
    if not isinstance(inputs, Iterable):
        rule = "be texts, a tensor, a dict of tensors or an iterable of batches"
        raise invalid(_OP, "inputs", rule, type(inputs).__name__)
    return inputs, None


def _rows(inputs: Tensor | Mapping) -> int:
    parts = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
    if not all(isinstance(t, Tensor) and t.dim() for t in parts):
        rule = "be tensors with a first axis of inputs"
        raise invalid(_OP, "inputs", rule, [type(t).__name__ for t in parts])
    if len({len(t) for t in parts}) != 1:
        raise invalid(_OP, "inputs", "have one first axis", [shape(t) for t in parts])
    return len(parts[0])


def _cut(inputs: Tensor | Mapping, first: int, count: int) -> Tensor | dict[str, Tensor]:
    if isinstance(inputs, Tensor):
        return inputs[first : first + count]
    return {name: t[first : first + count] for name, t in inputs.items()}


def _moved(batch: object, device: torch.device) -> Tensor | dict[str, object]:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if not isinstance(batch, Mapping):
        rule = "be tensors or dicts of tensors (leave the labels out)"
        raise invalid(_OP, "batches", rule, type(batch).__name__)
    return {name: t.to(device) if isinstance(t, Tensor) else t for name, t in batch.items()}


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no adapters; modes come back as they were, module by module."""
    training = [module for module in model.modules() if module.training]
    try:
        with _without_adapters(model):
            model.eval()
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _without_adapters(model: nn.Module) -> Iterator[None]:
    sites = [site for m in model.modules() if (site := getattr(m, "lora_site", None)) is not None]
    tuned = any(hasattr(module, "lora_A") for module in model.modules())
    with contextlib.ExitStack() as stack:
        for routing in {id(site.routing): site.routing for site in sites}.values():
            stack.enter_context(routing.without())
        if hasattr(model, "disable_adapter"):
            stack.enter_context(model.disable_adapter())
        elif tuned:
            raise RuntimeError(
                f"{_OP}: the model must be a PeftModel to put its adapters off, got "
                f"{type(model).__name__} with adapters inside; give the PeftModel or the base"
            )
        yield


@contextlib.contextmanager
def _reader(model: nn.Module, layer: str | int | None) -> Iterator[Callable[[object], Tensor]]:
    """A function from a batch to the layer's output."""

    def run(batch: object, **options) -> object:
        return model(**batch, **options) if isinstance(batch, Mapping) else model(batch, **options)

    if layer is None:
        yield lambda batch: _output(run(batch))
    elif isinstance(layer, str):
        held: list[object] = []
        hook = _module(model, layer).register_forward_hook(lambda *call: held.append(call[2]))

        def read(batch: object) -> Tensor:
            held.clear()
            run(batch)
            if len(held) != 1:
                rule = "run once in a forward"
                raise invalid(_OP, f"layer {layer!r}", rule, f"{len(held)} times")
            # Layers of transformers may return a tuple whose first entry is the hidden state.
            out = held[0]
            return _output(out[0] if isinstance(out, tuple) and out else out)

        try:
            yield read
        finally:
            hook.remove()
    elif isinstance(layer, int) and not isinstance(layer, bool):
        yield lambda batch: _hidden(run(batch, output_hidden_states=True), layer)
    else:
        raise invalid(_OP, "layer", "be a module's name, a number or None", repr(layer))


def _module(model: nn.Module, name: str) -> nn.Module:
    found = dict(model.named_modules()).get(name)
    if found is None or not name:
        names = [known for known, _ in model.named_modules() if known]
        rule = f"be one of {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
        raise invalid(_OP, "layer", rule, repr(name))
    return found


def _output(out: object) -> Tensor:
    found = getattr(out, "last_hidden_state", out)
    if not isinstance(found, Tensor):
        rule = (
            "be given where the output is not a tensor and has no last_hidden_state (-1: the last)"
        )
        raise invalid(_OP, "layer", rule, f"{type(out).__name__}")
    return found


def _hidden(out: object, layer: int) -> Tensor:
    states = getattr(out, "hidden_states", None)
    if states is None or not -len(states) <= layer < len(states):
        count = "none" if states is None else len(states)
        raise invalid(_OP, "layer", "count within the model's hidden_states", f"{layer} of {count}")
    return states[layer]


def _pooled(features: Tensor, mask: Tensor | None, pooling: Pooling) -> Tensor:
    """``[S, E]`` float32."""
    if not features.is_floating_point():
        raise invalid(_OP, "features", "be floating point", features.dtype)
    features = features.float()
    if callable(pooling):
        features, pooling = pooling(features, mask), None
        if not isinstance(features, Tensor) or features.dim() != 2:
            raise invalid(_OP, "pooling", "return a tensor [S, E]", type(features).__name__)
        return features.float()
    if features.dim() == 2 and pooling is None:
        return features
    if features.dim() != 3:
        rule = "be a function for features other than [S, N, E]"
        raise invalid(_OP, "pooling", rule, f"{pooling!r} for {shape(features)}")
    if mask is None:
        mask = torch.ones(features.shape[:2], device=features.device)
    if mask.shape != features.shape[:2]:
        rule = f"be {list(features.shape[:2])} like the features' tokens"
        raise invalid(_OP, "attention_mask", rule, shape(mask))
    return _of_tokens(features, mask.to(features.device) > 0, pooling or "mean")


def _of_tokens(features: Tensor, mask: Tensor, pooling: str) -> Tensor:
    kept = features.where(mask[..., None], 0.0)  # a masked token may be anything, NaN even
    if pooling == "mean":
        return kept.sum(1) / mask.sum(1, keepdim=True)
    if not bool(mask.any(1).all()):
        return features.new_full((1, 1), torch.nan)
    if pooling == "max":
        return features.masked_fill(~mask[..., None], -torch.inf).amax(1)
    place = torch.arange(mask.shape[1], device=mask.device)
    at = torch.where(mask, place, -1).argmax(1)
    if pooling == "first":
        at = mask.int().argmax(1)
    return kept[torch.arange(len(kept), device=at.device), at]
