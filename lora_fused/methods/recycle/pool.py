"""Labelled surrogate images of many teachers, with what each teacher says of its own."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_fused.checks import invalid, shape

_OP = "Pool"


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """Images of N rows, each of one class of one of T teachers.

    Attributes:
        images: ``[N, C, H, W]``, as the model takes them.
        labels: ``[N]`` int64, classes of each row's own teacher.
        teachers: ``[N]`` int64, positions in ``names``.
        logits: ``[N, L]`` what its own teacher's head says of each image, L the most classes that a
            teacher has, -inf where it has fewer. These stand in for the teacher in ``distil``.
        losses: ``[N]`` of each image when it was kept; 0 for given images.
        names: T adapter names.
        class_names: T tuples of class names. Classes of the same name are taken for the same.
        kept: ``[N, P]`` int64, the tokens that pruning kept of each image; None: all of them.
    """

    images: Tensor
    labels: Tensor
    teachers: Tensor
    logits: Tensor
    losses: Tensor
    names: tuple[str, ...]
    class_names: tuple[tuple[str, ...], ...]
    kept: Tensor | None = None

    def __post_init__(self):
        if self.images.dim() != 4 or not len(self.images):
            raise invalid(_OP, "images", "be [N, C, H, W], N at least 1", shape(self.images))
        rows = len(self.images)
        for label in ("labels", "teachers", "logits", "losses", "kept"):
            tensor, axes = getattr(self, label), 1 + (label in ("logits", "kept"))
            if tensor is not None and (tensor.dim() != axes or len(tensor) != rows):
                rule = f"have {axes} axes and a row for each of {rows} images"
                raise invalid(_OP, label, rule, shape(tensor))
        for label in ("labels", "teachers", "kept"):
            tensor = getattr(self, label)
            if tensor is not None and tensor.is_floating_point():
                raise invalid(_OP, label, "be integers", tensor.dtype)
        if len(self.class_names) != len(self.names):
            rule = f"name the classes of {len(self.names)} teachers"
            raise invalid(_OP, "class_names", rule, len(self.class_names))
        sizes = torch.tensor([len(names) for names in self.class_names])
        known = (self.teachers >= 0) & (self.teachers < len(sizes))
        known &= self.labels >= 0
        if not known.all() or not (self.labels < sizes[self.teachers.clamp(0)]).all():
            raise invalid(_OP, "labels and teachers", "name classes that are there", "others")

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        classes = sum(map(len, self.class_names))
        tokens = "" if self.kept is None else f", {self.kept.shape[1]} tokens kept"
        return f"Pool({len(self)} images, {len(self.names)} teachers, {classes} classes{tokens})"

    def tensors(self) -> list[Tensor]:
        """Everything that decides a training run on the pool, but for ``class_names``."""
        held = [self.images, self.labels, self.teachers, self.logits]
        return held if self.kept is None else [*held, self.kept]

    def accuracy(self) -> dict[str, float]:
        """Teacher -> the share of its images that it takes for what their label says."""
        right = (self.logits.argmax(-1) == self.labels).double()
        return {name: float(right[self.teachers == t].mean()) for t, name in enumerate(self.names)}


def named_classes(
    op: str, heads: Mapping[str, tuple], class_names: Mapping[str, Sequence[str]] | None
) -> tuple[tuple[str, ...], ...]:
    """The names given for each head's classes; by default ``"<teacher>/<number>"``."""
    found = []
    for name, (weight, _) in heads.items():
        made = tuple(f"{name}/{i}" for i in range(len(weight)))
        given = made if class_names is None else tuple(class_names.get(name, ()))
        if len(given) != len(made):
            rule = f"name the {len(made)} classes of {name!r}"
            raise invalid(op, "class_names", rule, list(given))
        found.append(given)
    return tuple(found)
