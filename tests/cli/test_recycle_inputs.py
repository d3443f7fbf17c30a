"""What lora-fused recycle takes: models of several layouts, heads, images; and what it refuses."""

import io
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_fused import LoraFactors, attach, new_adapter, read_adapter, write_adapter
from lora_fused.cli import recycle_vision
from lora_fused.cli.recycle_images import open_images
from lora_fused.cli.recycle_vision import attached, heads_of, load_vision, targets_of
from lora_fused.io import load_adapters, load_pool, save_pool

numpy = pytest.importorskip("numpy")
transformers = pytest.importorskip("transformers")
image = pytest.importorskip("PIL.Image")

SIDE, WIDTH = 16, 24
SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3}
SIZES |= {"image_size": SIDE, "patch_size": 4}
HIDDEN = {"intermediate_size": 32}


def vit(kind: str = "ViTForImageClassification"):
    config = transformers.ViTConfig(**SIZES, **HIDDEN, num_labels=3)
    return getattr(transformers, kind)(config)


def clip(kind: str):
    tower = {**SIZES, **HIDDEN, "projection_dim": 8}
    if kind.startswith("CLIPVision"):
        return getattr(transformers, kind)(transformers.CLIPVisionConfig(**tower))
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "vocab_size": 64}
    config = {"text_config": text, "vision_config": tower, "projection_dim": 8}
    return getattr(transformers, kind)(transformers.CLIPConfig(**config))


def dino():
    return transformers.Dinov2Model(transformers.Dinov2Config(**SIZES))


def resnet():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    return transformers.ResNetForImageClassification(config)


MODELS = {
    "vit": (vit, WIDTH),
    "vit-bare": (lambda: vit("ViTModel"), WIDTH),
    "clip": (lambda: clip("CLIPVisionModel"), WIDTH),
    "clip-projected": (lambda: clip("CLIPVisionModelWithProjection"), 8),
    "clip-both-towers": (lambda: clip("CLIPModel"), 8),
    "clip-classifier": (lambda: clip("CLIPForImageClassification"), WIDTH),
    "dino": (dino, WIDTH),
    "resnet": (resnet, 16),
}


def save(model, folder) -> str:
    model.eval().save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder)
    return str(folder)


def teacher(model, folder, head: str = "classifier", width: int = WIDTH, targets=("v_proj",)):
    """An adapter of a model, with a head of two classes."""
    adapter = new_adapter(model, folder.name, rank=1, target_modules=list(targets), seed=0)
    adapter.saved = {f"{head}.weight": torch.ones(2, width), f"{head}.bias": torch.zeros(2)}
    adapter.metadata["config"]["modules_to_save"] = [head.split(".")[0]]
    write_adapter(adapter, folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_features_of_every_layout(name, tmp_path):
    torch.manual_seed(0)
    make, width = MODELS[name]
    model = make()
    vision = load_vision(save(model, tmp_path))
    assert (vision.width, vision.size) == (width, (SIDE, SIDE))
    assert torch.equal(vision.black, torch.full((3,), -1.0)) and vision.white.eq(1).all()
    x = torch.randn(2, 3, SIDE, SIDE)
    with torch.no_grad():
        found = vision.features(x)
        if hasattr(model, "classifier"):  # a classifier of the features is the model's own
            assert torch.allclose(model.classifier(pooled(name, found)), model(x).logits, atol=1e-5)
        elif name == "clip-both-towers":
            pixels = model.vision_model(pixel_values=x).pooler_output
            assert torch.allclose(found, model.visual_projection(pixels), atol=1e-5)
        elif name == "vit-bare":
            assert torch.allclose(found, model(x).last_hidden_state[:, 0], atol=1e-5)
        else:
            out = model(pixel_values=x)
            truth = out["image_embeds"] if width == 8 else out.pooler_output
            assert torch.allclose(found, truth, atol=1e-5)


def pooled(name: str, features):
    return features[:, :, None, None] if name == "resnet" else features


def test_a_head_decides_the_class_and_a_prefix_nothing(tmp_path):
    folder, found = save(vit("ViTModel"), tmp_path / "vit"), []
    for kind in ("ViTModel", "ViTForImageClassification"):
        one = new_adapter(vit(kind), kind, rank=1, target_modules=["v_proj"], seed=0)
        for part in one.modules.values():
            part.lora_b = torch.ones_like(part.lora_b)
        write_adapter(one, tmp_path / "both" / kind)
    vision, handle = attached(folder, load_adapters(tmp_path / "both"))
    assert type(vision.model).__name__ == "ViTModel" and len(handle.bank.modules) == 2
    for name in handle.bank.names:
        with torch.no_grad(), handle.mix(name):
            found.append(vision.features(torch.ones(1, 3, SIDE, SIDE)))
    assert torch.equal(*found)
    both = save(clip("CLIPModel"), tmp_path / "clip")
    headed = load_adapters(teacher(clip("CLIPForImageClassification"), tmp_path / "headed"))
    vision, handle = attached(both, headed)
    assert type(vision.model).__name__ == "CLIPForImageClassification"
    assert heads_of(vision, handle.bank, None)["headed"][0].shape == (2, WIDTH)


@pytest.mark.parametrize("kind", ["ViTForImageClassification", "ViTModel"])
def test_names_of_transformers_4_are_todays(kind, tmp_path):
    model = vit(kind)
    folder = save(model, tmp_path / "vit")
    today = new_adapter(model, "one", rank=1, target_modules=["q_proj", "fc2"], seed=0)
    for part in today.modules.values():
        part.lora_b = torch.ones_like(part.lora_b)
    write_adapter(today, tmp_path / "one")
    once = {"layers.": "encoder.layer.", "attention.q_proj": "attention.attention.query"}
    old, once["mlp.fc2"] = read_adapter(tmp_path / "one"), "output.dense"
    for before, after in once.items():
        old.modules = {name.replace(before, after): p for name, p in old.modules.items()}
    old.metadata["config"]["target_modules"] = ["query", "output.dense"]
    old.metadata["keys"], old.name = {}, "old"
    write_adapter(old, tmp_path / "old")
    assert any("encoder.layer.1.attention.attention.query" in name for name in old.modules)
    x, found = torch.randn(2, 3, SIDE, SIDE), []
    for name in ("one", "old"):
        vision, handle = attached(folder, load_adapters(tmp_path / name))
        with torch.no_grad(), handle.mix(name):
            found.append(vision.features(x))
    assert torch.equal(*found) and not torch.equal(found[0], vision.features(x))
    mixed = load_adapters([tmp_path / "one", tmp_path / "old"])
    assert attached(folder, mixed)[1].bank.modules == load_adapters(tmp_path / "one").modules


def test_a_network_with_batchnorm_is_its_own_prior(run, tmp_path):
    torch.manual_seed(0)
    model = resnet()
    folder = save(model, tmp_path / "resnet")
    name = "encoder.stages.1.layers.0.shortcut.convolution"
    assert any(module.endswith(name) for module, _ in model.named_modules())
    one = teacher(model, tmp_path / "one", "classifier.1", 16, [name])
    options = ("--per-class", 3, "--steps", 3, "--prior", "batchnorm", "--json", "-q")
    done = run("recycle", "invert", "--model", folder, one, "-o", tmp_path / "pool", *options)
    assert done.exit_code == 0 and json.loads(done.stdout)["images"] == 6, done.output


def test_a_model_of_timms(tmp_path):
    timm = pytest.importorskip("timm")
    args = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "num_heads": 3, "depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=2, **args).eval()
    timm.models.save_for_hf(model, tmp_path, model_args=args, safe_serialization=True)
    vision = load_vision(f"local-dir:{tmp_path}")
    assert (vision.width, vision.size, vision.head) == (WIDTH, (32, 32), "head")
    assert targets_of(vision.model, None) == ["qkv"]
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(model.head(vision.features(x)), model(x), atol=1e-5)


def test_q_and_v_are_what_the_model_calls_them():
    assert targets_of(vit(), None) == targets_of(vit(), "q, v") == ["q_proj", "v_proj"]
    assert targets_of(vit(), "k,fc1") == ["k_proj", "fc1"]
    assert targets_of(torch.nn.ModuleDict({"qkv": torch.nn.Linear(1, 1)}), None) == ["qkv"]


def test_three_sources_of_images_are_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 9, 7, 3), generator=generator, dtype=torch.uint8).numpy()
    label = numpy.array([0, 0, 1, 1, 1, 2])
    stream, offset = b"", [0]
    for i, (one, folder) in enumerate(zip(pixels, label, strict=True)):
        (tmp_path / "images" / f"c{folder}").mkdir(parents=True, exist_ok=True)
        image.fromarray(one).save(tmp_path / "images" / f"c{folder}" / f"{i}.PNG", "PNG")
        (tmp_path / "images" / f"c{folder}" / "notes.txt").write_text("no image")
        held = io.BytesIO()
        image.fromarray(one).save(held, "PNG")  # lossless, under the key that JPEG has
        stream += held.getvalue()
        offset.append(len(stream))
    bytes_of = numpy.frombuffer(stream, dtype=numpy.uint8)
    numpy.savez(tmp_path / "jpeg.npz", jpeg=bytes_of, offset=numpy.array(offset), label=label)
    numpy.savez(tmp_path / "image.npz", image=pixels, label=label.astype(numpy.int16))

    def prepare(batch):
        return torch.stack([torch.from_numpy(numpy.array(one)) for one in batch])

    for source in ("images", "jpeg.npz", "image.npz"):
        found = open_images(str(tmp_path / source))
        assert found.labels.tolist() == label.tolist() and found.labels.dtype == torch.int64
        parts = list(found.batches(prepare, 4))
        assert [len(part) for part in parts] == [4, 2]
        assert torch.equal(torch.cat(parts), torch.from_numpy(pixels)), source


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """vit/, one/ and two/ with heads, pool, images/; all of two commands."""
    root = tmp_path_factory.mktemp("refused")
    torch.manual_seed(0)
    model = vit()
    save(model, root / "vit")
    for name in ("one", "two"):
        teacher(model, root / name)
    for label in range(2):
        (root / "images" / str(label)).mkdir(parents=True)
        for i in range(2):
            image.new("RGB", (8, 8), (90 * label, i, 0)).save(root / f"images/{label}/{i}.png")
    return root


def fault(done, *words: str) -> None:
    assert done.exit_code == 1 and done.stdout == "", done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("lora-fused:")]
    assert len(lines) == 1 and all(word in lines[0] for word in words), done.stderr


@pytest.mark.parametrize(
    "options, words",
    [
        ("--prior pca", "--prior must be one of"),
        ("--prior tokens", "tokens with --prior-images"),
        ("--prior batchnorm", "must have BatchNorm2d modules"),
        ("--prune 1", "--prune must be pairs of block:share"),
        ("--prune 1:0.5,1:0.2", "--prune must name each block once"),
        ("--prune 9:0.5", "must name blocks from 0 to 1"),
        ("--resume", "--resume must come with --checkpoint"),
        ("--per-class 0", "per_class must be an integer of at least 1"),
        ("--size 20", "doesn't match model"),
        ("--heads none.safetensors", "no such file of heads: none.safetensors"),
        ("--device nowhere", "nowhere"),
        ("--overwrite --png {}", "is a folder, not a file"),
        ("-o {}", "is a folder, not a file"),
        ("-o {}/x.png --png {}/vit/../x.png", "files to write must have names of their own"),
        ("-o {}/one/adapter_config.json", "exists (--overwrite replaces it)"),
        ("--model {}/none", "no such folder"),
        ("--model {}/images", "images"),
    ],
)
def test_invert_refuses(run, world, tmp_path, options, words):
    given = [part.replace("{}", str(world)) for part in options.split()]
    before = sorted(world.rglob("*"))
    out = () if "-o" in given else ("-o", tmp_path / "pool")
    model = () if "--model" in given else ("--model", world / "vit")
    quick = () if "--per-class" in given else ("--per-class", 1)
    start = ("recycle", "invert", world / "one", *model, *out, *quick, "--steps", 1, "-q")
    fault(run(*start, *given), words)
    assert not list(tmp_path.iterdir()) and sorted(world.rglob("*")) == before


def test_heads_that_do_not_fit_are_refused(run, world, tmp_path):
    model = vit()
    plain = new_adapter(model, "plain", rank=1, target_modules=["v_proj"], seed=0)
    write_adapter(plain, tmp_path / "plain")
    teacher(model, tmp_path / "wide", width=WIDTH + 1)
    more = read_adapter(teacher(model, tmp_path / "more"))
    more.saved["vit.layernorm.weight"] = torch.ones(WIDTH)
    more.metadata["config"]["modules_to_save"] = ["classifier", "layernorm"]
    write_adapter(more, tmp_path / "more", overwrite_ok=True)
    start = ("recycle", "invert", "--model", world / "vit", "-o", tmp_path / "pool", "-q")
    for name, words in (
        ("plain", "'plain' must hold its head 'classifier' (modules_to_save), or --heads"),
        ("wide", "head of 'wide' must be [classes, 24], a row of the model's features wide"),
        ("more", "no fully trained modules but its head, 'classifier', got ['vit.layernorm"),
    ):
        fault(run(*start, tmp_path / name), words)
    images = ("--images", world / "images", "--ways", 2, "--queries", 1)
    done = run("recycle", "eval", "--model", world / "vit", "--adapter", tmp_path / "more", *images)
    assert done.exit_code == 1 and "fully trained modules" in done.stderr
    file = tmp_path / "heads.safetensors"
    save_file({"two.weight": torch.ones(2, WIDTH)}, file)
    fault(run(*start, world / "one", "--heads", file), "'one' must have a head in", "got none")
    file.write_bytes(b"short")
    fault(run(*start, world / "one", "--heads", file), "recycle: ", "whole safetensors file")
    assert not (tmp_path / "pool").exists()


def test_distil_refuses(run, world, tmp_path):
    pool = tmp_path / "pool"
    made = ("recycle", "invert", "--model", world / "vit", world / "one", world / "two", "-q")
    assert run(*made, "-o", pool, "--per-class", 2, "--steps", 1).exit_code == 0
    start = ("recycle", "distil", "--model", world / "vit", "-q", "--steps", 1)
    out = ("--pool", pool, "-o", tmp_path / "meta")
    small = ("--ways", 2, "--queries", 1)
    for options, words in (
        (("--queries", 1), "pool must hold 5 classes of other names, of two teachers"),
        ((*small, "--queries", 2), "shots + queries must be at most 2, the pool's images"),
        ((*small, "--sparse-tokens"), "pool must have kept tokens"),
        ((*small, "--targets", "q,w"), "got ['w']"),
        ((*small, "--rank", 0), "rank must be"),
        ((*small, "--temperature", 0), "temperature must be a positive number"),
        (("--pool", tmp_path / "none"), "load_pool: no such file"),
        (("-o", world / "vit"), "vit exists and is not an adapter folder"),
        (("-o", world / "one"), "exists (--overwrite replaces it)"),
    ):
        fault(run(*start, *out, *options), words)
    found = load_pool(pool)
    found.images.mul_(2)
    save_pool(found, tmp_path / "louder")
    louder = (*start, *out, "--pool", tmp_path / "louder", *small)
    fault(run(*louder), "hold images that the model can take ([-1.0, -1.0, -1.0] to")
    assert not (tmp_path / "meta").exists() and run(*start, *out, *small).exit_code == 0


def test_eval_refuses(run, world, tmp_path):
    start = ("recycle", "eval", "--model", world / "vit", "-q")
    small = ("--ways", 2, "--queries", 1, "--episodes", 2)
    (tmp_path / "empty" / "class").mkdir(parents=True)
    (tmp_path / "bad" / "class").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "bad" / "class" / f"{i}.png").write_text("no image")
    (tmp_path / "text.npz").write_text("no archive")
    numpy.savez(tmp_path / "odd.npz", image=numpy.zeros((3, 4, 4, 3)), label=numpy.arange(3))
    numpy.savez(tmp_path / "objects.npz", image=numpy.array([{}]), label=numpy.arange(1))
    for images, options, words in (
        (world / "images", (), "must hold 5 classes with 16 images each"),
        (world / "images", (*small, "--batch-size", 0), "--batch-size must be an integer"),
        (world / "images", (*small, "--episodes", 0), "count must be an integer"),
        (world / "images", (*small, "--adapter", tmp_path / "none"), "no such file or folder"),
        (tmp_path / "none", small, "no such file or folder of images"),
        (tmp_path / "empty", small, "one folder per class, of files in .png"),
        (tmp_path / "bad", (*small, "--ways", 1), "images that can be read, got image 0"),
        (tmp_path / "text.npz", small, "be an .npz with jpeg, offset and label"),
        (tmp_path / "odd.npz", small, "got image float64 [3, 4, 4, 3], label int64 [3]"),
        (tmp_path / "objects.npz", small, "be an .npz with jpeg"),
    ):
        fault(run(*start, "--images", images, *options), words)
    one = run(*start, "--images", world / "images", *small, "--episodes", 1, "--json")
    assert json.loads(one.stdout)["results"][0]["interval"] is None


def test_weights_that_are_missing_are_refused(run, world, tmp_path):
    folder = save(vit(), tmp_path / "vit")
    file = tmp_path / "vit" / "model.safetensors"
    tensors = load_file(file)
    (lost,) = [key for key in tensors if key.endswith("layernorm.weight") and "layers" not in key]
    save_file({key: t for key, t in tensors.items() if key != lost}, file, {"format": "pt"})
    images = ("--images", world / "images", "--ways", 2, "--queries", 1, "-q")
    fault(run("recycle", "eval", "--model", folder, *images), "hold every weight of ViTFor")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    save_file(tensors, file, {"format": "pt"})
    fault(run("recycle", "eval", "--model", folder, *images), "must hold its image processor")
    text = transformers.BertConfig(hidden_size=12, num_hidden_layers=1, num_attention_heads=2)
    text.save_pretrained(tmp_path / "bert")
    done = run("recycle", "eval", "--model", tmp_path / "bert", *images)
    fault(done, "model must read images", "'bert'")


@pytest.mark.parametrize("package", ["transformers", "pillow", "numpy", "timm"])
def test_what_must_be_installed_is_said(run, world, tmp_path, monkeypatch, package):
    real, hidden = recycle_vision.find_spec, "PIL" if package == "pillow" else package
    monkeypatch.setattr(
        recycle_vision, "find_spec", lambda name: None if name == hidden else real(name)
    )
    numpy.savez(tmp_path / "images.npz", image=numpy.zeros((4, 4, 4, 3), "uint8"),
                label=numpy.arange(4) % 2)  # fmt: skip
    model = "vit_tiny_patch16_224" if package == "timm" else world / "vit"
    images = ("--images", tmp_path / "images.npz", "--ways", 2, "--queries", 1, "-q")
    fault(run("recycle", "eval", "--model", model, *images), f"pip install {package}")


def test_modules_that_the_model_lacks_are_named(run, world, tmp_path):
    strange = read_adapter(world / "one")
    strange.modules = {"vit.encoder.query": LoraFactors(torch.ones(1, 4), torch.ones(1, 4), 1.0)}
    strange.metadata["config"]["target_modules"] = ["query"]
    strange.metadata["keys"] = {}
    write_adapter(strange, tmp_path / "strange")
    start = ("recycle", "invert", "--model", world / "vit", "-o", tmp_path / "pool", "-q")
    fault(run(*start, tmp_path / "strange"), "vit.encoder.query")


def test_a_teacher_is_the_same_alone_and_among_others(world):
    vision, handle = attached(str(world / "vit"), load_adapters([world / "one", world / "two"]))
    x = torch.randn(2, 3, SIDE, SIDE)
    other = load_vision(str(world / "vit"), handle.bank.modules)
    twin = attach(other.model, load_adapters(world / "one"), saved_modules="ignore")
    with torch.no_grad(), handle.mix("one"), twin.mix("one"):
        assert torch.equal(vision.features(x), other.features(x))
