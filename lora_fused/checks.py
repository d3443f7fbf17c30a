"""The one form in which every error of this package is worded."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


def invalid(op: str, argument: str, rule: str, got: object) -> ValueError:
    """Return (not raise) the ValueError ``"<op>: <argument> must <rule>, got <got>"``."""
    return ValueError(f"{op}: {argument} must {rule}, got {got}")


def check_whole(op: str, argument: str, value: object, least: int = 1) -> None:
    """Raise the ValueError that names the argument unless it is an integer of at least so much."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise invalid(op, argument, f"be an integer of at least {least}", repr(value))


def some(things: Iterable[str], most: int = 4) -> str:
    """``a, b, c, d and 3 more``."""
    things = list(things)
    rest = len(things) - most
    return ", ".join(things[:most]) + (f" and {rest} more" if rest > 0 else "")


def hint(name: object, known: Sequence[str]) -> str:
    """What a name that is not among the known ones may have meant: close ones, or a few of them."""
    close = get_close_matches(str(name), known, n=3)
    return (
        f"close: {', '.join(map(repr, close))}" if close else f"known: {some(map(repr, known), 3)}"
    )


def shape(tensor) -> str:
    """A tensor's shape as users write it: ``[4, 16]``."""
    return str(list(tensor.shape))
