"""Inversion: teachers in one batch, each as if alone; best images; runs that go on."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.recycling import (
    CLASSES,
    SIZE,
    Interrupted,
    conv_net,
    heads,
    interrupt,
    pictures,
    teachers,
)

from lora_fused.io import Checkpoint
from lora_fused.methods import recycle
from lora_fused.methods.recycle.images import Images
from lora_fused.methods.recycle.invert import Objective
from lora_fused.methods.recycle.teachers import Teachers, plain_heads
from lora_fused.nn.prune import prune_tokens
from lora_fused.testing import assert_within_budget

BOUNDS = (torch.tensor([[[-1.0]]]), torch.tensor([[[1.0]]]))
TENSORS = ("images", "labels", "teachers", "logits", "losses")


def prior_of(kind: str, model):
    if kind == "batchnorm":
        return recycle.FeatureStatistics.of_batchnorm(conv_net().to(next(model.parameters()).dtype))
    if kind == "tokens":
        images = pictures(12, 4).to(next(model.parameters()).dtype)
        return recycle.FeatureStatistics.of_tokens(model, images)
    return recycle.TotalVariation() if kind == "variation" else recycle.NoPrior()


def gradient(names: str, images, per_class: int, prior: str = "none", asked: str | None = None):
    """Of the pixels of these teachers' images; ``asked``: adapters in other teachers' places."""
    handle = teachers("abcd", images.dtype)
    found = plain_heads("test", handle, heads(names, dtype=images.dtype))
    labels = torch.arange(CLASSES).repeat_interleave(per_class).repeat(len(names))
    counts = [CLASSES * per_class] * len(names)
    if asked is not None:
        found = dict(zip(asked, found.values(), strict=True))
    routed = Teachers("test", handle, found, counts)
    objective = Objective(routed, labels, prior_of(prior, handle.model), 0.5)
    pixels = images.clone().requires_grad_()
    with objective.in_force():
        _, total = objective(pixels)
        total.backward(inputs=[pixels])
    return pixels.grad


def one_at_a_time(names: str, images, per_class: int, prior: str):
    parts = images.split(CLASSES * per_class)
    grads = [gradient(n, x, per_class, prior) for n, x in zip(names, parts, strict=True)]
    return torch.cat(grads)


@pytest.mark.parametrize("prior", ["none", "variation", "batchnorm", "tokens"])
def test_gradients_of_a_batch_are_those_of_each_teacher_alone(prior):
    names, per_class = "abcd", 2
    images = pictures(len(names) * CLASSES * per_class)
    truth = one_at_a_time(names, images.double(), per_class, prior)
    reference = one_at_a_time(names, images, per_class, prior)
    assert_within_budget(gradient(names, images, per_class, prior), reference, truth)
    wrong = gradient(names, images, per_class, prior, asked="bacd")
    with pytest.raises(AssertionError, match="error"):
        assert_within_budget(wrong, reference, truth)


def test_a_prior_of_the_whole_batch_would_be_another():
    """Negative control: statistics over several teachers' images fail the budget."""
    prior, images = prior_of("batchnorm", conv_net()), pictures(8)
    with prior.watch(torch.nn.Identity()), torch.no_grad():
        by_teacher = prior(images, [4, 4])
        prior.reset()
        together = prior(images, [8])
    assert abs(float(by_teacher.mean() - together)) > 1e-3


@pytest.mark.parametrize("alone", ["a", "b", "c"])
def test_random_numbers_do_not_depend_on_the_batch(alone):
    many = Images("abc", [2, 3, 1], (3, SIZE, SIZE), 7, BOUNDS)
    one = Images(alone, [[2, 3, 1]["abc".index(alone)]], (3, SIZE, SIZE), 7, BOUNDS)
    at = slice([0, 2, 5]["abc".index(alone)], [2, 5, 6]["abc".index(alone)])
    assert torch.equal(many.pixels[at], one.pixels)
    for _ in range(5):
        assert torch.equal(many.views(3)[at], one.views(3))


def test_teachers_and_seeds_have_random_numbers_of_their_own():
    """Negative control of the test above."""
    starts = [
        Images(n, [2], (3, 4, 4), s, BOUNDS).pixels for n, s in (("a", 0), ("b", 0), ("a", 1))
    ]
    assert not any(torch.equal(starts[i], starts[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_views_are_every_roll_and_flip_and_each_teachers_own():
    images = Images("ab", [2, 1], (1, 4, 4), 0, (torch.tensor(-9.0), torch.tensor(9.0)))
    seen: dict[str, list] = {"a": [], "b": []}
    for _ in range(300):
        parts = images.views(1).split([2, 1])
        for name, view, own in zip("ab", parts, images.pixels.split([2, 1]), strict=True):
            rolled = {
                (y, x, flip): own.roll((y, x), (2, 3)).flip([3] if flip else [])
                for y in (-1, 0, 1)
                for x in (-1, 0, 1)
                for flip in (False, True)
            }
            (which,) = [key for key, one in rolled.items() if torch.equal(one, view)]
            seen[name].append(which)
    assert len(set(seen["a"])) == len(set(seen["b"])) == 18 and seen["a"] != seen["b"]


def run(names: str = "ab", **options) -> recycle.Pool:
    handle = teachers(names)
    ratios = options.pop("ratios", None)
    prune = None if ratios is None else prune_tokens(handle.model, ratios)
    options = {"per_class": 2, "steps": 12, "size": SIZE, "seed": 0} | options
    options |= {"prune": prune, "progress": options.get("progress", False)}
    return recycle.invert(handle, heads(names), **options)


def equal(one: recycle.Pool, other: recycle.Pool) -> bool:
    kept = one.kept is other.kept or torch.equal(one.kept, other.kept)
    return kept and all(torch.equal(getattr(one, n), getattr(other, n)) for n in TENSORS)


def test_a_teacher_alone_gives_what_it_gives_in_a_batch():
    """Few steps: Adam makes of a last bit's difference a pixel's, in time."""
    both, alone = run("ab", steps=3), run("b", steps=3)
    at = both.teachers == 1
    assert torch.allclose(both.images[at], alone.images, atol=1e-4)
    assert torch.equal(both.labels[at], alone.labels)


def test_seeds_differ_more_than_a_batch_does_from_teachers_alone():
    """Many steps: images differ in the end, but neither accuracies nor priors do."""
    prior, found = recycle.TotalVariation(), {"ab": [], "alone": []}
    for seed in range(5):
        options = {"seed": seed, "steps": 40, "prior": prior, "prior_weight": 0.1}
        runs = {"ab": [run("ab", **options)], "alone": [run(name, **options) for name in "ab"]}
        for kind, pools in runs.items():
            images = torch.cat([pool.images for pool in pools])
            accuracy = [value for pool in pools for value in pool.accuracy().values()]
            found[kind].append([*prior(images, [6, 6]).tolist(), *accuracy])
    batched, alone = (torch.tensor(found[kind]) for kind in ("ab", "alone"))
    interval = 1.96 * alone[:, :2].std(0) / 5**0.5
    assert ((batched - alone).mean(0)[:2].abs() < interval).all()
    assert batched[:, 2:].min() == alone[:, 2:].min() == 1.0


def test_images_are_what_their_own_teacher_takes_for_their_label():
    pool = run(per_class=8, steps=60, prior=recycle.TotalVariation())
    assert min(pool.accuracy().values()) >= 0.95
    assert pool.images.amin() >= -1 and pool.images.amax() <= 1
    assert pool.images.shape == (2 * CLASSES * 8, 3, SIZE, SIZE)
    other = recycle.label_pool(teachers("ba"), heads("ba"), _swapped(pool), batch_size=16)
    assert max(other.accuracy().values()) < 0.95, "another teacher sees something else"


def _swapped(pool):
    own = {n: pool.teachers == t for t, n in enumerate(pool.names)}
    return {n: (pool.images[own[m]], pool.labels[own[m]]) for n, m in zip("ba", "ab", strict=True)}


def test_an_untrained_head_is_at_chance():
    """The accuracy above is not one that any head would have."""
    pool = run(per_class=8, steps=60, prior=recycle.TotalVariation())
    own = {
        n: (pool.images[pool.teachers == t], pool.labels[pool.teachers == t])
        for t, n in enumerate(pool.names)
    }
    handle = teachers("ab")
    found = []
    for seed in range(1000, 1050):
        pools = recycle.label_pool(handle, heads("ab", seed=seed), own)
        found += pools.accuracy().values()
    found = torch.tensor(found)
    interval = 1.96 * float(found.std()) / len(found) ** 0.5
    assert abs(float(found.mean()) - 1 / CLASSES) < 2 * interval < 0.15


def test_the_best_image_is_kept_as_a_copy_and_not_the_last():
    images = Images("a", [2], (3, 4, 4), 0, BOUNDS)
    first = images.pixels.detach().clone()
    images.keep(images.pixels.detach(), torch.tensor([1.0, 5.0]))
    with torch.no_grad():
        images.pixels += 1
    images.keep(images.pixels.detach(), torch.tensor([2.0, 3.0]))
    with torch.no_grad():
        images.pixels += 1
    assert torch.equal(images.best, torch.stack([first[0], first[1] + 1]))
    assert images.losses.tolist() == [1.0, 3.0]


@pytest.mark.parametrize("ratios", [None, {0: 0.5}], ids=["whole", "pruned"])
def test_the_kept_image_has_the_loss_that_is_told(ratios):
    pools = [run(steps=steps, ratios=ratios, lr=1.0, prune_from=0.0) for steps in (9, 10)]
    for pool in pools:
        own = F.cross_entropy(pool.logits, pool.labels, reduction="none")
        assert torch.allclose(own, pool.losses, atol=1e-5)
    assert (pools[1].losses <= pools[0].losses).all()
    same = (pools[1].images == pools[0].images).flatten(1).all(1)
    assert same.any() and torch.equal(same, pools[1].losses == pools[0].losses)


def test_no_loss_of_the_whole_network_stands_for_one_of_the_pruned():
    pool = run(steps=40, ratios={0: 0.75}, prune_from=0.95)
    own = F.cross_entropy(pool.logits, pool.labels, reduction="none")
    assert torch.allclose(own, pool.losses, atol=1e-5)


def test_the_loss_that_is_told_holds_the_prior():
    pool = run(steps=1, prior=recycle.TotalVariation(), prior_weight=0.5)
    own = F.cross_entropy(pool.logits, pool.labels, reduction="none")
    variation = recycle.TotalVariation()(pool.images, [6, 6])
    assert torch.allclose(pool.losses, own + 0.5 * variation[pool.teachers], atol=1e-5)


@pytest.mark.parametrize("at", [3, 5, 7, 10, 12])
@pytest.mark.parametrize("ratios", [None, {0: 0.5}], ids=["whole", "pruned"])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, ratios, at):
    options = {"ratios": ratios, "prune_from": 0.5, "prior": recycle.TotalVariation()}
    checkpoint = Checkpoint(tmp_path / "run" / "pool.safetensors")
    resumable = options | {"checkpoint": checkpoint, "checkpoint_every": 3}
    with pytest.raises(Interrupted):
        run(**resumable, progress=interrupt(at))
    steps = []
    found = run(**resumable, progress=lambda done, total: steps.append(done))
    assert equal(found, run(**options))
    assert steps == list(range(at // 3 * 3 + 1, 13)), "it began where the last write was"


def test_without_its_generators_a_resumed_run_would_differ(tmp_path):
    """Negative control: each part of the state matters."""
    path = tmp_path / "pool.safetensors"
    resumable = {"checkpoint": Checkpoint(path), "checkpoint_every": 3}
    with pytest.raises(Interrupted):
        run(**resumable, progress=interrupt(6))
    tensors, facts = Checkpoint(path).read()
    other = Images("ab", [6, 6], (3, SIZE, SIZE), 1, BOUNDS).tensors()
    for key, changed in (
        ("generators", other["generators"]),
        ("adam.0.exp_avg", tensors["adam.0.exp_avg"] * 0),
        ("adam.0.exp_avg_sq", tensors["adam.0.exp_avg_sq"] * 2),
        ("adam.0.step", tensors["adam.0.step"] + 1),
    ):
        Checkpoint(path).write(tensors | {key: changed}, facts)
        assert not equal(run(**resumable), run()), key


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    checkpoint = Checkpoint(tmp_path / "pool.safetensors")
    run(checkpoint=checkpoint)
    prior = recycle.FeatureStatistics.of_batchnorm(conv_net())
    given = Checkpoint(tmp_path / "prior.safetensors")
    run(checkpoint=given, prior=prior)
    for at, change in (
        *((checkpoint, {name: value}) for name, value in (("seed", 1), ("lr", 0.1))),
        *((checkpoint, {name: value}) for name, value in (("names", "ba"), ("jitter", 1))),
        (checkpoint, {"ratios": {0: 0.5}}),
        (checkpoint, {"betas": (0.9, 0.99)}),
        (checkpoint, {"prior": recycle.TotalVariation()}),
        (given, {"prior": recycle.FeatureStatistics.of_batchnorm(conv_net(4))}),
    ):
        with pytest.raises(ValueError, match="checkpoint must be of a run with the same"):
            run(checkpoint=at, **change)
    run(checkpoint=checkpoint)
    run(checkpoint=given, prior=prior)


def test_teachers_of_different_numbers_of_classes():
    handle, few = teachers("ab"), heads("a") | heads("b", classes=5)
    options = {"per_class": 2, "steps": 40, "size": SIZE, "seed": 0, "progress": False}
    pool = recycle.invert(handle, few, **options)
    own = {n: pool.teachers == t for t, n in enumerate(pool.names)}
    assert pool.labels[own["b"]].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert pool.logits.shape == (16, 5) and min(pool.accuracy().values()) == 1.0
    assert (pool.logits[own["a"], 3:] == -torch.inf).all()
    given = {n: (pool.images[rows], pool.labels[rows]) for n, rows in own.items()}
    again = recycle.label_pool(handle, few, given)
    assert torch.allclose(again.logits, pool.logits, atol=1e-5)


def test_pruning_keeps_tokens_and_begins_late():
    pool = run(ratios={0: 0.5})
    assert pool.kept.shape == (12, 8) and "8 tokens kept" in repr(pool)
    handle = teachers("ab")
    with handle.mix("a"), prune_tokens(handle.model, {0: 0.5}) as pruning, torch.no_grad():
        handle.model(pool.images[pool.teachers == 0])
    assert torch.equal(pruning.kept, pool.kept[pool.teachers == 0])
    assert not equal(run(ratios={0: 0.5}, prune_from=0.75), pool)
    whole = run(ratios={0: 0.5}, prune_from=1.0)
    assert whole.kept is None and equal(whole, run())


def test_nothing_else_changes():
    handle = teachers("ab")
    before = copy.deepcopy(handle.model.state_dict())
    factors = [t.clone() for s in handle.bank.stacks.values() for t in s.factors()]
    head = torch.nn.Linear(16, 2)
    recycle.invert(
        handle, {"a": head}, per_class=1, steps=2, size=(SIZE, SIZE), seed=0, progress=False
    )
    assert all(torch.equal(v, before[k]) for k, v in handle.model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in handle.model.parameters())
    assert head.weight.grad is None and not any(m._forward_hooks for m in handle.model.modules())
    after = [t for s in handle.bank.stacks.values() for t in s.factors()]
    assert all(torch.equal(x, y) for x, y in zip(factors, after, strict=True))


@pytest.mark.parametrize("prior", ["none", "batchnorm", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_models_of_other_dtypes(dtype, prior):
    """Of 16 bits too: Adam's epsilon is 0 in float16, and pixels without a gradient became NaN."""
    handle = teachers("ab", dtype)
    options = {
        "prior": prior_of(prior, handle.model),
        "prune": prune_tokens(handle.model, {0: 0.5}),
    }
    sizes = {"per_class": 2, "steps": 40, "size": SIZE, "seed": 0, "progress": False}
    pool = recycle.invert(handle, heads("ab"), **sizes, **options)
    held = torch.float64 if dtype == torch.float64 else torch.float32
    assert pool.images.dtype == pool.losses.dtype == pool.logits.dtype == held
    assert pool.images.isfinite().all() and min(pool.accuracy().values()) == 1.0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"per_class": 0}, "per_class must be an integer of at least 1"),
        ({"steps": 2.5}, "steps must be an integer"),
        ({"size": (16, 16, 3)}, "size must be one number of pixels, or height and width"),
        ({"pixel_range": (1, -1)}, "pixel_range must be two finite numbers"),
        ({"pixel_range": ([0, 0], [1, 1])}, "two lists of 3"),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"prior_weight": -1.0}, "prior_weight must be 0 or a positive number"),
        ({"prune_from": 2.0}, "prune_from must be a share of the steps"),
        ({"class_names": {"a": ["x", "y", "z"]}}, "class_names must name the 3 classes of 'b'"),
        ({"features": lambda x: x}, "model must give one row of features"),
        ({"checkpoint_every": 0}, "checkpoint_every must be an integer"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        run(**change)


def test_rejects_heads_modes_and_what_is_not_finite():
    handle, options = teachers("ab"), {"per_class": 1, "steps": 1, "size": SIZE, "seed": 0}
    with pytest.raises(ValueError, match="name must be a loaded adapter"):
        recycle.invert(handle, heads("x"), **options)
    with pytest.raises(ValueError, match="heads must be a dict of at least one"):
        recycle.invert(handle, {}, **options)
    broken = {"a": (torch.full((2, 16), torch.nan), None)}
    with pytest.raises(ValueError, match=r"loss must stay finite, got NaN or infinity of \['a'\]"):
        recycle.invert(handle, broken, **options)
    with pytest.raises(ValueError, match="head of 'a' must have at least two classes, got 1"):
        recycle.invert(handle, heads("ab", classes=1), **options)
    handle.model.train()
    with pytest.raises(ValueError, match=r"model must be in eval mode .* got train mode$"):
        recycle.invert(handle, heads("ab"), **options)
    handle.model.eval().blocks[1].norm1.train()
    with pytest.raises(ValueError, match=r"in eval mode .* got train mode of 'blocks\.1\.norm1'"):
        recycle.invert(handle, heads("ab"), **options)
