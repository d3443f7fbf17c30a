"""AdapterStack and AdapterBank: one copy, bank-global ids, all or nothing."""

import copy

import pytest
import torch
from torch import nn

from lora_fused import Adapter, AdapterBank, AdapterStack, LoraFactors, testing

SIZES = {"q": (5, 3), "v": (4, 6)}


def factors(module: str, rank: int = 2, seed: int = 0, dtype=torch.float32) -> LoraFactors:
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rank, n, generator=g).to(dtype) for n in SIZES[module])
    return LoraFactors(a, b, 1.5 + seed)


def adapter(name: str, modules=("q", "v"), rank: int = 2, dtype=torch.float32, **more) -> Adapter:
    seed = sum(map(ord, name))
    return Adapter(name, {m: factors(m, rank, seed, dtype) for m in modules}, **more)


@pytest.fixture
def bank() -> AdapterBank:
    bank = AdapterBank()
    bank.add_many([adapter("math"), adapter("code", ("q",), 3), adapter("art", ("v",), 1)])
    return bank


def snapshot(bank: AdapterBank) -> tuple:
    tables = (list(bank._names), dict(bank._ids), dict(bank.metadata), dict(bank.saved))
    stacks = {
        m: (s.lora_a.clone(), s.lora_b.clone(), s.scale.clone(), s.row_start.clone(), s.ranks)
        for m, s in bank.stacks.items()
    }
    return tables, bank.version, bank.dtype, bank.device, stacks


def same(before: tuple, after: tuple) -> bool:
    def equal(a, b):
        return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b

    stacks, others = before[-1], after[-1]
    return (
        before[:-1] == after[:-1]
        and list(stacks) == list(others)
        and all(equal(a, b) for m in stacks for a, b in zip(stacks[m], others[m], strict=True))
    )


def holds(bank: AdapterBank, expected: Adapter) -> None:
    """The bank returns this adapter bit by bit."""
    got = bank.adapter(expected.name)
    assert list(got.modules) == [m for m in bank.modules if m in expected.modules]
    for module, part in expected.modules.items():
        at = got.modules[module]
        assert torch.equal(at.lora_a, part.lora_a) and torch.equal(at.lora_b, part.lora_b)
        assert at.scale == part.scale and at.embedding == part.embedding


class TestStack:
    def test_packed(self):
        stack = testing.make_stack((2, 0, 3), 5, 4)
        assert stack.row_start.tolist() == [0, 2, 2, 5] and stack.row_start.dtype == torch.int32
        assert len(stack) == 3 and stack.ranks == (2, 0, 3) and stack.max_rank == 3
        assert (stack.in_features, stack.out_features) == (5, 4)
        assert [stack.rows(k) for k in range(3)] == [slice(0, 2), slice(2, 2), slice(2, 5)]
        assert stack.scale.dtype == torch.float32 and stack.slot_ranks is None

    def test_slotted_is_served_in_place(self):
        lora_a, lora_b = torch.randn(3, 4, 5), torch.randn(3, 1, 6, 4)[:, 0].transpose(1, 2)
        ranks = torch.tensor([4, 2, 0]).int()
        stack = AdapterStack(lora_a, lora_b, torch.ones(3), slot_ranks=ranks)
        assert stack.row_start is None and stack.slot_ranks is ranks and stack.ranks == (4, 4, 4)
        assert all(f is t for f, t in zip(stack.factors(), (lora_a, lora_b), strict=True))
        for misuse in (lambda: stack.train_adapters([0]), lambda: stack.drop(1)):
            with pytest.raises(ValueError, match="stack must be packed, got padded slots"):
                misuse()

    @pytest.mark.parametrize(
        "a, b, scale, ranks, message",
        [
            ((4, 5), (3, 5), 2, (2, 2), r"lora_a and lora_b must be .*got \[4, 5\] and \[3, 5\]"),
            ((4,), (4,), 2, (2, 2), "lora_a and lora_b must be"),
            ((4, 5), (4, 3), 2, None, "ranks must be given, not negative, and sum to the 4 rows"),
            ((4, 5), (4, 3), 2, (2, 1), r"ranks must .*, got \(2, 1\)"),
            ((4, 5), (4, 3), 2, (5, -1), r"ranks must .*, got \(5, -1\)"),
            ((4, 5), (4, 3), 3, (2, 2), r"scale must be \[2\], got \[3\]"),
            ((2**31, 0), (2**31, 0), 1, (2**31,), "ranks must sum to less than 2"),
        ],
    )
    def test_rejects(self, a, b, scale, ranks, message):
        with pytest.raises(ValueError, match="^AdapterStack: " + message):
            AdapterStack(torch.zeros(a), torch.zeros(b), torch.ones(scale), ranks=ranks)

    def test_growth_leaves_the_users_memory_alone(self):
        """A stack over a view of a larger buffer must not grow into the rest of the buffer."""
        whole_a, whole_b = torch.randn(64, 5), torch.randn(64, 3)
        kept = whole_a.clone(), whole_b.clone()
        stack = AdapterStack(whole_a[:4], whole_b[:4], torch.ones(1), ranks=[4])
        stack._commit(*stack.with_appended([factors("q", 3)], torch.float32))
        assert stack.ranks == (4, 3) and torch.equal(stack.lora_a[:4], kept[0][:4])
        assert torch.equal(whole_a, kept[0]) and torch.equal(whole_b, kept[1])


def test_ids_are_the_banks(bank):
    assert bank.names == ["math", "code", "art"] == list(bank) and len(bank) == bank.count == 3
    assert [bank.id(n) for n in bank] == [0, 1, 2] and "code" in bank and "other" not in bank
    assert bank.modules == ("q", "v")
    assert bank.stacks["q"].ranks == (2, 3, 0) and bank.stacks["v"].ranks == (2, 0, 1)
    assert bank.add(adapter("late", ("v",))) == 3
    assert bank.stacks["q"].ranks == (2, 3, 0, 0)
    for name, modules, rank in (("math", "qv", 2), ("code", "q", 3), ("art", "v", 1)):
        holds(bank, adapter(name, tuple(modules), rank))
    assert "4 adapters, 2 modules" in repr(bank)


def test_unknown_names_list_the_close_ones(bank):
    for ask in (bank.id, bank.remove, bank.adapter, lambda n: bank.subset([n])):
        with pytest.raises(ValueError, match=r"be a loaded adapter \(close: 'math'\), got 'mathe'"):
            ask("mathe")
    with pytest.raises(ValueError, match="none; the bank is empty"):
        AdapterBank().id("math")


def test_remove_leaves_an_empty_segment_and_never_reuses_the_id(bank):
    kept = snapshot(bank)
    bank.remove("math")
    assert bank.names == ["code", "art"] and bank.count == 3 and bank.id("code") == 1
    assert bank.version == kept[1] + 1 and "math" not in bank and not bank.is_live(0)
    assert [bank.is_live(k) for k in (-1, 1, 2, 3)] == [False, True, True, False]
    holds(bank, adapter("code", ("q",), 3))
    assert bank.stacks["q"].ranks == (0, 3, 0) and bank.stacks["q"].lora_a.shape == (3, 5)
    assert bank.add(adapter("math")) == 3, "a name may come back, its id does not"
    holds(bank, adapter("math"))


def test_compact_renumbers(bank):
    bank.add(Adapter("only", {"k": LoraFactors(torch.ones(1, 2), torch.ones(1, 2), 1.0)}))
    bank.remove("math")
    bank.remove("only")
    stack, version = bank.stacks["q"], bank.version
    bank.compact()
    assert bank.names == ["code", "art"] and [bank.id(n) for n in bank] == [0, 1]
    assert bank.count == 2 and bank.version == version + 1 and bank.modules == ("q", "v")
    assert bank.stacks["q"] is stack, "layers hold the stack itself"
    holds(bank, adapter("code", ("q",), 3))
    holds(bank, adapter("art", ("v",), 1))
    for name in list(bank):
        bank.remove(name)
    bank.compact()
    assert len(bank) == bank.count == len(bank.stacks) == 0 and bank.dtype is None
    assert bank.add(adapter("math")) == 0


def test_rename_keeps_the_id(bank):
    bank.metadata["code"]["r"] = 3
    bank.rename("code", "python")
    assert bank.id("python") == 1 and "code" not in bank and bank.metadata["python"] == {"r": 3}
    before = snapshot(bank)
    for old, new, message in (
        ("python", "art", "name must be new, got 'art', which is loaded"),
        ("python", "__base__", "name must be a non-empty string other than '__base__'"),
        ("python", "", "name must be a non-empty string"),
        ("python", 3, "name must be a non-empty string"),
        ("code", "x", "be a loaded adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            bank.rename(old, new)
        assert same(before, snapshot(bank))


def test_subset_copies(bank):
    bank.saved["art"] = {"head.weight": torch.ones(2)}
    part = bank.subset(["art", "math"])
    assert part.names == ["art", "math"] and part.id("art") == 0 and list(part.saved) == ["art"]
    for name in part:
        holds(part, bank.adapter(name))
    before = snapshot(bank)
    part.stacks["v"].lora_a.zero_()
    part.remove("math")
    assert same(before, snapshot(bank))
    assert bank.subset(["art"]).modules == ("v",) and len(bank.subset([])) == 0
    with pytest.raises(ValueError, match="names must be distinct"):
        bank.subset(["art", "art"])


FAULTS = {
    "loaded": (lambda: adapter("code"), "name must be new, got 'code', which is loaded"),
    "base": (lambda: adapter("__base__"), "name must be a non-empty string other than '__base__'"),
    "unnamed": (lambda: Adapter("", {"q": factors("q")}), "name must be a non-empty string"),
    "no-modules": (lambda: adapter("new", ()), "adapter 'new' must adapt at least one module"),
    "rank-0": (lambda: adapter("new", rank=0), r"'new' at 'q' must have factors .* with R >= 1"),
    "ranks-differ": (
        lambda: Adapter("new", {"q": LoraFactors(torch.ones(2, 5), torch.ones(3, 3), 1.0)}),
        r"must have factors \[R, I\] and \[R, O\].*got \[2, 5\] and \[3, 3\]",
    ),
    "other-sizes": (
        lambda: Adapter("new", {"q": LoraFactors(torch.ones(2, 6), torch.ones(2, 3), 1.0)}),
        r"'new' at 'q' must fit the other adapters' sizes \(I, O\) = \(5, 3\).*got \(6, 3\)",
    ),
    "embedding": (
        lambda: Adapter("new", {"q": LoraFactors(torch.ones(2, 5), torch.ones(2, 3), 1.0, True)}),
        "must fit .* embedding False, got .* embedding True",
    ),
    "integers": (
        lambda: Adapter("new", {"q": LoraFactors(*(torch.ones(2, n).char() for n in (5, 3)), 1.0)}),
        r"must have floating-point factors, got torch\.int8",
    ),
    "nan": (
        lambda: Adapter(
            "new", {"v": LoraFactors(torch.ones(2, 4), torch.full((2, 6), torch.nan), 1.0)}
        ),
        "lora_b of adapter 'new' at 'v' must be finite in the bank's dtype, got non-finite values",
    ),
    "inf": (
        lambda: Adapter(
            "new", {"v": LoraFactors(torch.full((2, 4), torch.inf), torch.ones(2, 6), 1.0)}
        ),
        "lora_a of adapter 'new' at 'v' must be finite",
    ),
    "rows": (
        lambda: Adapter(
            "new", {"q": factors("q"), "w": LoraFactors(*[torch.ones(2**31, 0)] * 2, 1.0)}
        ),
        "ranks must sum to less than 2",
    ),
} | {
    f"scale-{scale}": (
        lambda scale=scale: Adapter(
            "new", {"q": LoraFactors(torch.ones(2, 5), torch.ones(2, 3), scale)}
        ),
        "must have a scale that is finite in float32 and not 0, got",
    )
    for scale in (0.0, float("nan"), float("inf"))
}


@pytest.mark.parametrize("label", FAULTS)
def test_a_failed_add_changes_nothing(bank, label):
    """Also when good adapters come before the bad one, and when rows have room to grow into."""
    make, message = FAULTS[label]
    bank.add(adapter("roomy", rank=4))
    before = snapshot(bank)
    for batch in ([make()], [adapter("good", rank=1), make()], [make(), adapter("good", rank=9)]):
        with pytest.raises(ValueError, match=message):
            bank.add_many(batch)
        assert same(before, snapshot(bank))
    bank.add(adapter("good", rank=1))
    holds(bank, adapter("good", rank=1))
    holds(bank, adapter("roomy", rank=4))


def test_names_and_sizes_must_agree_within_one_call():
    bank = AdapterBank()
    with pytest.raises(ValueError, match="name must be new, got 'x' twice"):
        bank.add_many([adapter("x"), adapter("x")])
    odd = Adapter("odd", {"q": LoraFactors(torch.ones(1, 9), torch.ones(1, 3), 1.0)})
    with pytest.raises(ValueError, match=r"'odd' at 'q' must fit .*\(5, 3\)"):
        bank.add_many([adapter("x"), odd])
    assert bank.count == 0 and not bank.stacks
    assert bank.add_many([]) == []


@pytest.mark.parametrize("seed", range(3))
def test_growth_keeps_every_adapter(seed):
    """One by one, in bursts, with removals between: every adapter stays as it was given."""
    g = torch.Generator().manual_seed(seed)
    bank, held, moved = AdapterBank(), {}, 0
    for step in range(60):
        drawn = int(torch.randint(1, 9, (1,), generator=g))
        modules = (("q",), ("v",), ("q", "v"))[drawn % 3]
        new = [adapter(f"{step}-{i}", modules, drawn) for i in range(drawn if step % 7 == 0 else 1)]
        place = bank.stacks["q"].lora_a.data_ptr() if bank.stacks.get("q") else 0
        bank.add_many(new)
        moved += "q" in bank.stacks and bank.stacks["q"].lora_a.data_ptr() != place
        held |= {a.name: a for a in new}
        if step % 20 == 19:
            bank.remove(gone := next(iter(held)))
            del held[gone]
    for expected in held.values():
        holds(bank, expected)
    assert moved < 20, "doubling: few of the additions may move the rows"


def test_growth_after_a_move_or_a_copy(bank):
    """What Module.to and deepcopy leave behind the rows is not room to grow into."""
    for i in range(4):
        bank.add(adapter(f"a{i}"))
    twin = copy.deepcopy(bank)
    bank.to(dtype=torch.float64).to(dtype=torch.float32)
    for each in (bank, twin):
        each.add(adapter("last", rank=5))
    twin.stacks["q"].lora_a[-1] = 7.0
    for name in ("math", "a0", "a3"):
        holds(bank, adapter(name))
    holds(bank, adapter("last", rank=5))


@pytest.mark.parametrize(
    "given, forced, stored",
    [
        ([torch.bfloat16] * 2, None, torch.bfloat16),
        ([torch.float16] * 2, None, torch.float16),
        ([torch.bfloat16, torch.float16], None, torch.float32),
        ([torch.float16, torch.float32], None, torch.float32),
        ([torch.float64] * 2, None, torch.float32),
        ([torch.float32, torch.bfloat16], torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtype_policy(given, forced, stored):
    """The adapters' own dtype if all agree, else float32, whether added together or in turn."""
    adapters = [adapter(f"a{i}", dtype=dtype) for i, dtype in enumerate(given)]
    together, in_turn = AdapterBank(dtype=forced), AdapterBank(dtype=forced)
    together.add_many(adapters)
    for one in adapters:
        in_turn.add(one)
    for bank in (together, in_turn):
        assert bank.dtype == stored and {s.lora_a.dtype for s in bank.stacks.values()} == {stored}
        for i, one in enumerate(adapters):
            part = one.modules["q"]
            assert torch.equal(bank.stacks["q"].lora_a[2 * i : 2 * i + 2], part.lora_a.to(stored))


def test_values_must_fit_the_dtype(bank):
    part = LoraFactors(torch.full((1, 5), 1e6), torch.ones(1, 3), 1.0)
    half = AdapterBank(dtype=torch.float16)
    with pytest.raises(ValueError, match=r"lora_a of adapter 'big' at 'q' .*values beyond"):
        half.add(Adapter("big", {"q": part}))
    bank.add(Adapter("big", {"q": part}))
    before = snapshot(bank)
    with pytest.raises(ValueError, match=r"dtype must hold the values of q, got torch\.float16"):
        bank.to(dtype=torch.float16)
    assert same(before, snapshot(bank))


def test_to_moves_the_one_copy(bank):
    stack = bank.stacks["q"]
    assert bank.to(dtype=torch.bfloat16) is bank and bank.stacks["q"] is stack
    assert stack.lora_a.dtype == stack.lora_b.dtype == bank.dtype == torch.bfloat16
    assert stack.scale.dtype == torch.float32 and stack.row_start.dtype == torch.int32
    assert bank.add(adapter("late")) == 3 and bank.dtype == torch.bfloat16
    bank.to("meta")
    assert bank.device.type == "meta" and stack.row_start.device.type == "meta"
    empty = AdapterBank().to("meta", torch.float16)
    assert empty.device.type == "meta" and empty.dtype == torch.float16


def test_model_half_keeps_scales_and_ranks(bank):
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "stack": bank.stacks["q"]})
    scale = bank.stacks["q"].scale.clone()
    for convert, dtype in ((model.half, torch.float16), (model.float, torch.float32)):
        convert()
        assert bank.stacks["q"].lora_a.dtype == bank.stacks["q"].lora_b.dtype == dtype
        assert bank.stacks["q"].scale.dtype == torch.float32
        assert torch.equal(bank.stacks["q"].scale, scale)
        assert bank.stacks["q"].row_start.tolist() == [0, 2, 5, 5]


def test_state_dict_is_empty(bank):
    bank.trainable(["math"])
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "stack": bank.stacks["q"]})
    assert list(model.state_dict()) == ["linear.weight", "linear.bias"]
    before = snapshot(bank)
    model.load_state_dict(model.state_dict(), strict=True)
    assert same(before, snapshot(bank))


def test_deepcopy_is_independent(bank):
    bank.saved["art"] = {"head": torch.ones(2)}
    twin, before = copy.deepcopy(bank), snapshot(bank)
    for stack in twin.stacks.values():
        stack.lora_a.zero_()
    twin.saved["art"]["head"].zero_()
    twin.remove("math")
    assert same(before, snapshot(bank)) and bank.saved["art"]["head"].all()


def test_saved_and_metadata_travel(bank):
    head = torch.randn(2, 3)
    bank.add(adapter("headed", saved={"head": head}, metadata={"peft_type": "LORA"}))
    got = bank.adapter("headed")
    assert torch.equal(got.saved["head"], head) and got.metadata == {"peft_type": "LORA"}
    bank.rename("headed", "h")
    assert list(bank.saved) == ["h"]
    bank.remove("h")
    assert "h" not in bank.saved and "h" not in bank.metadata
