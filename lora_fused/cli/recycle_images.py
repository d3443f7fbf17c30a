"""Images for ``lora-fused recycle``: labelled files in, a grid of a pool's images out."""

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fused.checks import invalid
from lora_fused.cli.recycle_vision import Vision, need

_OP = "recycle"
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")


class Images:
    """Labelled images, read one by one.

    Attributes:
        labels: ``[N]`` int64.
        path: Where they are from.
    """

    def __init__(self, path: str, labels: list[int], read: Callable[[int], object]):
        self.path, self.labels, self._read = path, torch.tensor(labels), read

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, prepare: Callable[[list], Tensor], size: int) -> Iterator[Tensor]:
        """``[n, C, H, W]``, at most ``size`` at once."""
        for start in range(0, len(self), size):
            rows = range(start, min(start + size, len(self)))
            yield prepare([self._image(row) for row in rows])

    def _image(self, row: int):
        try:
            return self._read(row).convert("RGB")
        except (OSError, ValueError) as error:
            rule = "hold images that can be read"
            raise invalid(_OP, self.path, rule, f"image {row}: {error}") from None


def open_images(path: str) -> Images:
    """A folder of one folder per class, or an .npz of (jpeg, offset, label) or (image, label)."""
    need("PIL", "pillow")
    if Path(path).is_dir():
        return _folder(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"{_OP}: no such file or folder of images: {path}")
    return _npz(path)


def _folder(path: str) -> Images:
    from PIL import Image

    files, labels = [], []
    classes = sorted(p for p in Path(path).iterdir() if p.is_dir() and p.name[0] != ".")
    for label, folder in enumerate(classes):
        own = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES)
        files += own
        labels += [label] * len(own)
    if not files:
        rule = f"hold one folder per class, of files in {', '.join(_SUFFIXES)}"
        raise invalid(_OP, f"images {path}", rule, f"{len(classes)} folders without any")
    return Images(path, labels, lambda row: Image.open(files[row]))


def _npz(path: str) -> Images:
    need("numpy")
    import numpy
    from PIL import Image

    rule = "be an .npz with jpeg, offset and label, or with image and label"
    try:
        with numpy.load(path, allow_pickle=False) as opened:
            arrays = {
                key: opened[key] for key in ("jpeg", "offset", "image", "label") if key in opened
            }
    except (ValueError, TypeError, OSError, zipfile.BadZipFile) as error:
        raise invalid(_OP, f"images {path}", rule, error) from None
    labels = arrays.get("label", numpy.empty(0))
    if {"jpeg", "offset"} <= arrays.keys():
        stream, ends = arrays["jpeg"], arrays["offset"]
        count = len(ends) - 1

        def read(row: int):
            return Image.open(io.BytesIO(stream[ends[row] : ends[row + 1]].tobytes()))
    else:
        pixels = arrays.get("image", numpy.empty(0))
        count = len(pixels) if pixels.dtype == numpy.uint8 else -1

        def read(row: int):
            return Image.fromarray(pixels[row])

    if count < 1 or labels.shape != (count,) or labels.dtype.kind not in "iu":
        got = ", ".join(f"{key} {a.dtype} {list(a.shape)}" for key, a in arrays.items())
        raise invalid(
            _OP, f"images {path}", f"{rule} (uint8 images, one label each)", got or "none"
        )
    return Images(path, labels.tolist(), read)


def read_class_names(file: str) -> dict[str, list[str]]:
    """A JSON file of adapter -> names of its classes."""
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:
        raise invalid(_OP, file, "be JSON", error) from None
    lists = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(names, list) for names in lists):
        raise invalid(_OP, file, "map adapters to lists of class names", "something else")
    return found


def write_grid(pool, vision: Vision, path: str) -> None:
    """The images of a pool as one PNG, each row a class."""
    from PIL import Image

    low, high = (end[:, None, None] for end in (vision.black, vision.white))
    pixels = ((pool.images - low) / (high - low)).clamp(0, 1).mul(255).round().byte()
    pixels = F.pad(pixels, (1, 1, 1, 1), value=255)
    keys = list(zip(pool.teachers.tolist(), pool.labels.tolist(), strict=True))
    rows = [[i for i, key in enumerate(keys) if key == one] for one in dict.fromkeys(keys)]
    lines = [torch.cat(list(pixels[row]), dim=2) for row in rows]
    grid = torch.cat(lines, dim=1)
    size = (grid.shape[2], grid.shape[1])
    data = bytes(grid.permute(1, 2, 0).contiguous().flatten().tolist())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.frombytes("RGB", size, data).save(path, "PNG")
