"""Many teachers in one batch: a run of rows each, routed by adapter, read by each one's head."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_fused.checks import check_whole, invalid, shape
from lora_fused.methods.recycle.pool import Pool, named_classes
from lora_fused.methods.recycle.runs import checked_bank, features_of, wide
from lora_fused.mixture import Mixture

Head = nn.Linear | tuple[Tensor, Tensor | None]


def plain_heads(op: str, handle, heads: Mapping[str, Head]) -> dict[str, tuple]:
    """Adapter -> (weight ``[L, E]``, bias ``[L]`` or None), of known adapters, without grad.

    In float32, float64 for such a model, and on the model's device.
    """
    bank, like = checked_bank(op, handle), next(handle.model.parameters()).detach()
    like = like.to(wide(like.dtype))
    if not isinstance(heads, Mapping) or not heads:
        rule = "be a dict of at least one adapter's head"
        raise invalid(op, "heads", rule, repr(heads))
    found = {}
    for name, head in heads.items():
        bank.id(name)
        weight, bias = (head.weight, head.bias) if isinstance(head, nn.Linear) else head
        if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            got = f"{shape(weight)} and {None if bias is None else shape(bias)}"
            raise invalid(op, f"head of {name!r}", "be [L, E] and [L] or None", got)
        if len(weight) < 2:  # a softmax of one class is 1 of any image
            raise invalid(op, f"head of {name!r}", "have at least two classes", len(weight))
        bias = None if bias is None else bias.detach().to(like)
        found[name] = (weight.detach().to(like), bias)
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Teachers:
    """Rows of several teachers, in runs of ``counts``, through the model at once.

    Attributes:
        op: For errors.
        handle: Of the attached model.
        heads: From ``plain_heads``; their order is that of the runs.
        counts: Rows of each teacher.
        features: See ``invert``.
    """

    op: str
    handle: object
    heads: dict[str, tuple]
    counts: Sequence[int]
    features: Callable[[Tensor], Tensor] | None = None

    def mixture(self) -> Mixture:
        """Each run of rows its teacher's adapter: T mixtures, however many rows."""
        names = tuple((name,) for name in self.heads)
        rows = torch.arange(len(names), dtype=torch.int32)
        rows = rows.repeat_interleave(torch.tensor(list(self.counts)))
        return Mixture(names, torch.ones(len(names), 1), row_mixture=rows)

    def logits(self, images: Tensor) -> list[Tensor]:
        """Of each teacher, ``[n, L]``; one forward. Call it under ``mixture()``."""
        found = features_of(self.op, self.handle, self.features, images)
        parts = found.split(list(self.counts))
        return [F.linear(x, *head) for x, head in zip(parts, self.heads.values(), strict=True)]

    def cross_entropy(self, images: Tensor, labels: Tensor) -> Tensor:
        """``[N]``, of each image to its label by its own teacher."""
        parts = zip(self.logits(images), labels.split(list(self.counts)), strict=True)
        return torch.cat([F.cross_entropy(x, y, reduction="none") for x, y in parts])

    @torch.no_grad()
    def pool(
        self,
        images: Tensor,
        labels: Tensor,
        losses: Tensor,
        *,
        class_names: Mapping[str, Sequence[str]] | None,
        prune=None,
    ) -> Pool:
        """The images with what their teachers say of them, pruned as they were inverted."""
        with self.handle.mix(self.mixture()), prune or contextlib.nullcontext():
            found = self.logits(images)
        most = max(len(weight) for weight, _ in self.heads.values())
        padded = [F.pad(x, (0, most - x.shape[1]), value=-torch.inf) for x in found]
        teachers = torch.arange(len(found)).repeat_interleave(torch.tensor(list(self.counts)))
        return Pool(
            images.cpu(),
            labels.cpu(),
            teachers,
            torch.cat(padded).cpu(),
            losses.cpu(),
            tuple(self.heads),
            named_classes(self.op, self.heads, class_names),
            None if prune is None else prune.kept.cpu(),
        )


@torch.no_grad()
def label_pool(
    handle,
    heads: Mapping[str, Head],
    images: Mapping[str, tuple[Tensor, Tensor]],
    *,
    features: Callable[[Tensor], Tensor] | None = None,
    class_names: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 256,
) -> Pool:
    """A pool of given images: what inverted ones are compared with, or add to.

    Args:
        handle: Of the model, attached to the teachers and in eval mode.
        heads: Adapter -> nn.Linear or (weight, bias).
        images: The same adapters -> images ``[n, C, H, W]`` and labels ``[n]``.
        features: As in ``invert``.
        class_names: As in ``invert``.
        batch_size: Images of one forward.
    """
    op = "label_pool"
    check_whole(op, "batch_size", batch_size)
    heads = plain_heads(op, handle, heads)
    if images.keys() != heads.keys():
        raise invalid(op, "images", f"be those of {list(heads)}", list(images))
    pools = []
    for name, head in heads.items():
        x, y = images[name]
        for part, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
            teacher = Teachers(op, handle, {name: head}, (len(part),), features)
            one = None if class_names is None else {name: class_names.get(name, ())}
            pools.append(teacher.pool(part, labels, torch.zeros(len(part)), class_names=one))
    return joined(pools)


def joined(pools: Sequence[Pool]) -> Pool:
    """One pool of several without pruning; teachers of one name are one teacher."""
    tables = {n: c for pool in pools for n, c in zip(pool.names, pool.class_names, strict=True)}
    names = tuple(tables)
    most = max(pool.logits.shape[1] for pool in pools)
    teachers = [torch.tensor([names.index(n) for n in p.names])[p.teachers] for p in pools]
    logits = [F.pad(p.logits, (0, most - p.logits.shape[1]), value=-torch.inf) for p in pools]
    return Pool(
        torch.cat([pool.images for pool in pools]),
        torch.cat([pool.labels for pool in pools]),
        torch.cat(teachers),
        torch.cat(logits),
        torch.cat([pool.losses for pool in pools]),
        names,
        tuple(tables.values()),
    )
