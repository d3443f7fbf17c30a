"""attach(model, subspace): served in the basis, and in all else as attach(model, bank)."""

import copy
import io

import pytest
import torch
from support.models import SIZES, Net, adapter, row_by_row, tiny_gpt2, tokens
from torch import Tensor

from lora_fused import Adapter, AdapterBank, LoraFactors, Mixture, attach, handle_of
from lora_fused.methods.eigenlorax import METHODS, fit_subspace
from lora_fused.methods.subspace import Subspace
from lora_fused.nn import subspace as nn_subspace
from lora_fused.nn.plans import Plans
from lora_fused.testing import assert_within_budget, error

ALL = ("embed", "up", "down")
EVERY = pytest.mark.parametrize("method", METHODS)
FORMS = pytest.mark.parametrize("method", ["hosvd", "jd_diag"], ids=["pairs", "diagonal"])
ROWS = [{"a": 1.0, "c": -0.5}, None, {"b": 0.7, "d": 1.0}]


def make_bank(saved=None) -> AdapterBank:
    """Four adapters of different ranks; "c" lacks a layer, "d" has a single one."""
    bank = AdapterBank()
    bank.add_many(
        [
            adapter("a", 1, 2, ALL),
            adapter("b", 2, 3, ALL),
            adapter("c", 3, 2, ("embed", "down")),
            adapter("d", 4, 1, ("up",)),
        ]
    )
    bank.saved.update(saved or {})
    return bank


def make(method="hosvd", saved=None) -> Subspace:
    options = {"keep_mean": True} if method == "eigenlorax" else {}
    return fit_subspace(make_bank(saved), rank=3, method=method, progress=False, **options)


def bank_of(subspace: Subspace, dtype=None) -> AdapterBank:
    """The reconstructed adapters as an ordinary bank."""
    subspace = copy.deepcopy(subspace).to(dtype=dtype)
    bank = AdapterBank(dtype=dtype)
    bank.add_many([subspace.reconstruct(name) for name in subspace.names])
    return bank


def adapters_of(subspace: Subspace) -> list[Adapter]:
    bank = bank_of(subspace, torch.float64)
    return [bank.adapter(name) for name in bank]


def run(model, handle, mixture, x=None) -> Tensor:
    with handle.mix(mixture), torch.no_grad():
        return model(tokens() if x is None else x)


def check(subspace: Subspace, model, using, **options) -> None:
    """An attached model against a bank of the reconstructed adapters; ``using`` opens a block."""
    x, outs = tokens(), []
    for dtype in (torch.float32, torch.float64):
        other = Net().to(dtype)
        with using(attach(other, bank_of(subspace, dtype), **options)), torch.no_grad():
            outs.append(other(x))
    with using(handle_of(model)), torch.no_grad():
        assert_within_budget(model(x), *outs)


@EVERY
def test_equals_a_bank_of_the_reconstructed_adapters(method):
    subspace, model, other = make(method), Net(), Net()
    ours = run(model, attach(model, subspace), ROWS)
    reference = run(other, attach(other, bank_of(subspace)), ROWS)
    adapters = adapters_of(subspace)
    rows = [row or {} for row in ROWS]
    truth = row_by_row(Net(), adapters, rows, tokens())
    assert_within_budget(ours, reference, truth, method)
    swapped = row_by_row(Net(), adapters, [{"b": 1.0, "c": -0.5}, *rows[1:]], tokens())
    assert error(ours, swapped) > 1e-3, "negative control: another adapter is seen"
    assert torch.equal(ours[1], Net()(tokens())[1]), "a row without adapters is the model's own"


@FORMS
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_every_kind_of_mixture(method, impl):
    subspace, model = make(method), Net()
    handle = attach(model, subspace, impl=impl)
    assert handle.bank.modules == bank_of(subspace).modules == ALL
    ids = torch.tensor([[0, 3], [1, -1], [2, 1]])
    for mixture in (
        Mixture.uniform(list("abcd")),
        Mixture.of({"b": 1.0}),
        Mixture.top_k(ids, torch.rand(3, 2, generator=torch.Generator().manual_seed(5))),
        Mixture.rows([{"a": 1.0}] * 7 + [{"b": 2.0, "d": 1.0}] * 8, per="token"),
        Mixture.rows(["d"]).repeat(3),
        Mixture.of(["a", "c"], torch.arange(6.0).reshape(3, 2) / 3),
    ):
        check(subspace, model, lambda handle, mixture=mixture: handle.mix(mixture))

    def fn(name, x):
        return torch.tensor([[len(name) % 4, 0]]), torch.tensor([[0.5, -1.0]])

    check(subspace, model, lambda handle: handle.route(fn))


def test_a_conv1d_and_a_batch_in_bfloat16():
    pytest.importorskip("transformers")
    name, x = "transformer.h.0.attn.c_attn", torch.arange(12).reshape(3, 4)
    generator, bank = torch.Generator().manual_seed(2), AdapterBank()
    for one in "ab":
        factors = (torch.randn(2, n, generator=generator) / 4 for n in (32, 96))
        bank.add(Adapter(one, {name: LoraFactors(*factors, 2.0)}))
    subspace, outs = fit_subspace(bank, rank=3, progress=False), []
    for dtype in (torch.bfloat16, torch.float64):
        model = tiny_gpt2().to(dtype)
        with attach(model, bank_of(subspace, dtype)).mix(["a", None, {"b": -1.0}]):
            outs.append(model(x).logits.detach())
    model = tiny_gpt2().bfloat16()
    with attach(model, subspace).mix(["a", None, {"b": -1.0}]):
        ours = model(x).logits.detach()
    assert_within_budget(ours, *outs)
    assert error(tiny_gpt2().bfloat16()(x).logits, outs[1]) > 5 * error(ours, outs[1])


@FORMS
def test_the_model_is_what_it_was_while_idle_and_after_detach(method):
    model, x = Net(), tokens()
    plain, state = model(x), copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    subspace = make(method)
    handle = attach(model, subspace)
    assert handle.subspace is subspace and handle.bank is subspace.cores
    assert model.state_dict().keys() == state.keys()
    assert model.load_state_dict(state, strict=True)
    assert [name for name, _ in model.named_parameters()] == list(state)
    assert torch.equal(model(x), plain) and not torch.equal(run(model, handle, "a"), plain)
    assert handle_of(model).subspace is subspace
    handle.detach()
    assert torch.equal(model(x), plain)
    assert [name for name, _ in model.named_modules()] == names
    assert torch.equal(run(model, attach(model, subspace), "b"), run(model, handle_of(model), "b"))


def test_the_layers_hold_the_one_copy():
    model, subspace = Net(), make()
    handle = attach(model, subspace)
    assert model.up.lora_basis is subspace.bases["up"]
    before = run(model, handle, "a")
    model.to(torch.bfloat16)
    assert {basis.basis_a.dtype for basis in subspace.bases.values()} == {torch.bfloat16}
    assert subspace.cores.dtype == torch.bfloat16
    assert error(run(model, handle, "a"), before) < 0.1
    model.to(torch.float64)  # the dtype of oracles
    assert run(model, handle, ROWS).dtype == torch.float64


@FORMS
def test_copies_are_attached_on_their_own(method):
    model, subspace = Net(), make(method)
    handle = attach(model, subspace)
    twin, file = copy.deepcopy(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (twin, torch.load(file, weights_only=False)):
        own = handle_of(again)
        assert own.subspace is not subspace and own.subspace.cores is own.bank
        assert again.up.lora_basis is own.subspace.bases["up"]
        assert torch.equal(run(again, own, ROWS), run(model, handle, ROWS))
    handle_of(twin).subspace.add(adapter("late", 9, 2, ALL))
    assert "late" not in subspace


@pytest.mark.parametrize("method", ["eigenlorax", "hosvd", "jd_diag"])
def test_adapters_added_to_the_subspace_reach_the_layers(method):
    model, subspace = Net(), make(method)
    handle, first = attach(model, subspace), adapter("late", 9, 2, ALL)
    mixture = Mixture.rows(["late", "a", {"b": 1.0, "late": -1.0}])
    subspace.add(first)
    check(subspace, model, lambda handle: handle.mix(mixture))
    held = Mixture.of({"late": 1.0})
    with handle.mix(held):
        subspace.cores.remove("late")
        with pytest.raises(RuntimeError, match="from before remove"):
            model(tokens())


def dense_gradients(subspace: Subspace, values: Tensor, dtype) -> list[Tensor]:
    """d mean(y^2) of the weights and of "a"'s cores, through weights formed by hand."""
    model, params = Net().to(dtype), {}
    values, grads = values.detach().to(dtype).requires_grad_(), []
    for module in ALL:
        basis, stack = subspace.bases[module], subspace.cores.stacks[module]
        basis_a, basis_b = basis.basis_a.to(dtype), basis.basis_b.to(dtype)
        weight = model.get_submodule(module).weight
        for k, name in enumerate("ab"):
            at = stack.rows(subspace.cores.id(name))
            a, b = (t.detach()[at].to(dtype).requires_grad_(k == 0) for t in stack.factors())
            core = (a * b).sum(0).diag() if subspace.diagonal else b.T @ a
            update = float(stack.scale[k]) * basis_b.T @ core @ basis_a
            weight = weight + values[k] * (update.T if basis.embedding else update)
            grads += [a, b] if k == 0 else []
        params[f"{module}.weight"] = weight
    y = torch.func.functional_call(model, params, (tokens(),))
    return torch.autograd.grad(y.square().mean(), [values, *grads])


@FORMS
def test_gradients_reach_weights_and_cores(method):
    model, subspace = Net(), make(method)
    handle = attach(model, subspace)
    values = torch.tensor([0.7, 0.0], requires_grad=True)  # 0 keeps its true gradient
    parameters = subspace.cores.trainable(["a"])
    with handle.mix(Mixture.of(["a", "b"], values=values)):
        model(tokens()).square().mean().backward()
    grads = [values.grad, *(p.grad for p in parameters)]
    exact, reference = (
        dense_gradients(subspace, values, dtype) for dtype in (torch.float64, torch.float32)
    )
    assert len(grads) == len(exact) == 7
    for ours, plain, truth in zip(grads, reference, exact, strict=True):
        assert_within_budget(ours, plain, truth)
    assert grads[0].abs().min() > 0
    assert all(not t.requires_grad for b in subspace.bases.values() for t in b.buffers())


@EVERY
def test_a_new_task_trains_while_attached_and_nothing_else_moves(method):
    model, subspace = Net().requires_grad_(False), make(method)
    handle, frozen = attach(model, subspace), copy.deepcopy(subspace)
    parameters = subspace.new_task("mine", rank=2)
    plain = model(tokens())
    assert torch.equal(run(model, handle, "mine"), plain)
    optimizer, losses = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1), []
    for _ in range(6):
        with handle.mix(["mine", {"mine": 1.0, "a": 0.5}, "mine"]):
            loss = (model(tokens()) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    y = run(model, handle, "mine")
    subspace.cores.freeze()
    assert torch.equal(run(model, handle, "mine"), y) and not torch.equal(y, plain)
    for name in "abcd":
        old, new = frozen.cores.adapter(name), subspace.cores.adapter(name)
        assert all(torch.equal(old.modules[m].lora_a, new.modules[m].lora_a) for m in old.modules)
    assert torch.equal(frozen.bases["up"].basis_a, subspace.bases["up"].basis_a)


def test_diagonal_cores_are_formed_once_and_never_stale(monkeypatch):
    model, subspace = Net(), make("jd_diag")
    handle, made, form = attach(model, subspace), [], nn_subspace.diagonals
    monkeypatch.setattr(nn_subspace, "diagonals", lambda stack: made.append(1) or form(stack))

    def forms(mixture="a") -> int:
        made.clear()
        check(subspace, model, lambda handle: handle.mix(mixture))
        return len(made)

    with torch.inference_mode():
        run(model, handle, "a")
    assert len(made) == 3 and forms() == 0
    values = torch.ones(1, requires_grad=True)
    with handle.mix(Mixture.of(["a"], values=values)):
        model(tokens()).sum().backward()  # through what inference mode had made
    subspace.cores.stacks["up"].lora_a.mul_(1.5)
    assert forms() == 1
    subspace.add(adapter("late", 9, 2, ("up",)))
    assert forms({"late": 1.0}) == 3
    (first, *_) = subspace.cores.trainable(["b"])
    first.data.add_(1.0)
    assert forms("b") == 3
    subspace.cores.freeze()
    assert forms("b") == 3 and forms("b") == 0


def test_saved_heads_run_as_with_a_bank():
    head = {"down.weight": torch.randn(6, 12, generator=torch.Generator().manual_seed(7))}
    bank = AdapterBank()
    bank.add_many([adapter("a", 1, 2, ("embed", "up")), adapter("b", 2, 2, ("embed", "up"))])
    bank.saved["a"] = head
    subspace, model = fit_subspace(bank, rank=3, progress=False), Net()
    with pytest.raises(ValueError, match="must have no saved modules"):
        attach(model, subspace)
    handle = attach(model, subspace, saved_modules="apply")
    rows = ["a", "b", None]
    check(subspace, model, lambda handle: handle.mix(rows), saved_modules="apply")
    y = run(model, handle, rows)
    handle.detach()
    assert error(y, run(model, attach(model, subspace, saved_modules="ignore"), rows)) > 0.1


@FORMS
def test_one_graph_serves_idle_and_every_mixture(method):
    torch._dynamo.reset()
    model = Net()
    handle, x = attach(model, make(method)), tokens()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    plain = compiled(x)
    assert torch.equal(plain, Net()(x))
    with handle.mix(ROWS):
        assert torch.equal(compiled(x), model(x))
    with torch._dynamo.config.patch(error_on_recompile=True), handle.mix([*ROWS[1:], "d"]):
        assert torch.equal(compiled(x), model(x)) and not torch.equal(compiled(x), plain)
    values = torch.ones(2, requires_grad=True)
    parameters = handle.bank.trainable(["a"])
    found = []
    for net in (model, compiled):
        with handle.mix(Mixture.of(["a", "b"], values=values)):
            found.append(torch.autograd.grad(net(x).square().sum(), [values, *parameters]))
    assert all(map(torch.equal, *found))
    torch._dynamo.reset()


@pytest.mark.parametrize("in_basis", [False, True])
def test_no_plan_is_made_where_one_launch_needs_none(in_basis, monkeypatch):
    subspace = make()
    route, stack = Mixture.of({"a": 1.0}).resolve(subspace.cores), subspace.cores.stacks["up"]
    args = ("up", torch.ones(3, 8), route, route, stack, in_basis)
    assert Plans().of(*args) is not None  # a backward pass groups by adapter
    with torch.no_grad():
        assert Plans().of(*args) is None
        monkeypatch.setattr("lora_fused.backends.BATCH_INVARIANT", True)
        assert Plans().of(*args) is not None


@pytest.mark.parametrize("method", ["hosvd", "jd_diag"])
def test_diagonal_cores_need_no_plan(method, monkeypatch):
    model = Net()
    handle = attach(model, make(method))
    route = Mixture.of({"a": 1.0}).resolve(handle.bank)
    monkeypatch.setattr("lora_fused.nn.routing.takes_plan", lambda x, impl: True)
    with handle.mix("a"):
        x, stack = torch.ones(3, 8, requires_grad=True), handle.bank.stacks["up"]
        plan = model.up.lora_site.routing.plan("up", x, route, stack)
    assert (plan is None) == (method == "jd_diag")


def test_what_does_not_fit_is_refused_and_nothing_changes():
    model, subspace = Net(), make()
    kinds = {name: type(module) for name, module in model.named_modules()}

    def refused(match, given=subspace, net=model):
        with pytest.raises(ValueError, match=match):
            attach(net, given)
        assert {name: type(module) for name, module in model.named_modules()} == kinds

    clusters = fit_subspace(make_bank(), rank=2, clusters=2, progress=False)
    refused("bank must be an AdapterBank or a Subspace .*, got SubspaceClusters", clusters)
    wide = Net()
    wide.up = torch.nn.Linear(8, 13)
    refused(r"module 'up' must have the adapters' in and out features \(8, 12\)", net=wide)
    other = Net()
    other.embed = torch.nn.Linear(11, 8)
    refused("module 'embed' must be an embedding", net=other)
    del other.down
    refused("model must have every module of the bank, got no 'down'", net=other)
    stray = copy.deepcopy(subspace)
    stray.cores.add(Adapter("x", {"head": LoraFactors(torch.ones(1, 3), torch.ones(1, 3), 1.0)}))
    refused("subspace must have a basis for every module of its cores, got none for 'head'", stray)
    thin = copy.deepcopy(subspace)
    thin.bases["up"].a.basis = thin.bases["up"].a.basis[:2]
    refused(r"cores of 'up' must have the sizes \(P, P\)", thin)
    refused("bank must hold at least one adapter", Subspace({}, AdapterBank(), subspace.options))
    handle = attach(model, subspace)
    with pytest.raises(ValueError, match="attached to one model at a time"):
        attach(Net(), subspace)
    assert SIZES["up"] == (8, 12) and handle.bank is subspace.cores
