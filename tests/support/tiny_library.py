"""A tiny base with a tokenizer as transformers saves them, adapters for it, and their examples."""

import json
from pathlib import Path

import torch

from lora_fused import Adapter, LoraFactors, write_adapter

BASE = "tiny/base"
SUBJECTS = {
    "pets": ["cat", "dog", "hamster", "parrot"],
    "food": ["soup", "bread", "cheese", "apple"],
    "cars": ["engine", "wheel", "brake", "clutch"],
}
VERBS = ["likes", "needs", "is", "has"]
MODULES = ("encoder.layer.0.attention.self.query", "encoder.layer.0.attention.self.value")
SIZE = 16


def save_base(folder: Path, seed: int = 0) -> Path:
    """A BERT of one layer whose words are those of the examples."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [word for several in SUBJECTS.values() for word in several] + VERBS
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    options = {"tokenizer_object": tokenizer, "pad_token": "[PAD]", "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(**options).save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=SIZE,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def texts(subject: str, count: int = 12, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    words = SUBJECTS[subject]
    picks = torch.randint(4, (count, 3), generator=generator).tolist()
    return [f"{words[a]} {VERBS[b]} {words[c]}" for a, b, c in picks]


def save_adapter(folder: Path, seed: int, rank: int = 2, base: str = BASE) -> Path:
    generator = torch.Generator().manual_seed(seed)
    parts = {
        module: LoraFactors(*(torch.randn(2, rank, SIZE, generator=generator)), 2.0)
        for module in MODULES
    }
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    config |= {"target_modules": ["query", "value"], "base_model_name_or_path": base}
    write_adapter(Adapter(folder.name, parts, {}, {"config": config}), folder)
    return folder


def save_manifest(folder: Path) -> Path:
    """Adapters ``pets``, ``food`` and ``cars`` with examples, below a folder; the manifest."""
    rows = []
    for seed, subject in enumerate(SUBJECTS):
        save_adapter(folder / "adapters" / subject, seed, rank=1 + seed)
        (folder / f"{subject}.txt").write_text("\n".join(texts(subject)) + "\n\n")
        row = {"adapter": f"adapters/{subject}", "examples": f"{subject}.txt"}
        row |= {"tags": ["living" if subject == "pets" else "thing"], "metadata": {"n": seed}}
        rows.append(json.dumps(row))
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


def said(done) -> object:
    """The JSON that a command has printed."""
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def fault(done, *words: str, code: int = 1) -> None:
    """One line on stderr with these words, nothing on stdout."""
    assert done.exit_code == code and done.stdout == "", done.output
    line = [line for line in done.stderr.splitlines() if line.startswith("lora-fused:")]
    assert len(line) == 1 and all(word in line[0] for word in words), done.stderr
