"""The demo's adapters: one rank-8 LoRA per task, trained with PEFT and kept as PEFT folders.

No classifier head: the class of a text is the nearest label in the frozen model's embedding, so the
base, any adapter and any mixture of adapters are scored the same way.
"""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import queue
import shutil
import signal
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_fused.cli.console import Reporter, counted
from lora_fused.cli.demo_tasks import Task

# The pooler's dense layer is left out: mean pooling never reads it, so it would stay untrained.
TARGETS = (
    "query",
    "key",
    "value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything besides the data that decides what an adapter becomes."""

    model: str
    epochs: int = 3
    seed: int = 0
    rank: int = 8
    alpha: int = 16
    learning_rate: float = 2e-3
    batch: int = 32
    max_length: int = 32
    temperature: float = 0.05
    targets: tuple[str, ...] = TARGETS


def train_all(
    tasks: list[Task], recipe: Recipe, cache: Path, threads: int, reporter: Reporter
) -> tuple[dict[str, Path], int]:
    """Return each task's PEFT folder, training those the cache lacks, and how many those were.

    Each adapter is trained by one thread, so the result does not depend on the number of cores.
    """
    folders = {task.name: adapter_folder(task, recipe, cache) for task in tasks}
    missing = [(i, task) for i, task in enumerate(tasks) if not folders[task.name].is_dir()]
    if not missing:
        return folders, 0
    cache.mkdir(parents=True, exist_ok=True)
    steps = sum(recipe.epochs * -(-len(task.train) // recipe.batch) for _, task in missing)
    context = multiprocessing.get_context("spawn")
    ticks = context.Queue()
    jobs = [(task, recipe, i, str(folders[task.name])) for i, task in missing]
    count = max(1, min(threads, len(jobs)))
    workers = [
        context.Process(target=_worker, args=(jobs[i::count], ticks), daemon=True)
        for i in range(count)
    ]
    for worker in workers:
        worker.start()
    try:
        with reporter.task(f"training {counted(len(missing), 'adapter')}", steps) as advance:
            _follow(workers, ticks, advance)
    finally:
        for worker in workers:
            worker.terminate()
    return folders, len(missing)


def adapter_folder(task: Task, recipe: Recipe, cache: Path) -> Path:
    """Where a task's adapter of this recipe is kept; the folder exists once it is trained."""
    return cache / f"{task.name}-{_key(task, recipe)}"


def _follow(workers, ticks, advance) -> None:
    """Advance by every step that the workers report; raise what they fail with."""
    while True:
        running = any(worker.is_alive() for worker in workers)
        try:
            message = ticks.get(timeout=0.2)
        except queue.Empty:
            if not running:  # asked before the queue, so nothing can have come since
                break
            continue
        if message is not None:
            raise RuntimeError(message)
        advance(1)
    codes = [worker.exitcode for worker in workers]
    if any(codes):
        raise RuntimeError(f"demo: training must end with exit codes of 0, got {codes}")


def _worker(jobs: list, ticks) -> None:
    # An interrupt is the parent's to report; it then ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # of transformers and PEFT, about their own future
    torch.set_num_threads(1)
    try:
        for task, recipe, index, folder in jobs:
            train(task, recipe, index, Path(folder), lambda: ticks.put(None))
    except Exception as error:
        ticks.put(f"demo: training of {task.name!r} failed: {type(error).__name__}: {error}")


def train(task: Task, recipe: Recipe, index: int, folder: Path, tick) -> None:
    """Train one adapter and save it; a folder that exists is complete."""
    from peft import LoraConfig, get_peft_model

    model, tokenizer = load_model(recipe.model)
    labels = embed(model, encode(tokenizer, list(task.labels), recipe.max_length)).detach()
    torch.manual_seed(recipe.seed + index)  # another random A for every adapter
    config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=list(recipe.targets))
    model = get_peft_model(model, config).train()
    batches = _batches(task, recipe, tokenizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=len(batches)
    )
    for tokens, target in batches:
        loss = F.cross_entropy(embed(model, tokens) @ labels.T / recipe.temperature, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        tick()
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    model.save_pretrained(partial)
    if folder.is_dir():  # another run was faster
        shutil.rmtree(partial)
    else:
        partial.rename(folder)


def _batches(task: Task, recipe: Recipe, tokenizer) -> list[tuple[dict, Tensor]]:
    batches = []
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(task.train)).split(recipe.batch):
            texts, targets = zip(*(task.train[i] for i in rows.tolist()), strict=True)
            tokens = encode(tokenizer, list(texts), recipe.max_length)
            batches.append((tokens, torch.tensor(targets)))
    return batches


def load_model(path: str):
    """The frozen model and its tokenizer, from a local folder, without a model hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(path)


def encode(tokenizer, texts: list[str], max_length: int) -> dict[str, Tensor]:
    options = {"padding": True, "truncation": True, "max_length": max_length}
    return dict(tokenizer(texts, return_tensors="pt", **options))


def embed(model, tokens: dict[str, Tensor]) -> Tensor:
    """Unit-length mean of the last hidden states over a text's own tokens."""
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None].to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def _key(task: Task, recipe: Recipe) -> str:
    settings = {**dataclasses.asdict(recipe), "model": Path(recipe.model).name}
    rows = [task.labels, task.train]
    text = json.dumps([settings, rows], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
