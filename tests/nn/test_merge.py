"""merge_into_base: the right weights, the exact way back, and nothing half-merged."""

import copy

import pytest
import torch
from support.models import Net, adapter, merged, tiny_gpt2, tiny_llama, tokens, with_peft
from torch import nn

from lora_fused import AdapterBank, Mixture
from lora_fused.methods import LearnedComposition
from lora_fused.nn import attach, merge_into_base
from lora_fused.testing import assert_within_budget

ALL = ("embed", "up", "down")
WEIGHTS = {"a": 0.5, "b": -1.25, "c": 2.0}


def bank_of(dtype=torch.float32) -> AdapterBank:
    bank = AdapterBank(dtype=dtype)
    bank.add_many([adapter("a", 1, 2, ALL), adapter("b", 2, 5, ALL), adapter("c", 3, 1)])
    return bank


def adapters_of(bank):
    return [bank.adapter(name) for name in bank.names]


def bits(model) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def equal(model, before) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[n], t) for n, t in before.items())


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_weights_are_sums_of_products_and_come_back(dtype):
    model, bank = Net().to(dtype), bank_of()
    before, held = bits(model), [*model.parameters()]
    truth = merged(model, adapters_of(bank), WEIGHTS)
    reference = copy.deepcopy(model).float()
    for one in adapters_of(bank):
        for name, part in one.modules.items():
            update = WEIGHTS[one.name] * part.scale * (part.lora_b.T @ part.lora_a)
            weight = reference.get_submodule(name).weight.data
            weight += update.T if part.embedding else update
    handle = merge_into_base(model, bank, WEIGHTS)
    assert handle.modules == ALL
    assert handle.nbytes == sum(before[f"{name}.weight"].nbytes for name in ALL)
    for name in ALL:
        weight = model.get_submodule(name).weight
        rounded = reference.get_submodule(name).weight.to(dtype)
        assert_within_budget(weight, rounded, truth.get_submodule(name).weight, name)
        assert (weight - before[f"{name}.weight"]).abs().max() > 0.1
    handle.undo()
    assert equal(model, before) and all(
        p is q for p, q in zip(held, model.parameters(), strict=True)
    )


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2], ids=["llama", "gpt2"])
def test_agrees_with_the_mixture_at_run_time_and_with_peft(make):
    pytest.importorskip("peft")
    model = make()
    linear = ["c_attn", "c_proj"] if make is tiny_gpt2 else ["q_proj", "down_proj"]
    configs = {
        "a": {"r": 4, "lora_alpha": 8, "target_modules": linear, "use_rslora": True},
        "b": {"r": 2, "lora_alpha": 3, "target_modules": linear[:1]},
    }
    for config in configs.values():
        config["fan_in_fan_out"] = make is tiny_gpt2
    wrapped, adapters = with_peft(model, configs)
    bank, x = AdapterBank(), tokens(2, 5, 61)
    bank.add_many(adapters)
    before = bits(model)
    with torch.no_grad():
        double = copy.deepcopy(model).double()
        with attach(double, copy.deepcopy(bank)).mix({"a": 1.0}):
            truth = double(x).logits
        base = model(x).logits
        with merge_into_base(model, bank, "a"):
            ours = model(x).logits
        theirs = wrapped.merge_and_unload(adapter_names=["a"])(x).logits
    assert_within_budget(ours - base, theirs - base, truth - base.double())
    assert equal(model, before)


def test_weights_of_each_layer_and_repeated_ids():
    bank = bank_of()
    composition = LearnedComposition(bank, constraint="none")
    composition.logits.data.copy_(torch.tensor([[1.0, 0, 3], [0, -2, 0], [0, 0, 0]]))
    model = Net()
    before = bits(model)
    with merge_into_base(model, bank, composition.mixture()) as handle:
        assert handle.modules == ("embed", "up")  # "c" lacks embed; nothing weighs in "down"
        layers = {"embed": {"a": 1.0}, "up": {"b": -2.0}}
        for name, weights in layers.items():
            truth = merged(Net(), adapters_of(bank), weights).get_submodule(name).weight
            found = model.get_submodule(name).weight
            assert_within_budget(found, truth.float(), truth)
    ids, weights = torch.tensor([[1, 0, 1, -1]]), torch.tensor([[0.5, 1.0, 0.25, 9.0]])
    with merge_into_base(model, bank, Mixture.top_k(ids, weights)):
        found = bits(model)
    with merge_into_base(model, bank, {"b": 0.75, "a": 1.0}):
        assert equal(model, found)
    assert equal(model, before)


def test_merges_nest_and_are_undone_in_order():
    model, bank = Net(), bank_of()
    before = bits(model)
    one = merge_into_base(model, bank, "a")
    middle = bits(model)
    other = merge_into_base(model, bank, {"b": -1.0})
    with pytest.raises(RuntimeError, match="undo: the weight of 'embed' must be as merge_into"):
        one.undo()
    other.undo()
    assert equal(model, middle)
    one.undo()
    assert equal(model, before)
    with pytest.raises(RuntimeError, match="undo: the mixture must be in the weights"):
        one.undo()


@pytest.mark.parametrize("change", ["train", "rows", "columns", "convert", "replace"])
def test_a_weight_changed_since_is_not_overwritten(change):
    model = Net()
    handle = merge_into_base(model, bank_of(), "a")
    if change == "train":
        model.down.weight.data[0, 0] = -model.down.weight.data[0, 0]
    elif change in ("rows", "columns"):  # the same values at other places
        model.down.weight.data = model.down.weight.data.roll(1, int(change == "columns"))
    elif change == "convert":
        model.half()
    else:
        model.down.weight = nn.Parameter(torch.zeros(6, 12))
    found = bits(model)
    with pytest.raises(RuntimeError, match="changed since"):
        handle.undo()
    assert equal(model, found)


def test_a_backward_pass_across_the_merge_is_refused():
    model = Net()
    loss = model(tokens()).square().sum()
    with (
        merge_into_base(model, bank_of(), "a"),
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
    ):
        loss.backward()


@pytest.mark.parametrize("where", ["adapter", "model", "overflow", "interrupt"])
def test_nothing_is_half_merged_after_an_error(where, monkeypatch):
    model, bank = Net().to(torch.float16), bank_of()
    error, what = ValueError, "weight of 'down' must stay finite in torch.float16, got "
    if where == "adapter":
        bank.stacks["down"].lora_a[0, 0] = float("nan")
        what += "non-finite values in an adapter"
    elif where == "model":
        model.down.weight.data[0, 0] = float("inf")
        what += "non-finite weights in the model"
    elif where == "overflow":
        bank.stacks["down"].scale.fill_(1e6)
        what += "values beyond it"
    else:
        error, what, times = KeyboardInterrupt, None, []
        addmm = torch.addmm

        def interrupted(*args):
            times.append(args)
            if len(times) == 3:
                raise KeyboardInterrupt
            return addmm(*args)

        monkeypatch.setattr(torch, "addmm", interrupted)
    before, versions = bits(model), [p._version for p in model.parameters()]
    with pytest.raises(error, match=what):
        merge_into_base(model, bank, {"a": 1.0})
    assert equal(model, before)
    # The other two modules were merged when it came to the third.
    assert [p._version for p in model.parameters()] != versions


class Tied(nn.Module):
    """An embedding that is the head too."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.embed(x))


def test_tied_weights_are_refused_by_name_or_untied():
    torch.manual_seed(0)
    model, bank = Tied(), AdapterBank()
    bank.add(adapter("a", 1, 2, ["embed"]))
    before, weight, x = bits(model), model.embed.weight, tokens()
    with pytest.raises(ValueError, match=r"no other module uses .*\{'embed': \['head.weight'\]\}"):
        merge_into_base(model, bank, "a")
    with torch.no_grad():
        handle = attach(copy.deepcopy(model), copy.deepcopy(bank))
        with handle.mix("a"):
            wanted = handle.model(x)
        merge = merge_into_base(model, bank, "a", tied="untie")
        assert torch.equal(model.head.weight, before["head.weight"])
        assert (model(x) - wanted).abs().max() < 1e-5 < (wanted - Tied()(x)).abs().max()
    merge.undo()
    assert model.embed.weight is weight is model.head.weight and equal(model, before)


def test_views_of_one_storage_are_tied_only_where_they_overlap():
    model, flat = Net(), torch.randn(8 * 12 + 12 * 6)
    model.up.weight = nn.Parameter(flat[:96].view(12, 8))
    model.down.weight = nn.Parameter(flat[96:].view(6, 12))
    before = bits(model)
    with merge_into_base(model, bank_of(), "a"):
        assert not torch.equal(flat[:96].view(12, 8), before["up.weight"])
    model.down.weight = nn.Parameter(flat[90:162].view(6, 12))
    with pytest.raises(ValueError, match=r"'up': \['down.weight'\], 'down': \['up.weight'\]"):
        merge_into_base(model, bank_of(), "a")


class Quantized(nn.Linear):
    """As quantisation libraries have them: a subclass with packed weights."""


def test_refuses_what_has_no_weight_to_add_to():
    bank = bank_of()
    model = Net()
    model.down.__class__ = Quantized
    with pytest.raises(ValueError, match=r"'down' must be exactly an nn.Linear.*Quantized"):
        merge_into_base(model, bank, "a")
    for dtype, got in ((torch.int8, "torch.int8"), (torch.float8_e4m3fn, "torch.float8_e4m3fn")):
        model = Net()
        model.down.weight = nn.Parameter(model.down.weight.data.to(dtype), requires_grad=False)
        with pytest.raises(ValueError, match=rf"ordinary floating-point weight, got .*{got}"):
            merge_into_base(model, bank, "a")
    model = Net()
    nn.utils.parametrizations.weight_norm(model.up)
    with pytest.raises(ValueError, match=r"'up' must be exactly .*ParametrizedLinear"):
        merge_into_base(model, bank, "a")
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ValueError, match="can be written to, got the meta device"):
        merge_into_base(model, bank, "a")
    with torch.inference_mode():
        model = Net()
    with pytest.raises(ValueError, match="can be written to, got a tensor made in inference mode"):
        merge_into_base(model, bank, "a")
    model = Net()
    attach(model, bank)
    with pytest.raises(ValueError, match="must be detached first"):
        merge_into_base(model, bank, "a")


@pytest.mark.parametrize(
    "mixture, what",
    [
        ([{"a": 1.0}, None], "mixture must be a Mixture of a single row.*got 2 rows"),
        (Mixture.rows([{"a": 1.0}, None]), "mixture must have a single row.*got 2 rows"),
        ({"x": 1.0}, "name must be a loaded adapter"),
        ({"a": 0.0}, "mixture must change at least one module"),
        ("__base__", "mixture must change at least one module"),
        (None, "mixture must be a Mixture of a single row.*got NoneType"),
    ],
    ids=str,
)
def test_rejects_mixtures(mixture, what):
    model = Net()
    before = bits(model)
    with pytest.raises(ValueError, match=what):
        merge_into_base(model, bank_of(), mixture)
    assert equal(model, before)


def test_rejects_models_and_banks():
    bank = bank_of()
    model = Net()
    model.top = model.up
    del model.up
    with pytest.raises(ValueError, match="every module of the adapters, got no 'up'"):
        merge_into_base(model, bank, "a")
    model = Net()
    model.up = nn.Linear(8, 13)
    with pytest.raises(ValueError, match=r"in and out features \(8, 12\), got \(8, 13\)"):
        merge_into_base(model, bank, "a")
    bank.add(adapter("d", 4))
    bank.saved["d"] = {"down.weight": torch.zeros(6, 12)}
    with pytest.raises(ValueError, match=r"adapters must have no saved modules .*\['down'\]"):
        merge_into_base(Net(), bank, {"a": 1.0, "d": 0.5})
    merge_into_base(Net(), bank, "a").undo()
    merge_into_base(Net(), bank, "d", saved_modules="ignore").undo()
    for option, word in (("tied", "copy"), ("saved_modules", "apply")):
        with pytest.raises(ValueError, match=f"{option} must be 'error' or .*, got '{word}'"):
            merge_into_base(Net(), bank, "a", **{option: word})
    other = AdapterBank()
    other.add(adapter("a", 1))
    other.stacks["up"].embedding = True
    with pytest.raises(ValueError, match="'up' must be an embedding, as the adapters are"):
        merge_into_base(Net(), other, "a")


def test_works_in_inference_mode_and_leaves_the_model_trainable():
    model, bank = Net(), bank_of()
    before = bits(model)
    with torch.inference_mode(), merge_into_base(model, bank, WEIGHTS):
        assert not equal(model, before)
    assert equal(model, before)
    model(tokens()).sum().backward()
    assert model.up.weight.grad is not None
    bank.trainable(["a"])
    with merge_into_base(model, bank, "a"):
        assert not equal(model, before)
