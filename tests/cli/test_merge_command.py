"""lora-fused merge: what it writes, recipes, and its one-line errors."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lora_fused import load_adapters, read_adapter
from lora_fused.methods import merge


@pytest.fixture
def folders(make_adapter):
    return [make_adapter(f"in/{name}", seed) for seed, name in enumerate(("mr", "cr", "sst"))]


def said(done) -> dict:
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def fault(done, *words: str, code: int = 1) -> None:
    assert done.exit_code == code and done.stdout == "", done.output
    line = [line for line in done.stderr.splitlines() if line.startswith("lora-fused:")]
    assert len(line) == 1 and all(word in line[0] for word in words), done.stderr


def same(folder, adapter) -> bool:
    written = read_adapter(folder)
    return all(
        written.modules[module].lora_a.equal(part.lora_a)
        and written.modules[module].lora_b.equal(part.lora_b)
        for module, part in adapter.modules.items()
    )


@pytest.mark.parametrize("options", [
    ("--type", "svd", "--rank", 3),
    ("--type", "dare_ties_svd", "--density", 0.5, "--rank", 3, "--seed", 4,
     "--majority-sign-method", "frequency"),
    ("-t", "magnitude_prune_core", "--density", 0.7, "--energy", 0.9, "--dtype", "bfloat16"),
], ids=lambda o: o[1])  # fmt: skip
def test_writes_what_merge_gives(run, folders, tmp_path, options):
    out = tmp_path / "out"
    done = run("merge", *folders, "--weights", ".5,.3,-.2", "-o", out, *options)
    assert done.exit_code == 0 and f"written: {out}" in done.stdout, done.output
    assert "error to the exact sum" in done.stdout and "merging 2 modules" in done.stderr
    given = dict(zip(options[2::2], options[3::2], strict=True))
    given = {key[2:].replace("-", "_"): value for key, value in given.items()}
    if "dtype" in given:
        given["dtype"] = getattr(torch, given["dtype"])
    weights = {"mr": 0.5, "cr": 0.3, "sst": -0.2}
    merged = merge(load_adapters(folders), weights, combination_type=options[1], **given)
    assert same(out, merged.adapter)
    record = yaml.safe_load((out / "recipe.yaml").read_text())
    assert [entry["weight"] for entry in record["adapters"]] == [0.5, 0.3, -0.2]
    assert record["adapters"][0]["path"] == "../in/mr"
    assert record["result"]["error_to_exact"] == merged.report.error_to_exact
    again = run("merge", "--recipe", out / "recipe.yaml", "-o", tmp_path / "again", "-q")
    assert again.exit_code == 0 and again.stderr == ""
    assert same(tmp_path / "again", merged.adapter)
    repeated = yaml.safe_load((tmp_path / "again" / "recipe.yaml").read_text())
    assert repeated == record


def test_peft_loads_what_is_written(run, folders, tmp_path):
    peft = pytest.importorskip("peft")

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.dense = torch.nn.Linear(8, 12), torch.nn.Linear(12, 6)

    model = torch.nn.Module()
    model.layer = torch.nn.ModuleList([Layer()])
    out = tmp_path / "out"
    done = run("merge", *folders, "--type", "ties_svd", "--density", 0.5, "-o", out, "-q")
    assert done.exit_code == 0, done.output
    loaded = peft.PeftModel.from_pretrained(model, out)
    for module, part in read_adapter(out).modules.items():
        layer = loaded.base_model.model.get_submodule(module)
        update = part.scale * part.lora_b.T @ part.lora_a
        torch.testing.assert_close(layer.get_delta_weight("default"), update)


def test_weights_default_to_the_average_and_cat_is_exact(run, folders, tmp_path):
    found = said(run("merge", *folders, "-o", tmp_path / "out", "--json", "-q"))
    assert found["combination_type"] == "cat" and found["error_to_exact"] < 1e-6
    assert [one["weight"] for one in found["adapters"]] == [1 / 3] * 3
    assert found["rank"] == [6, 6] and set(found["modules"]) == {"layer.0.query", "layer.0.dense"}
    assert found["modules"]["layer.0.query"]["rank"] == 6 and found["options"] == {}


def test_a_dry_run_writes_nothing(run, folders, tmp_path):
    out = tmp_path / "out"
    done = run("merge", *folders, "-o", out, "--dry-run", "--type", "linear")
    assert done.exit_code == 0 and "nothing written (dry run)" in done.stdout
    assert not out.exists()
    found = said(run("merge", *folders, "--dry-run", "--json", "-q"))
    assert found["path"] is None and found["error_to_exact"] < 1e-6


def test_nothing_is_replaced_unasked(run, folders, tmp_path):
    out = tmp_path / "out"
    assert run("merge", *folders, "-o", out, "-q").exit_code == 0
    before = (out / "adapter_model.safetensors").read_bytes()
    fault(run("merge", *folders, "-o", out, "-q", "--type", "svd"), "exists (--overwrite replaces")
    assert (out / "adapter_model.safetensors").read_bytes() == before
    done = run("merge", *folders, "-o", out, "-q", "--type", "svd", "--overwrite")
    assert done.exit_code == 0
    assert yaml.safe_load((out / "recipe.yaml").read_text())["combination_type"] == "svd"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    refused = run("merge", *folders, "-o", tmp_path / "other", "--overwrite", "-q")
    fault(refused, "exists and is not an adapter folder")


def test_an_output_that_is_merged_itself_is_refused(run, folders, tmp_path):
    """Else the same line, run twice over a folder that holds its result, would merge that too."""
    out = tmp_path / "in" / "out"
    assert run("merge", tmp_path / "in", "-o", out, "-q").exit_code == 0
    before = (out / "adapter_model.safetensors").read_bytes()
    for paths in ([tmp_path / "in"], [folders[0], out / "adapter_model.safetensors"]):
        done = run("merge", *paths, "-o", out, "--overwrite", "-q")
        fault(done, "--output must be none of the adapters merged")
    assert (out / "adapter_model.safetensors").read_bytes() == before


def test_checkpoints_of_one_name_are_told_apart(run, make_adapter, tmp_path, monkeypatch):
    """By names that stay where the recipe is run from elsewhere: DARE draws by them."""
    pair = [make_adapter(f"{run_}/checkpoint-1", seed) for seed, run_ in enumerate("ab")]
    found = said(run("merge", *pair, "--dry-run", "--json", "-q"))
    assert [one["name"] for one in found["adapters"]] == ["a/checkpoint-1", "b/checkpoint-1"]
    monkeypatch.chdir(tmp_path)
    here = [path.relative_to(tmp_path) for path in pair]
    options = ("--type", "dare_linear_svd", "--density", 0.5, "-q")
    assert run("merge", *here, *options, "-o", "out").exit_code == 0
    monkeypatch.chdir(tmp_path / "a")
    assert run("merge", "--recipe", "../out/recipe.yaml", "-o", "../again", "-q").exit_code == 0
    assert same(tmp_path / "again", read_adapter(tmp_path / "out"))
    other = run("merge", *pair, *options, "--seed", 1, "-o", tmp_path / "other")
    assert other.exit_code == 0 and not same(tmp_path / "other", read_adapter(tmp_path / "out"))


RECIPES = {
    "- a": "must map 'combination_type' and 'adapters' to values, got list",
    "a: [": "must be YAML",
    "type: svd": "must be of (",
    "combination_typ: svd": "(close: 'combination_type'), got 'combination_typ'",
    "combination_type: svd": "must be a list of one entry per adapter",
    "adapters: [in/mr]": "must hold path and weight, and nothing else, got 'in/mr'",
    "adapters: [{path: in/mr, weight: 1, wight: 2}]": "must hold path and weight",
    "adapters: [{path: 3, weight: 1}]": "must be text, got 3",
    "adapters: [{path: in/mr, weight: a}]": "weight of 'mr' must be a number, got 'a'",
    "adapters: [{path: in, weight: 1}]": "must be one adapter, got 3",
    "adapters: [{path: in/mr, weight: .nan}]": "weight of 'mr' must be finite",
    "adapters: [{path: in/none, weight: 1}]": "no such file or folder",
    "{adapters: [{path: in/mr, weight: 1}], dtype: int8}": "dtype must be one of",
    "{adapters: [{path: in/mr, weight: 1}], rank: two, combination_type: svd}": "rank must be an",
}


@pytest.mark.parametrize("text", RECIPES)
def test_wrong_recipes_are_one_line(run, folders, tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    done = run("merge", "--recipe", tmp_path / "r.yaml", "-o", tmp_path / "out", "-q")
    fault(done, RECIPES[text])
    assert not (tmp_path / "out").exists()


FAULTS = {
    "no paths": ([], [], "paths must name adapters (or give --recipe), got none"),
    "no output": (["mr", "cr"], [], "--output must be given (or --dry-run), got none"),
    "few weights": (
        ["mr", "cr"],
        ["--weights", "1"],
        "--weights must be 2 numbers, one per adapter (mr, cr), got 1",
    ),
    "bad weights": (["mr"], ["--weights", "1;2"], "--weights must be numbers with commas between"),
    "nan": (["mr", "cr"], ["--weights", "1,nan"], "weight of 'cr' must be finite in float32"),
    "type": (["mr"], ["--type", "tie"], "combination_type must be one of ('cat', 'svd', 'linear'"),
    "no density": (
        ["none"],  # told before anything is read
        ["--type", "ties_svd"],
        "--density must be given for --type ties_svd: the share of entries to keep, in (0, 1], got",
    ),
    "density": (["mr"], ["--type", "ties", "--density", "2"], "density must be a number in (0, 1]"),
    "rank": (["mr"], ["--rank", "4"], "rank must be given for 'svd'"),
    "dtype": (["mr"], ["--dtype", "int8"], "dtype must be one of ('float32'"),
    "missing": (["none"], [], "no such file or folder"),
    "recipe too": (["mr"], ["--recipe", "x", "--seed", "1"], "--recipe must stand without paths"),
    "no recipe": ([], ["--recipe", "x"], "no such recipe: x"),
    "mixed": (
        ["mr", "wide"],
        ["--type", "linear"],
        "combination_type must be 'cat' or 'svd' where ranks differ",
    ),
}


@pytest.mark.parametrize("names, options, text", FAULTS.values(), ids=FAULTS)
def test_faults_are_one_line(run, folders, make_adapter, tmp_path, names, options, text):
    make_adapter("in/wide", 9, rank=4)
    paths = [tmp_path / "in" / name for name in names]
    output = [] if "--output" in text else ["-o", tmp_path / "out"]
    fault(run("merge", *paths, *options, *output, "-q"), text)
    assert not (tmp_path / "out").exists()


def test_saved_modules_are_refused_in_words_of_the_command(run, folders, tmp_path):
    file, config = folders[0] / "adapter_model.safetensors", folders[0] / "adapter_config.json"
    tensors = load_file(file) | {"base_model.model.head.weight": torch.ones(2, 2)}
    save_file(tensors, file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | {"modules_to_save": ["head"]}))
    done = run("merge", *folders, "-o", tmp_path / "out", "-q")
    fault(done, "(pass --saved-modules ignore to leave them out)")
    options = ("--saved-modules", "ignore", "-o", tmp_path / "out", "-q")
    assert run("merge", *folders, *options).exit_code == 0


def test_without_pyyaml_it_says_what_to_install(run, folders, tmp_path, monkeypatch):
    from lora_fused.cli import recipe

    monkeypatch.setattr(recipe, "find_spec", lambda name: None)
    done = run("merge", *folders, "-o", tmp_path / "out", "-q")
    fault(done, "PyYAML must be installed; run: pip install pyyaml")
