"""Files of named tensors: safetensors mapped and checked, pickles only where allowed."""

import json
import pickle
import stat
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_fused.checks import invalid

_CHECKSUM = "lora_fused.checksum"
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}


def read_tensors(file: Path, allow_pickle: bool, op: str) -> tuple[dict[str, Tensor], dict, float]:
    """The tensors, the header's metadata, and a bound on all magnitudes; errors begin with op."""
    if file.suffix == ".bin":
        refuse_pointer(file, op)
        return _read_pickle(file, allow_pickle, op), {}, torch.inf
    return read_safetensors(file, op)


def read_safetensors(file: Path, op: str) -> tuple[dict[str, Tensor], dict, float]:
    """``read_tensors`` of a file that is safetensors, whatever it is called."""
    refuse_pointer(file, op)
    try:
        with safe_open(file, "pt"):
            pass  # it has checked the header, the offsets and the file's length
    except SafetensorError as error:
        raise invalid(op, str(file), "be a whole safetensors file", error) from error
    table, section = _map(file)
    header = table.pop("__metadata__", None) or {}
    if _CHECKSUM in header and header[_CHECKSUM] != _checksum(section):
        raise invalid(op, str(file), "match its checksum", "other bytes than written")
    tensors = {}
    for key, entry in table.items():
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            rule = f"be one of {', '.join(_DTYPES)}"
            raise invalid(op, f"tensor {key!r} in {file}", rule, entry["dtype"])
        flat = section[slice(*entry["data_offsets"])]
        flat = flat.clone() if flat.storage_offset() % dtype.itemsize else flat
        tensors[key] = flat.view(dtype).view(entry["shape"])
    return tensors, header, _bound(section, tensors)


def _map(file: Path) -> tuple[dict, Tensor]:
    """The header of a safetensors file, and its data as mapped bytes: one mapping for all tensors.

    Tensors are cut from it here, and not one by one by safe_open: checksum and extremes
    then run over the whole at memory speed, and 64 adapters load in 3/4 of the time.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        table = json.loads(stream.read(length))
    size = file.stat().st_size
    everything = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)
    section = everything[8 + length :]
    # Old writers did not align the data; views of wider types need it.
    return table, section.clone() if length % 8 else section


def _read_pickle(file: Path, allow_pickle: bool, op: str) -> dict[str, Tensor]:
    if not allow_pickle:
        rule = "be safetensors, or allow_pickle=True be given (torch.load with weights_only=True)"
        raise invalid(op, str(file), rule, "a pickle")
    try:
        tensors = torch.load(file, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise invalid(op, str(file), "be a pickle of tensors alone", reason) from error
    if not isinstance(tensors, dict) or not all(torch.is_tensor(t) for t in tensors.values()):
        raise invalid(op, str(file), "hold a dict of tensors", "something else")
    return tensors


def refuse_pointer(file: Path, op: str) -> None:
    """Refuse what git leaves in place of a large file that was not fetched."""
    with file.open("rb") as stream:
        if stream.read(23) == b"version https://git-lfs":
            raise invalid(op, str(file), "be the file itself", "a Git LFS pointer")


def _bound(section: Tensor, tensors: dict[str, Tensor]) -> float:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1 or not dtypes <= set(FLOATS):
        return torch.inf
    return magnitude(section.view(*dtypes))


def _checksum(section: Tensor) -> str:
    # The sum of the machine words: any one flipped bit changes it.
    words = section.numel() // 8 * 8
    total = int(section[:words].view(torch.int64).sum()) + int(section[words:].sum())
    return f"{total % 2**64:016x}"


def write_safetensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
    """``save_file`` with the permissions of any new file: by itself it lets no other user read."""
    file.touch()
    mode = stat.S_IMODE(file.stat().st_mode)
    save_file(tensors, file, metadata=metadata)
    file.chmod(mode)


def save_tensors(tensors: dict[str, Tensor], file: Path, header: dict) -> None:
    """Write a safetensors file whose header carries a checksum of its data."""
    blank = "0" * 16
    write_safetensors(tensors, file, {**header, _CHECKSUM: blank})
    checksum = _checksum(_map(file)[1])
    with file.open("r+b") as stream:
        field = f'"{_CHECKSUM}":"'.encode()
        length = int.from_bytes(stream.read(8), "little")
        stream.seek(8 + stream.read(length).index(field) + len(field))
        stream.write(checksum.encode())


def magnitude(values: Tensor) -> float:
    """The largest absolute value; NaN if there is one."""
    if values.numel() == 0:
        return 0.0
    low, high = map(float, torch.aminmax(values))
    return max(-low, high)
