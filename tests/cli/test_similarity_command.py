"""lora-fused similarity: tables, JSON, the page, and its one-line errors."""

import json
import math

import pytest

from lora_fused import load_adapters
from lora_fused.methods.similarity import compare_adapters


@pytest.fixture
def folders(make_adapter):
    names = ("mr", "cr", "sst", "qnli")
    return [make_adapter(f"in/{name}", seed, rank=1 + seed % 2) for seed, name in enumerate(names)]


def test_json_holds_every_measure(run, folders):
    done = run("similarity", *folders, "--json", "-q")
    assert done.exit_code == 0 and done.stderr == "", done.output
    found, truth = json.loads(done.stdout), compare_adapters(load_adapters(folders))
    assert [one["name"] for one in found["adapters"]] == ["mr", "cr", "sst", "qnli"]
    for key in ("cosine", "inputs", "outputs"):
        assert found[key] == getattr(truth, key).tolist()
    assert found["chance"]["inputs"] == truth.chance_inputs and "angles_in_degrees" not in found


def test_a_pair_is_told_by_its_angles(run, folders, make_adapter):
    twin = make_adapter("in/twin", 0)
    done = run("similarity", folders[0], twin, "--json", "-q")
    angles = json.loads(done.stdout)["angles_in_degrees"]
    assert set(angles) == {"layer.0.query", "layer.0.dense"}
    assert all(0 <= a <= 90 for sides in angles.values() for a in sides["inputs"])
    text = run("similarity", folders[0], twin).stdout
    assert "Principal angles in degrees" in text and "layer.0.query" in text


def test_the_table_names_the_nearest_first(run, folders, make_adapter):
    copy = make_adapter("in/copy", 0, rank=1, alpha=9)
    done = run("similarity", *folders, copy, "--top", 3)
    assert done.exit_code == 0 and "3 of 10 pairs" in done.stdout
    first = next(line for line in done.stdout.splitlines() if "1.000" in line)
    assert "mr" in first and "copy" in first and "random ones have" in done.stdout


def test_the_page(run, folders, tmp_path):
    page = tmp_path / "page.html"
    done = run("similarity", *folders, "--html", page, "-q")
    assert done.exit_code == 0 and f"heat maps: {page}" in done.stdout
    assert page.read_text().count("<svg") == 3


def test_adapters_that_change_nothing_are_dashes(run, make_adapter):
    pair = [make_adapter("a", 0, inert=True), make_adapter("b", 1)]
    done = run("similarity", *pair)
    assert done.exit_code == 0 and " - " in done.stdout and "nan" not in done.stdout
    found = json.loads(run("similarity", *pair, "--json", "-q").stdout)
    assert found["inputs"][0] == [None, None] and found["chance"]["inputs"] is None
    assert not any(math.isnan(value) for row in found["cosine"] for value in row)


@pytest.mark.parametrize("names, options, text", [
    (["mr"], [], "similarity: bank must hold at least two adapters, got 1"),
    (["mr", "none"], [], "no such file or folder"),
    (["mr", "cr"], ["--html", "no/such/page.html"], "similarity: no such folder:"),
    (["mr", "cr"], ["--html", "."], "similarity: --html names a folder: ."),
    (["mr", "mr"], [], "names must be distinct"),
], ids=lambda value: str(value)[:20])  # fmt: skip
def test_faults_are_one_line(run, folders, tmp_path, names, options, text):
    done = run("similarity", *(tmp_path / "in" / name for name in names), *options, "-q")
    lines = done.stderr.splitlines()
    assert done.exit_code == 1 and done.stdout == "" and len(lines) == 1, done.output
    assert lines[0].startswith("lora-fused: ") and text in lines[0]
