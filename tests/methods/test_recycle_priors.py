"""Priors of inversion: what they capture, where they are 0, and what they refuse."""

import pytest
import torch
from support.recycling import SIZE, conv_net, pictures, teachers, tiny_vit
from torch import nn

from lora_fused.methods.recycle import (
    FeatureStatistics,
    Prior,
    Statistics,
    TotalVariation,
    Weighted,
)


def value(prior: Prior, images, counts, model=None):
    model = nn.Identity() if model is None else model
    with prior.watch(model), torch.no_grad():
        prior.reset()
        model(images)
        return prior(images, counts)


def test_batchnorm_is_the_gap_to_the_running_statistics():
    net, images = conv_net(), pictures(6)
    found = value(FeatureStatistics.of_batchnorm(net), images, [2, 4])
    for at, gap in zip(images.split([2, 4]), found, strict=True):
        x, expected = at, 0.0
        with torch.no_grad():
            for layer in net:
                if isinstance(layer, nn.BatchNorm2d):
                    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
                    expected += (mean - layer.running_mean).norm()
                    expected += (variance - layer.running_var).norm()
                x = layer(x)
        assert torch.allclose(gap, expected, rtol=1e-4)


def test_images_with_the_statistics_asked_for_have_no_gap():
    net, images = conv_net(), pictures(16)
    with torch.no_grad():
        net.train()
        for module in net:
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        net(images)
        # Running variances are the unbiased ones.
        for module, size in ((net[1], 16 * 14 * 14), (net[4], 16 * 6 * 6)):
            module.running_var *= (size - 1) / size
    # The second layer saw the first's batch statistics, so now it sees the same.
    gap = value(FeatureStatistics.of_batchnorm(net.eval()), images, [16])
    assert gap < 1e-3 < value(FeatureStatistics.of_batchnorm(net), 1.1 * images, [16])


def test_inside_the_model_and_beside_it_are_the_same():
    net, images = conv_net(), pictures(6)
    whole = nn.Sequential(net, nn.Linear(6, 2)).eval()
    beside = value(FeatureStatistics.of_batchnorm(net), images, [3, 3])
    prior, runs = FeatureStatistics.of_batchnorm(net), []
    net.register_forward_hook(lambda *_: runs.append(1))
    assert torch.equal(value(prior, images, [3, 3], whole), beside)
    assert len(runs) == 1, "its own forward, not another"


def test_another_network_gets_transformed_images():
    net, images = conv_net(), pictures(4)
    prior = FeatureStatistics.of_batchnorm(net, transform=lambda x: 2 * x + 1)
    plain = value(FeatureStatistics.of_batchnorm(net), 2 * images + 1, [4])
    assert torch.equal(value(prior, images, [4]), plain)


def test_tokens_have_the_statistics_of_the_images_given():
    model, images = tiny_vit(), pictures(10)
    prior = FeatureStatistics.of_tokens(model, images, batch_size=4)
    assert list(prior.targets) == [
        *(f"blocks.{i}.norm{j}" for i in range(2) for j in (1, 2)),
        "norm",
    ]
    assert value(prior, images, [10], model) < 1e-3
    noise = value(prior, 3 * pictures(10, 1), [5, 5], model)
    assert noise.shape == (2,) and (noise > 0.1).all()
    same = FeatureStatistics.of_tokens(model, images, batch_size=10)
    for one, other in zip(prior.tensors(), same.tensors(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    only = FeatureStatistics.of_tokens(model, images, modules=["blocks.0.norm1"])
    assert list(only.targets) == ["blocks.0.norm1"]


def test_tokens_of_an_attached_model():
    handle = teachers("ab")
    prior = FeatureStatistics.of_tokens(handle.model, pictures(4))
    plain = FeatureStatistics.of_tokens(tiny_vit(), pictures(4))
    pairs = zip(prior.tensors(), plain.tensors(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_hooks_and_captures_are_gone_after_watching():
    net = conv_net()
    prior = FeatureStatistics.of_batchnorm(net)
    with pytest.raises(KeyError), prior.watch(net):
        net(pictures(2))
        raise KeyError
    assert not any(module._forward_pre_hooks for module in net.modules())
    with pytest.raises(ValueError, match="targets must run in every forward"):
        prior(pictures(2), [2])


def test_variation_counts_neighbours():
    image = torch.zeros(1, 3, 4, 4)
    image[:, :, :, 2:] = 1.0  # one step in each row, of 3 neighbours
    flat = torch.full((2, 3, 4, 4), 0.7)
    found = TotalVariation()(torch.cat([image, flat]), [1, 2])
    assert torch.allclose(found, torch.tensor([1 / 3, 0.0]))


def test_weighted_adds_priors():
    net, images = conv_net(), pictures(4)
    statistics, variation = FeatureStatistics.of_batchnorm(net), TotalVariation()
    both = Weighted([(statistics, 2.0), (variation, 0.5)])
    parts = [value(p, images, [2, 2], net) for p in (statistics, variation)]
    found = value(both, images, [2, 2], net)
    assert torch.allclose(found, 2 * parts[0] + 0.5 * parts[1])
    again = value(both, images, [2, 2], net)
    assert torch.equal(found, again), "reset forgets the forward before"
    assert len(both.tensors()) == 1 + len(statistics.tensors())


def test_rejects():
    net = conv_net()
    with pytest.raises(ValueError, match=r"targets must name modules of the network, got \['9'\]"):
        FeatureStatistics(net, {"9": Statistics(torch.zeros(1), torch.ones(1), 1)})
    with pytest.raises(ValueError, match="network must have BatchNorm2d modules"):
        FeatureStatistics.of_batchnorm(tiny_vit())
    with pytest.raises(ValueError, match="network must be in eval mode"):
        FeatureStatistics.of_batchnorm(conv_net().train())
    with pytest.raises(ValueError, match="modules must run in the model's forward"):
        FeatureStatistics.of_tokens(tiny_vit(), pictures(2), modules=["head"])
    with pytest.raises(ValueError, match="whose first axis is the batch, 3"):
        value(FeatureStatistics.of_batchnorm(net), torch.zeros(4, 3, SIZE, SIZE), [3])
