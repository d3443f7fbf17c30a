"""examples/eigenlorax_glue_like.py on a tiny random model and made-up tasks: runs, resumes."""

import json

import pytest
import torch
from support import text_tasks

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("rich")

TASKS = ("trec6", "cr", "clickbait", "stackoverflow", "mr")
METHODS = "probe,lora,full,eigenlorax-4,augmented-2+2,hosvd-4,null-4"
SMALL = {"steps": 4, "batch": 8, "checks": 2, "pool-rows": 16, "pool-epochs": 1, "test-rows": 16}


@pytest.fixture(scope="module")
def example():
    with text_tasks.example("eigenlorax_glue_like") as module:
        yield module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return text_tasks.text_tasks(tmp_path_factory.mktemp("eigenlorax"), TASKS)


@pytest.fixture
def run(example, folder, capsys):
    """run("a.csv", "--seeds", 1) -> the rows of the CSV without times, and the summary."""

    def call(name, *options):
        always = ("--methods", METHODS, "--json")
        rows = text_tasks.run(example, folder, SMALL, name, *always, *options)
        return rows, json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def small_reconstruction(monkeypatch, example):
    import eigenlorax_reconstruction as part

    monkeypatch.setattr(part, "WAYS", ("eigenlorax-4", "hosvd-4"))
    monkeypatch.setattr(part, "LEFT_OUT", ("hosvd-4", "null-4"))
    monkeypatch.setattr(example, "SIZES", (4,))


def test_it_resumes_as_if_it_had_never_stopped(run, folder, small_reconstruction):
    whole, told = run("whole.csv", "--seeds", 1)
    phases = [row["phase"] for row in whole]
    assert phases.count("cell") == 2 * 7  # two tasks to hold out
    assert phases.count("report") == 2 and phases.count("reconstruct") == 5 * 6
    assert [m["method"] for m in told["methods"]] == METHODS.split(",")
    lines = (folder / "whole.csv").read_text().splitlines(keepends=True)
    (folder / "part.csv").write_text("".join(lines[:20]) + lines[20][:30])  # killed in a row
    stopped, _ = run("part.csv", "--seeds", 1, "--minutes", 0)
    assert stopped == whole[:19]  # nothing begins, and the torn row is gone
    resumed, again = run("part.csv", "--seeds", 1)
    assert resumed == whole
    for both in (told, again):
        for method in both["methods"]:
            del method["cpu_seconds"]
    assert again == told
    size = (folder / "part.csv").stat().st_size
    run("part.csv", "--seeds", 1)
    assert (folder / "part.csv").stat().st_size == size  # nothing is done twice


def test_parameters_are_the_formulas(run):
    rows, _ = run("whole.csv", "--seeds", 1, "--no-reconstruction")
    layers = 2 * (4 * (16 + 16) + (16 + 32) + (32 + 16))  # sum of I + O
    found = {r["method"]: int(r["parameters"]) for r in rows if r["phase"] == "cell"}
    modules, rank = 2 * 6, 8
    assert found["lora"] == rank * layers
    for method in ("eigenlorax-4", "augmented-2+2", "hosvd-4", "null-4"):
        assert found[method] == 2 * 4 * rank * modules
        ratio = {r["lora_ratio"] for r in rows if r["method"] == method and r["phase"] == "cell"}
        assert {float(r) for r in ratio} == {round(layers / (2 * 4 * modules), 3)}
    assert found["probe"] == 0 and found["full"] > found["lora"]


def test_another_setting_is_another_recipe(run):
    before, told = run("whole.csv", "--seeds", 1, "--no-reconstruction")
    rows, other = run(
        "whole.csv", "--seeds", 1, "--no-reconstruction", "--steps", 2, "--minutes", 0
    )
    assert rows == before and other["recipe"] != told["recipe"] and other["methods"] == []


def test_an_interval_is_students(example):
    from eigenlorax_tables import interval

    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert mean == 3.5 and half == pytest.approx(2.5706 * 1.8708 / 6**0.5, rel=2e-3)
    assert interval([1.0]) == [1.0, None] and interval([]) is None


def test_a_task_of_the_development_is_not_held_out(example, folder, capsys):
    argv = ["--csv", str(folder / "none.csv"), "--data", str(folder), "--tasks", "clickbait"]
    assert example.main([*argv, "--model", str(folder / "model")]) == 2
    assert "clickbait" in capsys.readouterr().err


def test_label_names_are_the_frozen_models(example, folder, monkeypatch):
    """An adapter moves label names too; it learned to meet them where they were."""
    import eigenlorax_reconstruction as part
    from eigenlorax_training import Experiment, Settings

    settings = Settings(pool_rows=16, pool_epochs=1, test_rows=16)
    experiment = Experiment(settings, str(folder / "model"), folder / "cache", folder)
    assert experiment.load_pool(lambda text: None, lambda: True)
    frozen, used = part._labels(experiment, "cr"), []
    keep = lambda experiment, task, labels: used.append(labels) or 0.0  # noqa: E731
    monkeypatch.setattr(part, "_by_label_names", keep)
    for way in ("base", "own", "hosvd-4", "left out of hosvd-4"):
        part.reconstructed(experiment, "cr", way)
    assert len(used) == 4 and all(torch.equal(labels, frozen) for labels in used)
    part.attach(experiment.model, experiment.bank).mix("cr").__enter__()
    assert not torch.equal(part._labels(experiment, "cr"), frozen)  # so the test can fail
