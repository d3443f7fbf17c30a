"""Hooks into Triton's interpreter that count each load, store, atomic and dot of a launch."""

import contextlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

import numpy as np
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from benchmarks.traffic.marks import SECTOR, Storage

UNKNOWN = "?"  # whom an out-of-bounds lane is attributed to


@dataclass
class Bytes:
    """Bytes of one kind of access at the five levels of reuse."""

    lane: int = 0
    op: int = 0
    sector: int = 0
    program: int = 0
    launch: int = 0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Bytes)))


@dataclass
class Counts:
    """What one launch, or several together, asked for."""

    launches: int = 0
    programs: int = 0
    storing_programs: int = 0  # those that stored or added anything, not the ones that left early
    loads: int = 0
    stores: int = 0
    atomics: int = 0
    lanes: int = 0
    masked_lanes: int = 0
    dots: int = 0
    dot_flops: int = 0  # 2 M N K of the tiles, padding included
    out_of_bounds: int = 0
    write_races: int = 0  # elements stored by several programs, once for each after the first
    read_write_races: int = 0  # elements read by one program and stored by another
    largest_program: int = 0  # bytes of the program that moves most, at program level
    read: Bytes = field(default_factory=Bytes)
    written: Bytes = field(default_factory=Bytes)
    atomic: Bytes = field(default_factory=Bytes)

    @property
    def races(self) -> int:
        return self.write_races + self.read_write_races

    @property
    def dram_bytes(self) -> int:
        """Launch level; an atomic reads and writes."""
        return self.read.launch + self.written.launch + 2 * self.atomic.launch

    @property
    def l2_bytes(self) -> int:
        """Program level; an atomic is one transaction."""
        return self.read.program + self.written.program + self.atomic.program

    def __add__(self, other: "Counts") -> "Counts":
        total = Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Counts)))
        total.largest_program = max(self.largest_program, other.largest_program)
        return total


@dataclass
class Launch(Counts):
    """One launch; ``arguments`` splits its bytes: name -> kind -> Bytes."""

    kernel: str = ""
    grid: tuple[int, ...] = ()
    arguments: dict[str, dict[str, Bytes]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(Bytes))
    )


class LaunchCounter:
    """The launches seen so far, and the torch operators called between them."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.launches: list[Launch] = []
        self.torch_ops: Counter[str] = Counter()  # a kernel each on a GPU; views are left out
        self._tensors = dict(tensors)
        self._launch: Launch | None = None
        self._storages: list[Storage] = []
        self._program = 0
        self._moved = self._stored = 0

    @property
    def total(self) -> Counts:
        return sum(self.launches, Counts())

    def _begin(self, kernel: str, arguments: Mapping[str, object]) -> None:
        self._launch = Launch(launches=1, kernel=kernel)
        named = [*_tensors_of(arguments), *self._tensors.items()]
        storages: dict[int, Storage] = {}
        for name, tensor in named:
            start = tensor.untyped_storage().data_ptr()
            if start and start not in storages:
                storages[start] = Storage(name, start, tensor.untyped_storage().nbytes())
        self._storages = [storages[start] for start in sorted(storages)]
        self._starts = np.array([s.start for s in self._storages], dtype=np.uint64)
        self._program = self._moved = self._stored = 0

    def _set_grid(self, grid: tuple[int, ...]) -> None:
        self._launch.grid = grid
        self._launch.programs = int(np.prod(grid))

    def _next_program(self) -> None:
        self._end_program()
        self._program += 1

    def _end_program(self) -> None:
        self._launch.storing_programs += bool(self._stored)
        self._launch.largest_program = max(self._launch.largest_program, self._moved)
        self._moved = self._stored = 0

    def _end(self) -> None:
        self._end_program()
        self.launches.append(self._launch)
        self._launch, self._storages = None, []

    def _access(self, kind: str, pointers: TensorHandle, mask: np.ndarray) -> np.ndarray | None:
        """Count one load, store or atomic; where lanes are out of bounds, the mask of the rest."""
        launch = self._launch
        addresses = np.asarray(pointers.data)
        mask = np.broadcast_to(np.asarray(mask, dtype=bool), addresses.shape)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        active = addresses[mask]
        launch.lanes += addresses.size
        launch.masked_lanes += addresses.size - active.size
        if not active.size:
            return None
        storage = self._holding(active.min())
        if storage is not None and int(active.max()) + size <= storage.stop:
            self._count(kind, storage, active, size)
            return None
        owners = np.searchsorted(self._starts, active, side="right") - 1
        inside = np.zeros(active.shape, bool)
        for owner in np.unique(owners[owners >= 0]):
            storage = self._storages[owner]
            own = (owners == owner) & (active + np.uint64(size) <= np.uint64(storage.stop))
            inside |= own
            self._count(kind, storage, active[own], size)
        outside = int((~inside).sum())
        launch.out_of_bounds += outside
        launch.arguments[UNKNOWN][kind].lane += outside * size
        kept = mask.copy()
        kept[mask] = inside
        return kept

    def _holding(self, address: np.uint64) -> Storage | None:
        at = int(np.searchsorted(self._starts, address, side="right")) - 1
        return self._storages[at] if at >= 0 else None

    def _count(self, kind: str, storage: Storage, addresses: np.ndarray, size: int) -> None:
        if not addresses.size:
            return
        launch, marks = self._launch, storage.marks(size)
        index = ((addresses - np.uint64(storage.start)) // np.uint64(size)).astype(np.int64)
        elements = marks.distinct(index)
        sectors = storage.sectors.distinct((elements * size + storage.start % SECTOR) // SECTOR)
        new, first = marks.visit(kind, elements, self._program)
        counted = Bytes(
            lane=index.size * size,
            op=elements.size * size,
            sector=sectors.size * SECTOR,
            program=new.size * size,
            launch=first * size,
        )
        launch.arguments[storage.name][kind] += counted
        setattr(launch, kind, getattr(launch, kind) + counted)
        self._moved += counted.program
        if kind == "written":
            launch.write_races += new.size - first
        if kind != "read":
            self._stored += 1
        if kind != "atomic":
            launch.read_write_races += marks.conflicts(kind, new, self._program)


@contextlib.contextmanager
def count(tensors: Mapping[str, torch.Tensor] | None = None) -> Iterator[LaunchCounter]:
    """Count every Triton launch inside the block.

    Args:
        tensors: Tensors that kernels reach through addresses in memory, by name; without them
            such accesses are out of bounds.
    """
    counter = LaunchCounter(tensors or {})
    hooks = _builder_hooks(counter)
    saved = {name: getattr(InterpreterBuilder, name) for name in hooks}
    call = GridExecutor.__call__
    for name, hook in hooks.items():
        setattr(InterpreterBuilder, name, hook(saved[name]))
    GridExecutor.__call__ = _launch_hook(counter, call)
    try:
        with _TorchOps(counter):
            yield counter
    finally:
        for name, stock in saved.items():
            setattr(InterpreterBuilder, name, stock)
        GridExecutor.__call__ = call


def _builder_hooks(counter: LaunchCounter) -> dict:
    def masked(handle: TensorHandle | np.ndarray, kept: np.ndarray | None):
        if kept is None:
            return handle
        return TensorHandle(kept, tl.int1) if isinstance(handle, TensorHandle) else kept

    def load(stock):
        def create_masked_load(self, pointers, mask, *rest, **options):
            counter._launch.loads += 1
            kept = counter._access("read", pointers, mask.data)
            return stock(self, pointers, masked(mask, kept), *rest, **options)

        return create_masked_load

    def store(stock):
        def create_masked_store(self, pointers, value, mask, *rest, **options):
            counter._launch.stores += 1
            kept = counter._access("written", pointers, mask.data)
            return stock(self, pointers, value, masked(mask, kept), *rest, **options)

        return create_masked_store

    def update(stock):
        def create_atomic_rmw(self, op, pointers, value, mask, *rest):
            counter._launch.atomics += 1
            kept = counter._access("atomic", pointers, mask.data)
            return stock(self, op, pointers, value, masked(mask, kept), *rest)

        return create_atomic_rmw

    def swap(stock):
        def create_atomic_cas(self, pointers, *rest):
            counter._launch.atomics += 1
            counter._access("atomic", pointers, np.ones(1, bool))
            return stock(self, pointers, *rest)

        return create_atomic_cas

    def dot(stock):
        def create_dot(self, a, b, *rest):
            counter._launch.dots += 1
            counter._launch.dot_flops += 2 * a.data.size * b.data.shape[-1]
            return stock(self, a, b, *rest)

        return create_dot

    def grid_dim(stock):
        def set_grid_dim(self, *grid):
            counter._set_grid(grid)
            return stock(self, *grid)

        return set_grid_dim

    def grid_idx(stock):
        def set_grid_idx(self, *at):
            counter._next_program()
            return stock(self, *at)

        return set_grid_idx

    return {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": update,
        "create_atomic_cas": swap,
        "create_dot": dot,
        "set_grid_dim": grid_dim,
        "set_grid_idx": grid_idx,
    }


def _launch_hook(counter: LaunchCounter, stock):
    # The interpreter copies storages to the host, which for CPU tensors is the storage itself.
    def __call__(self, *args, **kwargs):
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        counter._begin(self.fn.__name__, named)
        try:
            stock(self, *args, **kwargs)
        finally:
            counter._end()

    return __call__


class _TorchOps(TorchDispatchMode):
    """Counts torch operators outside of launches (within, the interpreter moves arguments)."""

    def __init__(self, counter: LaunchCounter):
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        allocates = func.overloadpacket.__name__.startswith(("empty", "new_empty"))
        if self._counter._launch is None and not func.is_view and not allocates:
            self._counter.torch_ops[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def _tensors_of(arguments: Mapping[str, object]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in arguments.items():
        if isinstance(value, tuple):
            yield from _tensors_of({f"{name}[{i}]": item for i, item in enumerate(value)})
        elif isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(getattr(value, "base", None), torch.Tensor):  # a descriptor or a recast
            yield name, value.base
