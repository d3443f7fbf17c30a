"""Who touched each element of a tensor, in arrays as long as the tensor."""

import numpy as np

SECTOR = 32  # bytes: the unit between L1 and L2


class Storage:
    """The memory of one tensor argument (and of all others that share it)."""

    def __init__(self, name: str, start: int, size: int):
        self.name, self.start, self.stop = name, start, start + size
        self._marks: dict[int, Marks] = {}
        self.sectors = Marks(size // SECTOR + 2)

    def marks(self, size: int) -> "Marks":
        if size not in self._marks:
            self._marks[size] = Marks((self.stop - self.start) // size + 1)
        return self._marks[size]


class Marks:
    """Who touched each element. Zeroed pages are not backed by memory until they are touched."""

    def __init__(self, count: int):
        self._count = count
        self._arrays: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            self._arrays[name] = np.zeros(self._count, np.int32)
        return self._arrays[name]

    def distinct(self, index: np.ndarray) -> np.ndarray:
        """The index without repetitions: each element keeps the lane that wrote to it last."""
        lanes, slot = np.arange(index.size, dtype=np.int32), self["lane"]
        slot[index] = lanes
        last = slot[index] == lanes
        return index if last.all() else index[last]

    def visit(self, kind: str, elements: np.ndarray, program: int) -> tuple[np.ndarray, int]:
        """Those new to this program, and how many of them are new to the launch."""
        latest = self[kind]
        before = latest[elements]
        new = elements[before != program]
        latest[new] = program
        if kind == "read":
            earliest = self["first read"]
            earliest[new] = np.where(earliest[new] == 0, program, earliest[new])
        return new, int((before == 0).sum())

    def conflicts(self, kind: str, elements: np.ndarray, program: int) -> int:
        """How many of the elements another program stored (read) that this one reads (stores).

        Programs run one after another: whoever read an element is between its first reader and
        its latest.
        """
        others = ("written",) if kind == "read" else ("read", "first read")
        foreign = np.zeros(elements.shape, bool)
        for name in others:
            if name in self._arrays:
                mark = self[name][elements]
                foreign |= (mark != 0) & (mark != program)
        return int(foreign.sum())
