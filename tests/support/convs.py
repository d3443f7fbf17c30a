"""A tiny network of convolutions, and its adapters in the plain: two more convolutions."""

import torch
from torch import Tensor, nn

from lora_fused import Adapter, LoraFactors


class ConvNet(nn.Module):
    """Images [N, 3, 9, 9] -> [N, 4]: 3 x 3, 1 x 1, depthwise, 1 x 1 of stride 2, and a view."""

    def __init__(self, seed: int = 0):
        torch.manual_seed(seed)
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand = nn.Conv2d(8, 12, 1)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.reduce = nn.Conv2d(12, 6, 1, stride=(2, 3), padding="valid", bias=False)
        self.head = nn.Linear(6 * 5 * 3, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.tanh(self.expand(torch.tanh(self.stem(images))))
        return self.head(self.reduce(torch.tanh(self.depth(x))).reshape(len(images), -1))


SIZES = {"expand": (8, 12), "reduce": (12, 6), "head": (90, 4)}


def images(count: int, seed: int = 3) -> Tensor:
    return torch.randn(count, 3, 9, 9, generator=torch.Generator().manual_seed(seed))


def adapter(name: str, seed: int, rank: int, modules=("expand", "reduce")) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for module in modules:
        a, b = (torch.randn(rank, n, generator=generator) * 0.4 for n in SIZES[module])
        parts[module] = LoraFactors(a, b, 1.0 + seed)
    pointwise = [module for module in modules if module != "head"]
    return Adapter(name, parts, metadata={"pointwise": pointwise})


def plain(conv: nn.Conv2d, x: Tensor, terms: list[tuple[LoraFactors, float | Tensor]]) -> Tensor:
    """One layer and one mixture for all rows, by convolutions with A and then B."""
    y = conv(x)
    for part, weight in terms:
        a, b = (t.to(x.dtype)[:, :, None, None] for t in (part.lora_a, part.lora_b.T))
        update = nn.functional.conv2d(nn.functional.conv2d(x, a, stride=conv.stride), b)
        y = y + weight * part.scale * update
    return y
