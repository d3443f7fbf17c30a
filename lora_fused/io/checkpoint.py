"""The state of a long run in one file, which is whole at every moment."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lora_fused.checks import invalid
from lora_fused.io.tensors import read_safetensors, save_tensors


class Checkpoint:
    """A safetensors file that a run writes now and then, and an interrupted run goes on from.

    Args:
        path: The file; its folder is made if need be. Delete it to begin anew.

    Example:
        >>> invert(handle, heads, checkpoint=Checkpoint("pool.part.safetensors"), ...)
    """

    def __init__(self, path: str | os.PathLike):
        if not isinstance(path, (str, os.PathLike)):
            raise invalid("Checkpoint", "path", "be a path", type(path).__name__)
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r})"

    def read(self) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """Tensors and facts of the last write; None where there is no file.

        Raises:
            ValueError: the file is damaged.
        """
        return read_state(self.path, "Checkpoint")

    def write(self, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
        """Replace the file; a reader finds the old one or the new one, never a part."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.new")
        try:
            held = {key: t.detach().cpu().contiguous() for key, t in tensors.items()}
            save_tensors(held, fresh, dict(facts))
            os.replace(fresh, self.path)
        finally:
            fresh.unlink(missing_ok=True)


def read_state(path: Path, op: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """What a ``Checkpoint`` wrote, for a reader whose errors begin with ``op``."""
    if not path.exists():
        return None
    tensors, facts, _ = read_safetensors(path, op)
    return {key: tensor.clone() for key, tensor in tensors.items()}, facts
