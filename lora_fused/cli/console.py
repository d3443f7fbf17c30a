"""Where output goes: results to stdout, progress to stderr; what a path argument stands for."""

import glob
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lora_fused.checks import some
from lora_fused.io.find import find_adapters, is_adapter

PIPE_WIDTH = 1000  # a table that no terminal limits is as wide as its content


class Reporter:
    """Progress on stderr: bars on a terminal, plain lines otherwise, nothing when quiet."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.console = Console(stderr=True, emoji=False)

    def say(self, text: str) -> None:
        if not self.quiet:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def task(self, label: str, total: int | None) -> Iterator[Callable[..., None]]:
        """Yield a function that advances the bar (or, without a terminal, does nothing).

        Called as advance(steps=1, total=None); ``total`` as soon as it is known.
        """
        if self.quiet or not self.console.is_terminal:
            self.say(f"{label} ...")
            start = time.perf_counter()
            yield lambda steps=1, total=None: None
            self.say(f"{label}: {time.perf_counter() - start:.1f} s")
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
        )
        with Progress(*columns, TimeElapsedColumn(), console=self.console) as progress:
            bar = progress.add_task(label, total=total)
            yield lambda steps=1, total=None: progress.update(bar, advance=steps, total=total)


def stdout() -> Console:
    """A console on stdout as it is now (tests replace it), wide where it is no terminal."""
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    return Console(file=sys.stdout, width=width, highlight=False, emoji=False)


def finite(facts: dict) -> dict:
    """Facts as JSON can hold them: None for a number that is none."""
    lost = {k: None for k, v in facts.items() if isinstance(v, float) and not math.isfinite(v)}
    return facts | lost


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def say(text: str) -> None:
    """A line on stdout as it is, however long."""
    stdout().print(text, markup=False, soft_wrap=True)


def say_facts(told: dict) -> None:
    """A line each."""
    for name, fact in told.items():
        if isinstance(fact, (dict, list)):
            fact = json.dumps(fact)
        shown = f"{fact:.4g}" if isinstance(fact, float) else fact
        say(f"{name.replace('_', ' ')}: {'-' if fact is None else shown}")


def check_page(path: str, op: str, option: str) -> None:
    """Before anything is computed: a page goes into a folder that is there, and is none itself."""
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"{op}: no such folder: {Path(path).absolute().parent}")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{op}: {option} names a folder: {path}")


def check_writable(path: str | os.PathLike, op: str) -> None:
    """Before anything is computed: try whether a file or folder can be made at this path."""
    folder = Path(path).absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        told = f"{op}: nothing can be written to {folder}: {error.strerror}"
        raise type(error)(told) from None


def counted(count: int, noun: str) -> str:
    """``1 thread``, ``2 threads``, ``3 matches``, ``4 entries``."""
    several = {"match": "matches", "entry": "entries"}.get(noun, f"{noun}s")
    return f"{count} {noun if count == 1 else several}"


def table(title: str, columns: dict[str, str], rows: list[list[object]]) -> Table:
    """A rich table; ``columns`` maps each heading to its justification ("left" or "right")."""
    made = Table(title=escape(title), title_justify="left", title_style="bold")
    for heading, justify in columns.items():
        made.add_column(heading, justify=justify, overflow="fold")
    for row in rows:
        made.add_row(*(escape(str(cell)) for cell in row))
    return made


def expand(arguments: list[str]) -> list[tuple[Path, str | None]]:
    """Turn path arguments into adapters, in order, each with None or the reason why it is none.

    A directory is searched for adapters, a pattern stands for the adapters among its matches (see
    ``strays``), ``@list.txt`` names one path per line, relative to the list's own directory; empty
    lines and lines with # are skipped.
    """
    found: dict[Path, str | None] = {}
    for argument in arguments:
        for path, reason in _expand_one(argument):
            found.setdefault(path, reason)
    return list(found.items())


def tell_strays(arguments: list[str], reporter: Reporter) -> list[Path]:
    """Say how many matches of patterns are passed over, since they are no adapters."""
    found = strays(arguments)
    if found:
        shown = some(map(str, found))
        reporter.say(f"passed over {counted(len(found), 'match')} without an adapter: {shown}")
    return found


def strays(arguments: list[str]) -> list[Path]:
    """What patterns match besides adapters: every command passes over it, as load_adapters does."""
    return [path for argument in arguments for path in _matches(argument) if not is_adapter(path)]


def _expand_one(argument: str) -> list[tuple[Path, str | None]]:
    path = Path(argument)
    if argument.startswith("@"):
        return _expand_list(Path(argument[1:]))
    if path.is_dir():
        adapters = find_adapters(path)
        return [(p, None) for p in adapters] or [(path, "no adapter in this directory")]
    if path.exists():
        return [(path, None)]
    matches = _matches(argument)
    if matches:
        found = [(match, None) for match in matches if is_adapter(match)]
        return found or [(path, "the pattern matches no adapter")]
    pattern = glob.has_magic(argument)
    return [(path, "the pattern matches nothing" if pattern else "no such file or directory")]


def _matches(argument: str) -> list[Path]:
    """Of a pattern; what is there by its very name is none."""
    pattern = glob.has_magic(argument) and not os.path.exists(argument)
    return [Path(match) for match in sorted(glob.glob(argument))] if pattern else []


def _expand_list(listing: Path) -> list[tuple[Path, str | None]]:
    try:
        lines = [line.strip() for line in listing.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        return [(listing, f"the list cannot be read: {error}")]
    paths = [line for line in lines if line and not line.startswith("#")]
    if not paths:
        return [(listing, "the list names no path")]
    return [pair for p in paths for pair in _expand_one(str(listing.parent / p))]
