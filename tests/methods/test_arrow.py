"""ArrowRouter: its prototypes, its choice of adapters, and PEFT's Arrow on the same files."""

import copy

import pytest
import torch
from support.models import Net, adapter, tiny_llama, tokens, with_peft

from lora_fused import AdapterBank
from lora_fused.io import write_adapter
from lora_fused.methods import ArrowRouter, subtract_general
from lora_fused.methods.arrow import prototypes
from lora_fused.nn import attach
from lora_fused.ops import mixture_lora
from lora_fused.testing import assert_within_budget, make_stack

NAMES = ("math", "code", "chat", "law", "art")


def update(stack, k):
    rows = stack.rows(k)
    return stack.lora_b[rows].double().T @ stack.lora_a[rows].double()


def test_prototypes_are_top_right_singular_vectors():
    stack = make_stack([3, 1, 8, 3, 20], 16, 12, seed=1)
    stack.lora_b[stack.rows(3)] = 0  # an update of zero has no direction
    found = prototypes(stack, [4, 3, 0, 1, 2])
    truth = torch.stack([torch.linalg.svd(update(stack, k))[2][0] for k in (4, 3, 0, 1, 2)])
    truth[1] = 0
    truth = truth * (found.double() * truth).sum(-1, keepdim=True).sign()
    assert_within_budget(found, truth.float(), truth)


def arrow_peft(tmp_path, general=0, **config):
    """PEFT's Arrow, the base and the bank of the same adapters."""
    pytest.importorskip("peft")
    from peft import ArrowConfig, create_arrow_model

    model = tiny_llama()
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    configs = {name: {**options, "lora_alpha": 4 + i} for i, name in enumerate(NAMES)}
    adapters = with_peft(model, configs)[1]
    for one in adapters:
        for part in one.modules.values():
            # One direction well ahead, which PEFT's 15 iterations find to the last digit.
            part.lora_a[0] *= 3
            part.lora_b[0] *= 3
    bank = AdapterBank()
    bank.add_many(adapters)
    folders = []
    for one in adapters:
        one.metadata["config"] = {**configs[one.name], "peft_type": "LORA"}
        folders.append(str(tmp_path / one.name))
        write_adapter(one, folders[-1])
    split = len(NAMES) - general
    wrapped = create_arrow_model(
        copy.deepcopy(model),
        folders[:split],
        ArrowConfig(rng_seed=0, use_gks=bool(general), **config),
        folders[split:] or None,
    )
    return wrapped.eval(), model, bank


@pytest.mark.parametrize("general", [0, 2], ids=["plain", "gks"])
@pytest.mark.parametrize("top_k, temperature", [(1, 1.0), (2, 0.1), (3, 5.0)])
def test_equals_peft(tmp_path, general, top_k, temperature):
    config = {"top_k": top_k, "router_temperature": temperature}
    wrapped, model, bank = arrow_peft(tmp_path, general, **config)
    if general:
        bank = subtract_general(bank, NAMES[-general:])
    x = tokens(3, 7, 61)

    def run(base, bank):
        handle = attach(base, bank)
        router = ArrowRouter(bank, top_k=top_k, temperature=temperature)
        with torch.no_grad(), handle.route(router):
            return base(x).logits

    truth = run(copy.deepcopy(model).double(), copy.deepcopy(bank).to(dtype=torch.float64))
    with torch.no_grad():
        base, peft = model(x).logits, wrapped(x).logits
    ours = run(model, bank)
    exact = truth - base.double()
    assert_within_budget(ours - base, peft - base, exact)
    assert exact.abs().max() > 0.1


def bank_of(dtype=torch.float32):
    bank = AdapterBank(dtype=dtype)
    bank.add_many([adapter("a", 1, 2), adapter("b", 2, 5), adapter("c", 3, 1)])
    bank.add_many([adapter("d", 4, 3, ["up"]), adapter("e", 5, 3, ["up"])])
    return bank


def test_a_choice_of_all_is_the_dense_mixture_of_all():
    """Every adapter with its softmax weight, as a sum over all; the gradient of x as well."""
    stack = bank_of().stacks["up"]
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    grad = torch.randn(9, 12, generator=torch.Generator().manual_seed(1))

    def dense(dtype):
        v, rows = prototypes(stack, range(5)).to(dtype), x.to(dtype).requires_grad_()
        weights = ((rows @ v.T).abs() / 0.5).softmax(-1)
        updates = torch.stack([update(stack, k) * stack.scale[k] for k in range(5)]).to(dtype)
        y = torch.einsum("nk,koi,ni->no", weights, updates, rows)
        return y.detach(), torch.autograd.grad(y, rows, grad.to(dtype))[0]

    rows, router = x.clone().requires_grad_(), ArrowRouter(bank_of(), top_k=9, temperature=0.5)
    route, args = router("up", rows), (stack.lora_a, stack.lora_b, stack.row_start)
    y = mixture_lora(rows, *args, *route, scale=stack.scale)
    (found,) = torch.autograd.grad(y, rows, grad)
    for ours, reference, truth in zip(
        (y, found), dense(torch.float32), dense(torch.float64), strict=True
    ):
        assert_within_budget(ours, reference, truth)


def test_picks_the_nearest_directions_among_those_that_have_the_layer():
    bank = bank_of()
    router = ArrowRouter(bank, ["e", "c", "a"], top_k=2, temperature=0.25)
    assert router.candidates["up"].tolist() == [0, 2, 4]
    assert router.candidates["down"].tolist() == [0, 2]
    v = router.prototypes["up"]
    assert_within_budget(v.norm(dim=-1), torch.ones(3), torch.ones(3, dtype=torch.float64))
    ids, weights = router("up", torch.stack([-4 * v[2], v[0]])[:, None])
    assert ids.shape == weights.shape == (2, 2) and ids[:, 0].tolist() == [4, 0]
    score = (v @ v.T).abs()[2] * 4 / 0.25
    assert torch.equal(weights[0], score[ids[0].long() // 2].softmax(-1))
    assert router("down", torch.ones(3, 12))[0].shape == (3, 2)
    assert ArrowRouter(bank, top_k=3)("down", torch.ones(3, 12))[0].shape == (3, 3)


def test_subtracts_what_general_adapters_share():
    bank = AdapterBank()
    bank.add_many([adapter("a", 1), adapter("b", 2), adapter("c", 3)])
    before = bank.adapter("a").modules["up"].lora_a.clone()
    found = subtract_general(bank, ["b", "c"])
    assert found.names == ["a"] and torch.equal(bank.adapter("a").modules["up"].lora_a, before)
    for side in ("lora_a", "lora_b"):
        of = {n: getattr(bank.adapter(n).modules["up"], side) for n in "abc"}
        wanted = of["a"] - torch.stack([of["b"], of["c"]]).mean(0)
        assert torch.equal(getattr(found.adapter("a").modules["up"], side), wanted)
    bank.add(adapter("d", 4, 3))
    with pytest.raises(ValueError, match="adapter 'd' must have the layers and ranks of the gener"):
        subtract_general(bank, ["b", "c"])
    with pytest.raises(ValueError, match="adapter 'd' must have the layers and ranks of the other"):
        subtract_general(bank, ["b", "d"], ["a"])
    for general, names in (("b", None), ([], None), (["a", "b", "c", "d"], None)):
        with pytest.raises(ValueError, match=r"subtract_general: (general|names) must"):
            subtract_general(bank, general, names)


@pytest.mark.parametrize(
    "options, what",
    [
        ({"names": ["x"]}, "name must be a loaded adapter"),
        ({"names": "a"}, "names must be a list of names, got 'a'"),
        ({"names": []}, "names must be distinct, and at least one"),
        ({"top_k": 0}, "top_k must be an integer of at least 1, got 0"),
        ({"temperature": 0}, "temperature must be a positive number, got 0"),
    ],
    ids=str,
)
def test_rejects(options, what):
    with pytest.raises(ValueError, match=what):
        ArrowRouter(bank_of(), **options)


def test_rejects_embeddings_and_banks_that_changed():
    with pytest.raises(ValueError, match="bank must be an AdapterBank with adapters"):
        ArrowRouter(AdapterBank())
    bank = AdapterBank()
    bank.add(adapter("a", 1, 2, ["embed", "up"]))
    with pytest.raises(ValueError, match=r"adapt linear layers only.*the embedding 'embed'"):
        ArrowRouter(bank)
    bank = bank_of()
    router, handle = ArrowRouter(bank), attach(Net(), bank)
    bank.remove("c")
    with (
        handle.route(router),
        pytest.raises(RuntimeError, match="the bank must be as it was"),
    ):
        handle.model(tokens())


def test_adapters_added_later_are_no_candidates_and_their_new_layers_refused():
    bank = AdapterBank()
    bank.add(adapter("a", 1, 2, ["up"]))
    router = ArrowRouter(bank)
    bank.add(adapter("b", 2, 2))
    assert router("up", torch.ones(3, 8))[0].unique().tolist() == [0]
    with pytest.raises(RuntimeError, match=r"got one after .* of a new layer \(at 'down'\)"):
        router("down", torch.ones(3, 12))


@pytest.mark.parametrize("side", "ab")
def test_refuses_adapters_in_training_that_are_not_finite(side):
    bank = bank_of()
    bank.trainable(["b"])
    getattr(bank.stacks["up"], f"trained_{side}_1").data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"be finite, got NaN or infinity among ids \[1\]"):
        ArrowRouter(bank)


def test_scores_are_made_in_the_dtype_of_the_factors():
    """bfloat16 adapters under a float32 model, as PEFT casts x: ties of bfloat16 are ties here."""
    router = ArrowRouter(bank_of(torch.bfloat16), top_k=2)
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    v = router.prototypes["up"]
    score = (x.bfloat16() @ v.T).abs().topk(2, dim=-1)
    ids, weights = router("up", x)
    assert weights.dtype == v.dtype == torch.bfloat16
    assert torch.equal(weights, score.values.softmax(-1)) and torch.equal(ids, score.indices.int())
