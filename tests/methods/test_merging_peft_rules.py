"""Entrywise merges beside PEFT's add_weighted_adapter, DARE with the same masks."""

import copy
from unittest import mock

import pytest
import torch
from support.models import read_peft, tiny_gpt2, tiny_llama, with_peft
from test_merging_peft import GPT2, LLAMA, MIXED, WEIGHTS, product

from lora_fused import AdapterBank, LoraFactors
from lora_fused.io import read_adapter, write_adapter
from lora_fused.methods import merge
from lora_fused.methods.entrywise import RULES, drawn
from lora_fused.testing import assert_within_budget

SEED, DENSITY = 3, 0.6
MODELS = {"llama": (tiny_llama, LLAMA, MIXED), "gpt2": (tiny_gpt2, GPT2, GPT2)}
TIES = [rule for rule in RULES if "ties" in rule]
CASES = [
    (kind, model, method)
    for rule in RULES
    for kind in (rule, f"{rule}_svd")
    for model in MODELS
    for method in (("total", "frequency") if rule in TIES else ("total",))
]


def masks(wrapped, bank: AdapterBank, kind: str, modules) -> list[torch.Tensor]:
    """What lora_fused draws, in the order and the shapes in which PEFT asks for it."""
    found = []
    for path, layer in wrapped.base_model.model.named_modules():
        parts = {
            n: bank.adapter(n).modules[path] for n in WEIGHTS if path in bank.adapter(n).modules
        }
        if path not in modules:
            continue
        for tensor in ("update",) if kind.endswith("_svd") else ("lora_a", "lora_b"):
            for name, part in parts.items():
                shape = (part.lora_b.shape[1], part.lora_a.shape[1])
                shape = shape if tensor == "update" else getattr(part, tensor).shape
                kept = drawn(f"{path}\0{name}\0{tensor}", SEED, shape, DENSITY)
                turned = part.embedding or getattr(layer, "fan_in_fan_out", False)
                turned = tensor == "lora_b" or (tensor == "update" and turned)
                found.append(kept.T if turned else kept)
    return found


def peft_merges(wrapped, bank, kind: str, modules, **options) -> dict[str, LoraFactors]:
    queue = masks(wrapped, bank, kind, modules) if kind.startswith("dare") else []

    def pruned(tensor, density, rescale):
        return tensor * queue.pop(0) / density

    with mock.patch("peft.utils.merge_utils.random_pruning", pruned):
        names, weights = list(WEIGHTS), list(WEIGHTS.values())
        wrapped.add_weighted_adapter(names, weights, "merged", kind, density=DENSITY, **options)
    assert not queue
    return read_peft(wrapped, "merged").modules


@pytest.mark.parametrize("kind, model, method", CASES, ids=["-".join(case) for case in CASES])
def test_products_equal_those_of_peft(kind, model, method):
    """Patterns, rsLoRA, an embedding, a negative weight; mixed ranks in the dense forms."""
    pytest.importorskip("peft")
    make, same_rank, mixed = MODELS[model]
    dense = kind.endswith("_svd")
    wrapped, adapters = with_peft(make(), mixed if dense else same_rank)
    bank = AdapterBank()
    bank.add_many(adapters)
    options = {"density": DENSITY, "majority_sign_method": method, "combination_type": kind}
    options |= {"rank": 5} if dense else {}
    merged = merge(bank, WEIGHTS, seed=SEED, **options)
    theirs = {"majority_sign_method": method, "svd_rank": 5 if dense else None}
    doubled = copy.deepcopy(wrapped).double()  # the weights are exact in any dtype
    modules = merged.adapter.modules
    rounded = peft_merges(wrapped, bank, kind, modules, **theirs)
    assert modules.keys() == rounded.keys()
    # PEFT's own run in float64, except where it rounds the roots of the weights to float32.
    exact = peft_merges(doubled, bank, kind, modules, **theirs) if dense else rounded
    other = merge(bank, WEIGHTS, seed=SEED + 1, **{**options, "density": DENSITY - 0.1})
    for module, part in modules.items():
        truth, reference = product(exact[module]), product(rounded[module]).float()
        assert_within_budget(product(part).float(), reference, truth, module)
        with pytest.raises(AssertionError):  # the negative control
            assert_within_budget(product(other.adapter.modules[module]).float(), reference, truth)


@pytest.mark.parametrize("rule", RULES)
def test_rules_on_factors_refuse_mixed_ranks_as_peft_does(rule):
    pytest.importorskip("peft")
    wrapped, adapters = with_peft(tiny_llama(), MIXED)
    bank = AdapterBank()
    bank.add_many(adapters)
    with pytest.raises(ValueError, match="All adapters must have the same r"):
        peft_merges(wrapped, bank, rule, ())
    with pytest.raises(ValueError, match=f"be '{rule}_svd' or '{rule}_core' where ranks differ"):
        merge(bank, WEIGHTS, combination_type=rule, density=0.5)


@pytest.mark.parametrize("kind", ["ties", "dare_ties_svd"])
def test_a_weight_of_zero_votes_as_in_peft(kind):
    pytest.importorskip("peft")
    wrapped, adapters = with_peft(tiny_llama(), LLAMA)
    bank = AdapterBank()
    bank.add_many(adapters)
    weights = {**WEIGHTS, "code": 0.0}
    merged = merge(bank, weights, combination_type=kind, density=DENSITY, seed=SEED)
    with mock.patch.dict(WEIGHTS, weights):
        theirs = peft_merges(wrapped, bank, kind, {m for a in adapters for m in a.modules})
    for module, part in merged.adapter.modules.items():
        truth = product(theirs[module])
        assert (product(part) - truth).norm() < 1e-5 * truth.norm(), module
    left_out = theirs.keys() - merged.adapter.modules.keys()
    assert all(not product(theirs[module]).any() for module in left_out)


@pytest.mark.parametrize("kind", ["ties_svd", "dare_linear_core"])
def test_what_is_written_loads_in_peft(kind, tmp_path):
    peft = pytest.importorskip("peft")
    _, adapters = with_peft(tiny_llama(), MIXED)
    bank = AdapterBank()
    bank.add_many(adapters)
    adapter, _ = merge(bank, WEIGHTS, combination_type=kind, density=0.5, dtype=torch.bfloat16)
    write_adapter(adapter, tmp_path / "merged")
    loaded = peft.PeftModel.from_pretrained(
        tiny_llama(), tmp_path / "merged", autocast_adapter_dtype=False
    )
    theirs, again = read_peft(loaded, "default").modules, read_adapter(tmp_path / "merged")
    assert theirs.keys() == adapter.modules.keys() == again.modules.keys()
    for module, part in adapter.modules.items():
        for other in (theirs[module], again.modules[module]):
            assert other.lora_a.equal(part.lora_a) and other.lora_b.equal(part.lora_b), module
            assert other.scale == part.scale == 1
