"""1 x 1 convolutions: PEFT's numbers, gradients, memory formats, merging, and what is refused."""

import copy

import pytest
import torch
from support.convs import ConvNet, adapter, images, plain
from torch import nn

from lora_fused import Adapter, AdapterBank, LoraFactors, Mixture, new_adapter
from lora_fused.io import load_subspace, read_adapter, save_subspace
from lora_fused.methods.eigenlorax import fit_subspace
from lora_fused.nn import MixtureConv2d, attach, merge_into_base
from lora_fused.testing import assert_within_budget

ROWS = [{"a": 1.0, "b": -0.5}, {}, {"b": 2.0}]
CONVS = {
    "one": {},
    "stride": {"stride": (2, 3), "bias": False},
    "same": {"padding": "same", "dilation": 2},
}


def bank_of(*adapters) -> AdapterBank:
    bank = AdapterBank()
    bank.add_many(adapters or [adapter("a", 1, 2), adapter("b", 2, 3, ("expand", "head"))])
    return bank


def layer(options) -> tuple[nn.Module, list[LoraFactors]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(5, 7, 1, **options))
    factors = [LoraFactors(torch.randn(r, 5), torch.randn(r, 7), 0.5 * r) for r in (2, 3)]
    return model, factors


def attached_layer(options, trainable=False):
    model, factors = layer(options)
    bank = bank_of(*(Adapter(n, {"0": f}) for n, f in zip("ab", factors, strict=True)))
    if trainable:
        bank.trainable()
    return model, factors, attach(model, bank)


def by_rows(conv, factors, rows, x):
    parts = dict(zip("ab", factors, strict=True))
    outs = [
        plain(conv, x[i : i + 1], [(parts[name], weight) for name, weight in row.items()])
        for i, row in enumerate(rows)
    ]
    return torch.cat(outs)


def test_rows_of_a_mixed_batch_match_peft_on_its_own_files(tmp_path):
    peft = pytest.importorskip("peft")
    model, bank, x = ConvNet().eval(), AdapterBank(), images(4)
    wrapped = copy.deepcopy(model)
    configs = {
        "a": {"r": 2, "lora_alpha": 3, "target_modules": ["expand", "reduce"]},
        "b": {"r": 3, "lora_alpha": 5, "target_modules": ["expand", "head"], "use_rslora": True},
    }
    for name, config in configs.items():
        config = peft.LoraConfig(**config)
        if name == "a":
            wrapped = peft.get_peft_model(wrapped, config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    wrapped.save_pretrained(tmp_path)
    for name in configs:
        bank.add(read_adapter(tmp_path / name))
    names = ["a", None, "b", "a"]
    like_peft = [name or "__base__" for name in names]
    handle = attach(model, bank)
    assert type(model.expand) is MixtureConv2d and type(model.depth) is nn.Conv2d
    with torch.no_grad():
        with handle.mix(Mixture.rows(names)):
            y = model(x)
        with handle.mix(Mixture.rows(names[::-1])):
            wrong = model(x)
        wrapped.eval()
        reference = wrapped(x, adapter_names=like_peft)
        truth = wrapped.double()(x.double(), adapter_names=like_peft)
    assert_within_budget(y, reference, truth)
    with pytest.raises(AssertionError):  # the negative control
        assert_within_budget(wrong, reference, truth)


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_values_and_memory_format(options, format):
    model, factors, handle = attached_layer(options)
    x = torch.randn(3, 5, 6, 7).contiguous(memory_format=format)
    model.to(memory_format=format)
    own = copy.deepcopy(layer(options)[0])[0].to(memory_format=format)
    with handle.mix(Mixture.rows(ROWS)), torch.no_grad():
        y = model(x)
    reference = by_rows(own, factors, ROWS, x)
    truth = by_rows(copy.deepcopy(own).double(), factors, ROWS, x.double())
    assert_within_budget(y, reference, truth)
    assert torch.equal(y[1], own(x)[1]) and y.stride() == own(x).stride()
    assert type(model[0]) is MixtureConv2d and handle.bank.names == ["a", "b"]


@pytest.mark.parametrize("options", CONVS.values(), ids=CONVS)
def test_gradients(options):
    grads = []
    for run, dtype in (("ours", torch.float32), ("plain", torch.float32), ("plain", torch.float64)):
        torch.manual_seed(4)
        x = torch.randn(3, 5, 6, 7, dtype=torch.float64).to(dtype).requires_grad_()
        values = torch.tensor([[1.0, -0.5], [0.0, 0.3], [0.7, 2.0]], dtype=dtype).requires_grad_()
        if run == "ours":
            model, _, handle = attached_layer(options, trainable=True)
            mixture = Mixture.top_k(torch.tensor([[0, 1]] * 3), values)
            with handle.mix(mixture):
                y = model(x)
            stack = handle.bank.stacks["0"]
            learned = [stack.trained_a_0, stack.trained_b_0, stack.trained_a_1, stack.trained_b_1]
        else:
            model, factors = layer(options)
            model, learned = model.to(dtype), []
            for part in factors:
                part.lora_a, part.lora_b = (
                    t.to(dtype).requires_grad_() for t in (part.lora_a, part.lora_b)
                )
                learned += [part.lora_a, part.lora_b]
            outs = [
                plain(model[0], x[i : i + 1], list(zip(factors, values[i], strict=True)))
                for i in range(3)
            ]
            y = torch.cat(outs)
        (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)).sum().backward()
        grads.append([x.grad, values.grad, model[0].weight.grad, *(t.grad for t in learned)])
    for actual, reference, truth in zip(*grads, strict=True):
        assert_within_budget(actual, reference, truth)


def test_pixels_are_the_tokens():
    model, _, handle = attached_layer(CONVS["stride"])
    x = torch.randn(2, 5, 3, 4)  # 2 x 2 pixels of output each
    rows = [*ROWS, {"a": 0.5}, *ROWS[::-1], {"b": 1.0}]
    with handle.mix(Mixture.rows(rows, per="token")), torch.no_grad():
        y = model(x)
    for n, row in enumerate(rows):
        i, h, w = n // 4, n // 2 % 2, n % 2
        with handle.mix(row), torch.no_grad():
            alone = model(x[i : i + 1])[0, :, h, w]
        assert torch.equal(y[i, :, h, w], alone)
    with handle.mix(Mixture.rows(ROWS)), pytest.raises(ValueError, match=r"x.shape\[0\].*2, got 3"):
        model(x)
    with (
        handle.mix(Mixture.rows(ROWS, per="token")),
        pytest.raises(ValueError, match=r"tokens \(rows of x, per='token'\), 8, got 3"),
    ):
        model(x)


def test_a_single_image_without_a_batch():
    model, _, handle = attached_layer({})
    x = torch.randn(5, 3, 2)
    with handle.mix({"a": 1.0, "b": -0.5}), torch.no_grad():
        assert torch.equal(model(x), model(x[None])[0])


def test_autocast_rounds_the_update_once():
    model, factors, handle = attached_layer({})
    x, conv = torch.randn(3, 5, 6, 7), layer({})[0][0]
    with handle.mix(Mixture.rows(ROWS)), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, base = model(x), conv(x)
    assert y.dtype == base.dtype == torch.bfloat16 and torch.equal(y[1], base[1])
    truth = by_rows(copy.deepcopy(conv).double(), factors, ROWS, x.double())
    with torch.no_grad():
        reference = by_rows(copy.deepcopy(conv).bfloat16(), factors, ROWS, x.bfloat16())
    assert_within_budget(y, reference, truth)


def test_attach_and_detach_are_exact():
    model, x = ConvNet(), images(3)
    before, kinds = model.state_dict(), [type(m) for m in model.modules()]
    held = list(model.parameters())
    with torch.no_grad():
        y = model(x)
        handle = attach(model, bank_of())
        assert torch.equal(model(x), y) and model.state_dict().keys() == before.keys()
        with handle.mix(Mixture.rows(ROWS)):
            assert torch.equal(model(x)[1], y[1]) and not torch.equal(model(x)[0], y[0])
        handle.detach()
        assert torch.equal(model(x), y)
    assert [type(m) for m in model.modules()] == kinds and not hasattr(model.expand, "lora_stack")
    assert all(p is q for p, q in zip(held, model.parameters(), strict=True))


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_merge_is_the_mixture_and_comes_back_bitwise(format):
    model, bank, x = ConvNet().to(memory_format=format), bank_of(), images(3)
    before = copy.deepcopy(model.state_dict())
    weights = {"a": 0.5, "b": -1.0}
    handle = attach(model, bank)
    with handle.mix(weights), torch.no_grad():
        y = model(x)
    handle.detach()
    twin = copy.deepcopy(model).double()
    for name in ("expand", "reduce", "head"):
        weight = twin.get_submodule(name).weight
        for k, factor in enumerate(weights.values()):
            part = bank.adapter("ab"[k]).modules.get(name)
            if part is not None:
                update = factor * part.scale * part.lora_b.double().T @ part.lora_a.double()
                weight.data += update.view(weight.shape)
    with merge_into_base(model, bank, weights) as merged, torch.no_grad():
        assert set(merged.modules) == {"expand", "reduce", "head"}
        assert_within_budget(y, model(x), twin(x.double()))
        for name in merged.modules:
            truth = twin.get_submodule(name).weight
            assert_within_budget(model.get_submodule(name).weight, truth.float(), truth)
        value = model.expand.weight.data[0, 1, 0, 0].clone()
        model.expand.weight.data[0, 1] += 1.0
        with pytest.raises(RuntimeError, match="'expand' must be as merge_into_base left it"):
            merged.undo()
        model.expand.weight.data[0, 1] = value
    after = model.state_dict()
    assert all(torch.equal(t, before[name]) for name, t in after.items())
    assert all(t.stride() == before[name].stride() for name, t in after.items())


@pytest.mark.parametrize(
    "conv, message",
    [
        (nn.Conv2d(4, 4, 3, padding=1), "be 1 x 1.*a linear layer over pixels.*kernel of 3 x 3"),
        (nn.Conv2d(4, 4, (1, 3)), "be 1 x 1.*kernel of 1 x 3"),
        (nn.Conv2d(4, 4, 1, groups=2), "in one group.*got 2 groups"),
        (nn.Conv2d(4, 4, 1, padding=1), r"without padding.*got padding \(1, 1\)"),
        (nn.ConvTranspose2d(4, 4, 1), "exactly an nn.Linear.*ConvTranspose2d"),
        (type("Padded", (nn.Conv2d,), {})(4, 4, 1), "exactly an nn.Linear.*Padded"),
        (nn.Conv2d(4, 5, 1), r"in and out features \(4, 4\), got \(4, 5\)"),
    ],
    ids=["3x3", "1x3", "groups", "padding", "transposed", "subclass", "sizes"],
)
def test_refused_convolutions(conv, message):
    model = nn.ModuleDict({"c": conv})
    bank = bank_of(Adapter("a", {"c": LoraFactors(torch.ones(1, 4), torch.ones(1, 4), 1.0)}))
    for call in (attach, lambda model, bank: merge_into_base(model, bank, "a")):
        with pytest.raises(ValueError, match=f"module 'c' must .*{message}"):
            call(model, bank)
    assert type(model["c"]) is type(conv)
    if "exactly" in message or "1 x 1" in message:
        with pytest.raises(ValueError, match=r"fit only nn\.Linear, .*1 x 1 nn\.Conv2d"):
            new_adapter(model, "n", target_modules=["c"], seed=0)


def test_a_fresh_adapter_trains_and_all_linear_takes_no_convolution():
    model, x = ConvNet(), images(4)
    fresh = new_adapter(model, "n", rank=2, target_modules=["expand", "reduce"], seed=0)
    assert fresh.metadata["pointwise"] == ["expand", "reduce"]
    every = new_adapter(model, "m", rank=2, target_modules="all-linear", seed=0)
    assert list(every.modules) == ["head"] and "pointwise" not in every.metadata
    bank = bank_of(fresh)
    handle = attach(model.requires_grad_(False), bank)
    optimizer = torch.optim.Adam(bank.trainable(), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with handle.mix("n"):
            loss = model(x).square().mean()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("method", ["hosvd", "jd_diag"], ids=["pairs", "diagonal"])
def test_a_subspace_serves_convolutions(method, tmp_path):
    bank = bank_of(adapter("a", 1, 2), adapter("b", 2, 3, ("expand",)), adapter("c", 3, 1))
    subspace = fit_subspace(bank, rank=3, method=method, progress=False)
    save_subspace(subspace, tmp_path / "s.safetensors", model=ConvNet())
    subspace = load_subspace(tmp_path / "s.safetensors", model=ConvNet())
    back = subspace.reconstruct("a")
    assert back.metadata["pointwise"] == ["expand", "reduce"]
    full = AdapterBank()
    full.add_many([subspace.reconstruct(name) for name in subspace.names])
    rows, x, outs = [{"a": 1.0, "c": -0.5}, None, {"b": 0.7}], images(3), []
    for source, dtype in ((subspace, torch.float32), (full, torch.float32), (full, torch.float64)):
        model = ConvNet().to(dtype)
        handle = attach(model, source.to(dtype=dtype) if source is full else source)
        with handle.mix(Mixture.rows(rows)), torch.no_grad():
            outs.append(model(x.to(dtype)))
        handle.detach()
    assert_within_budget(*outs)


def test_compiles_as_one_graph():
    model, x = ConvNet(), images(3)
    handle = attach(model, bank_of())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        with handle.mix(Mixture.rows(ROWS)):
            assert torch.equal(compiled(x), model(x))
