"""lora-fused recycle: from PEFT folders with heads to few-shot scores, on tiny random models."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_fused import attach, load_adapters, new_adapter, read_adapter, write_adapter
from lora_fused.cli.recycle_vision import load_vision
from lora_fused.io import Checkpoint, load_pool
from lora_fused.methods import recycle
from lora_fused.nn.prune import prune_tokens

transformers = pytest.importorskip("transformers")
image = pytest.importorskip("PIL.Image")

SIDE, WIDTH, CLASSES = 16, 24, 3
INVERT = ("--per-class", 6, "--steps", 24, "--seed", 1, "-q")
DISTIL = ("--ways", 3, "--queries", 4, "--steps", 12, "--seed", 2, "-q")
EPISODES = ("--ways", 3, "--queries", 4, "--episodes", 40, "--seed", 3, "-q")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """vit/, adapters/first and second with their heads, images/ of four colours."""
    root = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 3, "image_size": SIDE, "patch_size": 4, "num_labels": CLASSES}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = 0.25 * torch.randn(parameter.shape)
    model.save_pretrained(root / "vit")
    scaling = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.5]}
    scaling["size"] = {"height": SIDE, "width": SIDE}
    transformers.ViTImageProcessor(**scaling).save_pretrained(root / "vit")
    for seed, name in enumerate(("first", "second")):
        write_adapter(teacher(model, name, seed), root / "adapters" / name)
    generator = torch.Generator().manual_seed(5)
    for label in range(4):
        (root / "images" / f"class {label}").mkdir(parents=True)
        for i in range(6):
            noise = torch.randint(0, 60, (20, 20, 3), generator=generator)
            pixels = noise + torch.tensor([40 * label, 100, 190 - 40 * label])
            file = root / "images" / f"class {label}" / f"{i}.png"
            image.fromarray(pixels.byte().numpy()).save(file)
    return root


def teacher(model, name: str, seed: int):
    adapter = new_adapter(model, name, rank=2, target_modules=["q_proj", "v_proj"], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for part in adapter.modules.values():
        part.lora_b = 0.3 * torch.randn(part.lora_b.shape, generator=generator)
    adapter.saved = {
        "classifier.weight": torch.randn(CLASSES, WIDTH, generator=generator),
        "classifier.bias": torch.zeros(CLASSES),
    }
    adapter.metadata["config"]["modules_to_save"] = ["classifier"]
    adapter.metadata["config"]["base_model_name_or_path"] = "vit"
    return adapter


@pytest.fixture(scope="module")
def made(world):
    """A pool and a meta-LoRA: pool.safetensors and meta/."""
    from typer.testing import CliRunner

    from lora_fused.cli.app import app

    def run(*args):
        done = CliRunner().invoke(app, ["recycle", *map(str, args)])
        assert done.exit_code == 0, done.output
        return done

    model, pool = ("--model", world / "vit"), world / "pool.safetensors"
    prune = ("--prune", "0:0.5,1:0.5", "--png", world / "grid")
    told = run("invert", *model, world / "adapters", "-o", pool, *INVERT, *prune, "--json")
    meta = ("-o", world / "meta", "--sparse-tokens", "--lr", 0.05, "--json")
    return told, run("distil", *model, "--pool", pool, *meta, *DISTIL)


def said(done) -> dict:
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def fault(done, *words: str) -> None:
    assert done.exit_code == 1 and done.stdout == "", done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("lora-fused:")]
    errors = [line for line in lines if not line.startswith("lora-fused: warning")]
    assert len(errors) == 1 and all(word in errors[0] for word in words), done.stderr


def same_pools(one, other) -> bool:
    tensors = zip(one.tensors(), other.tensors(), strict=True)
    return one.names == other.names and all(torch.equal(a, b) for a, b in tensors)


def ours(world):
    """The library's own way to what the commands do: vision, handle, heads."""
    bank = load_adapters(world / "adapters")
    vision = load_vision(str(world / "vit"), {*bank.modules, "classifier"})
    handle = attach(vision.model, bank, saved_modules="ignore")
    heads = {n: (t["classifier.weight"], t["classifier.bias"]) for n, t in bank.saved.items()}
    return vision, handle, heads


def test_invert_is_the_librarys(world, made):
    pool, told = load_pool(world / "pool.safetensors"), json.loads(made[0].stdout)
    vision, handle, heads = ours(world)
    low, high = (-2.0, -2.0, -1.2), (3.0, 2.0, 0.8)  # (0 - mean) / std and (1 - mean) / std
    assert torch.allclose(vision.black, torch.tensor(low), atol=1e-6)
    assert torch.allclose(vision.white, torch.tensor(high), atol=1e-6)
    truth = recycle.invert(
        handle, heads, per_class=6, steps=24, size=SIDE, seed=1, features=vision.features,
        pixel_range=(vision.black.tolist(), vision.white.tolist()), progress=False,
        prior=recycle.TotalVariation(), prune=prune_tokens(vision.model, {0: 0.5, 1: 0.5}),
    )  # fmt: skip
    assert same_pools(pool, truth) and pool.names == ("first", "second")
    assert told["images"] == 36 and told["classes"] == 6 and told["tokens_kept"] == 4
    shares = {name: one["accuracy"] for name, one in told["teachers"].items()}
    assert shares == pool.accuracy() and min(shares.values()) >= 0.95
    # Not trivially so: with the labels of another class none would be right.
    assert (pool.logits.argmax(1) == (pool.labels + 1) % CLASSES).double().mean() < 0.1
    record = json.loads((world / "pool.safetensors.json").read_text())
    assert record["prune"] == "0:0.5,1:0.5" and record["seed"] == 1 and record["prior"] == "tv"
    assert [path.rpartition("/")[2] for path in record["adapters"]] == ["first", "second"]
    assert record["result"]["images"] == 36 and record["result"]["teachers"] == told["teachers"]


def test_the_grid_shows_every_image(world, made):
    with image.open(world / "grid") as grid:  # PNG by any name
        assert grid.format == "PNG" and grid.size == (6 * (SIDE + 2), 6 * (SIDE + 2))
        pool, (row, column) = load_pool(world / "pool.safetensors"), (4, 3)
        box = [side * (SIDE + 2) + 1 for side in (column, row)]
        found = grid.crop((*box, box[0] + SIDE, box[1] + SIDE))
    again = load_vision(str(world / "vit")).prepare([found])
    assert (again[0] - pool.images[row * 6 + column]).abs().max() < 5 / 255 / 2 + 1e-5


def test_peft_loads_the_meta_lora(world, made):
    peft = pytest.importorskip("peft")
    told = json.loads(made[1].stdout)
    assert told["targets"] == "q_proj, v_proj" and told["parameters"] == 2 * 2 * 2 * 4 * WIDTH
    assert json.loads((world / "meta" / "recycle.json").read_text())["sparse_tokens"] is True
    kind, x = transformers.ViTForImageClassification, torch.randn(2, 3, SIDE, SIDE)
    wrapped = peft.PeftModel.from_pretrained(kind.from_pretrained(world / "vit"), world / "meta")
    model = kind.from_pretrained(world / "vit").eval()
    with torch.no_grad():
        truth, plain = wrapped.eval()(x).logits, model(x).logits
        with attach(model, load_adapters(world / "meta")).mix("meta"):
            found = model(x).logits
    assert (truth - plain).abs().max() > 100 * (truth - found).abs().max()


def test_eval_is_the_librarys(run, world, made):
    options = ("--model", world / "vit", "--images", world / "images", *EPISODES, "--json")
    told = said(run("recycle", "eval", "--adapter", world / "meta", *options))
    vision = load_vision(str(world / "vit"))
    handle = attach(vision.model, load_adapters(world / "meta"))
    files = sorted((world / "images").rglob("*.png"))
    images = vision.prepare([image.open(file).convert("RGB") for file in files])
    labels = torch.arange(4).repeat_interleave(6)
    sizes = {"ways": 3, "queries": 4, "episodes": 40, "seed": 3, "features": vision.features}
    truth = [recycle.evaluate(handle, m, images, labels, **sizes) for m in (None, "meta")]
    for row, one in zip(told["results"], truth, strict=True):
        assert row["accuracy"] == one.accuracy and row["interval"] == one.interval
    frozen, meta = told["results"]
    assert frozen["features"] == "frozen model" and frozen["gain"] is None
    assert meta["gain"] == pytest.approx(meta["accuracy"] - frozen["accuracy"])
    assert frozen["accuracy"] > 0.6, "colours are told apart"
    alone = said(run("recycle", "eval", *options, "--batch-size", 5))
    assert alone["results"] == [frozen]
    table = run("recycle", "eval", "--adapter", world / "meta", *options[:-1]).stdout
    assert "3-way 1-shot, 40 episodes of 24 images" in table and "frozen model" in table


def interrupted(monkeypatch, writes: int):
    """Ctrl-C right after so many writes of a checkpoint."""
    write, left = Checkpoint.write, itertools.count(1)

    def stop(self, *args):
        write(self, *args)
        if next(left) == writes:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "write", stop)


def test_resumed_runs_give_the_same_bits(run, world, made, tmp_path, monkeypatch):
    state = ("--checkpoint", tmp_path / "state", "--checkpoint-every", 5)
    model, prune = ("--model", world / "vit"), ("--prune", "0:0.5,1:0.5")
    pool = ("-o", tmp_path / "pool", *INVERT, *prune, *state)
    meta = ("--pool", world / "pool.safetensors", "-o", tmp_path / "meta", *DISTIL, *state)
    meta += ("--sparse-tokens", "--lr", 0.05)
    for args in (("invert", *model, world / "adapters", *pool), ("distil", *model, *meta)):
        (tmp_path / "state").unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            interrupted(patch, 2)
            assert run("recycle", *args).exit_code == 130
        assert Checkpoint(tmp_path / "state").read()[1]["step"] == "10"
        assert not (tmp_path / "pool").exists() or args[0] == "distil"
        fault(run("recycle", *args), "exists (--resume goes on from it)")
        fault(run("recycle", *args, "--lr", 0.2, "--resume"), "be of a run with the same options")
        assert run("recycle", *args, "--resume").exit_code == 0
    assert same_pools(load_pool(tmp_path / "pool"), load_pool(world / "pool.safetensors"))
    one, other = (read_adapter(root / "meta").modules for root in (tmp_path, world))
    assert all(torch.equal(one[name].lora_b, other[name].lora_b) for name in one)


def test_heads_and_class_names_from_files(run, world, tmp_path):
    tensors = {}
    for name in ("first", "second"):
        file = load_file(world / "adapters" / name / "adapter_model.safetensors")
        for leaf in ("weight", "bias"):
            tensors[f"{name}.{leaf}"] = file[f"base_model.model.classifier.{leaf}"]
    save_file(tensors, tmp_path / "heads.safetensors")
    names = {"first": ["cat", "dog", "cow"], "second": ["cat", "elk", "fox"]}
    (tmp_path / "names.json").write_text(json.dumps(names))
    start = ("recycle", "invert", "--model", world / "vit", world / "adapters", *INVERT)
    files = ("--heads", tmp_path / "heads.safetensors", "--class-names", tmp_path / "names.json")
    assert run(*start, "-o", tmp_path / "saved").exit_code == 0
    done = run(*start, "-o", tmp_path / "given", *files)
    assert done.exit_code == 0 and "accuracy by its own adapter" in done.stdout
    one, other = load_pool(tmp_path / "saved"), load_pool(tmp_path / "given")
    assert same_pools(one, other) and one.kept is None
    assert other.class_names == (("cat", "dog", "cow"), ("cat", "elk", "fox"))
    assert one.class_names[1] == ("second/0", "second/1", "second/2")
    (tmp_path / "names.json").write_text("[1]")
    fault(run(*start, "-o", tmp_path / "more", *files), "map adapters to lists of class names")


def test_priors(run, world, tmp_path):
    start = ("recycle", "invert", "--model", world / "vit", world / "adapters", *INVERT)
    images = ("--prior-images", world / "images", "--prior-weight", 1)
    pools = {}
    for prior, options in (("none", ()), ("tv", ("--prior-weight", 1)), ("tokens", images)):
        file = tmp_path / prior
        assert run(*start, "-o", file, "--prior", prior, *options).exit_code == 0
        pools[prior] = load_pool(file).images
    variation = recycle.TotalVariation()
    found = {name: float(variation(x, [len(x)])) for name, x in pools.items()}
    assert found["tv"] < 0.95 * found["none"] and not torch.equal(pools["tokens"], pools["none"])
    vision = load_vision(str(world / "vit"), ["vit", "classifier"])
    natural = torch.cat(list(load_images(world).batches(vision.prepare, 64)))
    own = recycle.FeatureStatistics.of_tokens(vision.model, natural)
    with own.watch(vision.model), torch.no_grad():
        for name in ("none", "tokens"):
            own.reset()
            vision.features(pools[name])
            found[name] = float(own(pools[name], [len(pools[name])]))
    assert found["tokens"] < found["none"]


def load_images(world):
    from lora_fused.cli.recycle_images import open_images

    return open_images(str(world / "images"))
