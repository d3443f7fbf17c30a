"""examples/small_vit.py: the packaged weights, exactly, and what they can do."""

import pytest
import torch
from support import text_tasks

np = pytest.importorskip("numpy")
pytest.importorskip("PIL", reason="pillow reads the images")


@pytest.fixture(scope="module")
def small_vit():
    with text_tasks.example("small_vit") as module:
        yield module


@pytest.fixture
def vision(data_dir):
    folder = data_dir / "vision"
    if not (folder / "small_vit.safetensors").is_file():
        pytest.skip(f"no small ViT in {folder}")
    return folder


def test_values_are_those_of_the_file(small_vit, vision):
    from safetensors.torch import load_file

    model = small_vit.load_small_vit(vision / "small_vit.safetensors")
    stored, own = load_file(vision / "small_vit.safetensors"), model.state_dict()
    assert stored.keys() == own.keys() and not model.training
    assert all(torch.equal(own[name].half(), t) for name, t in stored.items())
    targets = [n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "in_features")]
    assert set(targets) >= {"q", "k", "v", "proj", "fc1", "fc2"}


def test_its_head_knows_base_classes(small_vit, vision):
    """20 % of 160 classes at the first guess, 47 % at five, of 500 images; chance: 0.6 and 3 %."""
    model = small_vit.load_small_vit(vision / "small_vit.safetensors")
    base = np.random.RandomState(0).permutation(200)[:160].tolist()
    file = vision / "tinyimagenet_val50.npz"
    with np.load(file, allow_pickle=False) as data:
        labels = data["label"]
    order = np.random.RandomState(1).permutation(len(labels))
    rows = [row for row in order if labels[row] in base][:300]
    images, labels = small_vit.read_images(file, rows)
    wanted = torch.tensor([base.index(label) for label in labels.tolist()])
    with torch.no_grad():
        best = model.head(model(images)).topk(5, dim=1).indices
        flipped = model.head(model(images.flip(1))).argmax(1)  # colours in another order
    assert (best[:, 0] == wanted).float().mean() > 0.13
    assert (best == wanted[:, None]).any(1).float().mean() > 0.35
    assert (flipped == wanted).float().mean() < (best[:, 0] == wanted).float().mean()


def test_its_features_tell_unseen_classes_apart(small_vit, vision):
    """5-way 5-shot on classes that it never saw: 0.53 (chance 0.2)."""
    model = small_vit.load_small_vit(vision / "small_vit.safetensors")
    unseen = np.random.RandomState(0).permutation(200)[160:180]
    file = vision / "tinyimagenet_val50.npz"
    with np.load(file, allow_pickle=False) as data:
        labels = data["label"]
    rows = np.concatenate([np.flatnonzero(labels == c)[:15] for c in unseen])
    images, _ = small_vit.read_images(file, rows)
    with torch.no_grad():
        features = model(images).unflatten(0, (20, 15))
    generator, right = torch.Generator().manual_seed(0), []
    for _ in range(60):
        ways = features[torch.randperm(20, generator=generator)[:5]]
        support, query = ways[:, :5].mean(1), ways[:, 5:]
        guess = torch.cdist(query.flatten(0, 1), support).argmin(1)
        right.append((guess == torch.arange(5).repeat_interleave(10)).float().mean())
    assert torch.stack(right).mean() > 0.4
