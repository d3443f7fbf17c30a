"""What compiled kernels may cost, by case, kernel and target: a committed file, and the test."""

import csv
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import pytest

from support import aot

KEY = ("case", "kernel", "target")
FIELDS = (
    *KEY,
    *("threads", "registers", "spills", "shared", "loads", "wide_loads", "mma", "occupancy"),
    *("triton",),
)


def measure(launch: Callable[..., object], cases: Mapping[str, Mapping], op: str) -> list[dict]:
    """A row for each kernel of each case and target, named by its stage where it is the op's."""
    import triton

    rows = [asdict(c) for c in aot.compile_launches(launch, list(cases.values()))]
    for row in rows:
        row |= {"case": list(cases)[row["case"]], "triton": triton.__version__}
        row["kernel"] = row["kernel"].removeprefix(f"_{op}_").removesuffix("_kernel")
        row["occupancy"] = round(row["occupancy"], 3)
    return rows


def compare(compiled: list[dict], path: Path) -> None:
    """Registers, shared memory and occupancy; a change for the better wants a new file too."""
    import triton

    with path.open(newline="") as file:
        allowed = {tuple(row[k] for k in KEY): row for row in csv.DictReader(file)}
    if {row["triton"] for row in allowed.values()} != {triton.__version__}:
        pytest.skip(f"the budget is of another Triton than {triton.__version__}")
    assert {tuple(c[k] for k in KEY) for c in compiled} == set(allowed)
    for c in compiled:
        most = allowed[tuple(c[k] for k in KEY)]
        for field in ("registers", "shared"):
            assert c[field] <= int(most[field]), (field, c, most)
        for field in ("occupancy", "wide_loads"):
            assert c[field] >= float(most[field]), (field, c, most)


def write(rows: list[dict], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
