"""Counts as text."""

from benchmarks.traffic.counter import Counts, LaunchCounter

_LINE = "{:<36.36s}{:>9s}{:>9s}{:>12s}{:>12s}{:>12s}{:>11s}{:>10s}{:>10s}{:>5s}{:>6s}"
_HEADER = _LINE.format(
    *("kernel", "programs", "storing", "read DRAM", "read L2", "written", "atomic"),
    *("largest", "dot MFLOP", "oob", "races"),
)


def launches(counter: LaunchCounter) -> str:
    """A line for each launch and one for the total; the largest program's bytes are at L2 level."""
    rows = [_HEADER, *(_row(launch.kernel, launch) for launch in counter.launches)]
    return "\n".join([*rows, _row("total", counter.total)])


def arguments(counter: LaunchCounter) -> str:
    """Each launch's bytes by argument: DRAM / L2 / sectors."""
    rows = []
    for launch in counter.launches:
        rows.append(f"{launch.kernel} {launch.grid}")
        for name, kinds in launch.arguments.items():
            cells = (f"{k} {b.launch} / {b.program} / {b.sector}" for k, b in kinds.items())
            rows.append(f"    {name:<36s}{'  '.join(cells)}")
    return "\n".join(rows)


def _row(name: str, counts: Counts) -> str:
    numbers = (
        *(counts.programs, counts.storing_programs, counts.read.launch, counts.read.program),
        *(counts.written.launch, counts.atomic.launch, counts.largest_program),
    )
    tail = (f"{counts.dot_flops / 1e6:.2f}", str(counts.out_of_bounds), str(counts.races))
    return _LINE.format(name, *map(str, numbers), *tail)
