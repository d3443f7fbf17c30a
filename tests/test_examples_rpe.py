"""examples/rpe_leave_one_out.py on a tiny random model and made-up tasks: runs, resumes."""

import pytest
import torch
from support import text_tasks

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("rich")

from lora_fused import Mixture
from lora_fused.cli.demo_train import embed

TASKS = ("trec6", "cr", "clickbait", "stackoverflow", "mr")
SMALL = {"pool-rows": 16, "pool-epochs": 8, "test-rows": 16, "inputs": 8, "k": 3}


@pytest.fixture(scope="module")
def example():
    with text_tasks.example("rpe_leave_one_out") as module:
        yield module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return text_tasks.text_tasks(tmp_path_factory.mktemp("rpe"), TASKS)


@pytest.fixture
def run(example, folder):
    """run("a.csv", "--seeds", 1) -> the rows of the CSV, without times."""

    def call(name, *options):
        return text_tasks.run(example, folder, SMALL, name, *options)

    return call


@pytest.fixture
def experiment(example, folder):
    settings = example.Settings(pool_rows=16, pool_epochs=8, test_rows=16, inputs=8, k=3)
    made = example.LeaveOneOut(settings, str(folder / "model"), folder / "cache", folder)
    assert made.load_pool(lambda _: None, lambda: True)
    return made


def test_it_resumes_as_if_it_had_never_stopped(run, example, folder, capsys):
    whole = run("whole.csv")
    told = capsys.readouterr().out
    ways = {how for of in example.groups(list(TASKS), 3).values() for how in of}
    assert len(whole) == len(ways) * len(TASKS)  # every task is left out
    assert "| l1 beats nearest " in told and "mean over tasks: raw features: " in told
    lines = (folder / "whole.csv").read_text().splitlines(keepends=True)
    count = len(lines) - 150  # within "k", where some ensembles are known and others not
    (folder / "part.csv").write_text("".join(lines[:count]) + lines[count][:30])  # killed in a row
    assert run("part.csv", "--minutes", 0) == whole[: count - 1]  # the torn row is gone
    assert run("part.csv") == whole
    size = (folder / "part.csv").stat().st_size
    capsys.readouterr()
    run("part.csv")
    assert capsys.readouterr().out == told
    assert (folder / "part.csv").stat().st_size == size  # nothing is done twice


def test_the_own_adapter_is_left_out_or_not(run):
    rows = [row for row in run("whole.csv") if row["ensemble"] and row["method"] != "single"]
    of = {row["pool"]: set() for row in rows}
    for row in rows:
        held = {part.split(":")[0] for part in row["ensemble"].split()}
        of[row["pool"]].add(row["task"] in held)
        assert len(held) <= int(row["k"]) and len(held) == float(row["adapters"])
    assert of == {"others": {False}, "all": {True, False}}


def test_another_seed_draws_other_inputs(run):
    both = run("whole.csv", "--seeds", 2, "--methods", "similarity", "--tasks", "cr")
    drawn = [row for row in both if row["task"] == "cr" and row["method"] == "similarity"]
    first, second = ([row["ensemble"] for row in drawn if row["seed"] == s] for s in "01")
    assert len(first) == len(second) and first != second


def test_features_come_in_the_order_of_the_texts(experiment):
    texts = ["w1 w2 w3 w4", "w5", "w30 w31", "w6 w7 w8"]
    alone = torch.cat([experiment._embedded([text]) for text in texts])
    torch.testing.assert_close(experiment._embedded(texts), alone, rtol=0, atol=1e-5)
    assert not torch.allclose(alone, alone[[1, 0, 2, 3]], atol=1e-2)


def test_inputs_are_no_training_and_no_test_texts(experiment, monkeypatch):
    seen = []
    monkeypatch.setattr(experiment, "_embedded", lambda texts: seen.extend(texts))
    monkeypatch.setattr("rpe_ensembles._as", lambda features, found: found)
    experiment.inputs("cr", 0)
    task = experiment.tasks["cr"]
    used = {text for text, _ in (*task.train[:16], *task.test)}
    assert len(set(seen)) == 8 and not used & set(seen)


@pytest.mark.parametrize("method", ["nearest", "simplex"])
def test_each_row_gets_its_own_ensemble(experiment, example, method):
    how = example.way(method, 3, of="input")
    chosen = experiment._weighed(experiment._tested("cr"), "cr", how)
    labels = embed(experiment.model, experiment.tokens(list(experiment.tasks["cr"].labels)))
    rows = [
        (text, target)
        for _, targets, texts in experiment._batches("cr")
        for text, target in zip(texts, targets.tolist(), strict=True)
    ]
    right, ensembles = 0, set()
    for i, (text, target) in enumerate(rows):
        weights = dict(zip(chosen.found.names(i), chosen.weights[i].tolist(), strict=True))
        ensembles.add(tuple(sorted((n, round(w, 4)) for n, w in weights.items() if w)))
        with torch.no_grad(), experiment.handle.mix(Mixture.of(weights)):
            scores = embed(experiment.model, experiment.tokens([text])) @ labels.T
        right += int(scores.argmax()) == target
    assert len(ensembles) > 1
    assert experiment.run("cr", 0, how)["accuracy"] == right / len(rows)


def test_a_single_adapter_is_the_one_that_peft_runs(experiment, example, folder):
    """And not the frozen model: some task's adapter changes what is right."""
    from peft import PeftModel

    from lora_fused.cli.demo_train import load_model

    single, base = {}, {}
    for task in TASKS:
        base[task] = experiment.run(task, "", example.Way("base"))["accuracy"]
        found = experiment.run(task, "", example.Way("single", adapter=task))
        single[task] = found["accuracy"]
        (path,) = (folder / "cache").glob(f"{task}-*")
        model = PeftModel.from_pretrained(load_model(str(folder / "model"))[0], path)
        labels = embed(experiment.model, experiment.tokens(list(experiment.tasks[task].labels)))
        with torch.no_grad():
            right = sum(
                int(((embed(model, tokens) @ labels.T).argmax(1) == target).sum())
                for tokens, target, _ in experiment._batches(task)
            )
        assert single[task] == right / 16
    assert single != base


def test_the_null_has_the_weights_and_not_the_adapters(run, experiment, example):
    rows = {tuple(row[c] for c in example.Way._fields): row for row in run("whole.csv")}
    ways = [example.way(method, 3) for method in ("simplex", "null-simplex")]
    real, null = (rows[tuple(map(str, how))] for how in ways)
    assert real["task"] == null["task"] and real["ensemble"] == null["ensemble"] != ""
    tokens, _, _ = experiment._batches("cr")[0]
    frozen, mixed = [], []
    for handle in (experiment.handle, experiment.null_handle):
        with torch.no_grad():
            frozen.append(embed(handle.model, tokens))
            with handle.mix("mr"):
                mixed.append(embed(handle.model, tokens))
    assert frozen[0].equal(frozen[1])
    assert (mixed[0] - mixed[1]).norm() > 0.5 * (mixed[0] - frozen[0]).norm() > 0


def test_columns_of_the_table():
    import rpe_tables
    from rpe_ensembles import Way, way

    def row(task, how, accuracy):
        told = {column: "" for column in rpe_tables.NUMBERS}
        fields = {name: str(value) for name, value in how._asdict().items()}
        return {"task": task, **fields, **told, "accuracy": str(accuracy)}

    values = {"a": (0.9, 0.2, 0.4), "b": (0.3, 0.8, 0.5)}  # of the adapters a, b, c
    rows = [
        row(task, Way("single", adapter=name), value)
        for task, of in values.items()
        for name, value in zip("abc", of, strict=True)
    ]
    rows += [row("a", way("l1", 2), 0.3), row("a", way("l1", 2), 0.5)]  # two seeds
    columns = rpe_tables.methods(rpe_tables.found(rows, ["a", "b", "c"], 2), "others")
    assert columns["best*"] == {"a": 0.4, "b": 0.5} and columns["own"] == {"a": 0.9, "b": 0.8}
    assert columns["random"] == pytest.approx({"a": 0.3, "b": 0.4})
    assert columns["l1"] == {"a": 0.4}
    span, count = rpe_tables.difference(columns["own"], columns["best*"])
    assert count == 2 and span[0] == pytest.approx(0.4)
    whole = rpe_tables.methods(rpe_tables.found(rows, ["a", "b", "c"], 2), "all")
    assert whole["best*"] == {"a": 0.9, "b": 0.8}


def test_rank_correlation():
    from rpe_tables import rank_correlation

    one = dict(zip("abcdef", (1, 2, 3, 4, 5, 60), strict=True))
    up, count = rank_correlation(one, {name: value**3 for name, value in one.items()})
    assert up[0] == pytest.approx(1) and up[1] > 0.9 and count == 6
    assert rank_correlation(one, {n: -v for n, v in one.items()})[0][0] == pytest.approx(-1)
    ties, _ = rank_correlation(one, dict(zip("abcdef", (1, 1, 2, 2, 3, 3), strict=True)))
    assert ties[0] == pytest.approx(0.9562, abs=1e-4)  # scipy.stats.spearmanr
    assert ties[1] < ties[0] < ties[2]
    assert rank_correlation(one, dict.fromkeys("abcdef", 1.0)) == (None, 6)
    assert rank_correlation(one, dict(zip("abcd", (1, 2, 3, 4), strict=True))) == (None, 4)


@pytest.mark.parametrize(
    ("option", "value", "told"), [("--tasks", "quora", "quora"), ("--methods", "magic", "magic")]
)
def test_wrong_options_are_said(example, folder, capsys, option, value, told):
    argv = ["--csv", str(folder / "none.csv"), "--data", str(folder), option, value]
    assert example.main([*argv, "--model", str(folder / "model")]) == 2
    assert told in capsys.readouterr().err
    assert not (folder / "none.csv").exists()
