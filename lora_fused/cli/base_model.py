"""The frozen base of a library at the command line: where it is, and features of texts from it."""

import json
import os
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from lora_fused.checks import invalid
from lora_fused.cli.console import Reporter, counted

_WEIGHTS = (".safetensors", ".bin")


class Base(NamedTuple):
    """A loaded base: a transformers model and its tokenizer."""

    model: torch.nn.Module
    tokenizer: Callable


def load_base(name: str, reporter: Reporter) -> Base:
    """A model by its folder, or by the installed package that it is in."""
    folder = base_folder(name)
    if find_spec("transformers") is None:
        raise ImportError("library: transformers must be installed; run: pip install transformers")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with reporter.task(f"loading {name}", 1) as advance:
        model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        advance(1)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return Base(model, tokenizer)


def base_folder(name: str) -> Path:
    """The folder of a model: itself, or the one in a package that has a config and weights."""
    if Path(name, "config.json").is_file():
        return Path(name)
    rule = "be a model's folder or an installed package with one (hubs are not asked)"
    try:
        package = distribution(name)
    except (PackageNotFoundError, ValueError):  # a path is no valid name
        raise invalid("library", "--model", rule, repr(name)) from None
    files = [Path(file) for file in package.files or ()]
    weights = {file.parent for file in files if file.suffix in _WEIGHTS}
    folders = {file.parent for file in files if file.name == "config.json"} & weights
    if len(folders) != 1:
        raise invalid("library", "--model", rule, f"{name} with {len(folders)} of them")
    return Path(package.locate_file(folders.pop()))


def place_of(name: str) -> str:
    """Where a base is found from any folder: its own one, absolute, or the package's name."""
    return os.path.abspath(name) if base_folder(name) == Path(name) else name


def base_of(library, model: str | None, reporter: Reporter) -> Base:
    """The base that is named, or else the one that the library was made with, if it is there.

    Whether it is the library's is for ``library.embed`` to see.
    """
    if model is None:
        space = library.space
        model = space.base_place or space.base or "not named"
        try:
            base_folder(model)
        except ValueError:
            gone = f", no longer at {space.base_place}" if space.base_place else ""
            rule = f"name the folder of the library's base ({space.base or 'not named'}{gone})"
            raise invalid("library", "--model", rule, None) from None
    return load_base(model, reporter)


def asked(
    library, inputs: str | None, text: list[str] | None, field: str, per_input: bool,
    model: str | None, reporter: Reporter, also: Sequence[str] = (),
):  # fmt: skip
    """What is asked: titles, features, and whether each is of one input alone.

    A row of each input, or one of their mean; rows of ``also`` follow.
    """
    if (inputs is None) == (not text):
        got = "both" if text else "neither"
        raise invalid("library", "--inputs and --text", "be given one of them", got)
    if not len(library):
        raise invalid("library", "URI", "hold entries", "none")
    texts = text or read_texts(inputs, field)
    base = base_of(library, model, reporter)
    count = len(texts) + len(also)
    with reporter.task(f"embedding {counted(count, 'input')}", count) as advance:
        found = library.embed(
            base.model, [*texts, *also], tokenizer=base.tokenizer, progress=steps(advance)
        )
    if per_input:
        return texts, found, True
    single = len(texts) == 1
    title = texts[0] if single else f"mean of {len(texts)} inputs"
    return [title], found.double().mean(0, keepdim=True).float(), single


def steps(advance: Callable[..., None]) -> Callable[[int, int | None], None]:
    """A bar's advance as the progress(done, total) that methods call."""
    before = 0

    def progress(done: int, total: int | None) -> None:
        nonlocal before
        advance(done - before)
        before = done

    return progress


def read_texts(path: str | os.PathLike, field: str = "text") -> list[str]:
    """Inputs of a file: its lines that are not empty, or a field of each JSON line."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"library: no such file: {path}")
    if path.suffix == ".jsonl":
        lines = [_field(row, field, where) for where, row in read_rows(path)]
    else:
        lines = [line for line in _lines(path) if line.strip()]
    if not lines:
        raise invalid("library", str(path), "hold inputs, one per line", "none")
    return lines


def read_rows(path: Path) -> list[tuple[str, dict]]:
    """The objects of a .jsonl file, each with its place."""
    rows = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise invalid("library", where, "be JSON", error) from None
        if not isinstance(row, dict):
            raise invalid("library", where, "be a JSON object", type(row).__name__)
        rows.append((where, row))
    return rows


def _lines(path: Path) -> list[str]:
    """Lines end at a newline alone; other separators are part of a text, which counts once."""
    try:
        held = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise invalid("library", str(path), "be text in UTF-8", error) from None
    return [line.removesuffix("\r") for line in held.split("\n")]


def _field(row: dict, field: str, where: str) -> str:
    text = row.get(field)
    if not isinstance(text, str) or not text.strip():
        fields = ", ".join(map(repr, row)) or "none"
        rule = f"have text in its field {field!r} (--field names another of {fields})"
        raise invalid("library", where, rule, repr(text))
    return text
