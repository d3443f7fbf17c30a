"""Classifying by class means, and its accuracy over episodes."""

import pytest
import torch
from support.recycling import pictures, teachers

from lora_fused.methods import recycle


def data(classes: int = 6, each: int = 8, spread: float = 1.0, seed: int = 0):
    """Images of classes around a mean each, and labels that are not 0, 1, 2."""
    means, noise = pictures(classes, seed), pictures(classes * each, seed + 1)
    labels = torch.arange(classes).repeat_interleave(each)
    return means[labels] + spread * noise, 10 + 7 * labels


def test_the_nearest_class_mean_wins():
    handle, (x, y) = teachers("ab"), data(3, 4)
    found = recycle.classify(handle, {"a": 0.5, "b": -1.0}, x[:10], y[:10], x[10:])
    with handle.mix({"a": 0.5, "b": -1.0}), torch.no_grad():
        features = handle.model(x)
    assert found.classes.tolist() == [10, 17, 24]
    for i in range(2):
        means = [features[:10][y[:10] == c].mean(0) for c in found.classes]
        distances = torch.stack([((features[10 + i] - m) ** 2).sum() for m in means])
        assert torch.allclose(found.scores[i], -distances, rtol=1e-4)
        assert found.labels[i] == found.classes[distances.argmin()]


def test_it_is_one_forward_pass():
    handle, (x, y) = teachers("ab"), data(3, 4)
    calls = []
    handle.model.register_forward_hook(lambda module, args, output: calls.append(len(output)))
    recycle.classify(handle, "a", x[:10], y[:10], x[10:])
    assert calls == [12]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_distances_of_a_16_bit_models_features_neither_overflow_nor_tie(dtype):
    handle, (x, y) = teachers("ab", dtype), data(6, 8)
    handle.model.norm.weight.data.fill_(100.0)  # squared distances of 1e5
    found = recycle.classify(handle, "a", x[::2], y[::2], x[1::2])
    with handle.mix("a"), torch.no_grad():
        features = handle.model(x.to(dtype)).double()
    means = torch.stack([features[::2][y[::2] == one].mean(0) for one in found.classes])
    truth = -(features[1::2, None] - means).square().sum(-1)
    assert found.scores.dtype == torch.float32 and truth.min() < -65504
    assert torch.allclose(found.scores.double(), truth, rtol=1e-4)


def test_evaluate_is_classify_over_episodes():
    handle, (x, y) = teachers("ab"), data()
    sizes = {"ways": 3, "shots": 2, "queries": 4}
    found = recycle.evaluate(handle, "b", x, y, **sizes, episodes=20, seed=3, batch_size=7)
    accuracies = []
    for rows in recycle.draw_episodes(y, **sizes, count=20, seed=3):
        support, queries = rows[:, :2].flatten(), rows[:, 2:].flatten()
        one = recycle.classify(handle, "b", x[support], y[support], x[queries])
        accuracies.append((one.labels == y[queries]).double().mean())
    accuracies = torch.stack(accuracies)
    assert torch.equal(found.accuracies, accuracies)
    assert found.accuracy == pytest.approx(float(accuracies.mean()))
    assert found.interval == pytest.approx(1.96 * float(accuracies.std()) / 20**0.5)


def test_classes_are_told_apart_and_shuffled_labels_are_not():
    handle, (x, y) = teachers("ab"), data(each=20, spread=0.2)
    options = {"ways": 5, "shots": 1, "queries": 10, "episodes": 300, "seed": 0}
    found = recycle.evaluate(handle, None, x, y, **options)
    assert found.accuracy > 0.9
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    chance = recycle.evaluate(handle, None, x, shuffled, **options)
    assert abs(chance.accuracy - 0.2) < 3 * chance.interval < 0.1


def test_episodes_are_seeded_and_hold_distinct_images():
    labels = torch.arange(7).repeat_interleave(9)
    sizes = {"ways": 5, "shots": 2, "queries": 3, "count": 30}
    drawn = list(recycle.draw_episodes(labels, **sizes, seed=0))
    again = list(recycle.draw_episodes(labels, **sizes, seed=0))
    other = list(recycle.draw_episodes(labels, **sizes, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(drawn, other, strict=True))
    for rows in drawn:
        assert rows.shape == (5, 5) and len(rows.unique()) == 25
        of = labels[rows]
        assert (of == of[:, :1]).all() and len(of[:, 0].unique()) == 5


def test_rejects():
    handle, (x, y) = teachers("ab"), data(3, 4)
    with pytest.raises(ValueError, match="labels must be integers, one for each of 10"):
        recycle.classify(handle, None, x[:10], y[:9], x[10:])
    with pytest.raises(ValueError, match="labels must hold 5 classes with 3 images each"):
        recycle.evaluate(handle, None, x, y, shots=1, queries=2, seed=0)
    with pytest.raises(ValueError, match="evaluate: episodes must be an integer"):
        recycle.evaluate(handle, None, x, y, ways=2, queries=2, episodes=0, seed=0)
    sizes = {"ways": 2, "queries": 2, "episodes": 3, "seed": 0}
    with pytest.raises(ValueError, match="evaluate: labels must be one for each of 12 images"):
        recycle.evaluate(handle, None, x, y[:11], **sizes)
    for labels in (y[:, None], y.double()):
        with pytest.raises(ValueError, match=r"draw_episodes: labels must be \[N\] integers, got"):
            recycle.evaluate(handle, None, x, labels, **sizes)
    with pytest.raises(ValueError, match="classify: features must be finite"):
        recycle.classify(handle, None, x[:10], y[:10], torch.nan * x[10:])
    with pytest.raises(ValueError, match="score_episodes: features must be finite"):
        recycle.evaluate(handle, None, x / 0, y, **sizes)
    with pytest.raises(ValueError, match="handle must be that of an attached model"):
        recycle.classify(handle.model, None, x[:10], y[:10], x[10:])
    with pytest.raises(ValueError, match="give one row of features for each of 12"):
        recycle.classify(handle, None, x[:10], y[:10], x[10:], features=lambda t: t[:, 0])
