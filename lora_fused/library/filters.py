"""What a library's entries are selected by: a filter of the user's, and tags."""

import re
from collections.abc import Iterable

from lora_fused.checks import invalid
from lora_fused.library.entries import OP

# Columns in which an entry's rows differ.
_OWN = re.compile(r"\b(prototype|count|crc|vector|_rowid|_rowaddr|_distance)\b", re.IGNORECASE)
_QUOTED = re.compile(r"""'[^']*'|"[^"]*"|`[^`]*`""")
_BEYOND = re.compile(r"--|/\*|[;$'\"`]")


def tagged(filter: str | None, tags: Iterable[str]) -> str | None:
    """A filter, and all of these tags.

    Raises:
        ValueError: a filter that is no expression by itself: of what closes our parenthesis, or
            comments out the rest, the engine would take the first part alone.
    """
    parts = []
    if filter is not None:
        if not isinstance(filter, str) or not filter.strip():
            raise invalid(OP, "filter", "be SQL, not empty", repr(filter))
        bare = _QUOTED.sub(" ", filter)
        if _BEYOND.search(bare) or not _balanced(bare):
            rule = "be one expression, parentheses and quotes closed, without comments, ; and $"
            raise invalid(OP, "filter", rule, repr(filter))
        parts.append(f"({filter})")
    listed = ", ".join(map(quoted, tags))
    return " AND ".join([*parts, f"array_has_all(tags, [{listed}])"] if listed else parts) or None


def by_row(filter: str | None) -> bool:
    """Whether a filter may hold for some of an entry's rows and not for others."""
    return filter is not None and bool(_OWN.search(filter))


def named(names: Iterable[str]) -> str:
    return f"name IN ({listed})" if (listed := ", ".join(map(quoted, names))) else "false"


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _balanced(text: str) -> bool:
    depth = 0
    for sign in text:
        depth += (sign == "(") - (sign == ")")
        if depth < 0:
            return False
    return depth == 0
