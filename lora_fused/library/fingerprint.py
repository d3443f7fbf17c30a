"""What tells one base model from another, without its weights at hand."""

import hashlib
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lora_fused.checks import invalid

_OP = "fingerprint"
_SAMPLES = 64
# What wrappers put into the names of parameters that stay as they are.
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|base_layer|original_module)\.")
# Parts of adapters, PEFT's and this package's.
_ADAPTERS = re.compile(r"(?<![^.])(lora_\w+|modules_to_save)\.")


@torch.no_grad()
def fingerprint(model) -> str:
    """64 hex digits that two copies of one base model share, and two base models do not.

    sha256 over the names and shapes of the backbone's parameters and up to 64 values of each,
    evenly spread and rounded to bfloat16, so that a float32 and a bfloat16 copy agree.

    Args:
        model: The base, or its handle; attached or in a PeftModel it has the same fingerprint.

    Raises:
        ValueError: naming a parameter that is quantised or has no values.

    Notes:
        The backbone is what transformers calls ``base_model``: a head, which loading may have made
        at random, does not count. Not noticed: buffers (statistics of batch norms), and changes
        that leave every looked-at value within bfloat16's rounding, such as a few edited rows.
        Copies that do not agree: in float16 (rounded twice), quantised, or loaded by a class that
        has other parameters in its backbone (BERT's with and without pooler).
    """
    model = backbone(model)
    known = hashlib.sha256()
    found = dict(_parameters(model))
    if not found:
        raise invalid(_OP, "model", "have parameters", "none")
    for name in sorted(found):
        values = found[name]
        if not values.is_floating_point() or values.element_size() < 2:
            rule = "be floating point of at least 16 bits (load the base unquantised)"
            raise invalid(_OP, f"parameter {name!r}", rule, values.dtype)
        if values.is_meta:
            raise invalid(_OP, f"parameter {name!r}", "have values", "a meta tensor")
        flat = values.detach().flatten()
        some = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].cpu().to(torch.bfloat16)
        known.update(f"{name} {list(values.shape)} {some.view(torch.int16).tolist()}\n".encode())
    return known.hexdigest()


def backbone(model) -> nn.Module:
    """The model without handle, adapters' wrapper and head."""
    model = unwrapped(model)
    inner = getattr(model, "base_model", None)
    return inner if hasattr(model, "base_model_prefix") and isinstance(inner, nn.Module) else model


def unwrapped(model) -> nn.Module:
    """The model that adapters were made for, out of a handle, a PeftModel or torch.compile."""
    found = model if isinstance(model, nn.Module) else getattr(model, "model", model)
    if not isinstance(found, nn.Module):
        raise invalid(_OP, "model", "be a module or a handle", type(model).__name__)
    found = getattr(found, "_orig_mod", found)
    return found.get_base_model() if hasattr(found, "peft_config") else found


def module_sizes(model) -> dict[str, list[int]]:
    """Of each module that adapters can be for: name -> [I, O]."""
    found = {}
    for name, module in unwrapped(model).named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2 or _ADAPTERS.search(f"{name}."):
            continue
        # An embedding and transformers' Conv1D hold theirs as [I, O].
        sizes = list(weight.shape)
        turned = isinstance(module, nn.Embedding) or type(module).__name__.endswith("Conv1D")
        found[_WRAPPERS.sub("", f"{name}.")[:-1]] = sizes if turned else sizes[::-1]
    return found


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, values in model.named_parameters(remove_duplicate=False):
        if not _ADAPTERS.search(name):
            yield _WRAPPERS.sub("", name), values
