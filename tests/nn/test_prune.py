"""Token pruning: dropping nothing is the network itself, and what is dropped is what should be."""

import copy

import pytest
import torch
from support import vits
from support.models import merged
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_fused import AdapterBank, Mixture, new_adapter
from lora_fused.nn import attach
from lora_fused.nn.prune import prune_tokens
from lora_fused.testing import assert_within_budget

LAYOUTS = pytest.mark.parametrize("layout", list(vits.MODELS))
RATIOS = {0: 0.25, 2: 0.5}  # 16 patches: 12 after block 0, 6 after block 2


@LAYOUTS
def test_ratio_zero_is_the_unpruned_network(layout):
    model, x = vits.MODELS[layout](), vits.images(3)
    with torch.no_grad():
        y = vits.feature(model, x)
        for ratios in ({}, {0: 0.0, 3: 0}, {1: 0.001}):
            with prune_tokens(model, ratios) as pruning:
                assert torch.equal(vits.feature(model, x), y)
            assert torch.equal(pruning.kept, torch.arange(16).expand(3, -1)) and not pruning.steps
        with prune_tokens(model, RATIOS):
            assert not torch.equal(vits.feature(model, x), y)  # the negative control
        assert torch.equal(vits.feature(model, x), y)


@LAYOUTS
def test_equals_the_slow_one_sample_by_sample(layout):
    model, x = vits.MODELS[layout](), vits.images(3)
    reference, _ = vits.slow(model, x, RATIOS)
    twin = copy.deepcopy(model).double()
    truth, kept = vits.slow(twin, x.double(), RATIOS)
    with prune_tokens(model, RATIOS) as pruning:
        y = vits.feature(model, x)
    assert pruning.kept.tolist() == kept and len(set(map(tuple, kept))) > 1
    assert {layer: t.shape[1] for layer, t in pruning.steps.items()} == {0: 12, 2: 6}
    assert_within_budget(y, reference, truth)
    with prune_tokens(twin, RATIOS) as pruning:
        assert_within_budget(vits.feature(twin, x.double()).float(), reference, truth)
    wrong, _ = vits.slow(model, x, RATIOS, residual_of_norm=True)
    with pytest.raises(AssertionError):  # a residual taken after the norm would show
        assert_within_budget(wrong, reference, truth)


@LAYOUTS
def test_what_was_kept_gives_the_same_again(layout):
    model, x = vits.MODELS[layout](), vits.images(3)
    with prune_tokens(model, RATIOS) as pruning, torch.no_grad():
        y = vits.feature(model, x)
    with prune_tokens(model, keep=pruning.steps) as again, torch.no_grad():
        assert torch.equal(vits.feature(model, x), y)
    assert torch.equal(again.kept, pruning.kept)
    assert all(torch.equal(t, again.steps[layer]) for layer, t in pruning.steps.items())
    flipped = {layer: t.flip(0) for layer, t in pruning.steps.items()}
    with prune_tokens(model, keep=flipped), torch.no_grad():
        assert not torch.equal(vits.feature(model, x), y)


@LAYOUTS
def test_runs_on_stored_tokens_with_their_own_positions(layout):
    """In place of the other patches nothing: the blocks see the stored ones alone."""
    model, x = vits.MODELS[layout](), vits.images(2)
    keep = torch.tensor([[9, 0, 3, 12], [1, 2, 15, 14]])
    with prune_tokens(model, keep=keep) as pruning:
        y = vits.feature(model, x)
    assert torch.equal(pruning.kept, keep.sort(1).values) and list(pruning.steps) == [-1]
    outs = {}
    for dtype in (torch.float32, torch.float64):
        twin = copy.deepcopy(model).to(dtype)
        net, rows = vits.parts(twin), []
        for image, patches in zip(x.to(dtype), keep.sort(1).values, strict=True):
            t = net.embed(image[None])[0][[*range(net.prefix), *(net.prefix + patches).tolist()]]
            for norm1, qkv, proj, norm2, mlp in net.blocks:
                mixed, _ = vits.attention(*(part[0] for part in qkv(norm1(t[None]))))
                t = t + proj(mixed[None])[0]
                t = t + mlp(norm2(t[None]))[0]
            rows.append(net.norm(t[None])[0, 0])
        outs[dtype] = torch.stack(rows)
    assert_within_budget(y, outs[torch.float32], outs[torch.float64])


def test_gradients_reach_pixels_through_kept_tokens_alone():
    model, x = vits.small_vit(), vits.images(2).requires_grad_()
    keep = torch.tensor([[0, 5], [15, 6]])
    with prune_tokens(model, keep=keep):
        model(x).square().sum().backward()
    patches = nn.functional.unfold(x.grad, 4, stride=4).abs().sum(1)  # [2, 16]
    kept = torch.zeros(2, 16, dtype=torch.bool).scatter(1, keep, True)
    assert (patches[kept] > 0).all() and (patches[~kept] == 0).all()


def test_gradients_of_a_cascade_are_those_of_the_slow_one():
    model, x = vits.small_vit(), vits.images(2)
    grads = []
    for run, dtype in (("fast", torch.float32), ("slow", torch.float32), ("slow", torch.float64)):
        twin, pixels = copy.deepcopy(model).to(dtype), x.to(dtype).clone().requires_grad_()
        if run == "fast":
            with prune_tokens(twin, RATIOS):
                twin(pixels).square().sum().backward()
        else:
            vits.slow(twin, pixels, RATIOS)[0].square().sum().backward()
        grads.append((pixels.grad, twin.patch.weight.grad, twin.blocks[1].v.weight.grad))
    for actual, reference, truth in zip(*grads, strict=True):
        assert_within_budget(actual, reference, truth)


def test_adapters_of_each_row_decide_what_it_keeps():
    model, x, bank = vits.small_vit(), vits.images(4), AdapterBank()
    for i, name in enumerate("ab"):
        one = new_adapter(model, name, rank=2, target_modules=["q", "k", "v"], seed=i)
        for part in one.modules.values():
            part.lora_b.normal_(std=0.5, generator=torch.Generator().manual_seed(i))
        bank.add(one)
    rows = [{"a": 1.0}, {"b": -1.5}, {"a": 0.5, "b": 0.5}, {}]
    adapters = [bank.adapter(name) for name in bank.names]
    outs = {}
    for dtype in (torch.float32, torch.float64):
        twins = [merged(model, adapters, row).to(dtype) for row in rows]
        outs[dtype] = [
            vits.slow(twin, image[None].to(dtype), RATIOS)
            for twin, image in zip(twins, x, strict=True)
        ]
    handle = attach(model, bank)
    with handle.mix(Mixture.rows(rows)), prune_tokens(model, RATIOS) as pruning:
        y = model(x)
    reference, truth = (torch.cat([out for out, _ in outs[dtype]]) for dtype in outs)
    assert pruning.kept.tolist() == [kept[0] for _, kept in outs[torch.float64]]
    assert_within_budget(y, reference, truth)
    with prune_tokens(model, RATIOS) as plain:
        model(x)
    assert plain.kept.tolist() != pruning.kept.tolist()
    handle.detach()


def test_counts_are_floors_and_one_token_stays():
    model, x = vits.small_vit(), vits.images(1)
    for ratio, left in ((0.25, 12), (0.3, 12), (0.32, 11), (0.75, 4), (0.9999999, 1)):
        with prune_tokens(model, {1: ratio}) as pruning:
            model(x)
        assert pruning.kept.shape == (1, left), ratio


def test_an_exact_undo_also_after_an_error():
    model = vits.small_vit()
    with pytest.raises(RuntimeError), prune_tokens(model, RATIOS):
        model(vits.images(1)[:, :2])
    with prune_tokens(model, RATIOS):
        with pytest.raises(RuntimeError, match="once at a time"):
            prune_tokens(model, RATIOS).__enter__()
        model(vits.images(1))
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks and "forward" not in vars(model)


class Checkpointed(nn.Module):
    """A SmallViT whose backward pass runs its blocks again, two at a time."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.halves = [nn.Sequential(*model.blocks[:2]), nn.Sequential(*model.blocks[2:])]

    def forward(self, x):
        x = vits.small_tokens(self.model, x)
        for half in self.halves:
            x = checkpoint(half, x, use_reentrant=False)
        return self.model.norm(x[:, 0])


def test_checkpointed_blocks_prune_alike_and_must_stay_inside():
    grads = []
    for wrap in (lambda model: model, Checkpointed):
        model, x = wrap(vits.small_vit()), vits.images(2).requires_grad_()
        with prune_tokens(model, RATIOS) as pruning:
            y = model(x)
            kept, steps = pruning.kept, pruning.steps
            y.square().sum().backward()
            assert pruning.kept is kept and pruning.steps.keys() == steps.keys() == {0, 2}
        grads.append(x.grad)
    assert torch.equal(*grads)
    with prune_tokens(model, RATIOS):
        y = model(x)
    with pytest.raises(RuntimeError, match="inside the with block"), prune_tokens(model, RATIOS):
        y.square().sum().backward()


@pytest.mark.parametrize("part", ["model", "block"])
def test_compiled_code_is_never_left_unpruned_nor_pruned_for_good(part):
    """Guards of compiled code leave out hooks, so that it would miss them, or keep them."""
    model, x = vits.small_vit(), vits.images(2)

    def compiled(**options):
        if part == "block":
            model.blocks[2].compile(backend="eager", **options)
            return model
        return torch.compile(model, backend="eager", **options)

    with torch.no_grad():
        y = model(x)
        with prune_tokens(model, RATIOS):
            pruned = model(x)
        late = compiled()
        with prune_tokens(model, RATIOS):
            assert torch.equal(late(x), pruned)  # in Python, for the hooks refuse to be traced
        assert torch.equal(late(x), y)
        torch._dynamo.reset()
        early = compiled()
        assert torch.equal(early(x), y)
        if part == "model":  # its graph knows of no hooks
            message = "no forward that came by every block"
            with pytest.raises(RuntimeError, match=message), prune_tokens(model, RATIOS):
                early(x)
        else:  # a module that is compiled as such looks for its own
            with prune_tokens(model, RATIOS):
                assert torch.equal(early(x), pruned)
        torch._dynamo.reset()
        whole = compiled(fullgraph=True)
        with pytest.raises(RuntimeError), prune_tokens(model, RATIOS):
            whole(x)
        torch._dynamo.reset()


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "ratios or keep must be given, one of them, got none"),
        ({"ratios": {0: 0.5}, "keep": torch.tensor([[0]])}, "got both"),
        ({"ratios": [0.5]}, "ratios must be a dict from block number"),
        ({"ratios": {4: 0.5}}, "ratios must name blocks from 0 to 3, got 4"),
        ({"ratios": {-1: 0.5}}, "must name blocks from 0 to 3, got -1"),
        ({"ratios": {1: 1.0}}, r"ratio of block 1 must lie in \[0, 1\), got 1.0"),
        ({"ratios": {1: -0.1}}, r"must lie in \[0, 1\), got -0.1"),
        ({"ratios": {1: float("nan")}}, r"must lie in \[0, 1\), got nan"),
        ({"keep": [[0]]}, "keep must be int64"),
        ({"keep": torch.tensor([0, 1])}, r"keep must be int64 \[B, n\]"),
        ({"keep": torch.tensor([[0, 0]])}, "distinct numbers of patches from 0, got one twice"),
        ({"keep": torch.tensor([[-1, 0]])}, "distinct numbers of patches from 0, got a negative"),
        ({"keep": {5: torch.tensor([[0]])}}, "keep must name blocks from -1 to 3, got 5"),
        (
            {"keep": {0: torch.tensor([[1, 2]]), 2: torch.tensor([[3]])}},
            "keep after block 2 only what was there",
        ),
        (
            {"keep": {0: torch.tensor([[1, 2]]), 2: torch.tensor([[1], [2]])}},
            "have as many rows for block 2 as before it, 1, got 2",
        ),
    ],
    ids=range(15),
)
def test_rejects(options, message):
    with pytest.raises(ValueError, match=f"^prune_tokens: .*{message}"):
        prune_tokens(vits.small_vit(), **options)


def test_rejects_what_does_not_fit_the_images():
    model, x = vits.small_vit(), vits.images(2)
    outside, one_row = torch.tensor([[0, 16], [0, 1]]), torch.tensor([[0, 1]])
    with pytest.raises(ValueError, match="hold patches of the image's 16, got 16"):
        run(model, x, outside)
    with pytest.raises(ValueError, match=r"keep must have a row per image, 2, got \[1, 2\]"):
        run(model, x, one_row)
    with prune_tokens(model, RATIOS) as pruning:
        for name in ("kept", "steps"):
            with pytest.raises(RuntimeError, match=f"{name}: the model must have run"):
                getattr(pruning, name)
        with pytest.raises(RuntimeError):
            model(x[:, :2])
        model(x)
    with pytest.raises(RuntimeError, match="got no forward that came by every"):
        prune_tokens(model, RATIOS).__enter__().__exit__(None)


def run(model, x, keep):
    with prune_tokens(model, keep=keep):
        model(x)
