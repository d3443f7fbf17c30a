"""A small vision transformer with a CLS token, its packaged weights and its images.

    model = load_small_vit(data / "vision" / "small_vit.safetensors")
    images, labels = read_images(data / "vision" / "tinyimagenet_val50.npz", range(100))
    features = model(images)                 # [100, 128]: CLS behind the last norm
    logits = model.head(features)            # of the 160 base classes

Its layers have the names q, k, v, proj, fc1 and fc2, for adapters to target. Weights are float16 in
the file and float32 here.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

MEAN, SPREAD = 0.498, 0.502  # of pixels in [0, 1]
SIZE = 32


class Block(nn.Module):
    """x + proj(attention(norm1(x))), then x + fc2(GELU(fc1(norm2(x))))."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class SmallViT(nn.Module):
    """Images ``[N, 3, size, size]``, scaled as ``scaled`` does, to features ``[N, width]``.

    ``head`` takes features to the 160 base classes, ``distill`` to what the model was distilled on.
    """

    def __init__(
        self,
        *,
        width: int = 128,
        depth: int = 6,
        heads: int = 4,
        patch: int = 4,
        size: int = SIZE,
        classes: int = 160,
        distilled: int = 128,
    ):
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.pos = nn.Parameter(0.02 * torch.randn(1, 1 + (size // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head, self.distill = nn.Linear(width, classes), nn.Linear(width, distilled)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(images), -1, -1), patches], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0])


def load_small_vit(path: str | Path) -> SmallViT:
    """The packaged model, in evaluation mode, its values exactly those of the file."""
    from safetensors.torch import load_file

    model = SmallViT()
    model.load_state_dict(load_file(path))
    return model.eval()


def scaled(pixels: Tensor) -> Tensor:
    """Bytes to what the model takes."""
    return (pixels.float() / 255 - MEAN) / SPREAD


def read_images(path: str | Path, rows: Iterable[int], size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, size, size]``, scaled, and labels ``[N]`` of rows of a file of JPEGs."""
    import io

    import numpy as np
    from PIL import Image

    with np.load(path, allow_pickle=False) as data:
        stream, offset, label = data["jpeg"], data["offset"], data["label"]
    rows = [int(row) for row in rows]
    images = []
    for row in rows:
        image = Image.open(io.BytesIO(stream[offset[row] : offset[row + 1]].tobytes()))
        image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return scaled(torch.stack(images)), torch.from_numpy(label[rows].astype(np.int64))
