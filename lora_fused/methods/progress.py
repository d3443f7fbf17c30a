"""How methods that take long say how far they are."""

import sys
from collections.abc import Callable


def show(
    progress: bool | Callable[[int, int | None], None],
    done: int,
    total: int | None,
    line: str,
    *,
    ends: bool | None = None,
) -> None:
    """Tell a function ``progress(done, total)``; for True, write over a line of a terminal.

    ``ends``: nothing follows. Default: at ``done == total``.
    """
    if callable(progress):
        progress(done, total)
    elif progress and sys.stderr.isatty():
        end = "\n" if (done == total if ends is None else ends) else ""
        print(f"\r{line}", end=end, file=sys.stderr, flush=True)
