"""fingerprint: copies of one base agree, other bases do not."""

import copy

import pytest
import torch
from support.models import Net, adapter, tiny_gpt2, tiny_llama, with_peft
from torch import nn

from lora_fused import AdapterBank, attach
from lora_fused.library import fingerprint
from lora_fused.library.fingerprint import module_sizes


def test_copies_agree():
    known = fingerprint(Net())
    assert len(known) == 64 and int(known, 16)
    assert fingerprint(copy.deepcopy(Net())) == known
    assert fingerprint(Net().to(torch.bfloat16)) == known
    assert fingerprint(Net().double()) == known
    assert fingerprint(Net().eval()) == known
    assert fingerprint(torch.compile(Net())) == known


def test_others_do_not():
    """Negative control: another seed, one changed value, one shape, one name."""
    changed, wider, renamed = Net(), Net(), Net()
    with torch.no_grad():
        changed.up.bias[3] += 0.1
    wider.down = nn.Linear(12, 7, bias=False)
    renamed.out, renamed.down = renamed.down, None
    models = [Net(), Net(seed=1), changed, wider, renamed]
    assert len({fingerprint(model) for model in models}) == len(models)


def test_an_attached_model_has_that_of_its_base():
    model, bank = Net(), AdapterBank()
    bank.add(adapter("a", 1, modules=("embed", "up", "down")))
    known, sizes = fingerprint(model), module_sizes(model)
    handle = attach(model, bank)
    bank.trainable()
    assert fingerprint(model) == fingerprint(handle) == known
    assert module_sizes(model) == sizes == {"embed": [11, 8], "up": [8, 12], "down": [12, 6]}
    handle.detach()
    assert fingerprint(model) == known


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_a_peft_model_has_that_of_its_base(make):
    pytest.importorskip("peft")
    model = make()
    known, sizes = fingerprint(model), module_sizes(model)
    names = ["q_proj", "embed_tokens"] if make is tiny_llama else ["c_attn", "wte"]
    saved = ["lm_head"] if make is tiny_llama else None
    wrapped, _ = with_peft(model, {"one": {"target_modules": names, "modules_to_save": saved}})
    assert fingerprint(wrapped) == known
    assert module_sizes(wrapped) == sizes


def test_sizes_are_in_and_out():
    pytest.importorskip("transformers")
    sizes, model = module_sizes(tiny_gpt2()), tiny_gpt2()
    name = next(name for name in sizes if name.endswith("attn.c_attn"))
    assert sizes[name] == list(model.get_submodule(name).weight.shape)
    assert sizes[name][1] == 3 * sizes[name][0], "a Conv1D holds [I, O]"


def test_a_head_does_not_count():
    transformers = pytest.importorskip("transformers")
    whole = tiny_llama()
    bare = transformers.LlamaModel(whole.config)
    bare.load_state_dict(whole.model.state_dict())
    assert fingerprint(bare) == fingerprint(whole)


def test_what_has_no_fingerprint():
    quantised = Net()
    quantised.up.weight = nn.Parameter(torch.ones(12, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"'up\.weight' must be floating point of .*uint8"):
        fingerprint(quantised)
    with pytest.raises(ValueError, match=r"must be floating point of .*float8"):
        fingerprint(Net().to(torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="must have values, got a meta tensor"):
        fingerprint(Net().to("meta"))
    with pytest.raises(ValueError, match="model must have parameters"):
        fingerprint(nn.ReLU())
    with pytest.raises(ValueError, match="model must be a module or a handle"):
        fingerprint(7)
