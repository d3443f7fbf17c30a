"""RPE on real tasks: all-MiniLM-L6-v2, eight text tasks, their trained adapters."""

import pytest
import torch

from lora_fused import attach, load_adapters
from lora_fused.methods import rpe

TASKS = ("clinc_banking", "clickbait", "mr", "ng_rec", "reuters_r8", "stackoverflow", "trec6", "cr")


@pytest.fixture(scope="module")
def minilm():
    transformers = pytest.importorskip("transformers")
    from lora_fused.cli.demo_tasks import model_path

    try:
        path = model_path()
    except ImportError as error:
        pytest.skip(str(error))
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    return transformers.AutoModel.from_pretrained(path).eval(), tokenizer


@pytest.fixture(scope="module")
def texts(data_dir) -> dict[str, dict[str, list[str]]]:
    found = {}
    for task in TASKS:
        path = data_dir / "text" / f"{task}.tsv"
        if not path.is_file():
            pytest.skip(f"no text tasks: {path} is absent")
        rows = [line.rstrip("\n").split("\t") for line in path.open(encoding="utf-8")]
        found[task] = {s: [r[2] for r in rows if r[0] == s][:24] for s in ("train", "test")}
    return found


def embedded(minilm, texts) -> torch.Tensor:
    return rpe.embed(minilm[0], texts, tokenizer=minilm[1], max_length=32, progress=False)


@pytest.fixture(scope="module")
def prototypes(minilm, texts) -> rpe.Prototypes:
    return rpe.make_prototypes({task: embedded(minilm, texts[task]["train"]) for task in TASKS})


def test_requests_find_the_adapter_of_their_own_task(minilm, texts, prototypes):
    single = torch.cat([embedded(minilm, texts[task]["test"]) for task in TASKS])
    means = single.reshape(len(TASKS), 24, -1).mean(1)
    found = rpe.retrieve(means, prototypes, k=1)
    assert [found.names(i)[0] for i in range(len(TASKS))] == list(TASKS)
    owners = torch.arange(len(TASKS)).repeat_interleave(24)
    hits = (rpe.retrieve(single, prototypes, k=1).adapters[:, 0] == owners).double().mean()
    assert hits > 0.7
    # Chance, which texts of shuffled tasks would come to.
    shuffled = owners[torch.randperm(len(owners), generator=torch.Generator().manual_seed(0))]
    by_chance = rpe.retrieve(single, prototypes, k=1).adapters[:, 0] == shuffled
    assert by_chance.double().mean() < 0.25


@pytest.mark.filterwarnings("ignore:attach. the model is")
def test_a_mixed_batch_runs_ensembles_of_real_adapters(minilm, texts, prototypes, data_dir):
    folder = data_dir / "adapters_minilm"
    if not (folder / TASKS[0]).is_dir():
        pytest.skip(f"no MiniLM adapters: {folder} has no {TASKS[0]}")
    model, tokenizer = minilm
    requests = [texts[task]["test"][0] for task in TASKS]
    features = embedded(minilm, requests)
    handle = attach(model, load_adapters([folder / task for task in TASKS]))
    try:
        batch = tokenizer(requests, padding=True, return_tensors="pt")
        mixture = rpe.ensemble(features, prototypes, k=4, max_adapters=2)
        with torch.no_grad(), handle.mix(mixture):
            mixed = model(**batch).last_hidden_state
            again = embedded(minilm, requests)
            assert (again - features).abs().max() < 1e-5  # the base, though a mixture is in force
        for i in range(len(TASKS)):
            row = rpe.ensemble(features[i], prototypes, k=4, max_adapters=2)
            with torch.no_grad(), handle.mix(row):
                alone = model(**{k: v[i : i + 1] for k, v in batch.items()}).last_hidden_state
            kept = batch["attention_mask"][i].bool()
            assert (mixed[i] - alone[0])[kept].abs().max() < 1e-4
            with torch.no_grad():
                base = model(**{k: v[i : i + 1] for k, v in batch.items()}).last_hidden_state
            assert (base[0] - alone[0])[kept].abs().max() > 1e-2
    finally:
        handle.detach()


def test_explain_of_a_task_that_was_left_out(minilm, texts, prototypes):
    pool = prototypes.subset([task for task in TASKS if task != "cr"])
    query = embedded(minilm, texts["cr"]["test"]).mean(0)
    (one,) = rpe.explain(rpe.weigh(rpe.retrieve(query, pool, k=4), "simplex"))
    assert "mr" in one.adapters[:3] and one.hull_distance <= one.distances[0]
    assert one.residual == pytest.approx(one.hull_distance)
