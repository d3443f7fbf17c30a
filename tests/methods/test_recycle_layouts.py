"""The whole way, from teachers to predictions, on every layout of vision models."""

import functools

import pytest
import torch
from support import vits
from torch import nn

from lora_fused import AdapterBank, attach, new_adapter
from lora_fused.io import Checkpoint
from lora_fused.methods import recycle
from lora_fused.nn.prune import prune_tokens

TARGETS = {
    "small": ["q", "v"],
    "timm": ["attn.qkv"],
    "vit": ["q_proj", "v_proj"],
    "clip": ["q_proj", "v_proj"],
}
CLASSES = 3


def attached(model: nn.Module, targets: list[str]):
    """The model, with two teachers whose B is not 0 and a fresh student."""
    bank = AdapterBank()
    for seed, name in enumerate(("first", "second", "meta")):
        one = new_adapter(model, name, rank=2, target_modules=targets, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for part in one.modules.values():
            noise = torch.randn(part.lora_b.shape, generator=generator)
            part.lora_b = part.lora_b if name == "meta" else 0.3 * noise
        bank.add(one)
    return attach(model, bank)


def heads(width: int) -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    return {name: nn.Linear(width, CLASSES) for name in ("first", "second")}


@pytest.mark.parametrize("layout", list(vits.MODELS))
def test_vision_transformers(layout):
    model = vits.MODELS[layout]()
    handle = attached(model, TARGETS[layout])
    features = functools.partial(vits.feature, model)
    width = features(vits.images(1)).shape[1]
    prior = recycle.FeatureStatistics.of_tokens(model, vits.images(8, seed=1))
    options = {"features": features, "seed": 0, "progress": False}
    sizes = {"per_class": 3, "steps": 8, "size": vits.SIDE}
    prune = prune_tokens(model, {0: 0.5, 2: 0.5})
    pool = recycle.invert(handle, heads(width), **sizes, prior=prior, prune=prune, **options)
    assert pool.images.shape == (18, 3, vits.SIDE, vits.SIDE) and pool.kept.shape == (18, 4)
    sizes = {"ways": CLASSES, "queries": 2, "steps": 4}
    found = recycle.distil(handle, pool, "meta", sparse_tokens=prune_tokens, **sizes, **options)
    assert all(part.lora_b.abs().sum() > 0 for part in found.adapter.modules.values())
    x, y = vits.images(12, seed=2), torch.arange(12) % CLASSES
    one = recycle.classify(handle, "meta", x[:6], y[:6], x[6:], features=features)
    assert one.scores.shape == (6, CLASSES) and one.scores.isfinite().all()


class ConvNet(nn.Module):
    """A network with BatchNorm whose 1 x 1 convolutions are linear layers over pixels."""

    def __init__(self):
        torch.manual_seed(2)
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.project, self.bn2 = nn.Conv2d(8, 12, 1, bias=False), nn.BatchNorm2d(12)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.stem(images)).relu()
        return self.bn2(self.project(x)).relu().mean((2, 3))


def test_a_convolutional_network_with_its_own_batchnorm_as_prior():
    model = ConvNet()
    with torch.no_grad():
        for seed in range(30):
            model(vits.images(16, seed=seed))
    model.eval()
    handle = attached(model, ["project"])
    prior = recycle.FeatureStatistics.of_batchnorm(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    options = {"per_class": 8, "steps": 60, "size": vits.SIDE, "lr": 0.05, "seed": 0}
    options |= {"pixel_range": (-3.0, 3.0), "progress": False}
    gaps = {}
    for weight in (0.0, 1.0):
        pool = recycle.invert(handle, heads(12), prior=prior, prior_weight=weight, **options)
        with prior.watch(model), torch.no_grad(), handle.mix("first"):
            model(pool.images[:24])
            gaps[weight] = float(prior(pool.images[:24], [24]))
    assert gaps[1.0] < 0.7 * gaps[0.0], "a prior that counts is nearer to the statistics"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    found = recycle.distil(handle, pool, "meta", ways=3, queries=4, steps=3, seed=0, progress=False)
    assert found.adapter.modules["project"].lora_b.abs().sum() > 0


def test_statistics_of_a_batchnorm_decide_a_run_too(tmp_path):
    model = ConvNet().eval()
    handle, checkpoint = attached(model, ["project"]), Checkpoint(tmp_path / "pool")
    options = {"per_class": 1, "steps": 2, "size": vits.SIDE, "seed": 0, "progress": False}
    pool = recycle.invert(handle, heads(12), checkpoint=checkpoint, **options)
    again = recycle.invert(handle, heads(12), checkpoint=checkpoint, **options)
    assert torch.equal(again.images, pool.images)
    model.bn1.running_mean += 1
    with pytest.raises(ValueError, match="checkpoint must be of a run with the same"):
        recycle.invert(handle, heads(12), checkpoint=checkpoint, **options)


def test_the_papers_meta_lora_has_147456_parameters():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.ViTModel(transformers.ViTConfig(), add_pooling_layer=False)
    meta = new_adapter(model, "meta", rank=4, target_modules=["q_proj", "v_proj"], seed=0)
    sizes = (part.lora_a.numel() + part.lora_b.numel() for part in meta.modules.values())
    assert sum(sizes) == 147_456
