"""Adapters with fully trained modules: refused, ignored, or each row's own copy."""

import copy
import pickle

import pytest
import torch
from support.models import tiny_llama, tokens, with_peft
from torch import nn

from lora_fused import Adapter, AdapterBank, LoraFactors, Mixture
from lora_fused.io import load_adapters
from lora_fused.nn import attach, handle_of
from lora_fused.testing import assert_within_budget


class Classifier(nn.Module):
    """[S, N, 6] -> [S, 4]: an adapted layer, and a head of two layers with a norm."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__()
        self.proj = nn.Linear(6, 8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        self.eval()

    def forward(self, x):
        return self.head(torch.tanh(self.proj(x)).mean(1))


def make(name: str, seed: int, saved: bool = True) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(2, n, generator=generator) for n in (6, 8))
    state = Classifier().state_dict() if saved else {}
    tensors = {
        key: t + torch.rand(t.shape, generator=generator) if t.is_floating_point() else t.clone()
        for key, t in state.items()
        if key.startswith("head")
    }
    return Adapter(name, {"proj": LoraFactors(a, b, 0.5)}, tensors)


def bank_of(*adapters) -> AdapterBank:
    bank = AdapterBank()
    bank.add_many(adapters or [make("a", 1), make("b", 2), make("headless", 3, saved=False)])
    return bank


def alone(row: dict[str, float] | None, x, dtype):
    """One row with merged weights and the saved head of its adapter put into the model."""
    model = Classifier().to(dtype)
    for one in (make("a", 1), make("b", 2), make("headless", 3, saved=False)):
        weight = (row or {}).get(one.name)
        if weight is not None:
            part = one.modules["proj"]
            update = part.lora_b.to(dtype).T @ part.lora_a.to(dtype)
            model.proj.weight.data += weight * part.scale * update
            model.load_state_dict({**model.state_dict(), **one.saved})
    return model(x.to(dtype)).detach()


ROWS = [{"a": 1.0}, None, {"b": 0.5}, {"headless": 1.0}, {"a": -2.0}]


def inputs(samples=5):
    return torch.randn(samples, 3, 6, generator=torch.Generator().manual_seed(9))


def compare(y, rows, x):
    singles = [
        torch.cat([alone(row, x[i : i + 1], dtype) for i, row in enumerate(rows)])
        for dtype in (torch.float32, torch.float64)
    ]
    assert_within_budget(y, *singles)


@pytest.mark.parametrize(
    "mixture, rows",
    [
        (Mixture.rows(ROWS), ROWS),
        (Mixture.of({"b": 1.0}), [{"b": 1.0}] * 5),
        (
            Mixture.rows([{"a": 1.0}, *ROWS[1:3]]).repeat(2),
            [{"a": 1.0}] * 2 + [None] * 2 + [{"b": 0.5}] * 2,
        ),
        (Mixture.rows([None, {"headless": 1.0}] * 3), [None, {"headless": 1.0}] * 3),
    ],
    ids=["mixed", "one-for-all", "repeated", "no-heads"],
)
def test_apply_runs_each_row_with_its_own_copy(mixture, rows):
    model = Classifier()
    handle = attach(model, bank_of(), saved_modules="apply")
    x = inputs(len(rows))
    with handle.mix(mixture), torch.no_grad():
        compare(model(x), rows, x)
    with torch.no_grad():
        assert torch.equal(model(x), Classifier()(x))


def test_apply_matches_peft():
    pytest.importorskip("peft")
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["proj"], "modules_to_save": ["head"]}
    wrapped, adapters = with_peft(Classifier(), {"math": config, "code": config})
    copies = wrapped.base_model.model.head.modules_to_save
    for one in adapters:
        for parameter in copies[one.name].parameters():
            parameter.data.normal_(std=0.5)
        state = copies[one.name].state_dict()
        one.saved = {f"head.{key}": t.detach().clone() for key, t in state.items()}
    model, x, names = Classifier(), inputs(4), ["math", None, "code", "math"]
    handle = attach(model, bank_of(*adapters), saved_modules="apply")

    def by_row(wrapped, x):
        outs = []
        for i, name in enumerate(names):
            wrapped.set_adapter(name or "math")
            if name is None:
                with wrapped.disable_adapter():
                    outs.append(wrapped(x[i : i + 1]))
            else:
                outs.append(wrapped(x[i : i + 1]))
        return torch.cat(outs).detach()

    with handle.mix(Mixture.rows(names)), torch.no_grad():
        y = model(x)
    truth = by_row(copy.deepcopy(wrapped).double(), x.double())
    assert_within_budget(y, by_row(wrapped, x), truth)


def test_apply_leaves_the_model_as_it_was():
    model = Classifier()
    before = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    keys = model.state_dict().keys()
    handle = attach(model, bank_of(), saved_modules="apply")
    assert model.state_dict().keys() == keys
    model.load_state_dict(Classifier().state_dict())
    twin = copy.deepcopy(model)
    x = inputs()
    with handle.mix(Mixture.rows(ROWS)), handle_of(twin).mix(Mixture.rows(ROWS)):
        assert torch.equal(model(x), twin(x))
    with pytest.raises(pickle.PicklingError):  # its classes are made for it
        pickle.dumps(model)
    model.to(torch.bfloat16)
    with handle.mix(Mixture.rows(ROWS)):
        assert model(x.bfloat16()).dtype == torch.bfloat16
    assert handle.bank.saved["a"]["head.0.weight"].dtype == torch.float32  # kept exactly
    handle.detach()
    after = {name: (type(m), set(vars(m))) for name, m in model.named_modules()}
    assert after == before


def test_error_names_adapters_and_modules_and_ignore_uses_the_models_own():
    model, x = Classifier(), inputs(2)
    with pytest.raises(ValueError, match=r"no saved modules.*'a': \['head.0 \(weight differs by"):
        attach(model, bank_of())
    handle = attach(model, bank_of(), saved_modules="ignore")
    with handle.mix(Mixture.rows([{"a": 0.5, "b": 0.5}, None])):
        assert torch.equal(model(x)[1], Classifier()(x)[1])
    handle.detach()
    handle = attach(model, bank_of(make("c", 4, saved=False)))
    handle.bank.add(make("a", 1))
    with pytest.raises(ValueError, match="mix: bank must have no saved modules"):
        handle.mix(Mixture.of({"c": 1.0}))
    with pytest.raises(ValueError, match="route: bank must have no saved modules"):
        handle.route(lambda name, x: None)


def test_apply_refuses_what_has_no_one_copy():
    model = Classifier()
    handle = attach(model, bank_of(), saved_modules="apply")
    for row in ({"a": 0.5, "b": 0.5}, {"a": 0.5, "headless": 0.5}):
        with pytest.raises(ValueError, match="mixture row 1 must name one adapter"):
            handle.mix(Mixture.rows([None, row]))
    with pytest.raises(ValueError, match="must be per='sample' to apply saved modules"):
        handle.mix(Mixture.rows(["a", "b"], per="token"))
    with pytest.raises(ValueError, match="'error' or 'ignore' for a router"):
        handle.route(lambda name, x: None)
    with (
        handle.mix(Mixture.rows(["a", "b"])),
        pytest.raises(ValueError, match="one row or as many"),
    ):
        model.head(torch.randn(3, 8))
    handle.bank.rename("a", "renamed")
    handle.bank.remove("headless")
    handle.bank.compact()
    with handle.mix(Mixture.rows(["renamed"] * 2)), torch.no_grad():
        compare(model(inputs(2)), [{"a": 1.0}] * 2, inputs(2))
    handle.bank.add(make("late", 7))
    with pytest.raises(RuntimeError, match="'late' must have been in the bank when"):
        handle.mix(Mixture.of({"late": 1.0}))


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda s: s.update({"tail.weight": torch.ones(2)}), "'tail'.*be a module of the model"),
        (lambda s: s.update({"proj.weight": torch.ones(8, 6)}), "'proj'.*not be adapted as well"),
        (lambda s: s.update({"weight": torch.ones(2)}), "must be a submodule, got the model"),
        (
            lambda s: s.pop("head.2.bias"),
            r"have the tensors \['bias', 'weight'\], got \['weight'\]",
        ),
        (
            lambda s: s.update({"head.2.bias": torch.ones(4, dtype=torch.int8)}),
            r"bias of the model's kind torch.float32, got torch.int8",
        ),
        (
            lambda s: s.update({"head.2.bias": torch.ones(5)}),
            r"bias of the model's shape \[4\], got",
        ),
    ],
    ids=["missing", "adapted", "root", "incomplete", "kind", "shape"],
)
def test_saved_modules_that_do_not_fit_are_refused(change, match):
    one, model = make("a", 1), Classifier()
    change(one.saved)
    with pytest.raises(ValueError, match=f"attach: saved module .*{match}"):
        attach(model, bank_of(one), saved_modules="apply")
    assert type(model.proj) is nn.Linear and type(model.head[0]) is nn.Linear


def of_peft(tmp_path) -> AdapterBank:
    """An adapter of embedding and head as PEFT saves it: with the base weights of both."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens", "lm_head"])
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        peft.get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "a")
    bank = load_adapters([tmp_path / "a"])
    assert sorted(bank.saved["a"]) == ["lm_head.weight", "model.embed_tokens.weight"]
    return bank


@pytest.mark.parametrize("policy", ["error", "apply"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untouched_copies_do_not_count(tmp_path, policy, dtype):
    bank, model, x = of_peft(tmp_path), tiny_llama().to(dtype), tokens(2, 4, 61)
    handle = attach(model, bank, saved_modules=policy)
    with handle.mix([{"a": 0.5}, None]), torch.no_grad():
        model(x)
    with handle.route(lambda name, x: (torch.zeros(1, 1).int(), torch.ones(1, 1))):
        model(x)
    late = bank.adapter("a")
    late.name = "late"
    late.saved = {path: tensor.clone() for path, tensor in late.saved.items()}
    bank.add(late)
    with handle.mix({"a": 0.5, "late": 0.5}):
        model(x)
    assert bank.saved["late"] is late.saved  # kept for writing
    late.saved = {"lm_head.weight": late.saved["lm_head.weight"] + 1}
    late.name = "trained"
    bank.add(late)
    if policy == "error":
        with pytest.raises(ValueError, match=r"{'trained': \['lm_head \(weight differs by up to 1"):
            handle.mix("a")
    else:
        handle.mix("a")
        with pytest.raises(RuntimeError, match="'trained' must have been in the bank"):
            handle.mix("trained")


@pytest.mark.parametrize(
    "change, difference",
    [
        (lambda w: w[0, 0].add_(0.5), "weight differs by up to 0.5"),
        (lambda w: w.resize_(62, 32).fill_(1.0), r"weight is \[62, 32\], the model's \[61, 32\]"),
    ],
    ids=["trained", "resized"],
)
def test_copies_that_differ_are_named(tmp_path, change, difference):
    bank, model = of_peft(tmp_path), tiny_llama()
    change(bank.saved["a"]["lm_head.weight"])
    with pytest.raises(ValueError, match=rf"got {{'a': \[.lm_head \({difference}\).\]}}"):
        attach(model, bank)
    with pytest.raises(ValueError, match=f"'lm_head' of adapter 'a' must not be .* {difference}"):
        attach(model, bank, saved_modules="apply")


def test_untouched_copies_leave_the_other_modules_to_apply():
    bank, x = bank_of(), inputs()
    for tensors in bank.saved.values():
        tensors["proj.weight"] = Classifier().proj.weight.detach().clone()
        tensors["proj.bias"] = Classifier().proj.bias.detach().clone()
    model = Classifier()
    handle = attach(model, bank, saved_modules="apply")
    with handle.mix(ROWS), torch.no_grad():
        compare(model(x), ROWS, x)
    with handle_of(copy.deepcopy(model)).mix(ROWS):
        pass
