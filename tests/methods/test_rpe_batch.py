"""64 requests, each with its own retrieved ensemble of 4 of 64 adapters, in one forward."""

import dataclasses

import pytest
import torch
from support.models import row_by_row
from torch import Tensor, nn

from lora_fused import Adapter, AdapterBank, LoraFactors, Mixture, attach
from lora_fused.cli.demo_train import TARGETS
from lora_fused.methods import rpe
from lora_fused.nn import merge_into_base
from lora_fused.testing import assert_within_budget

COUNT, LENGTH, RANK, MOST = 64, 6, 8, 4


class Encoder(nn.Module):
    """A BERT from tokens to its last hidden states."""

    def __init__(self, bert: nn.Module):
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bert(input_ids=tokens).last_hidden_state


@dataclasses.dataclass
class Library:
    """A model, adapters of random factors, tokens of requests, prototypes and features."""

    encoder: Encoder
    adapters: list[Adapter]
    tokens: Tensor
    prototypes: rpe.Prototypes
    features: Tensor

    def bank(self, dtype: torch.dtype = torch.float32) -> AdapterBank:
        bank = AdapterBank(dtype=dtype)
        bank.add_many(reversed(self.adapters))  # ids other than the library's indices
        return bank

    def mixture(self, weights: str) -> Mixture:
        options = {"k": 8, "weights": weights, "max_adapters": MOST}
        return rpe.ensemble(self.features, self.prototypes, **options)


def adapters_of(encoder: Encoder) -> list[Adapter]:
    """Of the demo's modules, in the first and the last layer: merging takes time for each."""
    ends = (".0.", f".{len(encoder.bert.encoder.layer) - 1}.")
    generator = torch.Generator().manual_seed(0)
    sizes = {
        name: (module.in_features, module.out_features, float(module.weight.detach().std()))
        for name, module in encoder.named_modules()
        if name.endswith(TARGETS)
        and any(end in name for end in ends)
        and isinstance(module, nn.Linear)
    }
    found = []
    for k in range(COUNT):
        parts = {}
        for name, (fan_in, fan_out, spread) in sizes.items():
            lora_a = torch.randn(RANK, fan_in, generator=generator)
            lora_b = 0.05 * spread * torch.randn(RANK, fan_out, generator=generator)
            parts[name] = LoraFactors(lora_a, lora_b, 1.0 + k % 3)
        found.append(Adapter(f"a{k}", parts))
    return found


def library_of(bert: nn.Module, vocabulary: int) -> Library:
    """Prototypes and requests are embedded by the model; each of its own kind of text."""
    encoder = Encoder(bert.eval()).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)

    def texts(rows: int) -> Tensor:
        return torch.randint(5, vocabulary, (rows, LENGTH), generator=generator)

    def embed(tokens: Tensor) -> Tensor:
        return rpe.embed(bert, {"input_ids": tokens}, progress=False)

    names = [f"a{k}" for k in range(COUNT)]
    prototypes = rpe.make_prototypes({name: embed(texts(12)) for name in names})
    tokens = texts(COUNT)
    return Library(encoder, adapters_of(encoder), tokens, prototypes, embed(tokens))


@pytest.fixture(scope="module", params=["tiny", "minilm"])
def library(request) -> Library:
    transformers = pytest.importorskip("transformers")
    if request.param == "minilm":
        from lora_fused.cli.demo_tasks import model_path

        try:
            return library_of(transformers.AutoModel.from_pretrained(model_path()), 20000)
        except ImportError as error:
            pytest.skip(str(error))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    config = transformers.BertConfig(
        vocab_size=61, num_hidden_layers=2, initializer_range=0.3, **sizes
    )
    return library_of(transformers.BertModel(config), 61)


def rows_of(mixture: Mixture) -> list[dict[str, float]]:
    pairs = zip(mixture.adapters, mixture.weights.tolist(), strict=True)
    return [{name: w for name, w in zip(*row, strict=True) if name is not None} for row in pairs]


def merged(library: Library, rows: list[dict[str, float]], dtype: torch.dtype) -> Tensor:
    """What 64 models give, each with one request's ensemble in its weights."""
    encoder, bank, found = library.encoder.to(dtype), library.bank(dtype), []
    try:
        for i, row in enumerate(rows):
            with merge_into_base(encoder, bank, row):
                found.append(encoder(library.tokens[i : i + 1]))
    finally:
        encoder.float()
    return torch.cat(found)


@torch.no_grad()
def test_one_forward_equals_64_merged_models(library):
    mixture = library.mixture("l1")
    rows = rows_of(mixture)
    assert len(rows) == COUNT and max(map(len, rows)) == MOST
    assert len({tuple(sorted(row)) for row in rows}) > COUNT // 2
    exact, plain = library.encoder.double()(library.tokens), library.encoder.float()(library.tokens)
    truth = merged(library, rows, torch.float64) - exact
    reference = merged(library, rows, torch.float32) - plain
    assert truth.abs().amax((1, 2)).min() > 1e-2  # each request's ensemble does something
    handle = attach(library.encoder, library.bank())
    try:
        with handle.mix(mixture):
            together = library.encoder(library.tokens) - plain
        swapped = [rows[1], rows[0], *rows[2:]]
        with handle.mix(swapped):
            others = library.encoder(library.tokens) - plain
    finally:
        handle.detach()
    assert_within_budget(together, reference, truth)
    for i in range(COUNT):  # one request cannot hide behind another's larger update
        assert_within_budget(together[i], reference[i], truth[i], f"request {i}")
    with pytest.raises(AssertionError, match="error"):  # two requests' ensembles exchanged
        assert_within_budget(others, reference, truth)
    assert torch.equal(others[2:], together[2:])


@pytest.mark.parametrize("library", ["tiny"], indirect=True)
@torch.no_grad()
def test_the_merged_models_are_those_of_plain_torch(library):
    """The truth above, by weights that are added up here without this project's merge."""
    rows = rows_of(library.mixture("similarity"))
    assert all(len(row) == MOST for row in rows)
    plain = row_by_row(library.encoder, library.adapters, rows, library.tokens)
    assert (merged(library, rows, torch.float64) - plain).abs().max() < 1e-10
