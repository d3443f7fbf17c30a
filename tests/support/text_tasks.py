"""A tiny model and made-up text tasks, for the experiments of examples/."""

import contextlib
import csv
import importlib
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch

from support import ROOT

NOT_TIMED = ("cpu_seconds", "date")
WORDS = [f"w{i}" for i in range(40)]


def text_tasks(folder: Path, tasks: Sequence[str]) -> Path:
    """A BERT of two layers with 40 words in model/, and tasks in text/, filled into a folder.

    A task's label is which half of the words says more; 60 rows to train on and 20 to test with.
    """
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=45, num_hidden_layers=2, **sizes)
    transformers.BertModel(config).save_pretrained(folder / "model")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS]))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder / "model")
    (folder / "text").mkdir()
    for task in tasks:
        draw, lines = random.Random(task), ["split\tlabel\ttext"]
        for i in range(80):
            words = draw.sample(WORDS, 6)
            label = int(sum(word in WORDS[:20] for word in words) > 3)
            lines.append("\t".join(["train" if i < 60 else "test", str(label), " ".join(words)]))
        (folder / "text" / f"{task}.tsv").write_text("\n".join(lines) + "\n")
    known = [{"task": task, "labels": ["w1", "w30"]} for task in tasks]
    (folder / "text" / "tasks.json").write_text(json.dumps(known))
    return folder


@contextlib.contextmanager
def example(name: str) -> Iterator[ModuleType]:
    """A program of examples/ as a module, beside those that it imports."""
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module(name)
    sys.path.remove(str(ROOT / "examples"))


def run(module: ModuleType, folder: Path, small: Mapping, name: str, *options) -> list[dict]:
    """Run an experiment on the folder's tasks at a small size; the rows of its CSV ``name``."""
    path = folder / name
    where = ("--csv", path, "--data", folder, "--model", folder / "model")
    sizes = [f"--{option}={value}" for option, value in small.items()]
    always = ("--cache", folder / "cache", "-q", *sizes)
    assert module.main([str(o) for o in (*where, *always, *options)]) == 0
    return rows_of(path)


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of an experiment's CSV, but for what differs from run to run."""
    with path.open() as file:
        return [{k: v for k, v in r.items() if k not in NOT_TIMED} for r in csv.DictReader(file)]
