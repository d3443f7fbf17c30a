"""new_adapter: begins as PEFT's do, trains in an attached model, and PEFT runs what was written."""

import json

import pytest
import torch
from support.models import Net, tiny_gpt2, tiny_llama, tokens
from torch.nn import functional as F

from lora_fused import AdapterBank, Mixture, attach, new_adapter, write_adapter
from lora_fused.testing import assert_within_budget

TARGETS = {"target_modules": ["q_proj", "v_proj"], "seed": 0}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (tiny_llama, ["q_proj", "v_proj", "embed_tokens"]),
        (tiny_llama, r"model\.layers\.\d+\.mlp\.(up|down)_proj"),
        (tiny_llama, "all-linear"),
        (tiny_gpt2, ["c_attn", "mlp.c_proj"]),
    ],
    ids=["list", "regex", "all-linear", "conv1d"],
)
def test_trained_here_and_run_by_peft(make, targets, use_rslora, tmp_path):
    peft = pytest.importorskip("peft")
    model, x = make(), tokens(2, 6, 61, seed=1)
    untouched = model(x).logits.detach()
    options = {"rank": 4, "alpha": 6, "target_modules": targets, "use_rslora": use_rslora}
    bank = AdapterBank()
    bank.add(new_adapter(model, "mine", **options, seed=0))
    handle = attach(model, bank)
    optimizer = torch.optim.SGD(bank.trainable(["mine"]), lr=0.5)
    losses = []
    with handle.mix(Mixture.of("mine")):
        assert torch.equal(model(x).logits, untouched)  # a new adapter changes nothing
        for _ in range(3):
            logits = model(x).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        bank.freeze()
        with torch.no_grad():
            trained = model(x).logits
    assert losses[-1] < losses[0]
    write_adapter(bank.adapter("mine"), tmp_path / "mine")
    outs = [
        peft.PeftModel.from_pretrained(make().to(dtype), tmp_path / "mine").to(dtype)(x).logits
        for dtype in (torch.float32, torch.float64)
    ]
    reference, truth = (out.detach() for out in outs)
    assert_within_budget(trained, reference, truth)
    with pytest.raises(AssertionError):  # the negative control
        assert_within_budget(untouched, reference, truth)


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["embed_tokens"], "all-linear", r".*\.1\..*proj"]
)
def test_modules_scale_and_spread_are_as_in_peft(targets):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=8, lora_alpha=3, target_modules=targets, use_rslora=True)
    wrapped = peft.get_peft_model(tiny_llama(), config)
    options = {"rank": 8, "alpha": 3, "use_rslora": True}
    ours = new_adapter(tiny_llama(), "x", target_modules=targets, seed=0, **options)
    modules = wrapped.base_model.model.named_modules()
    theirs = {path: m for path, m in modules if hasattr(m, "lora_A")}
    assert ours.modules.keys() == theirs.keys()
    for path, part in ours.modules.items():
        assert part.scale == pytest.approx(theirs[path].scaling["default"], rel=1e-12)
        if part.embedding:
            assert not part.lora_a.any()
            assert float(part.lora_b.std()) == pytest.approx(1, abs=0.2)
            continue
        bound = part.lora_a.shape[1] ** -0.5
        their_bound = float(theirs[path].lora_A["default"].weight.abs().max())
        assert float(part.lora_a.abs().max()) == pytest.approx(bound, rel=0.05)
        assert their_bound == pytest.approx(bound, rel=0.05)
        assert not part.lora_b.any()


def test_the_seed_decides_a():
    first, again, other = (
        new_adapter(Net(), "x", target_modules=["up", "down"], seed=seed) for seed in (0, 0, 1)
    )
    for module, part in first.modules.items():
        assert part.lora_a.equal(again.modules[module].lora_a)
        assert not part.lora_a.equal(other.modules[module].lora_a)
    assert not first.modules["up"].lora_a[0, :8].equal(first.modules["down"].lora_a[0, :8])


def test_the_config_names_the_model(tmp_path):
    model = tiny_llama()
    model.config._name_or_path = "somewhere/tiny"
    write_adapter(new_adapter(model, "x", rank=2, **TARGETS), tmp_path / "x")
    config = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    told = {"base_model_name_or_path": "somewhere/tiny", "r": 2, "lora_alpha": 2}
    told |= {"target_modules": ["q_proj", "v_proj"], "use_rslora": False}
    assert told.items() <= config.items()
    assert (
        new_adapter(Net(), "x", target_modules="up", seed=0).metadata["config"][
            "base_model_name_or_path"
        ]
        is None
    )


def test_a_second_adapter_for_an_attached_model():
    model, bank = Net(), AdapterBank()
    bank.add(new_adapter(model, "one", target_modules="all-linear", seed=0))
    handle = attach(model, bank)
    bank.add(new_adapter(model, "two", target_modules="(up|down).*", seed=1))
    assert bank.modules == ("up", "down")
    with handle.mix(Mixture.rows(["one", "two", None])):
        model(tokens(3))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
        ({"rank": 2.0}, "rank must be an integer of at least 1, got 2.0"),
        ({"alpha": 0}, "alpha must be a finite number other than 0, got 0"),
        ({"alpha": float("nan")}, "alpha must be a finite number"),
        ({"seed": None}, "seed must be an integer, got None"),
        ({"target_modules": []}, "target_modules must be names of modules"),
        ({"target_modules": ["up", "absent"]}, r"each fit a module of the model, got \['absent'\]"),
        ({"target_modules": "abs.*"}, "target_modules must fit a module of the model"),
        ({"target_modules": "(up"}, "target_modules must be a regex"),
        ({"target_modules": ".*"}, "must fit only nn.Linear, .*, got '', Net"),
    ],
)
def test_wrong_arguments(options, told):
    with pytest.raises(ValueError, match=f"new_adapter: .*{told}"):
        new_adapter(Net(), "x", **{"target_modules": ["up"], "seed": 0, **options})
