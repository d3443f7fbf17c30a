"""Adapters given back by a basis, without training: of this experiment's pool, and public ones."""

from collections.abc import Iterator
from pathlib import Path

import torch
from eigenlorax_training import Experiment
from torch import Tensor

from lora_fused import AdapterBank, attach, load_adapters
from lora_fused.cli.demo_train import embed, encode
from lora_fused.io import find_adapters, read_adapter
from lora_fused.methods import Subspace, fit_subspace

SIZES = (8, 16, 32)
PUBLIC = ("distilbert-base-uncased", "google/vit-base-patch16-224")
WAYS = ("eigenlorax-8", "eigenlorax-16", "eigenlorax-32", "hosvd-32")
LEFT_OUT = ("eigenlorax-32", "hosvd-32", "null-32")
TEST_ROWS = 300


def ways() -> list[str]:
    """What an adapter is replaced by, in the order of the table."""
    return ["base", "own", *WAYS, *(f"left out of {way}" for way in LEFT_OUT)]


def reconstructed(experiment: Experiment, task: str, way: str) -> dict:
    """Accuracy of a task with its adapter as a basis gives it back, and how far that is from it.

    No head is trained: the class of a text is the nearest label name, as the adapters learned it.
    """
    bank, found = experiment.bank, {}
    if way in ("base", "own"):
        served = bank.subset([task])
    else:
        kind, _, size = way.removeprefix("left out of ").partition("-")
        left_out = task if way.startswith("left out") else None
        fitted = experiment.subspace(left_out, kind, int(size))
        served = Subspace(fitted.bases, AdapterBank(), fitted.options)
        served.cores.add(fitted.project(bank.adapter(task)))
        found["error"] = round(served.errors(bank).overall, 5)
    labels = _labels(experiment, task)  # of the frozen model: before anything is attached to it
    handle = attach(experiment.model, served)
    with torch.no_grad(), handle.mix(None if way == "base" else task):
        found["accuracy"] = _by_label_names(experiment, task, labels)
    handle.detach()
    return found


def _by_label_names(experiment: Experiment, task: str, labels: Tensor) -> float:
    rows, right = sorted(experiment.tasks[task].test[:TEST_ROWS], key=lambda row: len(row[0])), 0
    for start in range(0, len(rows), 32):
        texts, target = zip(*rows[start : start + 32], strict=True)
        tokens = encode(experiment.tokenizer, list(texts), experiment.settings.max_length)
        scores = embed(experiment.model, tokens) @ labels.T
        right += int((scores.argmax(1) == torch.tensor(target)).sum())
    return right / len(rows)


def _labels(experiment: Experiment, task: str) -> Tensor:
    names = list(experiment.tasks[task].labels)
    found = experiment.embedded(tuple((name, 0) for name in names))
    return torch.stack([found[name] for name in names])


def families(experiment: Experiment) -> Iterator[tuple[str, AdapterBank]]:
    """Banks to ask whether their adapters share anything: the pool, and those of the data folder.

    Embeddings of label names and heads play no part: updates of the adapted layers alone.
    """
    yield "pool, a seed each", experiment.bank
    ready = experiment.data / "adapters_minilm"
    if ready.is_dir():
        yield "MiniLM, one seed", load_adapters(find_adapters(ready))
    public = experiment.data / "adapters"
    if public.is_dir():
        for base in PUBLIC:
            found = _alike(public, base)
            if len(found) > 1:
                yield base, load_adapters(found)


def _alike(folder: Path, base: str) -> dict[str, Path]:
    """The adapters of a base model that adapt the same modules as most of them do."""
    groups: dict[tuple, dict[str, Path]] = {}
    for path in find_adapters(folder):
        try:
            adapter = read_adapter(path)
        except (ValueError, FileNotFoundError):  # the folder keeps odd files on purpose
            continue
        if (adapter.metadata.get("config") or {}).get("base_model_name_or_path") == base:
            modules = tuple(sorted(adapter.modules))
            groups.setdefault(modules, {})[str(path.relative_to(folder))] = path
    return max(groups.values(), key=len, default={})


def reported(bank: AdapterBank, method: str, size: int) -> dict:
    """The honesty report of one fit, in figures."""
    rank = size - 1 if method == "eigenlorax" else size  # the mean is a direction too
    report = fit_subspace(bank, rank=rank, method=method, progress=False).report(
        bank, null_draws=2, progress=False
    )
    null = [errors.overall for errors in report.null_fitted]
    null_held_out = [errors.overall for errors in report.null_held_out]
    return {
        "error": round(report.fitted.overall, 4),
        "null_error": round(sum(null) / len(null), 4),
        "held_out": round(report.held_out.overall, 4),
        "null_held_out": round(sum(null_held_out) / len(null_held_out), 4),
        "verdict": report.verdict.label,
    }
