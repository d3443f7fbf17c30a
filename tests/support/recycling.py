"""A tiny vision transformer with teachers, and classes of images that can be told apart."""

import torch
from torch import Tensor, nn

from lora_fused import Adapter, AdapterBank, LoraFactors, attach
from support import text_tasks

SIZE, WIDTH, CLASSES = 16, 16, 3


def tiny_vit(seed: int = 0) -> nn.Module:
    """Images [N, 3, 16, 16] to features [N, 16]; 16 patches, 2 blocks."""
    torch.manual_seed(seed)
    with text_tasks.example("small_vit") as module:
        options = {"width": WIDTH, "depth": 2, "heads": 2, "patch": 4, "size": SIZE}
        model = module.SmallViT(**options, classes=2, distilled=2).eval()
    with torch.no_grad():  # at their small beginnings all images would look alike
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(0.25 * torch.randn(parameter.shape))
    return model


def teacher(name: str, seed: int, rank: int = 2) -> Adapter:
    """A random adapter of q and v in both blocks, with updates of O(1)."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for block in range(2):
        for side in "qv":
            a, b = (torch.randn(rank, WIDTH, generator=generator) * 0.4 for _ in range(2))
            parts[f"blocks.{block}.{side}"] = LoraFactors(a, b, 1.0)
    return Adapter(name, parts)


def heads(names, classes: int = CLASSES, dtype=torch.float32, seed: int = 5) -> dict:
    """A random head for each name, which depends on the name's last letter alone."""
    found = {}
    for name in names:
        generator = torch.Generator().manual_seed(seed + ord(name[-1]))
        weight = torch.randn(classes, WIDTH, generator=generator)
        found[name] = (weight.to(dtype), torch.zeros(classes, dtype=dtype))
    return found


def teachers(names="ab", dtype: torch.dtype = torch.float32):
    """A handle of a tiny transformer attached to a random teacher for each letter."""
    bank = AdapterBank(dtype=dtype)
    bank.add_many([teacher(name, ord(name)) for name in names])
    return attach(tiny_vit().to(dtype), bank)


def pictures(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, SIZE, SIZE, generator=generator).to(dtype)


def conv_net(seed: int = 3) -> nn.Module:
    """Images to features [N, 6], with two BatchNorms whose statistics are not the first ones."""
    torch.manual_seed(seed)
    first, second = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 6, 3, 2)
    layers = (first, nn.BatchNorm2d(5), nn.ReLU(), second, nn.BatchNorm2d(6), nn.ReLU())
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        for _ in range(20):
            net(1.5 * torch.randn(8, 3, SIZE, SIZE) + 0.3)
    return net.eval()


class Interrupted(Exception):
    """What ``interrupt`` raises."""


def interrupt(at: int):
    """A progress function that ends a run after so many steps."""

    def progress(done: int, total: int) -> None:
        if done == at:
            raise Interrupted

    return progress
