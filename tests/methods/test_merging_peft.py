"""merge beside PEFT's add_weighted_adapter, written and loaded there, and on public adapters."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from support.models import read_peft, tiny_gpt2, tiny_llama, tokens, with_peft
from torch import Tensor

from lora_fused import AdapterBank, LoraFactors
from lora_fused.io import load_adapters, read_adapter, write_adapter
from lora_fused.methods import merge
from lora_fused.testing import assert_within_budget

LLAMA = {
    "math": {
        "r": 4,
        "lora_alpha": 8,
        "alpha_pattern": {"v_proj": 2},
        "target_modules": ["q_proj", "v_proj", "down_proj"],
    },
    "code": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "embed_tokens"]},
    "chat": {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
}
MIXED = {
    **LLAMA,
    "code": {**LLAMA["code"], "r": 8},
    "chat": {**LLAMA["chat"], "rank_pattern": {"layers.1.self_attn.q_proj": 6}},
}
GPT2 = {
    "math": {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True},
    "code": {"r": 4, "lora_alpha": 2, "target_modules": ["c_proj"], "fan_in_fan_out": True},
    "chat": {"r": 4, "lora_alpha": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True},
}
WEIGHTS = {"math": 0.5, "code": -0.25, "chat": 1.5}
CASES = {
    "cat": (tiny_llama, MIXED, {}),
    "svd": (tiny_llama, MIXED, {"rank": 3}),
    "linear": (tiny_llama, LLAMA, {}),
    "cat-gpt2": (tiny_gpt2, GPT2, {}),
    "svd-gpt2": (tiny_gpt2, GPT2, {"rank": 5}),
}


def product(part: LoraFactors) -> Tensor:
    return part.scale * (part.lora_b.double().T @ part.lora_a.double())


def peft_merges(wrapped, combination_type: str, rank: int | None) -> dict[str, LoraFactors]:
    """PEFT's merged adapter, with its own scaling."""
    wrapped.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), "merged", combination_type, svd_rank=rank
    )
    return read_peft(wrapped, "merged").modules


@pytest.mark.parametrize("case", CASES)
def test_products_equal_those_of_peft(case):
    pytest.importorskip("peft")
    make, configs, options = CASES[case]
    combination_type, rank = case.split("-")[0], options.get("rank")
    wrapped, adapters = with_peft(make(), configs)
    bank = AdapterBank()
    bank.add_many(adapters)
    merged = merge(bank, WEIGHTS, combination_type=combination_type, **options)
    doubled = copy.deepcopy(wrapped).double()  # the weights are exact in any dtype
    rounded = peft_merges(wrapped, combination_type, rank)
    assert merged.adapter.modules.keys() == rounded.keys()
    # PEFT's own run in float64, except where it rounds the roots of the weights to float32.
    exact = (
        rounded if combination_type == "linear" else peft_merges(doubled, combination_type, rank)
    )
    for module, part in merged.adapter.modules.items():
        truth, reference = product(exact[module]), product(rounded[module]).float()
        assert_within_budget(product(part).float(), reference, truth, module)
    flipped = merge(bank, {**WEIGHTS, "code": 0.25}, combination_type=combination_type, **options)
    changed = [m for m in exact if m in bank.adapter("code").modules]
    for module in changed:  # the negative control
        truth, reference = product(exact[module]), product(rounded[module]).float()
        with pytest.raises(AssertionError):
            other = product(flipped.adapter.modules[module]).float()
            assert_within_budget(other, reference, truth)


def test_linear_refuses_mixed_ranks_as_peft_does():
    pytest.importorskip("peft")
    wrapped, adapters = with_peft(tiny_llama(), MIXED)
    bank = AdapterBank()
    bank.add_many(adapters)
    with pytest.raises(ValueError, match="All adapters must have the same r"):
        peft_merges(wrapped, "linear", None)
    with pytest.raises(ValueError, match="'cat' or 'svd' where ranks differ, got 'lin"):
        merge(bank, WEIGHTS, combination_type="linear")


@pytest.mark.parametrize("make, configs", [(tiny_llama, MIXED), (tiny_gpt2, GPT2)])
@pytest.mark.parametrize("options", [{}, {"combination_type": "svd", "energy": 0.8}], ids=str)
def test_what_is_written_loads_in_peft_and_here(make, configs, options, tmp_path):
    peft = pytest.importorskip("peft")
    wrapped, adapters = with_peft(make(), configs)
    bank = AdapterBank()
    bank.add_many(adapters)
    for name, config in configs.items():
        known = {"base_model_name_or_path": "some/model", "task_type": "CAUSAL_LM"}
        bank.metadata[name]["config"] = config | known
    adapter, _ = merge(bank, WEIGHTS, **options)
    write_adapter(adapter, tmp_path / "merged")
    again = read_adapter(tmp_path / "merged")
    config = again.metadata["config"]
    assert (config["base_model_name_or_path"], config["task_type"]) == ("some/model", "CAUSAL_LM")
    assert config["fan_in_fan_out"] == (make is tiny_gpt2)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "merged").eval()
    theirs = read_peft(loaded, "default").modules
    assert theirs.keys() == adapter.modules.keys() == again.modules.keys()
    for module, part in adapter.modules.items():
        for other in (theirs[module], again.modules[module]):
            assert other.lora_a.equal(part.lora_a) and other.lora_b.equal(part.lora_b), module
            assert torch.tensor(other.scale).equal(torch.tensor(part.scale)), module
    if options:
        return
    peft_merges(wrapped, "cat", None)
    wrapped.set_adapter("merged")
    x = tokens(2, 6, 61, seed=1)
    y, reference = (model(input_ids=x).logits.detach() for model in (loaded, wrapped))
    assert_within_budget(y, reference, wrapped.double()(input_ids=x).logits.detach())


def test_real_adapters_of_one_base(data_dir):
    """They share one random A, so their rows are nearly dependent; some B are zero."""
    names = ["trec6", "subj", "tw_emotion", "clinc_home"]
    bank = load_adapters([data_dir / "adapters_minilm" / name for name in names])
    weights = dict(zip(names, (0.5, 0.25, -0.25, 0.5), strict=True))
    cat, svd = merge(bank, weights), merge(bank, weights, combination_type="svd", rank=8)
    assert cat.report.error_to_exact < 1e-6 and 0 < svd.report.energy < 1
    worst = []
    for module, part in svd.adapter.modules.items():
        parts = [(bank.adapter(name).modules[module], weights[name]) for name in names]
        exact = sum(weight * product(p) for p, weight in parts)
        values = torch.linalg.svdvals(exact)
        found = part.lora_a.norm(dim=1) * part.lora_b.norm(dim=1)
        assert_within_budget(found, torch.linalg.svdvals(exact.float())[:8], values[:8], module)
        worst.append((product(part) - exact).square().sum())
    size = sum(part.norm**2 for part in svd.report.modules.values())
    truth = (torch.stack(worst).sum() / size).sqrt()[None]
    assert_within_budget(torch.tensor([svd.report.error_to_exact]), truth.float(), truth, "overall")
    linear = merge(bank, weights, combination_type="linear")
    assert linear.report.error_to_exact > 0.1


def test_public_adapters_with_trained_heads(data_dir, tmp_path):
    folder = data_dir / "adapters"
    found = [p for p in folder.glob("*distilbert*/**/") if (p / "adapter_config.json").is_file()]
    found = [p for p in found if (p / "adapter_model.safetensors").is_file()][:2]
    if len(found) < 2:
        pytest.skip(f"{folder} holds fewer than two DistilBERT adapters")
    bank = load_adapters({f"{i}": path for i, path in enumerate(found)})
    weights = dict.fromkeys(bank.names, 0.5)
    with pytest.raises(ValueError, match="merge: adapters must have no saved modules"):
        merge(bank, weights)
    merged = merge(bank, weights, saved_modules="ignore")
    assert merged.report.error_to_exact < 1e-6
    write_adapter(merged.adapter, tmp_path / "merged")
    names = load_file(tmp_path / "merged" / "adapter_model.safetensors")
    assert all(".lora_" in name for name in names)
    read_adapter(tmp_path / "merged")
