"""embed: the frozen base alone, pooled in float32, whatever is on the model; nothing is left."""

import copy

import pytest
import torch
from support.models import Net, adapter, tiny_llama, tokens, with_peft
from torch import nn

from lora_fused import AdapterBank, Mixture
from lora_fused.methods.rpe import embed
from lora_fused.nn import attach


def bank() -> AdapterBank:
    found = AdapterBank()
    found.add_many([adapter("a", 1), adapter("b", 2)])
    return found


class Tokenizer:
    """Words to numbers, padded on one side."""

    def __init__(self, side="right"):
        self.side, self.calls = side, []

    def __call__(self, texts, padding, truncation, return_tensors, max_length=7):
        self.calls.append(len(texts))
        rows = [[int(word) for word in text.split()][:max_length] for text in texts]
        width = max(map(len, rows))
        pads = [[0] * (width - len(row)) for row in rows]
        ones = [[1] * len(row) for row in rows]
        joined = [
            (r + p, o + p) if self.side == "right" else (p + r, p + o)
            for r, p, o in zip(rows, pads, ones, strict=True)
        ]
        ids, mask = (torch.tensor([pair[i] for pair in joined]) for i in (0, 1))
        return {"input_ids": ids, "attention_mask": mask}


class Words(nn.Module):
    """An embedding whose feature of a token is known; masked places give NaN."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 3)
        self.table.weight.data = torch.arange(60.0).reshape(20, 3).square()

    def forward(self, input_ids, attention_mask):
        return self.table(input_ids).masked_fill(attention_mask[..., None] == 0, torch.nan)


TEXTS = ["3 1 4", "1", "5 9 2 6", "5 3", "5"]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("pooling", [None, "mean", "first", "last", "max"])
def test_pooling_sees_only_tokens_of_the_mask(pooling, side):
    model, tokenizer = Words(), Tokenizer(side)
    found = embed(model, TEXTS, tokenizer=tokenizer, pooling=pooling, batch_size=2)
    assert tokenizer.calls == [2, 2, 1] and found.shape == (5, 3)
    for row, text in zip(found, TEXTS, strict=True):
        own = model.table.weight.data[[int(word) for word in text.split()]]
        expected = {"first": own[0], "last": own[-1], "max": own.amax(0)}
        assert torch.equal(row, expected.get(pooling, own.mean(0)))


def test_batches_of_all_kinds_give_the_same():
    model, ids = Words(), tokens(7, 4)
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = embed(model, whole, batch_size=3)
    parts = [{k: v[i : i + 2] for k, v in whole.items()} for i in range(0, 7, 2)]
    assert torch.equal(found, embed(model, parts))
    assert torch.equal(found, embed(model, iter(parts)))
    texts = [" ".join(map(str, row)) for row in ids.tolist()]
    assert torch.equal(found, embed(model, texts, tokenizer=Tokenizer()))
    net = Net()
    assert torch.equal(embed(net, ids), net(ids).mean(1).detach())
    unit = embed(net, ids, normalize=True)
    assert torch.allclose(unit.norm(dim=1), torch.ones(7))
    assert torch.equal(unit, nn.functional.normalize(embed(net, ids), dim=1))


def test_pools_in_float32():
    """bfloat16 features, all alike: a mean in bfloat16 would leave them."""
    model = nn.Linear(4, 4).bfloat16()
    x = torch.randn(2, 3000, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        truth = model(x).double().mean(1)
        rounded = model(x).mean(1)
    found = embed(model, x)
    assert found.dtype == torch.float32 and (found - truth).abs().max() < 1e-6
    assert (rounded - truth).abs().max() > 1e-5


def test_layers_are_read_by_name_and_number():
    net, ids = Net(), tokens()
    expected = net.up(net.embed(ids)).mean(1).detach()
    assert torch.equal(embed(net, ids, layer="up"), expected)
    assert not net.up._forward_hooks
    llama, batch = tiny_llama(), {"input_ids": tokens(3, 6)}
    states = llama(**batch, output_hidden_states=True).hidden_states
    for layer in (0, 1, -1):
        assert torch.equal(embed(llama, batch, layer=layer), states[layer].mean(1).detach())
    by_name = embed(llama, batch, layer="model.layers.0")  # may return a tuple
    assert torch.equal(by_name, states[1].mean(1).detach())
    assert torch.equal(embed(llama.model, batch), states[-1].mean(1).detach())  # last_hidden_state
    x = torch.ones(2, 5, 3)
    assert torch.equal(embed(Layered(), x, layer="layer"), x[:, 0])
    function = embed(net, ids, pooling=lambda features, mask: features.flatten(1))
    assert torch.equal(function, net(ids).flatten(1).detach())


def test_an_attached_model_is_the_base_meanwhile():
    model, ids = Net(), tokens()
    plain = embed(copy.deepcopy(model), ids)
    handle = attach(model, bank())
    mixture = Mixture.rows(["a", "b", None])
    with torch.no_grad(), handle.mix(mixture):
        adapted = model(ids).mean(1)
        assert not torch.allclose(adapted[:2], plain[:2])  # the adapters do something
        assert torch.equal(embed(model, ids), plain)
        assert torch.equal(embed(handle, ids), plain)
        assert torch.equal(embed(model, ids[:2]), plain[:2])  # of other rows than the mixture's
        assert torch.equal(model(ids).mean(1), adapted)  # and it is in force again
        with pytest.raises(ValueError, match="embed: layer must be one of"):
            embed(model, ids, layer="nowhere")
        assert torch.equal(model(ids).mean(1), adapted)
    assert torch.equal(embed(model, ids), plain)
    handle.detach()


def test_modes_grads_and_hooks_are_as_before():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3))
    model.train()
    model[2].eval()
    modes = [module.training for module in model.modules()]
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    found = embed(model, x, layer="2")
    assert [module.training for module in model.modules()] == modes == [True, True, True, False]
    assert torch.equal(found, embed(model, x))  # no dropout
    assert not found.requires_grad and model[0].weight.requires_grad and torch.is_grad_enabled()
    with pytest.raises(RuntimeError):  # from the model itself
        embed(model, torch.randn(5, 3), layer="2")
    assert [module.training for module in model.modules()] == modes
    assert not model[2]._forward_hooks


def test_a_peft_model_runs_without_its_adapter():
    pytest.importorskip("peft")
    base, batch = tiny_llama(), {"input_ids": tokens(3, 6)}
    plain = embed(base, batch, layer=-1)
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    wrapped, _ = with_peft(base, {"math": config})
    with torch.no_grad():
        adapted = wrapped(**batch, output_hidden_states=True).hidden_states[-1].mean(1)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    assert torch.equal(embed(wrapped, batch, layer=-1), plain)
    with torch.no_grad():
        again = wrapped(**batch, output_hidden_states=True).hidden_states[-1].mean(1)
    assert torch.equal(again, adapted)
    with pytest.raises(RuntimeError, match="must be a PeftModel to put its adapters off"):
        embed(wrapped.base_model.model.model, batch)


def test_progress_counts_inputs():
    seen = []
    embed(Net(), tokens(7), batch_size=3, progress=lambda *pair: seen.append(pair))
    assert seen == [(3, 7), (6, 7), (7, 7)]
    seen.clear()
    embed(Net(), [tokens(2), tokens(3)], progress=lambda *pair: seen.append(pair))
    assert seen == [(2, None), (5, None)]


class Pair(nn.Module):
    def forward(self, x):
        return x, x  # as logits may come, which are no features


class Layered(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Pair()

    def forward(self, x):
        return self.layer(x)[0]


class Named(nn.Module):
    def forward(self, x):
        return {"logits": x}


@pytest.mark.parametrize(
    "model, inputs, options, message",
    [
        (None, tokens(), {}, "model must be a module or a handle, got NoneType"),
        (Net(), tokens(), {"pooling": "sum"}, "pooling must be one of .* or a function, got 'sum'"),
        (Net(), tokens(), {"batch_size": 0}, "batch_size must be an integer of at least 1"),
        (Net(), "a text", {}, "inputs must be a list of texts"),
        (Net(), ["a text"], {}, "tokenizer must be given with texts"),
        (Net(), tokens(), {"tokenizer": Tokenizer()}, "inputs must be a list of texts where"),
        (Net(), 3, {}, "inputs must be texts, a tensor, a dict of tensors or an iterable"),
        (Net(), [], {}, "inputs must hold at least one, got none"),
        (Net(), [(tokens(), 1)], {}, "batches must be tensors or dicts"),
        (Net(), {"x": torch.ones(2, 1), "y": torch.ones(3, 1)}, {}, "inputs must have one first"),
        (Net(), tokens(), {"layer": ""}, "layer must be one of embed, up, down, got ''"),
        (Net(), tokens(), {"layer": True}, "layer must be a module's name, a number or None"),
        (Pair(), torch.ones(2, 3), {}, "layer must be given where the output is not a tensor"),
        (Named(), torch.ones(2, 3), {}, "layer must be given where the output is not a tensor"),
        (nn.Linear(3, 2), torch.ones(2, 3), {"pooling": "mean"}, "pooling must be a function for"),
        (
            nn.Linear(3, 2),
            torch.ones(2, 5, 6, 3),
            {},
            r"pooling must be a function for .*2, 5, 6, 2",
        ),
        (nn.Linear(3, 2), torch.full((2, 3), torch.inf), {}, "features must be finite"),
    ],
)
def test_rejects(model, inputs, options, message):
    with pytest.raises(ValueError, match=f"^embed: {message}"):
        embed(model, inputs, **options)


def test_an_input_without_tokens_is_refused():
    ids = tokens(3, 4)
    mask = torch.ones_like(ids)
    mask[1] = 0
    for pooling in ("mean", "first", "last", "max"):
        with pytest.raises(ValueError, match="each input have a token"):
            embed(Words(), {"input_ids": ids, "attention_mask": mask}, pooling=pooling)
    with pytest.raises(
        ValueError, match="embed: layer must count within the model's hidden_states, got 9 of 3"
    ):
        embed(tiny_llama(), {"input_ids": ids}, layer=9)
