"""What the two long runs share: features of a model, seeds by name, and states that resume."""

import ctypes
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from lora_fused.adapters import AdapterBank
from lora_fused.checks import invalid, shape


def checked_bank(op: str, handle) -> AdapterBank:
    """The bank of a handle whose model is in eval mode, every part of it."""
    bank = getattr(handle, "bank", None)
    if not isinstance(bank, AdapterBank):
        raise invalid(op, "handle", "be that of an attached model", type(handle).__name__)
    modules = handle.model.named_modules()  # an adapter's own mode means nothing
    training = [name for name, one in modules if one.training and "lora_" not in name]
    if training:
        rule = "be in eval mode (model.eval()): dropout and batch statistics would mix the rows"
        got = f"train mode of {training[0]!r}" if training[0] else "train mode"
        raise invalid(op, "model", rule, got)
    return bank


def features_of(op: str, handle, features: Callable | None, images: Tensor) -> Tensor:
    """``[N, E]`` of the images, on the model's device and in its dtype, under the mixture in force.

    Of a 16-bit model in float32: losses and squared distances of theirs would overflow or tie.
    """
    found = (handle.model if features is None else features)(fitted(images, handle.model))
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(images):
        got = shape(found) if isinstance(found, Tensor) else type(found).__name__
        rule = f"give one row of features for each of {len(images)} images (else pass features=)"
        raise invalid(op, "model", rule, got)
    return found.to(wide(found.dtype))


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return dtype if dtype == torch.float64 else torch.float32


def fitted(images: Tensor, model: nn.Module) -> Tensor:
    """The images on the model's device and, unless they are integers, in its dtype."""
    one = next(model.parameters(), images)
    return images.to(one if images.is_floating_point() else one.device)


def generator_of(seed: int, name: str) -> torch.Generator:
    """Random numbers that depend on the seed and this name alone. On the CPU, for every device."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def fingerprint(facts: Mapping, tensors: Iterable[Tensor]) -> str:
    """One word for what decides a run; a checkpoint of another one is refused by it."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{tensor.dtype}{shape(tensor)}".encode())
        digest.update(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))
    return digest.hexdigest()[:32]


def model_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers (BatchNorm's statistics decide features too), but no adapters."""
    return [t for t in model.state_dict().values() if isinstance(t, Tensor)]


class Saved:
    """A run's state in a checkpoint (lora_fused.io.Checkpoint), or nowhere.

    Args:
        op: For errors.
        checkpoint: ``read() -> (tensors, facts) | None`` and ``write(tensors, facts)``; or None.
        every: Steps between two writes.
        run: The run's fingerprint.
    """

    def __init__(self, op: str, checkpoint, every: int, run: str):
        self._op, self._checkpoint, self._every, self._run = op, checkpoint, every, run

    def read(self) -> tuple[int, dict[str, Tensor]]:
        """The steps done and the state after them; 0 and nothing where there is none."""
        found = None if self._checkpoint is None else self._checkpoint.read()
        if found is None:
            return 0, {}
        tensors, facts = found
        if facts.get("run") != self._run:
            rule = "be of a run with the same options, adapters, images and seed"
            raise invalid(self._op, "checkpoint", rule, f"that of another run, {self._checkpoint}")
        return int(facts["step"]), tensors

    def write(self, step: int, steps: int, state: Callable[[], dict[str, Tensor]]) -> None:
        """Write the state after ``step`` steps where that is due: now and then, and at the end."""
        if self._checkpoint is not None and (step % self._every == 0 or step == steps):
            self._checkpoint.write(state(), {"run": self._run, "step": str(step)})


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an Adam remembers, under names that ``load_optimizer`` knows."""
    state = optimizer.state_dict()["state"]
    return {f"adam.{i}.{key}": t.clone() for i, part in state.items() for key, t in part.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an Adam of the same parameters what another remembered."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("adam."):
            _, i, name = key.split(".")
            state.setdefault(int(i), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
