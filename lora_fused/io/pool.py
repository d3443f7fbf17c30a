"""Pools of surrogate images as one safetensors file."""

import json
import os
from pathlib import Path

from lora_fused.checks import invalid
from lora_fused.io.checkpoint import Checkpoint, read_state
from lora_fused.methods.recycle.pool import Pool

_KIND = "lora_fused.pool"
_TENSORS = ("images", "labels", "teachers", "logits", "losses", "kept")


def save_pool(pool: Pool, path: str | os.PathLike) -> None:
    """Write a pool, whole or not at all; a pool that is there is replaced."""
    if not isinstance(pool, Pool):
        raise invalid("save_pool", "pool", "be a Pool", type(pool).__name__)
    tensors = {name: getattr(pool, name) for name in _TENSORS}
    facts = json.dumps({"names": pool.names, "class_names": pool.class_names})
    held = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    Checkpoint(path).write(held, {_KIND: facts})


def load_pool(path: str | os.PathLike) -> Pool:
    """Read what ``save_pool`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds something else.
    """
    found = read_state(Path(path), "load_pool")
    if found is None:
        raise FileNotFoundError(f"load_pool: no such file: {path}")
    tensors, header = found
    if _KIND not in header or not set(_TENSORS) - {"kept"} <= tensors.keys() <= set(_TENSORS):
        raise invalid("load_pool", str(path), "hold a pool", f"tensors {sorted(tensors)[:6]}")
    try:
        facts = json.loads(header[_KIND])
        class_names = tuple(tuple(names) for names in facts["class_names"])
        return Pool(**tensors, names=tuple(facts["names"]), class_names=class_names)
    except (ValueError, KeyError, TypeError) as error:
        rule = "hold a pool whose header and tensors agree"
        raise invalid("load_pool", str(path), rule, repr(error)) from error
