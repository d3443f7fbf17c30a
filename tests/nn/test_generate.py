"""transformers' generate: every row of a batch writes what it writes alone under PEFT."""

import copy

import pytest
import torch
from support.models import tiny_gpt2, tiny_llama, tokens, with_peft

from lora_fused import AdapterBank, Mixture
from lora_fused.nn import attach

pytest.importorskip("peft")

TARGETS = {tiny_llama: ["q_proj", "v_proj", "down_proj"], tiny_gpt2: ["c_attn", "c_proj"]}
NAMES = ["math", None, "code"]
MODELS = pytest.mark.parametrize("make", TARGETS, ids=["llama", "gpt2"])


def attached(make):
    # float64, so that a token is never decided by the order of a sum
    model = make().double()
    config = {"r": 4, "lora_alpha": 16, "target_modules": TARGETS[make]}
    if make is tiny_gpt2:
        config["fan_in_fan_out"] = True
    wrapped, adapters = with_peft(model, {"math": config, "code": config})
    bank = AdapterBank(dtype=torch.float64)
    bank.add_many(adapters)
    return model, wrapped, attach(model, bank)


def write(model, x, **options):
    torch.manual_seed(7)
    mask = torch.ones_like(x)
    return model.generate(input_ids=x, attention_mask=mask, max_new_tokens=8, **options)


def alone(wrapped, name, x, **options):
    wrapped = copy.deepcopy(wrapped)
    if name is None:
        return write(wrapped.unload(), x, **options)
    wrapped.set_adapter(name)
    return write(wrapped, x, **options)


@MODELS
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_greedy(make, cache):
    model, wrapped, handle = attached(make)
    x = tokens(3, 5, 60) + 1
    options = {"do_sample": False, "use_cache": cache}
    with handle.mix(Mixture.rows(NAMES)):
        together = write(model, x, **options)
    rows = [alone(wrapped, name, x[i : i + 1], **options) for i, name in enumerate(NAMES)]
    assert torch.equal(together, torch.cat(rows))
    assert not torch.equal(together, write(model, x, **options))  # the adapters matter


@MODELS
def test_beams_need_repeated_rows(make):
    model, wrapped, handle = attached(make)
    x = tokens(3, 5, 60) + 1
    options = {"do_sample": False, "num_beams": 3}
    mixture = Mixture.rows(NAMES)
    with handle.mix(mixture.repeat(3)):
        together = write(model, x, **options)
    rows = [alone(wrapped, name, x[i : i + 1], **options) for i, name in enumerate(NAMES)]
    assert torch.equal(together, torch.cat(rows))
    with handle.mix(mixture), pytest.raises(ValueError, match=r"samples .*, 9, got 3"):
        write(model, x, **options)


@MODELS
def test_sampling(make):
    """Rows of one adapter, so that PEFT draws the same numbers; then weights of a mixed batch."""
    model, wrapped, handle = attached(make)
    x = tokens(3, 5, 60) + 1
    options = {"do_sample": True, "top_k": 20, "num_return_sequences": 2}
    with handle.mix(Mixture.rows(["math"] * 3).repeat(2)):
        together = write(model, x, **options)
    assert torch.equal(together, alone(wrapped, "math", x, **options))
    with handle.mix(Mixture.rows(["math", "code", {"math": 0.5, "code": 0.5}]).repeat(2)):
        mixed = write(model, x, **options)
    assert mixed.shape == together.shape and not torch.equal(mixed, together)
