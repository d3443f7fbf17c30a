"""Tasks drawn from a pool: classes of one teacher, or of several."""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_fused.checks import invalid
from lora_fused.methods.recycle.pool import Pool


class Task(NamedTuple):
    """One step's images.

    Attributes:
        rows: ``[ways, shots + queries]`` rows of the pool, each line one class.
        teacher: Whose classes they are; None: of several.
        labels: ``[ways]`` of the classes, each in its own teacher's counting.
    """

    rows: Tensor
    teacher: int | None
    labels: Tensor


class Tasks:
    """What tasks can be drawn from a pool.

    Args:
        op: For errors.
        pool: Classes with fewer than ``each`` images are left out.
        ways: Classes of a task.
        each: Images of a class.
        interpolate: Half of the tasks mix teachers.
    """

    def __init__(self, op: str, pool: Pool, *, ways: int, each: int, interpolate: bool):
        self._ways, self._each, self._interpolate = ways, each, interpolate
        self._classes: list[tuple[int, int, str, Tensor]] = []
        most = 0
        for teacher, names in enumerate(pool.class_names):
            for label, name in enumerate(names):
                found = (pool.teachers == teacher) & (pool.labels == label)
                rows = found.nonzero().flatten()
                most = max(most, len(rows))
                if len(rows) >= each:
                    self._classes.append((teacher, label, name, rows))
        if not self._classes:
            rule = f"be at most {most}, the pool's images of a class"
            raise invalid(op, "shots + queries", rule, each)
        of = [teacher for teacher, *_ in self._classes]
        self._whole = [t for t in range(len(pool.names)) if of.count(t) >= ways]
        has = f"{each} images each (shots + queries)"
        if interpolate and (len(set(of)) < 2 or len({c[2] for c in self._classes}) < ways):
            rule = f"hold {ways} classes of other names, of two teachers at least, with {has}"
            raise invalid(op, "pool", rule, f"{len(of)} classes of {len(set(of))} teachers")
        if not interpolate and not self._whole:
            rule = f"hold a teacher with {ways} classes with {has}"
            raise invalid(op, "pool", rule, f"at most {max(map(of.count, of), default=0)} classes")

    def draw(self, generator: torch.Generator) -> Task:
        """A task by lot; where no teacher has enough classes of its own, a mixed one."""
        mixed = bool(torch.randint(0, 2, (), generator=generator)) if self._interpolate else False
        if mixed or not self._whole:
            return self._task(self._of_several(generator), None, generator)
        at = int(torch.randint(0, len(self._whole), (), generator=generator))
        teacher = self._whole[at]
        own = [c for c in self._classes if c[0] == teacher]
        chosen = torch.randperm(len(own), generator=generator)[: self._ways].tolist()
        return self._task([own[i] for i in chosen], teacher, generator)

    def _of_several(self, generator: torch.Generator) -> list[tuple]:
        """Classes of as many teachers as there are, each name once."""
        order = torch.randperm(len(self._classes), generator=generator).tolist()
        found, teachers, names = [], set(), set()
        for spread in (True, False):  # at first one class of each teacher
            for one in (self._classes[i] for i in order):
                taken = one[2] in names or (spread and one[0] in teachers)
                if not taken and len(found) < self._ways:
                    found.append(one)
                    teachers.add(one[0])
                    names.add(one[2])
        return found

    def _task(self, chosen: list[tuple], teacher: int | None, generator) -> Task:
        picks = [
            rows[torch.randperm(len(rows), generator=generator)[: self._each]]
            for *_, rows in chosen
        ]
        labels = torch.tensor([label for _, label, *_ in chosen])
        return Task(torch.stack(picks), teacher, labels)
