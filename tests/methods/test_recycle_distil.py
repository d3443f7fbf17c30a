"""Distilling a meta-LoRA: tasks, losses, what trains, runs that go on, and PEFT."""

import dataclasses
import functools
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from support.recycling import (
    CLASSES,
    SIZE,
    WIDTH,
    Interrupted,
    heads,
    interrupt,
    pictures,
    teachers,
    tiny_vit,
)

from lora_fused import AdapterBank, attach, new_adapter, write_adapter
from lora_fused.io import Checkpoint
from lora_fused.methods import recycle
from lora_fused.methods.recycle.distil import Student, cosine, task_loss
from lora_fused.methods.recycle.tasks import Task, Tasks
from lora_fused.nn.prune import prune_tokens

EACH = 6


@functools.cache
def pool(pruned: bool = False) -> recycle.Pool:
    handle = teachers("abc")
    prune = prune_tokens(handle.model, {0: 0.5}) if pruned else None
    options = {"per_class": EACH, "steps": 20, "size": SIZE, "seed": 0, "prune": prune}
    return recycle.invert(handle, heads("abc"), **options, progress=False)


def student(names: str = "a", rank: int = 2, name: str = "meta"):
    handle = teachers(names)
    targets = {"rank": rank, "target_modules": ["q", "v"], "seed": 0}
    handle.bank.add(new_adapter(handle.model, name, **targets))
    return handle


def run(handle=None, images=None, **options):
    options = {"ways": CLASSES, "queries": 3, "steps": 12, "seed": 0, "progress": False} | options
    images = pool("sparse_tokens" in options) if images is None else images
    return recycle.distil(student() if handle is None else handle, images, "meta", **options)


def factors(adapter) -> list[torch.Tensor]:
    return [t for part in adapter.modules.values() for t in (part.lora_a, part.lora_b)]


def equal(one, other) -> bool:
    pairs = zip(factors(one.adapter), factors(other.adapter), strict=True)
    same = torch.equal(one.losses, other.losses) and torch.equal(one.mixed, other.mixed)
    return same and all(torch.equal(x, y) for x, y in pairs)


def test_the_student_alone_trains():
    handle = student()
    before = {k: v.clone() for k, v in handle.model.state_dict().items()}
    teacher = [t.clone() for t in factors(handle.bank.adapter("a"))]
    start = [t.clone() for t in factors(handle.bank.adapter("meta"))]
    found = run(handle)
    assert all(torch.equal(v, before[k]) for k, v in handle.model.state_dict().items())
    assert all(p.grad is None for p in handle.model.parameters())
    own = factors(handle.bank.adapter("a"))
    assert all(torch.equal(x, y) for x, y in zip(own, teacher, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(factors(found.adapter), start, strict=True))
    assert not list(handle.bank.stacks["blocks.0.q"].parameters()), "frozen again"
    assert all(stack.max_rank == 2 for stack in handle.bank.stacks.values())


def test_losses_fall():
    found = run(steps=300, lr=1e-2, temperature=WIDTH, restart_every=300)
    for mixed in (True, False):
        losses = found.losses[found.mixed == mixed]
        assert losses[-20:].mean() < 0.7 * losses[:20].mean()


def test_distances_that_leave_a_one_hot_softmax_are_told():
    with pytest.warns(UserWarning, match="makes them 16") as told:
        run(steps=2, temperature=0.1)
    assert len(told) == 1
    good = float(re.search(r"\(temperature ([^ ]+) makes", str(told[0].message))[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(steps=1, temperature=good)


def test_the_teachers_need_not_be_there():
    assert equal(run(student("a")), run(student("xyz")))


@pytest.mark.parametrize("sparse", [False, True], ids=["whole", "sparse"])
@pytest.mark.parametrize("at", [2, 7, 12])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, sparse, at):
    options = {"sparse_tokens": prune_tokens} if sparse else {}
    resumable = options | {"checkpoint": Checkpoint(tmp_path / "meta.safetensors")}
    resumable["checkpoint_every"] = 3
    handle = student()
    start = [t.clone() for t in factors(handle.bank.adapter("meta"))]
    with pytest.raises(Interrupted):
        run(handle, **resumable, progress=interrupt(at))
    back = factors(handle.bank.adapter("meta"))
    assert all(torch.equal(x, y) for x, y in zip(back, start, strict=True)), "as it was"
    steps = []
    found = run(handle, **resumable, progress=lambda done, total: steps.append(done))
    assert equal(found, run(**options))
    assert steps == list(range(at // 3 * 3 + 1, 13))


def test_without_its_generator_a_resumed_run_would_differ(tmp_path):
    """Negative control: each part of the state matters."""
    checkpoint = Checkpoint(tmp_path / "meta.safetensors")
    resumable = {"checkpoint": checkpoint, "checkpoint_every": 6}
    with pytest.raises(Interrupted):
        run(**resumable, progress=interrupt(6))
    tensors, facts = checkpoint.read()
    for key, changed in (
        ("generator", torch.Generator().manual_seed(1).get_state()),
        ("adam.1.exp_avg", tensors["adam.1.exp_avg"] * 0),
        ("factor.1", tensors["factor.1"] * 2),
    ):
        checkpoint.write(tensors | {key: changed}, facts)
        assert not equal(run(**resumable), run()), key


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    checkpoint = Checkpoint(tmp_path / "meta.safetensors")
    run(checkpoint=checkpoint)
    other = dataclasses.replace(pool(), images=pool().images + 1)
    for change in ({"seed": 1}, {"lr": 0.1}, {"images": other}, {"handle": student(rank=3)}):
        with pytest.raises(ValueError, match="checkpoint must be of a run with the same"):
            run(checkpoint=checkpoint, **change)
    run(student("xyz"), checkpoint=checkpoint)
    whole = Checkpoint(tmp_path / "whole.safetensors")
    run(images=pool(True), checkpoint=whole)
    with pytest.raises(ValueError, match="checkpoint must be of a run with the same"):
        run(checkpoint=whole, sparse_tokens=prune_tokens)


def test_what_has_the_same_tensors_is_another_run_all_the_same(tmp_path):
    """Scale, places of the factors and names of the classes decide what is trained."""
    checkpoint = Checkpoint(tmp_path / "meta.safetensors")
    run(alone("q", "v"), checkpoint=checkpoint)
    one_name = dataclasses.replace(pool(), class_names=(("cat", "dog", "cow"),) * 3)
    for handle, images in (
        (alone("q", "v", alpha=64), pool()),
        (alone("q", "k"), pool()),
        (alone("q", "v"), one_name),
    ):
        with pytest.raises(ValueError, match="checkpoint must be of a run with the same"):
            run(handle, images, checkpoint=checkpoint)


def alone(*targets: str, **options):
    """A student without teachers beside it."""
    model, bank = tiny_vit(), AdapterBank()
    bank.add(new_adapter(model, "meta", rank=2, target_modules=targets, seed=0, **options))
    return attach(model, bank)


def test_tasks_are_of_one_teacher_or_of_several():
    images = pool()
    tasks = Tasks("test", images, ways=CLASSES, each=4, interpolate=True)
    generator = torch.Generator().manual_seed(0)
    found = [tasks.draw(generator) for _ in range(200)]
    for task in found:
        assert task.rows.shape == (CLASSES, 4) and len(task.rows.unique()) == CLASSES * 4
        of = images.teachers[task.rows]
        assert torch.equal(images.labels[task.rows], task.labels[:, None].expand(-1, 4))
        if task.teacher is None:
            assert len(of.unique()) == 3, "as many teachers as there are"
        else:
            assert (of == task.teacher).all()
    assert 70 < sum(task.teacher is None for task in found) < 130
    assert {task.teacher for task in found} == {None, 0, 1, 2}
    one = Tasks("test", images, ways=CLASSES, each=4, interpolate=False)
    assert all(one.draw(generator).teacher is not None for _ in range(50))


def test_classes_of_one_name_are_never_in_one_task():
    names = (("cat", "dog", "cow"), ("cat", "dog", "cow"), ("cat", "ant", "bee"))
    images = dataclasses.replace(pool(), class_names=names)
    tasks = Tasks("test", images, ways=5, each=2, interpolate=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        task = tasks.draw(generator)
        of = images.teachers[task.rows[:, 0]].tolist()
        drawn = [names[t][i] for t, i in zip(of, task.labels.tolist(), strict=True)]
        assert len(set(drawn)) == 5 and task.teacher is None, "no teacher has five classes"


def test_a_mixed_task_is_never_of_one_teacher_where_all_know_the_same_classes():
    images = dataclasses.replace(pool(), class_names=(("cat", "dog", "cow"),) * 3)
    tasks = Tasks("test", images, ways=CLASSES, each=2, interpolate=True)
    generator = torch.Generator().manual_seed(0)
    drawn = [task for task in (tasks.draw(generator) for _ in range(400)) if task.teacher is None]
    assert len(drawn) > 150
    assert min(len(images.teachers[task.rows[:, 0]].unique()) for task in drawn) > 1


def test_the_loss_is_what_the_docstring_says():
    images, shots = pool(), 2
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(CLASSES, 5, 4, generator=generator, dtype=torch.float64)
    tasks = Tasks("test", images, ways=CLASSES, each=5, interpolate=True)
    drawn = {}
    while len(drawn) < 2:
        task = tasks.draw(generator)
        drawn[task.teacher is None] = task
    means = features[:, :shots].mean(1)
    for mixed, task in drawn.items():
        total = 0.0
        for way in range(CLASSES):
            for query in range(shots, 5):
                distances = ((features[way, query] - means) ** 2).sum(-1)
                student_log = torch.log_softmax(-distances / 3, 0)
                if mixed:
                    total -= student_log[way]
                else:
                    logits = images.logits[task.rows[way, query], task.labels].double()
                    p = logits.softmax(0)
                    total += (p * (p.log() - student_log)).sum()
        expected = total / (CLASSES * (5 - shots))
        assert torch.allclose(task_loss(features, task, images, shots, 3.0), expected, rtol=1e-6)


def test_a_student_that_agrees_with_the_teacher_has_no_loss():
    """KL is 0 where the scores are the teacher's logits, and only there."""
    features = torch.eye(3).reshape(3, 1, 3).repeat(1, 2, 1)
    task = Task(torch.arange(6).reshape(3, 2), 0, torch.arange(3))
    scores = -2 * (1 - torch.eye(3)).repeat_interleave(2, 0)
    images = dataclasses.replace(pool(), logits=F.pad(scores, (0, 0, 0, len(pool()) - 6)))
    assert task_loss(features, task, images, 1).abs() < 1e-6
    images = dataclasses.replace(images, logits=2 * images.logits)
    assert task_loss(features, task, images, 1) > 1e-2


def test_sparse_tokens_runs_on_the_kept_ones():
    handle, images = student(), pool(True)
    task = Task(torch.arange(12).reshape(3, 4), None, torch.arange(3))
    lengths = []
    norm = handle.model.blocks[0].norm1
    norm.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    with torch.no_grad():
        sparse = Student(handle, "meta", images, prune_tokens, None)(task)
        whole = Student(handle, "meta", images, None, None)(task)
        with handle.mix("meta"), prune_tokens(handle.model, keep=images.kept[:12]):
            expected = handle.model(images.images[:12])
    assert lengths == [9, 17, 9], "CLS and the tokens kept"
    assert torch.equal(sparse.flatten(0, 1), expected) and not torch.allclose(sparse, whole)


def test_the_rate_is_a_cosine_with_warm_restarts():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 7)
    for step in range(20):
        assert cosine(0.1, step, 7) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_a_run_steps_at_that_rate():
    """Whole at a restart, half of it in the middle of a cosine of two steps."""
    runs = [run(steps=2, restart_every=every) for every in (1, 2)]
    assert torch.equal(runs[0].losses, runs[1].losses), "of before each step"
    start = [t.clone() for t in factors(run(steps=1).adapter)]
    for first, whole, half in zip(start, *(factors(one.adapter) for one in runs), strict=True):
        assert torch.allclose(half - first, (whole - first) / 2, atol=1e-6)
        assert not torch.equal(half, whole)


def test_peft_loads_the_meta_lora_and_gives_the_same_features(tmp_path):
    peft = pytest.importorskip("peft")
    handle = student()
    found = run(handle, lr=0.1)
    write_adapter(found.adapter, tmp_path / "meta")
    x = pictures(4)
    with handle.mix("meta"), torch.no_grad():
        ours = handle.model(x)
    base = tiny_vit()
    with torch.no_grad():
        frozen = base(x)
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "meta")(x)
    assert torch.allclose(ours, theirs, atol=1e-5) and not torch.allclose(ours, frozen, atol=1e-2)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ways": 1}, "ways must be an integer of at least 2"),
        ({"ways": 4, "interpolate": False}, "pool must hold a teacher with 4 classes with 4"),
        ({"ways": 10}, "pool must hold 10 classes of other names, of two teachers"),
        (
            {"queries": 6},
            r"shots \+ queries must be at most 6, the pool's images of a class, got 7",
        ),
        ({"lr": 0.0}, "lr must be a positive number"),
        ({"temperature": -1.0}, "temperature must be a positive number"),
        ({"restart_every": 0}, "restart_every must be an integer"),
        ({"images": "pool"}, "pool must be a Pool, got str"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        run(**change)


def test_rejects_adapters_that_cannot_train():
    with pytest.raises(ValueError, match="name must be a loaded adapter"):
        run(student(name="other"))
    handle = student()
    handle.bank.trainable(["a"])
    with pytest.raises(ValueError, match="bank must have no adapters in training"):
        run(handle)
    with pytest.raises(ValueError, match="pool must have kept tokens"):
        run(images=pool(), sparse_tokens=prune_tokens)
    broken = dataclasses.replace(pool(), images=pool().images * torch.nan)
    handle = student()
    with pytest.raises(ValueError, match="loss must stay finite"):
        run(handle, images=broken)
    assert all(t.isfinite().all() for t in factors(handle.bank.adapter("meta")))
