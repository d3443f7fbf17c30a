"""Recipes: a merge as a YAML file, to be run from and written as the record of what was done."""

import os
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from lora_fused.checks import invalid

FILE = "recipe.yaml"
OPTIONS = (
    *("combination_type", "rank", "energy", "density", "majority_sign_method", "seed"),
    *("dtype", "saved_modules"),
)
_IGNORED = ("lora_fused", "result")  # written for the reader


def need_yaml() -> None:
    """Raise, before any work is done, where PyYAML is missing."""
    if find_spec("yaml") is None:
        raise ImportError("merge: PyYAML must be installed; run: pip install pyyaml")


def read_recipe(path: str | os.PathLike) -> tuple[list[tuple[str, object]], dict]:
    """The adapters of a recipe as (path, weight), and its options; paths from where it lies."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"merge: no such recipe: {path}")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise invalid("merge", str(path), "be YAML", error) from None
    if not isinstance(found, dict):
        rule = "map 'combination_type' and 'adapters' to values"
        raise invalid("merge", str(path), rule, type(found).__name__)
    known = (*OPTIONS, "adapters", *_IGNORED)
    for key in found:
        if key not in known:
            close = get_close_matches(str(key), known, n=1)
            hint = f" (close: {close[0]!r})" if close else ""
            raise invalid("merge", f"keys of {path}", f"be of {known}{hint}", repr(key))
    adapters = found.get("adapters")
    if not isinstance(adapters, list) or not adapters:
        rule = "be a list of one entry per adapter, each with path and weight"
        raise invalid("merge", f"adapters of {path}", rule, repr(adapters))
    pairs = [_entry(entry, path) for entry in adapters]
    return pairs, {key: found[key] for key in OPTIONS if found.get(key) is not None}


def _entry(entry: object, path: Path) -> tuple[str, object]:
    if not isinstance(entry, dict) or set(entry) != {"path", "weight"}:
        rule = "hold path and weight, and nothing else"
        raise invalid("merge", f"an entry of adapters of {path}", rule, repr(entry))
    if not isinstance(entry["path"], str):
        raise invalid("merge", f"a path of {path}", "be text", repr(entry["path"]))
    return os.path.normpath(path.parent / entry["path"]), entry["weight"]


def write_recipe(folder: Path, adapters: list[tuple[Path, float]], options: dict, result: dict):
    """Write the record of a merge beside its result, so that it can be run again."""
    import yaml

    from lora_fused import __version__

    entries = [{"path": _from(folder, path), "weight": weight} for path, weight in adapters]
    content = {**options, "adapters": entries, "result": result, "lora_fused": __version__}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    head = (
        "# How this adapter was made. Run it again: lora-fused merge --recipe recipe.yaml -o OUT\n"
    )
    (folder / FILE).write_text(head + text, encoding="utf-8")


def _from(folder: Path, path: Path) -> str:
    try:
        return os.path.relpath(path, folder)
    except ValueError:  # another drive
        return os.path.abspath(path)
