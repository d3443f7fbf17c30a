"""attach, detach, handles: what stays the same, what is undone, what is refused."""

import copy
import io
import threading

import pytest
import torch
from support.models import Net, adapter, merged, tokens
from torch import nn

from lora_fused import Adapter, AdapterBank, LoraFactors, Mixture
from lora_fused.nn import attach, handle_of
from lora_fused.testing import assert_within_budget

ALL = ("embed", "up", "down")


def bank_of(*adapters: Adapter) -> AdapterBank:
    bank = AdapterBank()
    bank.add_many(adapters or [adapter("a", 1, 2, ALL), adapter("b", 2, 3, ALL)])
    return bank


def picture(model: nn.Module) -> dict:
    """Everything a model's modules hold, by name: class and instance dictionary."""

    def entries(module):
        return {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()}

    return {name: (type(module), entries(module)) for name, module in model.named_modules()}


def linear_adapter(name: str, sizes: dict[str, tuple[int, int]], embedding=False) -> Adapter:
    parts = {
        module: LoraFactors(torch.randn(2, i), torch.randn(2, o), 1.0, embedding)
        for module, (i, o) in sizes.items()
    }
    return Adapter(name, parts)


def test_the_model_is_what_it_was_while_idle_and_after_detach():
    model, x = Net(), tokens()
    parameters = dict(model.named_parameters())
    modules = dict(model.named_modules())
    calls = []
    model.up.register_forward_hook(lambda module, args, out: calls.append(module))
    model.up.register_buffer("extra", torch.ones(2))
    before, plain = picture(model), model(x)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    handle = attach(model, bank_of())
    assert torch.equal(model(x), plain)
    assert model.state_dict().keys() == state.keys()
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(model.get_parameter(name) is p for name, p in parameters.items())
    assert all(model.get_submodule(name) is m for name, m in modules.items())
    model.load_state_dict(state, strict=True)
    with handle.mix(Mixture.of({"a": 1.0})):
        assert not torch.equal(model(x), plain)
    assert torch.equal(model(x), plain) and len(calls) == 4  # hooks go on working

    handle.detach()
    assert picture(model) == before
    assert torch.equal(model(x), plain)
    for use in (handle.detach, lambda: handle.mix(Mixture.of({"a": 1.0}))):
        with pytest.raises(RuntimeError, match="must be attached, got a handle that was detached"):
            use()
    attach(model, handle.bank)  # and again


def test_ties_optimizers_and_dtype_moves_reach_the_same_parameters():
    model = Net()
    model.tied = nn.Linear(8, 11, bias=False)
    model.tied.weight = model.embed.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = attach(model, bank_of())
    assert model.tied.weight is model.embed.weight
    assert optimizer.param_groups[0]["params"][0] is model.embed.weight
    with handle.mix(Mixture.of({"a": 1.0})):
        model.tied(model.up.weight).sum().backward()
    assert model.embed.weight.grad is not None
    model.to(torch.bfloat16)
    assert handle.bank.dtype == torch.bfloat16  # one copy, held by bank and layer alike
    assert handle.bank.stacks["up"].scale.dtype == torch.float32
    assert handle.bank.stacks["up"] is model.up.lora_stack


def test_one_module_under_two_names():
    model = Net()
    model.alias = model.up
    x = tokens()
    handle = attach(model, bank_of(linear_adapter("a", {"alias": (8, 12)})))
    with handle.mix(Mixture.of({"a": 1.0})):
        y = model(x)
    handle.detach()
    assert not torch.equal(model(x), y) and type(model.up) is nn.Linear
    both = bank_of(linear_adapter("a", {"alias": (8, 12), "up": (8, 12)}))
    with pytest.raises(ValueError, match=r"'up'.* under one name, got the same module as 'alias'"):
        attach(model, both)
    assert type(model.up) is nn.Linear


def test_a_deepcopy_is_attached_on_its_own():
    model, x = Net(), tokens()
    handle = attach(model, bank_of())
    with handle.mix(Mixture.of({"a": 1.0})):
        y = model(x)
        twin = copy.deepcopy(model)  # even while a mixture is open
        own = handle_of(twin)
        assert torch.equal(twin(x), Net()(x))
        with own.mix(Mixture.of({"b": 1.0})):
            z = twin(x)
            assert torch.equal(model(x), y)
        own.bank.remove("b")
        assert not torch.equal(y, z) and "b" in handle.bank
    assert own.bank is not handle.bank
    assert own.bank.stacks["up"] is twin.up.lora_stack is not model.up.lora_stack
    assert handle_of(model).bank is handle.bank
    own.detach()
    with pytest.raises(ValueError, match="handle_of: model must be an attached model"):
        handle_of(twin)
    with pytest.raises(ValueError, match="got a part of one"):
        handle_of(model.up)


def test_an_attached_model_can_be_saved_whole():
    model, x = Net(), tokens()
    handle = attach(model, bank_of())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    with handle.mix(Mixture.of({"a": 1.0})), handle_of(again).mix(Mixture.of({"a": 1.0})):
        assert torch.equal(model(x), again(x))


def test_adapters_added_later_work_at_once_and_new_modules_are_refused():
    model, x = Net(), tokens()
    first = [adapter("a", 1, 2, ("up", "down"))]
    handle = attach(model, bank_of(*first))
    late = adapter("late", 5, 4, ("up",))
    handle.bank.add(late)
    with handle.mix(Mixture.of({"late": 1.0})), torch.no_grad():
        y = model(x)
    truth = merged(Net(), [late], {"late": 1.0})
    assert_within_budget(y, truth.float()(x).detach(), truth.double()(x).detach())
    handle.bank.add(adapter("wider", 6, 2, ("embed",)))
    with pytest.raises(RuntimeError, match="'embed' added since; detach and attach again"):
        handle.mix(Mixture.of({"a": 1.0}))
    handle.detach()  # still possible
    attach(model, handle.bank)


def test_remove_and_compact_end_the_mixtures_of_before():
    model, x = Net(), tokens()
    handle = attach(model, bank_of(adapter("a", 1, 2, ALL), adapter("b", 2, 3, ("up",))))
    with handle.mix(Mixture.of({"b": 1.0})):
        y = model(x)
        handle.bank.remove("a")
        with pytest.raises(RuntimeError, match=r"before remove\(\) or compact"):
            model(x)
    handle.bank.compact()  # "embed" and "down" have no adapter any more
    values = torch.ones(len(handle.bank.modules), 1)
    with handle.mix(Mixture.of(["b"], values=values)):
        assert torch.equal(model(x), y)


def test_nested_mixtures_override_and_restore():
    model, x = Net(), tokens()
    handle = attach(model, bank_of())
    outputs = []
    with handle.mix(Mixture.of({"a": 1.0})):
        outputs.append(model(x))
        with handle.mix(Mixture.of({"b": 1.0})):
            outputs.append(model(x))
            with pytest.raises(RuntimeError, match="must be closed first"):
                handle.detach()
        outputs.append(model(x))
    again = Mixture.rows(["a", "a", "a"])
    with handle.mix(again), handle.mix(again):  # the same one, twice
        model(x)
    with pytest.raises(KeyError), handle.mix(Mixture.of({"a": 1.0})):
        raise KeyError
    assert torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[1])
    assert torch.equal(model(x), Net()(x))


def test_mixtures_left_out_of_order_are_loud():
    model, x = Net(), tokens()
    handle = attach(model, bank_of())
    first, second = (handle.mix(Mixture.of({name: 1.0})) for name in "ab")
    first.__enter__()
    second.__enter__()
    with pytest.raises(RuntimeError, match="reverse order"):
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert torch.equal(model(x), Net()(x))  # the one that was left does not come back


def test_detach_refuses_a_class_that_it_did_not_give():
    model, x = Net(), tokens()
    handle = attach(model, bank_of())
    torch.nn.utils.parametrize.register_parametrization(model.up, "weight", nn.Identity())
    with pytest.raises(RuntimeError, match="'up' must have the class that attach gave it, got Par"):
        handle.detach()
    with handle.mix(Mixture.of({"a": 1.0})):  # nothing was undone
        assert not torch.equal(model(x), Net()(x))
    torch.nn.utils.parametrize.remove_parametrizations(model.up, "weight")
    handle.detach()
    assert torch.equal(model(x), Net()(x))


def test_a_second_thread_is_refused():
    model = Net()
    handle = attach(model, bank_of())
    caught = []

    def other():
        try:
            with handle.mix(Mixture.of({"b": 1.0})):
                caught.append("entered")
        except RuntimeError as error:
            caught.append(str(error))

    for _ in range(2):
        with handle.mix(Mixture.of({"a": 1.0})):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert "one mixture at a time" in caught[0] and caught[0] == caught[1]
    assert caught[2:] == ["entered"]


class Odd(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def refused_modules() -> dict[str, tuple[nn.Module, tuple[int, int], bool, str]]:
    heads = nn.MultiheadAttention(4, 2)
    encoder = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    replaced = nn.Linear(4, 4)
    replaced.forward = lambda x: x
    return {
        "subclass": (Odd(4, 4), (4, 4), False, "exactly an nn.Linear.*Odd"),
        "conv": (nn.Conv1d(4, 4, 1), (4, 4), False, "exactly an nn.Linear.*Conv1d"),
        "sizes": (nn.Linear(4, 5), (4, 4), False, r"features \(4, 4\), got \(4, 5\)"),
        "kind": (nn.Embedding(4, 4), (4, 4), False, "be a linear layer.*got an embedding"),
        "kind2": (nn.Linear(4, 4), (4, 4), True, "be an embedding.*got a linear layer"),
        "norm": (nn.Embedding(4, 4, max_norm=1.0), (4, 4), True, "no max_norm"),
        "freq": (nn.Embedding(4, 4, scale_grad_by_freq=True), (4, 4), True, "scale_grad_by_freq"),
        "meta": (nn.Linear(4, 4, device="meta"), (4, 4), False, "the meta device"),
        "patched": (replaced, (4, 4), False, "got one replaced on the instance"),
        "heads.out_proj": (heads, (4, 4), False, "NonDynamicallyQuantizableLinear"),
        "encoder.linear1": (encoder, (4, 8), False, "outside TransformerEncoderLayer"),
    }


@pytest.mark.parametrize("name", refused_modules())
def test_refused_modules(name):
    module, sizes, embedding, match = refused_modules()[name]
    model = nn.ModuleDict({name.partition(".")[0]: module, "fine": nn.Linear(3, 2)})
    before = picture(model)
    bank = bank_of(
        linear_adapter("fine", {"fine": (3, 2)}), linear_adapter("a", {name: sizes}, embedding)
    )
    with pytest.raises(ValueError, match=rf"attach: module '{name}' must .*{match}"):
        attach(model, bank)
    assert picture(model) == before


def test_refused_models_and_banks():
    model = Net()
    before = picture(model)
    with pytest.raises(ValueError, match="bank must hold at least one adapter, got an empty bank"):
        attach(model, AdapterBank())
    emptied = bank_of()
    emptied.remove("a")
    emptied.remove("b")
    with pytest.raises(ValueError, match="got an empty bank"):
        attach(model, emptied)
    with pytest.raises(ValueError, match=r"no 'upp' \(close: 'up'\), 'xyz' \(close: none\)"):
        attach(model, bank_of(linear_adapter("a", {"upp": (8, 12), "xyz": (2, 2)})))
    with pytest.raises(ValueError, match="saved_modules must be 'error', 'ignore' or 'apply'"):
        attach(model, bank_of(), saved_modules="keep")
    assert picture(model) == before
    attach(model, bank_of())
    attached = picture(model)
    with pytest.raises(ValueError, match="model must be detached, got an attached model"):
        attach(model, bank_of())
    with pytest.raises(ValueError, match="model must be detached, got an attached model"):
        attach(nn.Sequential(model.up), bank_of(linear_adapter("a", {"0": (8, 12)})))
    assert picture(model) == attached
    with pytest.raises(ValueError, match="close: 'a'"):
        handle_of(model).mix(Mixture.of({"aa": 1.0}))
