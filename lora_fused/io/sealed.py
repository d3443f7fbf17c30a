"""A folder of one JSON header and one safetensors file, sealed by checksums of both.

The header names the data file, whose name tells its content, and is put in place last: whenever a
save ends, whole or killed, the folder holds one whole content, the old or the new.
"""

import hashlib
import json
import mmap
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_fused.checks import invalid
from lora_fused.io.tensors import magnitude, write_safetensors

HEADER = "subspace.json"
FORMAT, VERSION = "lora_fused.subspace", 1
_DATA = re.compile(r"subspace-[0-9a-f]{16}\.safetensors")
_SAVE, _LOAD = "save_subspace", "load_subspace"


def write_sealed(tensors: dict[str, Tensor], header: dict, path: Path) -> None:
    """Write a folder, or replace the content of one, whole or not at all; other files stay."""
    from lora_fused import __version__

    known = {"format": FORMAT, "format_version": VERSION, "library_version": __version__}
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"{_SAVE}: {path.parent} is not a folder") from error
    try:
        fresh.mkdir()
        _write(tensors, {**known, **header}, fresh)
        _put(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def read_sealed(path: Path) -> tuple[dict, dict[str, Tensor], Path]:
    """The header, all tensors, and the file that they are from; every checksum is compared."""
    header, where = _read_header(path), path / HEADER
    name = header.get("file")
    if not isinstance(name, str) or not _DATA.fullmatch(name):
        rule = "be subspace-<16 hex digits>.safetensors, beside it"
        raise invalid(_LOAD, f"file in {where}", rule, repr(name))
    if not (path / name).is_file():
        raise FileNotFoundError(f"{_LOAD}: {path} holds no {name}, which {HEADER} names")
    return header, _read_tensors(path / name, header["tensors"]), path / name


def check_target(path: Path, overwrite_ok: bool) -> None:
    if path.exists() and (path.is_file() or any(path.iterdir())):
        if not (path / HEADER).is_file():
            raise FileExistsError(f"{_SAVE}: {path} exists and is not the folder of a subspace")
        if not overwrite_ok:
            raise FileExistsError(f"{_SAVE}: {path} exists (overwrite_ok=True replaces it)")


def is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or magnitude(tensor.detach()) < torch.inf


def _put(fresh: Path, path: Path) -> None:
    """Move a written folder to its place; into a folder that is there, data first, header last."""
    if not path.exists():
        fresh.rename(path)
        return
    for file in sorted(fresh.iterdir(), key=lambda file: file.name == HEADER):
        os.replace(file, path / file.name)
    current = json.loads((path / HEADER).read_text(encoding="utf-8"))["file"]
    for file in path.iterdir():
        if _DATA.fullmatch(file.name) and file.name != current:
            file.unlink()


def _write(tensors: dict[str, Tensor], header: dict, folder: Path) -> None:
    """The data file, and the header with the checksums of all tensors and of itself."""
    blank = folder / "data"
    write_safetensors(tensors, blank, {"format": "pt", "header": HEADER})
    sums = {name: hashlib.sha256(part).hexdigest() for name, part in _bytes_of(blank)}
    table = {
        name: {"dtype": word(tensor.dtype), "shape": list(tensor.shape), "sha256": sums[name]}
        for name, tensor in tensors.items()
    }
    header = {**header, "tensors": table, "file": f"subspace-{_digest(table)[:16]}.safetensors"}
    blank.rename(folder / header["file"])
    text = json.dumps({**header, "sha256": _digest(header)}, indent=1, ensure_ascii=False)
    (folder / HEADER).write_text(text + "\n", encoding="utf-8")


def word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(value: dict) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _bytes_of(file: Path) -> Iterator[tuple[str, memoryview]]:
    """Each tensor's bytes as they lie in a whole safetensors file."""
    with (
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as everything,
    ):
        start = 8 + int.from_bytes(everything[:8], "little")
        for name, entry in json.loads(bytes(everything[8:start])).items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                with everything[start + first : start + last] as part:
                    yield name, part


def _read_header(path: Path) -> dict:
    file = path / HEADER
    if not path.is_dir():
        raise FileNotFoundError(f"{_LOAD}: no such folder: {path}")
    if not file.is_file():
        raise FileNotFoundError(f"{_LOAD}: {path} holds no {HEADER}")
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise invalid(_LOAD, str(file), "be JSON", error) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise invalid(_LOAD, f"format in {file}", f"be {FORMAT!r}", _of(header, "format"))
    version = header.get("format_version")
    if type(version) is not int or not 1 <= version <= VERSION:
        rule = f"be from 1 to {VERSION} (update lora_fused to read newer ones)"
        got = f"{version!r}, written by version {header.get('library_version')}"
        raise invalid(_LOAD, f"format_version in {file}", rule, got)
    checksum = header.pop("sha256", None)
    if checksum != _digest(header):
        raise invalid(_LOAD, str(file), "match its checksum", "other text than written")
    return header


def _of(header: object, key: str) -> object:
    return repr(header.get(key)) if isinstance(header, dict) else type(header).__name__


def fault(name: str, file: Path, rule: str, got: object) -> ValueError:
    return invalid(_LOAD, f"tensor {name!r} in {file}", rule, got)


def _read_tensors(file: Path, table: dict[str, dict]) -> dict[str, Tensor]:
    """All tensors, each as the header describes it."""
    try:
        with safe_open(file, "pt") as opened:
            # clone: the file may be replaced while the subspace lives.
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise invalid(_LOAD, str(file), "be a whole safetensors file", error) from error
    check_names(tensors, table, file, HEADER)
    for name, part in _bytes_of(file):
        tensor, entry = tensors[name], table[name]
        if hashlib.sha256(part).hexdigest() != entry["sha256"]:
            raise fault(name, file, "match its checksum", "other bytes than written")
        found = word(tensor.dtype), list(tensor.shape)
        if found != (entry["dtype"], entry["shape"]):
            rule = f"be {entry['dtype']} {entry['shape']}, as {HEADER} says"
            raise fault(name, file, rule, f"{found[0]} {found[1]}")
        if not is_finite(tensor):
            raise fault(name, file, "hold finite values", "NaN or infinity")
    return tensors


def check_names(found: Iterable[str], wanted: Iterable[str], file: Path, by: str) -> None:
    found, wanted = set(found), set(wanted)
    for name in sorted(wanted - found):
        raise fault(name, file, f"be there, for {by} names it", "none")
    for name in sorted(found - wanted):
        raise fault(name, file, f"be named by {by}", "an unknown tensor")
