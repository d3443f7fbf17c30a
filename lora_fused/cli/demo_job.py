"""The main job: load adapters as one bank, attach it, serve a mixed batch, measure against PEFT."""

import dataclasses
import os
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch

from lora_fused.cli.console import Reporter, counted
from lora_fused.cli.demo_peft import PeftRows
from lora_fused.cli.demo_serve import (
    ROUNDS,
    MakeModel,
    compare,
    example_rows,
    first_adapter,
    mixed_batch,
    race,
)
from lora_fused.cli.demo_tasks import Task, load_tasks, model_path
from lora_fused.cli.demo_train import Recipe, embed, encode, load_model, train_all
from lora_fused.io import find_adapters, load_adapters, read_adapter
from lora_fused.mixture import Mixture
from lora_fused.nn import Handle, attach

MIXED_ROWS, TIMED_ROWS = 36, 16
OWN_LENGTH = 32  # tokens of a row of the user's model
AUTO_CLASS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}


@dataclasses.dataclass(frozen=True)
class Loading:
    """What to accept in adapters: see ``attach`` and ``load_adapters``."""

    saved_modules: str = "error"
    any_base: bool = False


def packaged_job(
    cache: Path, count: int, epochs: int, seed: int, threads: int, reporter: Reporter
) -> dict:
    """The main job on a packaged model and packaged texts, adapters trained here and cached."""
    _need("transformers", "peft")
    start = time.perf_counter()
    tasks = load_tasks(count, seed)
    recipe = Recipe(str(model_path()), epochs=epochs, seed=seed)
    folders, trained = train_all(tasks, recipe, cache, threads, reporter)
    seconds = time.perf_counter() - start
    torch.set_num_threads(threads)
    model, tokenizer = load_model(recipe.model)
    labels = {t.name: embed_labels(model, tokenizer, t, recipe.max_length) for t in tasks}
    handle = _attach(model, folders, reporter, Loading())
    accuracies = _accuracies(handle, tokenizer, tasks, labels, recipe.max_length, reporter)
    # A row's text is one of the task of its first adapter.
    texts = [tasks[first_adapter(i) % count].test[i][0] for i in range(MIXED_ROWS)]
    tokens = encode(tokenizer, texts, recipe.max_length)

    def make_model(dtype: torch.dtype):
        return load_model(recipe.model)[0].to(dtype)

    serving = _serve(handle, make_model, tokens, folders, reporter)
    trained_now = {"trained": trained, "prepare_seconds": round(seconds, 1)}
    return {"model": recipe.model, "accuracy": accuracies, **trained_now, **serving}


def own_job(
    adapters: Path,
    model: Path,
    text: Path | None,
    seed: int,
    threads: int,
    reporter: Reporter,
    loading: Loading,
) -> dict:
    """The main job on the user's model and adapters, with lines of a text or random tokens."""
    _need("transformers", "peft")
    if not model.is_dir():
        raise FileNotFoundError(f"demo: no such model folder: {model}")
    torch.set_num_threads(threads)
    found = find_adapters(adapters)
    if not found:
        raise FileNotFoundError(f"demo: no adapter in {adapters}")
    folders = {
        str(path.relative_to(adapters)) if path != adapters else path.name: path for path in found
    }
    make_model = _own_factory(model, read_adapter(found[0]).metadata["config"].get("task_type"))
    base = make_model(torch.float32)
    tokens = _own_tokens(base, model, text, seed)
    handle = _attach(base, folders, reporter, loading)
    serving = _serve(handle, make_model, tokens, folders, reporter, loading.saved_modules)
    return {"model": str(model), **serving}


def _attach(model, folders: dict[str, Path], reporter: Reporter, loading: Loading) -> Handle:
    with reporter.task(f"loading {counted(len(folders), 'adapter')}", len(folders)) as advance:
        bank = load_adapters(
            folders,
            any_base=loading.any_base,
            on_progress=lambda done, total: advance(1),
        )
    return attach(model, bank, saved_modules=loading.saved_modules)


def _serve(
    handle: Handle,
    make_model: MakeModel,
    tokens,
    folders,
    reporter: Reporter,
    saved_modules: str = "error",
) -> dict:
    names = handle.bank.names
    # Several heads cannot be mixed.
    weighted = saved_modules != "apply" or not handle.bank.saved
    rows = example_rows(names, len(tokens["input_ids"]), weighted)
    mixed = mixed_batch(handle, tokens, rows)
    with warnings.catch_warnings():
        # PEFT warns of several active adapters and of adapters added after the first: wanted here.
        warnings.simplefilter("ignore")
        heads = saved_modules == "apply"
        peft = PeftRows(make_model(torch.float32), folders, heads)
        truth = PeftRows(make_model(torch.float64), folders, heads)
        with reporter.task("PEFT row by row, in float32 and float64", len(rows)) as advance:
            difference = compare(mixed, tokens, rows, peft, truth, advance)
        del truth
        few = {name: t[:TIMED_ROWS] for name, t in tokens.items()}
        plain = make_model(torch.float32)
        with reporter.task("timing, interleaved", 2 * (ROUNDS + 1)) as advance:
            timings = race(
                handle, peft, plain, few, rows[:TIMED_ROWS], list(folders.values()), advance
            )
    shape = list(few["input_ids"].shape)
    return {
        "adapters": names,
        "modules": len(handle.bank.modules),
        "rows": [row or {} for row in rows],
        "difference": {**dataclasses.asdict(difference), "within": difference.within},
        "timing": {
            "rows": shape[0],
            "tokens": shape[1],
            "threads": torch.get_num_threads(),
            "rounds": ROUNDS,
            "cases": [dataclasses.asdict(timing) for timing in timings],
        },
    }


@torch.no_grad()
def embed_labels(model, tokenizer, task: Task, max_length: int) -> torch.Tensor:
    """The label names of a task in the frozen model's embedding."""
    return embed(model, encode(tokenizer, list(task.labels), max_length))


@torch.no_grad()
def _accuracies(handle: Handle, tokenizer, tasks, labels, max_length, reporter) -> list[dict]:
    """Per task: base, own adapter and the mean of all, three rows of one batch for every text."""
    names = handle.bank.names
    uniform = {name: 1.0 / len(names) for name in names}
    total = sum(len(task.test) for task in tasks)
    found = []
    with reporter.task("scoring base, own adapter and uniform mixture", total) as advance:
        for task in tasks:
            right = torch.zeros(3)
            for start in range(0, len(task.test), 32):
                rows = task.test[start : start + 32]
                tokens = encode(tokenizer, [text for text, _ in rows], max_length)
                tripled = {name: torch.cat([t] * 3) for name, t in tokens.items()}
                kinds = Mixture.rows([None, task.name, uniform]).repeat(len(rows))
                with handle.mix(kinds):
                    scores = embed(handle.model, tripled) @ labels[task.name].T
                target = torch.tensor([label for _, label in rows])
                right += scores.argmax(1).view(3, -1).eq(target).sum(1)
                advance(len(rows))
            base, own, mixed = (right / len(task.test)).tolist()
            sizes = {"classes": len(task.labels), "train": len(task.train), "test": len(task.test)}
            scored = {"base": base, "own": own, "uniform": mixed}
            found.append({"task": task.name, **sizes, **scored})
    return found


def _own_factory(path: Path, task_type: str | None) -> MakeModel:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(path)
    kind = AUTO_CLASS.get(task_type, "AutoModel")
    if task_type is None and any("CausalLM" in name for name in config.architectures or ()):
        kind = "AutoModelForCausalLM"
    auto = getattr(transformers, kind)

    def make_model(dtype: torch.dtype):
        return auto.from_pretrained(path, dtype=torch.float32).to(dtype).eval()

    return make_model


def _own_tokens(model, path: Path, text: Path | None, seed: int) -> dict[str, torch.Tensor]:
    if text is None:
        generator = torch.Generator().manual_seed(seed)
        size = (MIXED_ROWS, OWN_LENGTH)
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
        if vocabulary is None:
            raise ValueError(f"demo: --model must read tokens, got {type(model).__name__}")
        ids = torch.randint(vocabulary, size, generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"demo: --text must hold at least one line of text, got {text}")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    some = [lines[i % len(lines)] for i in range(MIXED_ROWS)]
    tokens = encode(tokenizer, some, OWN_LENGTH)
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def _need(*packages: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        need, packages = " and ".join(missing), " ".join(missing)
        raise ImportError(f"demo: {need} must be installed; run: pip install {packages}")
