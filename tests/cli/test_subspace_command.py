"""lora-fused subspace: every verb on small PEFT folders, and its one-line errors."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_fused import load_subspace, read_adapter
from lora_fused.cli.subspace_bench import stored

FIT = ("--rank", 4, "--method", "hosvd", "-q")


@pytest.fixture
def folders(make_adapter):
    return [
        make_adapter(f"in/{name}", seed) for seed, name in enumerate(("mr", "cr", "sst", "wnli"))
    ]


@pytest.fixture
def fitted(run, folders, tmp_path):
    done = run("subspace", "fit", *folders, "-o", tmp_path / "S", *FIT)
    assert done.exit_code == 0, done.output
    return tmp_path / "S"


def said(done) -> dict:
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def fault(done, *words: str) -> None:
    assert done.exit_code == 1 and done.stdout == "", done.output
    line = [line for line in done.stderr.splitlines() if line.startswith("lora-fused:")]
    assert len(line) == 1 and all(word in line[0] for word in words), done.stderr


def test_fit_writes_what_info_shows(run, folders, tmp_path):
    options = ("-o", tmp_path / "S", "--rank", 4, "--augment", 1, "--seed", 3, "--drop-mean")
    done = run("subspace", "fit", *folders, *options)
    assert done.exit_code == 0 and "fitting 2 modules" in done.stderr
    assert "random directions: 1" in done.stdout and "says little" in done.stdout
    subspace = load_subspace(tmp_path / "S")
    assert subspace.options.seed == 3 and not subspace.options.keep_mean
    facts = said(run("subspace", "info", tmp_path / "S", "--json"))
    assert facts["adapters"] == 4 and facts["modules"] == 2 and facts["method"] == "eigenlorax"
    assert facts["directions"] == [5, 5] and not facts["mean_kept"]
    assert facts["ranks"] == {"mr": "2", "cr": "2", "sst": "2", "wnli": "2"}
    assert facts["parameters_uncompressed"] == 4 * 2 * (8 + 12 + 12 + 6)
    assert facts["parameters"] == 5 * (8 + 12 + 12 + 6) + 4 * 2 * 2 * (5 + 5)
    assert facts["base"] == ["tiny/base"] and facts["weighting"] == "updates" and facts["seed"] == 3
    assert facts["sources"]["cr"].endswith("in/cr") and not facts["fingerprint"]
    told = run("subspace", "info", tmp_path / "S").stdout
    assert "rank of its core" in told and "base: tiny/base" in told and "in/cr" in told


def test_fit_tells_the_errors(run, folders, tmp_path):
    found = {}
    for rank in (2, 6):
        path = tmp_path / f"S{rank}"
        done = run("subspace", "fit", *folders, "-o", path, "--rank", rank, "--json", "-q")
        found[rank] = said(done)
    assert found[6]["error"] < found[2]["error"] and set(found[2]["errors"]) == {
        "mr", "cr", "sst", "wnli"
    }  # fmt: skip
    by_energy = ("--energy", 0.9, "--method", "hosvd", "--json", "-q")
    done = said(run("subspace", "fit", *folders, "-o", tmp_path / "E", *by_energy))
    assert done["error"] ** 2 <= 0.1 + 1e-6


def test_reconstruct_writes_peft_folders(run, fitted, tmp_path):
    done = run("subspace", "reconstruct", fitted, "mr", "cr", "-o", tmp_path / "out", "-q")
    assert done.exit_code == 0 and len(done.stdout.splitlines()) == 2
    subspace = load_subspace(fitted)
    for name in ("mr", "cr"):
        back, truth = read_adapter(tmp_path / "out" / name), subspace.reconstruct(name)
        assert back.metadata["config"]["lora_alpha"] == 4
        for module, part in truth.modules.items():
            assert torch.equal(back.modules[module].lora_a, part.lora_a)
    everything = run(
        "subspace", "reconstruct", fitted, "-o", tmp_path / "all", "--rank", 1, "--json"
    )
    assert len(said(everything)["written"]) == 4
    assert len(read_adapter(tmp_path / "all" / "mr").modules["layer.0.query"].lora_a) == 1


def test_project_and_add(run, fitted, folders, make_adapter, tmp_path):
    other = make_adapter("qnli", 9)
    known = said(run("subspace", "project", fitted, folders[0], "--json"))["errors"]["mr"]
    found = said(run("subspace", "project", fitted, other, "-o", tmp_path / "P", "--json"))
    assert 0 < known < found["errors"]["qnli"] < 1
    before, projected = load_subspace(fitted), load_subspace(tmp_path / "P")
    assert projected.names == [*before.names, "qnli"] and "qnli" not in before
    assert projected.bases["layer.0.query"].basis_a.equal(before.bases["layer.0.query"].basis_a)
    added = said(run("subspace", "add", fitted, other, "-o", tmp_path / "A", "--json"))
    assert added["errors"]["qnli"] < found["errors"]["qnli"] and "qnli" not in load_subspace(fitted)
    assert run("subspace", "add", fitted, other, "-q").exit_code == 0
    assert load_subspace(fitted).names == load_subspace(tmp_path / "A").names


def test_report_says_that_random_adapters_share_nothing(run, fitted, folders, tmp_path):
    page = tmp_path / "report.html"
    args = ("--html", page, "--null-draws", 2, "--seed", 2)
    done = run("subspace", "report", fitted, *folders, *args)
    assert done.exit_code == 0 and "Subspace not shared: " in done.stdout
    assert "adapters left out in turn" in done.stderr and str(page) in done.stdout
    assert page.read_text().startswith("<!doctype html>")
    found = said(run("subspace", "report", fitted, *folders, "--null-draws", 2, "--json", "-q"))
    assert found["verdict"]["label"] == "not shared" and len(found["null_held_out"]) == 2
    few = ("--null-draws", 1, "--sample", 2, "--json", "-q")
    found = said(run("subspace", "report", fitted, *folders, *few))
    assert len(found["left_out"]) == 2 and len(found["adapters"]) == 4


@pytest.mark.parametrize("method", ["hosvd", "jd_diag"])
def test_bench_counts_bytes(run, folders, tmp_path, method):
    options = ("--rank", 2, "--method", method, "-q", "-o", tmp_path / "S")
    assert run("subspace", "fit", *folders, *options).exit_code == 0
    small = ("--rows", 4, "--per-row", 9, "--repeat", 2)
    found = said(run("subspace", "bench", tmp_path / "S", *small, "--json"))
    per_core = 2 if method == "jd_diag" else 2 * (2 + 2)
    assert found["per_row"] == found["adapters"] == 4 and found["module"] == "layer.0.query"
    assert found["read_bytes"]["adapters"] == 4 * 4 * 2 * (8 + 12)
    assert found["read_bytes"]["subspace"] == 4 * (2 * (8 + 12) + 4 * per_core)
    numbers = stored(load_subspace(tmp_path / "S"))
    assert found["stored_bytes"]["subspace"] == 4 * numbers["subspace"]
    assert numbers == {"adapters": 304, "subspace": 2 * 38 + 2 * 4 * per_core}
    assert found["milliseconds"]["ratio"] > 0
    table = run("subspace", "bench", tmp_path / "S", *small)
    assert table.exit_code == 0 and "bytes read by the batch" in table.stdout


def content(folder) -> dict:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def rebased(folder, base="other/large"):
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = base
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("verb", ["add", "project", "report"])
def test_adapters_of_another_base_are_refused(run, fitted, make_adapter, verb):
    before, other = content(fitted), rebased(make_adapter("qnli", 9))
    words = ("base of adapter 'qnli' must be 'tiny/base'", "--any-base", "got 'other/large'")
    fault(run("subspace", verb, fitted, other, "-q"), *words)
    assert content(fitted) == before
    if verb != "report":
        assert run("subspace", verb, fitted, other, "-q", "--any-base").exit_code == 0


@pytest.mark.parametrize("verb", ["fit", "add", "project", "report"])
def test_a_bad_adapter_changes_no_file(run, fitted, folders, make_adapter, tmp_path, verb):
    nan, cut, more = make_adapter("nan", 9, nan=True), make_adapter("cut", 9), make_adapter("more")
    weights = cut / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    tensors = load_file(more / "adapter_model.safetensors")
    named = {key.replace("layer.0", "layer.1"): tensor for key, tensor in tensors.items()}
    save_file(named, more / "adapter_model.safetensors", {"format": "pt"})
    before = content(tmp_path)
    page = ("--html", tmp_path / "r.html") if verb == "report" else ("-o", tmp_path / "new")
    start = ("subspace", verb, *(() if verb == "fit" else (fitted,)), *page, "-q")
    options = FIT[:2] if verb == "fit" else ()
    for folder, words in ((nan, "NaN or infinity"), (cut, "whole safetensors file")):
        fault(run(*start, folders[0], folder, *options), words, folder.name)
    if verb in ("add", "project"):
        fault(run(*start, more), "'more' at 'layer.1.", "a module it lacks")
    assert content(tmp_path) == before


def test_a_damaged_subspace_is_refused_by_every_verb(run, fitted, folders, tmp_path):
    (file,) = fitted.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for verb, *rest in (
        ("info",), ("bench",), ("project", folders[0]), ("add", folders[0]),
        ("report", *folders), ("reconstruct", "-o", tmp_path / "out"),
    ):  # fmt: skip
        fault(run("subspace", verb, fitted, *rest), "load_subspace", "must match its checksum")
    assert file.read_bytes() == data and not (tmp_path / "out").exists()


def test_what_cannot_be_written_is_said_before_anything_is_read(run, fitted, tmp_path):
    none = tmp_path / "none"  # would be the next fault
    fault(run("subspace", "fit", none, "-o", fitted, *FIT), "exists (--overwrite replaces it)")
    for verb in ("add", "project"):
        fault(run("subspace", verb, fitted, none, "-o", tmp_path, "-q"), "not the folder of a sub")
    fault(run("subspace", "report", fitted, none, "--html", tmp_path), "is a folder, not a page")
    (tmp_path / "file").write_text("x")
    inside = tmp_path / "file" / "S"
    fault(run("subspace", "reconstruct", fitted, "-o", inside, "-q"))


def test_errors_are_one_line(run, fitted, folders, tmp_path):
    new = ("-o", tmp_path / "new", "-q")
    for options, got in (((), "neither"), (("--rank", 2, "--energy", 0.5), "both")):
        done = run("subspace", "fit", tmp_path / "none", *options, *new)  # nothing is read
        fault(done, f"--rank or --energy must be given, one of the two, got {got}")
    for option, words in (
        (("--rank", 0), "rank must be an integer of at least 1, got 0"),
        (("--rank", 99), "rank must be at most"),
        (("--energy", 2), "energy must be a number in (0, 1]"),
        (("--rank", 2, "--method", "pca"), "method must be one of"),
        (("--rank", 2, "--augment", 99), "augment must leave room"),
    ):
        fault(run("subspace", "fit", *folders, *option, *new), words)
    fault(run("subspace", "reconstruct", fitted, "mr", "--rank", 0, *new), "rank must be an integ")
    fault(run("subspace", "report", fitted, *folders, "--sample", 1, "-q"), "sample must be")
    fault(run("subspace", "fit", tmp_path / "none", "--rank", 2, *new), "no such file or folder")
    fault(run("subspace", "fit", *folders, "-o", fitted, *FIT), str(fitted))
    assert run("subspace", "fit", *folders, "-o", fitted, "--overwrite", *FIT).exit_code == 0
    fault(run("subspace", "info", tmp_path / "none"), "no such folder")
    fault(run("subspace", "add", fitted, folders[0], "-q"), "'mr'")
    fault(run("subspace", "reconstruct", fitted, "mrr", *new), "close: 'mr'")
    page = ("--html", tmp_path / "absent" / "r.html", "-q")
    fault(run("subspace", "report", fitted, *folders, *page), "no such folder", "absent")
    fault(
        run("subspace", "report", fitted, folders[0], "-q"), "at least two adapters", "got 1 of 4"
    )
    usage = run("subspace", "fit", *folders)
    assert usage.exit_code == 2 and "--output" in usage.stderr
    assert not (tmp_path / "new").exists() and not [p for p in tmp_path.iterdir() if "." in p.name]
    assert "Commands" in run("subspace").output
