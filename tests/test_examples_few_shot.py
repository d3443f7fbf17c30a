"""examples/composition_few_shot.py on a tiny random model and made-up tasks: runs, resumes."""

from xml.etree import ElementTree

import pytest
from support import text_tasks

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("rich")
pytest.importorskip("cma")

TASKS = ("trec6", "cr", "clickbait", "stackoverflow", "mr")
SHOTS = "2,full"
SMALL = {
    "epochs": 1,
    "least-steps": 2,
    "most-steps": 3,
    "batch": 8,
    "pool-rows": 16,
    "pool-epochs": 1,
    "test-rows": 16,
    "train-rows": 40,
    "hub-candidates": 8,
    "hub-rows": 4,
}


@pytest.fixture(scope="module")
def example():
    with text_tasks.example("composition_few_shot") as module:
        yield module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return text_tasks.text_tasks(tmp_path_factory.mktemp("few_shot"), TASKS)


@pytest.fixture
def run(example, folder):
    """run("a.csv", "--seeds", 1) -> the rows of the CSV, without times."""

    def call(name, *options):
        always = ("--shots", SHOTS, "--seeds", 1)
        return text_tasks.run(example, folder, SMALL, name, *always, *options)

    return call


def test_it_resumes_as_if_it_had_never_stopped(run, example, folder, capsys):
    whole = run("whole.csv", "--plot", folder / "plot.svg")
    told = capsys.readouterr().out
    cells = [row for row in whole if row["phase"] == "cell"]
    assert [r["method"] for r in cells] == list(example.METHODS) * 2 * 2  # shots, unseen tasks
    assert "| learned beats null-learned" in told and "| learned is comparable to lora" in told
    root = ElementTree.parse(folder / "plot.svg").getroot()
    assert len(root.findall("{*}circle")) == 3 * 2 * len(example.METHODS)  # the mean, two tasks
    lines = (folder / "whole.csv").read_text().splitlines(keepends=True)
    count = len(lines) - 21  # among the cells of the first shots
    (folder / "part.csv").write_text("".join(lines[:count]) + lines[count][:30])  # killed in a row
    assert run("part.csv", "--minutes", 0) == whole[: count - 1]  # the torn row is gone
    assert run("part.csv") == whole
    size = (folder / "part.csv").stat().st_size
    run("part.csv")
    assert (folder / "part.csv").stat().st_size == size  # nothing is done twice


def test_what_trains_is_what_the_formulas_say(run):
    cells = {r["method"]: r for r in run("whole.csv") if r["phase"] == "cell"}
    found = {method: int(row["parameters"]) for method, row in cells.items()}
    modules, adapters, rank = 2 * 6, len(TASKS) - 1, 8
    assert found["learned"] == found["null-learned"] == adapters * modules
    assert found["learned-free"] == found["learned"]
    assert found["lorahub"] == adapters
    assert found["lora"] == rank * 2 * (4 * (16 + 16) + (16 + 32) + (32 + 16))
    assert found["head"] == found["uniform"] == found["null-uniform"] == 0 < found["full"]
    assert {row["head_parameters"] for row in cells.values()} == {str(2 * 16 + 2)}


@pytest.fixture
def experiment(example, folder):
    settings = example.Settings(train_rows=40)
    return example.FewShot(settings, str(folder / "model"), folder / "cache", folder)


def test_shots_are_nested_and_even(experiment):
    few, more = (experiment.few("cr", 0, n) for n in (2, 8))
    assert set(few) < set(more) < set(experiment.few("cr", 0, None))
    assert [label for _, label in sorted(few, key=lambda row: row[1])] == [0, 0, 1, 1]
    assert experiment.few("cr", 1, 2) != few
    assert len(experiment.few("cr", 0, None)) == 40


def test_a_task_is_not_composed_of_its_own_adapter(experiment):
    assert experiment.load_pool(lambda _: None, lambda: True)
    assert set(experiment.without("cr").names) == set(TASKS) - {"cr"}


def test_verdicts(example):
    from composition_few_shot_tables import better, comparable, difference, found

    assert better([0.03, 0.02]) == "yes" and better([-0.03, 0.02]) == "no, the opposite"
    assert better([0.01, 0.02]) == "not shown" and better([0.01, None]) == "too little data"
    assert comparable([0.005, 0.01]) == "yes" and comparable([-0.05, 0.02]) == "no, worse"
    assert comparable([0.0, 0.05]) == "not shown" and comparable([0.05, 0.02]) == "better"
    rows = [
        {"phase": "cell", "task": t, "seed": s, "shots": "4", "method": m, "accuracy": a}
        | {"cpu_seconds": "1"}
        for m, values in {"uniform": (0.5, 0.7, 0.9), "full": (0.4, 0.6, 0.4)}.items()
        for (t, s), a in zip((("a", "0"), ("a", "1"), ("b", "0")), values, strict=True)
    ]
    data = found(rows)
    span, count = difference(data, "4", "uniform", "full")
    assert count == 2 and span[0] == pytest.approx((0.1 + 0.5) / 2)  # not (0.1 + 0.1 + 0.5) / 3
    data = found(rows[:-1])  # full lacks a cell: the others' is left out too
    assert set(data.accuracy["4"]["uniform"]) == {("a", 0), ("a", 1)}


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [("--tasks", "clickbait", "clickbait"), ("--methods", "magic", "magic"), ("--shots", "0", "0")],
)
def test_wrong_options_are_said(example, folder, capsys, option, value, told):
    argv = ["--csv", str(folder / "none.csv"), "--data", str(folder), option, value]
    assert example.main([*argv, "--model", str(folder / "model")]) == 2
    assert told in capsys.readouterr().err
    assert not (folder / "none.csv").exists()
