"""examples/rpe_gemma.py on a tiny random Llama and made-up texts: runs, resumes, and is right."""

import functools
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
from support import text_tasks
from support.models import tiny_llama

from lora_fused import Adapter, LoraFactors, load_adapters
from lora_fused.io import write_adapter
from lora_fused.nn import merge_into_base

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTU 012345."
SIZES = {"q_proj": (32, 32), "v_proj": (32, 16)}
KINDS = {"ner": "abcdef ", "expanded": "ghijkl ", "svg": "mnopqr ", "other": "stuvwx "}


@pytest.fixture(scope="module")
def example():
    with text_tasks.example("rpe_gemma") as module:
        yield module


def texts(kind: str, count: int, seed: int = 0) -> list[str]:
    draw = random.Random(f"{kind} {seed}")
    return ["".join(draw.choices(KINDS[kind], k=12)) for _ in range(count)]


def write(path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_ner(folder) -> None:
    """As the real files are: some validation texts were trained on, here the first two of each."""
    (folder / "prompt_template.txt").write_text("T. {document} R.")
    for kind, train, asked in (
        ("ner", "ner_train", "ner_val"),
        ("expanded", "expanded_train_expanded", "expanded_val_expanded"),
    ):
        seen, fresh = texts(kind, 20), texts(kind, 5, seed=1)
        for name, documents in ((train, seen), (asked, seen[:2] + fresh)):
            rows = [{"document": d, "output": d[:5]} for d in documents]
            write(folder / f"data_{name}.jsonl", rows)
    documents = texts("other", 5)
    rows = [{"document": d, "hashtags": d[:4]} for d in documents]
    write(folder / "data_hashtag_generation_val.jsonl", rows)
    rows = [{"question": d, "sql": d[:6]} for d in documents]
    write(folder / "data_text2sql_val.jsonl", rows)


def write_svg(folder) -> None:
    for name, seed in (("train", 0), ("valid", 1)):
        rows = [
            {"messages": [{"content": c} for c in ("S", text, text[:8])]}
            for text in texts("svg", 14, seed)
        ]
        write(folder / f"{name}.jsonl", rows)


def new_adapter(name: str, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for layer in range(2):
        for leaf, (fan_in, fan_out) in SIZES.items():
            a, b = (0.3 * torch.randn(4, n, generator=generator) for n in (fan_in, fan_out))
            parts[f"model.layers.{layer}.self_attn.{leaf}"] = LoraFactors(a, b, 2.0)
    return Adapter(name, parts)


def new_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: i for i, word in enumerate(["<pad>", "<bos>", "<unk>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


@pytest.fixture(scope="module")
def folder(example, tmp_path_factory):
    """Data, adapters and a base model where the example looks for them."""
    folder = tmp_path_factory.mktemp("rpe_gemma")
    (folder / "gemma_ner").mkdir()
    write_ner(folder / "gemma_ner")
    write_svg(folder / "svg")
    for i, (name, (at, _)) in enumerate(example.ADAPTERS.items()):
        write_adapter(new_adapter(name, i), folder / "adapters" / at)
    tiny_llama().save_pretrained(folder / "model")
    new_tokenizer().save_pretrained(folder / "model")
    return folder


@pytest.fixture
def run(example, folder, capsys, monkeypatch):
    """run("a.csv") -> the rows of the CSV without times, and the tables."""
    small = functools.partial(example.Settings, texts=3, svg_texts=3, svg_letters=6)
    monkeypatch.setattr(example, "Settings", small)

    def call(name, *options):
        where = ("--csv", folder / name, "--svg", folder / "svg", "--data", folder)
        always = (*where, "--cache", folder, "-q")
        assert example.main([str(o) for o in (*always, *options)]) == 0
        return text_tasks.rows_of(folder / name), capsys.readouterr().out

    return call


@pytest.fixture
def study(example, folder):
    settings = example.Settings(texts=3, svg_texts=3, svg_letters=6)
    sets, prompts = example.read_ner(folder / "gemma_ner", settings)
    sets["svg"], prompts["svg"] = example.read_svg(folder / "svg", settings)
    model, tokenizer = example.load_base(example.base_folder(folder))
    paths = {name: folder / "adapters" / at for name, (at, _) in example.ADAPTERS.items()}
    trained_on = {name: data for name, (_, data) in example.ADAPTERS.items()}
    bank = load_adapters(paths, any_base=True)
    return example.Study(model, tokenizer, bank, trained_on, prompts, sets)


def test_it_resumes_as_if_it_had_never_stopped(run, folder, example):
    whole, told = run("whole.csv")
    single, ensembles = 1 + len(example.ADAPTERS), len(example.METHODS)
    assert len(whole) == 5 * single + (5 + 3) * ensembles  # two sets have no adapter to leave out
    assert all(math.isfinite(float(row["loss"])) for row in whole)
    assert all(f"### {name}" in told for name in example.OWN)
    lines = (folder / "whole.csv").read_text().splitlines(keepends=True)
    (folder / "part.csv").write_text("".join(lines[:40]) + lines[40][:30])  # killed in a row
    some, _ = run("part.csv", "--minutes", 0)
    assert len(some) == 39
    again, told_again = run("part.csv")
    assert again == whole and told_again == told
    table, told_again = run("part.csv", "--table")
    assert table == whole and told_again == told


def test_sets_hold_no_text_that_an_adapter_was_trained_on(example, folder):
    sets, prompts = example.read_ner(folder / "gemma_ner", example.Settings())
    trained = {prompt for of in prompts.values() for prompt in of}
    for name, kind in (("ner", "ner"), ("expanded", "expanded")):
        asked = [prompt for prompt, _ in sets[name]]
        assert len(asked) == 5 and not trained & set(asked)
        assert asked == [f"T. {text} R." for text in texts(kind, 5, seed=1)]
    assert prompts["ner-10"] == prompts["ner"][10:20]


def test_weights_come_from_the_prompts_of_the_pool(example, study):
    for name, own in example.OWN.items():
        weights, _ = study.weights(name, "all", "nearest")
        (nearest,) = weights
        if own:
            assert study.trained_on[nearest] in own
            assert "others" in study.pools(name)
        for pool, names in study.pools(name).items():
            for method in example.METHODS:
                weights, facts = study.weights(name, pool, method)
                assert weights.keys() <= set(names) and facts["hull"] >= 0
                assert sum(weights.values()) == pytest.approx(1, abs=1e-4)
        others = study.pools(name).get("others", [])
        assert not any(study.trained_on[a] in own for a in others)
    # Adapters of the same data have one prototype, so nothing tells them apart.
    same = study.weights("svg", "all", "l1")[0]
    svg = [same.get(a, 0.0) for a, data in study.trained_on.items() if data == "svg"]
    assert max(svg) - min(svg) < 1e-5 < max(svg)


def plain_losses(model, tokenizer, pairs) -> list[float]:
    """The same by a loop over tokens."""
    found = []
    for prompt, target in pairs:
        before, after = (tokenizer(text).input_ids for text in (prompt, target))
        logits = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        at = range(len(before), len(before + after))
        found.append(-sum(float(logits[i - 1, (before + after)[i]]) for i in at) / len(after))
    return found


@torch.no_grad()
def test_losses_are_those_of_merged_models(example, study, folder):
    model, tokenizer = example.load_base(folder / "model")
    bank = study.handle.bank
    base = plain_losses(model, tokenizer, study.sets["ner"])
    assert [loss for loss, _ in study.losses("ner", {})] == pytest.approx(base, abs=1e-5)
    assert [count for _, count in study.losses("ner", {})] == [5, 5, 5]
    weights, _ = study.weights("ner", "all", "linear")
    assert len(weights) > 3
    with merge_into_base(model, bank, weights):
        merged = plain_losses(model, tokenizer, study.sets["ner"])
    mixed = [loss for loss, _ in study.losses("ner", weights)]
    assert mixed == pytest.approx(merged, abs=1e-4)
    assert mixed != pytest.approx(base, abs=1e-2)  # and not the base's
    row = study.cell("ner", "all", "linear")
    change = sum(mixed) / 3 - sum(base) / 3
    assert float(row["change"]) == pytest.approx(change, abs=2e-4)


def test_features_are_the_frozen_base_whatever_is_in_force(example, study):
    prompts = [prompt for prompt, _ in study.sets["svg"]]
    before = example.features(study.model, study.tokenizer, prompts)
    with study.handle.mix({"svg-seed42": 1.0}):
        within = example.features(study.model, study.tokenizer, prompts)
        hidden = study.model.get_decoder()(
            study.tokenizer(prompts[0], return_tensors="pt").input_ids
        )
    assert torch.equal(before, within)
    mean = hidden.last_hidden_state[0].mean(0)
    assert not torch.allclose(mean, before[0], atol=1e-3)
    assert F.cosine_similarity(mean, before[0], dim=0) < 1
