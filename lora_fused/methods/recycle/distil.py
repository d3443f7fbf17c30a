"""A meta-LoRA from surrogate images: features whose class means classify what it never saw.

**The paper says** (LoRA Recycle, Hu et al., CVPR 2025, arXiv 2412.02220): tasks of 5 classes with 1
or 5 support images and 15 queries, drawn from the inverted images; of one teacher, where the
student's prototype scores should give the teacher's probabilities (KL), or of classes of several
teachers (cross-task interpolation), where they should give the labels; Adam 1e-3 with cosine warm
restarts, one task a step. Inputs are the tokens that inversion kept.
**We compute** the same. The student is an adapter in training of a bank, the base is frozen.
**We differ**: the teachers are not run. Their images do not change, so neither does what they say
of them, which the pool holds; teacher and student cannot be mixed up (in the public code they are
one module whose parameters are replaced under the optimiser). Kept tokens are the pool's indices
(there: pixels that are not 0).
"""

import contextlib
import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fused.adapters import Adapter
from lora_fused.checks import check_whole, invalid
from lora_fused.methods.progress import show
from lora_fused.methods.recycle.episodes import prototype_scores
from lora_fused.methods.recycle.pool import Pool
from lora_fused.methods.recycle.runs import (
    Saved,
    checked_bank,
    features_of,
    fingerprint,
    generator_of,
    load_optimizer,
    model_tensors,
    optimizer_state,
)
from lora_fused.methods.recycle.tasks import Task, Tasks

_OP = "distil"
_GOOD_DISTANCE = 16  # divided, between features: a softmax of them still has a gradient


class Distilled(NamedTuple):
    """What ``distil`` did.

    Attributes:
        adapter: The meta-LoRA, for ``write_adapter``; the bank holds it too.
        losses: ``[steps]`` of each task, KL or cross-entropy, before its step.
        mixed: ``[steps]`` bool: the task's classes were of several teachers.
    """

    adapter: Adapter
    losses: Tensor
    mixed: Tensor


def distil(
    handle,
    pool: Pool,
    adapter: str,
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    interpolate: bool = True,
    sparse_tokens: Callable | None = None,
    steps: int,
    lr: float = 1e-3,
    restart_every: int = 500,
    temperature: float = 1.0,
    features: Callable[[Tensor], Tensor] | None = None,
    seed: int,
    checkpoint=None,
    checkpoint_every: int = 100,
    progress: bool | Callable[[int, int], None] = True,
) -> Distilled:
    """Train one adapter of a bank on tasks drawn from a pool; nothing else changes.

    With f(x) the model's features under the adapter, c_w the mean of f over the support of class w
    and s_w(x) = -||f(x) - c_w||^2 / temperature, a step lowers the mean over the queries of
    KL(softmax(teacher logits of the task's classes) || softmax(s(x))) for a task of one teacher,
    of CE(s(x), own class) for a mixed one.

    Args:
        handle: Of the model, attached and in eval mode. The pool's teachers need not be in its
            bank, and a step is faster without them.
        pool: From ``invert`` or ``label_pool``, shots + queries images of a class at least.
        adapter: The name of the adapter to train, at first mostly
            ``new_adapter(model, "meta", rank=4, target_modules=["q", "v"], seed=0)``.
        ways, shots, queries: Classes of a task, support images and queries of each.
        interpolate: Half of the tasks, by lot, take classes of several teachers, never two of the
            same name. Without: all tasks are of one teacher.
        sparse_tokens: ``lora_fused.nn.prune_tokens``: the model runs on ``pool.kept`` alone. None:
            on whole images.
        steps: Tasks, one a step.
        lr: Of Adam; from it to 0 by a cosine of ``restart_every`` steps, again and again.
        temperature: Squared distances are divided by it. Features of norm sqrt(E) have distances of
            about 2 E, of which a softmax is all but one-hot at 1: a warning says so, and names the
            temperature that makes them 16.
        features: As in ``invert``.
        seed: Of the tasks.
        checkpoint, checkpoint_every, progress: As in ``invert``.

    Returns:
        The trained adapter and the losses.

    Raises:
        ValueError: a wrong argument; too few images or classes; a checkpoint of another run; a loss
            that is not finite. The adapter is as it was then, as after an interrupt.

    Example:
        >>> bank.add(new_adapter(model, "meta", rank=4, target_modules=["q", "v"], seed=0))
        >>> meta = distil(handle, pool, "meta", steps=2000, seed=0).adapter
        >>> write_adapter(meta, "meta")
    """
    sizes = {"ways": ways, "shots": shots, "queries": queries, "steps": steps, "seed": seed}
    sizes["restart_every"] = restart_every
    _check(sizes, checkpoint_every, lr, temperature)
    bank = checked_bank(_OP, handle)
    _check_bank(bank, adapter, pool, sparse_tokens)
    tasks = Tasks(_OP, pool, ways=ways, each=shots + queries, interpolate=interpolate)
    parts = bank.adapter(adapter).modules
    start = [t.clone() for part in parts.values() for t in _sides(part)]
    options = sizes | {"interpolate": interpolate, "lr": lr, "temperature": temperature}
    options |= {"sparse": sparse_tokens is not None, "class_names": pool.class_names}
    options["scales"] = {name: part.scale for name, part in parts.items()}
    run = ""
    if checkpoint is not None:
        run = fingerprint(options, [*model_tensors(handle.model), *start, *pool.tensors()])
    saved = Saved(_OP, checkpoint, checkpoint_every, run)
    student = Student(handle, adapter, pool, sparse_tokens, features)
    with _training(bank, adapter) as parameters:
        state = _State(parameters, lr, steps, seed)
        done, found = saved.read()
        if done:
            state.load(found)
        for step in range(done, steps):
            task = tasks.draw(state.generator)
            found = student(task)
            loss = task_loss(found, task, pool, shots, temperature)
            if not loss.isfinite():
                raise invalid(_OP, "loss", "stay finite", loss.item())
            if step == 0:
                _warn_of_distances(found.detach(), shots, temperature)
            state.descend(loss, cosine(lr, step, restart_every))
            state.losses[step], state.mixed[step] = loss.detach(), task.teacher is None
            now = step + 1
            saved.write(now, steps, state.tensors)
            line = f"{_OP}: step {now} of {steps}, loss {float(state.losses[step]):.4f}"
            show(progress, now, steps, line)
        if not all(p.isfinite().all() for p in parameters):
            raise invalid(_OP, "loss", "have finite gradients", "NaN or infinity")
    return Distilled(bank.adapter(adapter), state.losses, state.mixed)


def _warn_of_distances(features: Tensor, shots: int, temperature: float) -> None:
    """Warn where distances of the first task are so large that their softmax is all but one-hot."""
    scores = prototype_scores(features[:, :shots], features[:, shots:].flatten(0, 1))
    far = -float(scores.mean())
    if far > 4 * _GOOD_DISTANCE * temperature:
        told = f"{_OP}: squared distances of features are about {far:.3g}; of these, divided by "
        told += f"temperature {temperature:g}, a softmax is all but one-hot (temperature "
        told += f"{far / _GOOD_DISTANCE:.2g} makes them {_GOOD_DISTANCE})"
        warnings.warn(told, stacklevel=3)


class _State:
    """What a run changes: the adapter's Parameters, Adam, the tasks' generator, the losses."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, steps: int, seed: int):
        self._parameters = parameters
        self._optimizer = torch.optim.Adam(parameters, lr)
        self.generator = generator_of(seed, _OP)
        self.losses = torch.zeros(steps)
        self.mixed = torch.zeros(steps, dtype=torch.bool)

    def descend(self, loss: Tensor, lr: float) -> None:
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.zero_grad()
        loss.backward(inputs=self._parameters)
        self._optimizer.step()

    def tensors(self) -> dict[str, Tensor]:
        own = {f"factor.{i}": p.detach().clone() for i, p in enumerate(self._parameters)}
        own |= {"losses": self.losses, "mixed": self.mixed}
        own["generator"] = self.generator.get_state()
        return own | optimizer_state(self._optimizer)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        for i, p in enumerate(self._parameters):
            p.copy_(tensors[f"factor.{i}"])
        load_optimizer(self._optimizer, tensors)
        self.generator.set_state(tensors["generator"])
        self.losses.copy_(tensors["losses"])
        self.mixed.copy_(tensors["mixed"])


class Student:
    """The model under the adapter in training, on a task's images or on their kept tokens."""

    def __init__(self, handle, adapter: str, pool: Pool, sparse_tokens, features):
        self._handle, self._adapter, self._pool = handle, adapter, pool
        self._sparse, self._features = sparse_tokens, features

    def __call__(self, task: Task) -> Tensor:
        """Features ``[ways, shots + queries, E]``."""
        rows = task.rows.flatten()
        tokens = contextlib.nullcontext()
        if self._sparse is not None:
            tokens = self._sparse(self._handle.model, keep=self._pool.kept[rows])
        with self._handle.mix(self._adapter), tokens:
            found = features_of(_OP, self._handle, self._features, self._pool.images[rows])
        return found.unflatten(0, task.rows.shape)


def task_loss(
    features: Tensor, task: Task, pool: Pool, shots: int, temperature: float = 1.0
) -> Tensor:
    """The loss of one task from features ``[ways, shots + queries, E]``; see ``distil``."""
    queries = features[:, shots:].flatten(0, 1)
    scores = prototype_scores(features[:, :shots], queries) / temperature
    if task.teacher is None:
        own = torch.arange(len(task.rows)).repeat_interleave(task.rows.shape[1] - shots)
        return F.cross_entropy(scores, own.to(scores.device))
    logits = pool.logits[task.rows[:, shots:].flatten()][:, task.labels].to(scores)
    options = {"reduction": "batchmean", "log_target": True}
    return F.kl_div(scores.log_softmax(-1), logits.log_softmax(-1), **options)


def cosine(lr: float, step: int, restart_every: int) -> float:
    """The learning rate of a step: cosine annealing to 0 with warm restarts."""
    return lr * (1 + math.cos(math.pi * (step % restart_every) / restart_every)) / 2


@contextlib.contextmanager
def _training(bank, adapter: str):
    """The adapter's Parameters; after an error its values are what they were."""
    parameters = bank.trainable([adapter])
    before = [p.detach().clone() for p in parameters]
    try:
        yield parameters
    except BaseException:
        with torch.no_grad():
            for p, values in zip(parameters, before, strict=True):
                p.copy_(values)
        raise
    finally:
        bank.freeze()


def _sides(part) -> tuple[Tensor, Tensor]:
    return part.lora_a, part.lora_b


def _check_bank(bank, adapter: str, pool: Pool, sparse_tokens) -> None:
    bank.id(adapter)
    if any(stack.trained for stack in bank.stacks.values()):
        raise invalid(_OP, "bank", "have no adapters in training (bank.freeze())", "some")
    if not isinstance(pool, Pool):
        raise invalid(_OP, "pool", "be a Pool", type(pool).__name__)
    if sparse_tokens is not None and pool.kept is None:
        rule = "have kept tokens, from invert(prune=...), for sparse_tokens"
        raise invalid(_OP, "pool", rule, "a pool of whole images")


def _check(whole: dict[str, int], every: int, lr: float, temperature: float) -> None:
    for label, value in whole.items():
        check_whole(_OP, label, value, 0 if label == "seed" else 1)
    check_whole(_OP, "ways", whole["ways"], 2)
    check_whole(_OP, "checkpoint_every", every)
    for label, value in (("lr", lr), ("temperature", temperature)):
        if not 0 < value < float("inf"):
            raise invalid(_OP, label, "be a positive number", value)
