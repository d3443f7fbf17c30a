"""merge by entrywise rules: what each space does, reported errors, seeds, refusals."""

import pytest
import torch
from test_merging import (
    RANKS,
    SIZES,
    WEIGHTS,
    adapter,
    check_reported_errors,
    dense,
    make_bank,
    product,
    same_rank_bank,
    truncated,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_fused import Adapter, AdapterBank, LoraFactors
from lora_fused.methods import entrywise, merge
from lora_fused.methods.entrywise import RULES
from lora_fused.methods.merge_request import TYPES
from lora_fused.testing import assert_within_budget

SPACES = ("svd", "core", "knots")
FORMS = [rule + form for rule in RULES for form in ("", "_svd", "_core", "_knots")]
DARE = [form for form in FORMS if form.startswith("dare")]


def bank_for(kind: str, dtype=torch.float32) -> AdapterBank:
    return same_rank_bank(dtype) if kind in RULES else make_bank(dtype=dtype)


def products(merged) -> dict[str, Tensor]:
    return {module: product(part) for module, part in merged.adapter.modules.items()}


def test_every_form_is_a_type():
    assert set(FORMS) == set(TYPES) - {"cat", "svd", "linear"} and len(TYPES) == 19


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", FORMS)
def test_reported_errors_are_the_dense_ones(kind, dtype):
    bank = bank_for(kind, dtype)
    merged = merge(bank, WEIGHTS, combination_type=kind, density=0.6, seed=1)
    assert tuple(merged.adapter.modules) == bank.modules
    check_reported_errors(bank, WEIGHTS, merged)
    assert all(part.lora_a.dtype == dtype for part in merged.adapter.modules.values())
    facts = merged.adapter.metadata["merge"]
    assert facts["combination_type"] == kind and facts["options"]["density"] == 0.6
    assert facts["error_to_exact"] == merged.report.error_to_exact > 0.01
    assert (merged.report.energy is None) == (kind in RULES)
    assert ("seed" in facts["options"]) == kind.startswith("dare")
    assert ("majority_sign_method" in facts["options"]) == ("ties" in kind)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("rule", ["dare_linear", "magnitude_prune"])
def test_with_nothing_pruned_a_space_is_lossless(rule, space):
    """Density 1 leaves the weighted sum, which every space holds in full: the same as "svd"."""
    bank = make_bank()
    exact = merge(bank, WEIGHTS, combination_type="svd", rank=17)
    merged = merge(bank, WEIGHTS, combination_type=f"{rule}_{space}", rank=17, density=1)
    for module, found in products(merged).items():
        truth, rounded = (dense(bank, WEIGHTS, module, d) for d in (torch.float64, torch.float32))
        assert_within_budget(found.float(), truncated(rounded, 17), truth, module)
    assert merged.report.error_to_exact < 1e-6 and merged.report.energy > 1 - 1e-6
    cut = merge(bank, WEIGHTS, combination_type=f"{rule}_{space}", rank=5, density=1)
    assert cut.report.error_to_exact == pytest.approx(
        merge(bank, WEIGHTS, combination_type="svd", rank=5).report.error_to_exact, rel=1e-5
    )
    assert exact.report.error_to_exact < 1e-6


@pytest.mark.parametrize("rule", ["dare_linear", "magnitude_prune"])
def test_with_nothing_pruned_factors_are_added_as_linear_does(rule):
    bank = same_rank_bank()
    found = products(merge(bank, WEIGHTS, combination_type=rule, density=1))
    for module, truth in products(merge(bank, WEIGHTS, combination_type="linear")).items():
        assert_within_budget(found[module].float(), truth.float(), truth)


@pytest.mark.parametrize("rule", RULES)
def test_svd_forms_cut_the_dense_rule_best(rule):
    bank, plain = make_bank(), entrywise.Entrywise(rule, 0.6, "total", 4)
    options = {"combination_type": f"{rule}_svd", "density": 0.6, "seed": 4}
    merged = merge(bank, WEIGHTS, rank=5, **options)
    by_energy = merge(bank, WEIGHTS, energy=0.8, **options)
    for module, found in products(merged).items():
        held = [name for name in WEIGHTS if module in bank.adapter(name).modules]
        updates = [product(bank.adapter(name).modules[module], torch.float32) for name in held]
        keys = [f"{module}\0{name}\0update" for name in held]
        whole = plain.combine(
            lambda k, span, updates=updates: updates[k][span].clone(),
            updates[0].shape,
            [WEIGHTS[name] for name in held],
            keys,
        )
        truth = truncated(whole.double(), 5)
        assert_within_budget(found.float(), truncated(whole, 5), truth, module)
        report, values = merged.report.modules[module], torch.linalg.svdvals(whole.double())
        assert report.rule_norm == pytest.approx(float(whole.norm()), rel=1e-6)
        share = values.square().cumsum(0) / values.square().sum()
        assert report.energy == pytest.approx(float(share[4]), rel=1e-5)
        assert by_energy.report.modules[module].rank == int((share < 0.8).sum()) + 1


def regauged(bank: AdapterBank) -> AdapterBank:
    """The same updates, (A, B) -> (M A, M^-T B)."""
    changed, generator = AdapterBank(), torch.Generator().manual_seed(3)
    for name in bank.names:
        parts = {}
        for module, part in bank.adapter(name).modules.items():
            rank = len(part.lora_a)
            turn = torch.linalg.qr(torch.randn(rank, rank, generator=generator).double()).Q
            stretch = turn * torch.linspace(0.5, 2, rank).double()
            a, b = (
                stretch @ part.lora_a.double(),
                torch.linalg.inv(stretch).mT @ part.lora_b.double(),
            )
            parts[module] = LoraFactors(a.float(), b.float(), part.scale, part.embedding)
        changed.add(Adapter(name, parts))
    return changed


@pytest.mark.parametrize("kind, changes", [
    ("magnitude_prune_svd", False), ("magnitude_prune_knots", False),
    ("magnitude_prune_core", True), ("magnitude_prune", True),
])  # fmt: skip
def test_which_forms_depend_on_the_split_into_factors(kind, changes):
    bank = bank_for(kind)
    options = {"combination_type": kind, "density": 0.6}
    before = products(merge(bank, WEIGHTS, **options))
    after = products(merge(regauged(bank), WEIGHTS, **options))
    gap = max(float((after[m] - before[m]).norm() / before[m].norm()) for m in before)
    assert gap > 0.01 if changes else gap < 1e-3


@pytest.mark.parametrize("kind", DARE)
def test_a_seed_repeats_itself_whatever_the_order(kind):
    bank = bank_for(kind)
    turned = AdapterBank()
    for name in reversed(bank.names):
        one = bank.adapter(name)
        turned.add(Adapter(name, dict(reversed(one.modules.items()))))
    options = {"combination_type": kind, "density": 0.5}
    first = products(merge(bank, WEIGHTS, seed=7, **options))
    again = products(merge(turned, dict(reversed(WEIGHTS.items())), seed=7, **options))
    other = products(merge(bank, WEIGHTS, seed=8, **options))
    for module, found in first.items():
        # Other orders of summation, in float32 where updates are dense.
        assert (again[module] - found).norm() < 1e-5 * found.norm(), module
        assert (other[module] - found).norm() > 0.1 * found.norm(), "the negative control"
    repeated = merge(bank, WEIGHTS, seed=7, **options)
    assert all(found.equal(first[module]) for module, found in products(repeated).items())


@pytest.mark.parametrize("kind", ["ties", "ties_svd", "ties_core", "dare_ties_knots"])
def test_an_adapter_of_weight_zero_votes_but_alone_it_changes_nothing(kind):
    bank = bank_for(kind)
    options = {"combination_type": kind, "density": 0.8}
    options |= {} if kind in RULES else {"rank": 4}
    zero = {**WEIGHTS, "code": 0.0}
    with_vote = products(merge(bank, zero, **options))
    without = products(merge(bank, {n: w for n, w in zero.items() if w}, **options))
    assert with_vote.keys() == without.keys() and "embed" not in with_vote
    assert float((with_vote["q"] - without["q"]).norm()) > 0.01
    assert with_vote["v"].equal(without["v"]), "code does not adapt v"


def test_hundreds_of_adapters(monkeypatch):
    """More than are held at a time, more rank rows than the layer has features."""
    count = 150
    bank = AdapterBank()
    bank.add_many([adapter(f"{i}", {"q": 1 + i % 2}, i) for i in range(count)])
    weights = {name: 1 / count for name in bank.names}
    for kind in ("ties_svd", "dare_ties_svd", "ties_core", "ties_knots"):
        merged = merge(bank, weights, combination_type=kind, density=0.5, rank=6)
        check_reported_errors(bank, weights, merged)
        monkeypatch.setattr(entrywise, "_HELD", 10**6)
        assert products(merge(bank, weights, combination_type=kind, density=0.5, rank=6))[
            "q"
        ].equal(products(merged)["q"]), kind
        monkeypatch.undo()


@pytest.mark.parametrize("kind", [f"{rule}_{space}" for rule in RULES for space in SPACES])
def test_untrained_adapters_and_shared_factors(kind):
    """Zero updates give zero; A's that are all alike are one set of directions."""
    bank = make_bank({n: {"q": 4, "k": 4} for n in WEIGHTS})
    bank.stacks["k"].lora_b[:] = 0
    shared = bank.stacks["q"]
    shared.lora_a[4:8] = shared.lora_a[:4]
    shared.lora_a[8:] = shared.lora_a[:4]
    merged = merge(bank, WEIGHTS, combination_type=kind, density=0.9)
    found = products(merged)
    assert not found["k"].any() and merged.report.modules["k"].error_to_exact == 0
    assert torch.linalg.matrix_rank(found["q"], rtol=1e-5) == 4
    check_reported_errors(make_bank({"math": {"q": 4}}), {"math": 1.0}, merge(
        make_bank({"math": {"q": 4}}), {"math": 1.0}, combination_type=kind, density=0.9
    ))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", FORMS)
def test_the_bank_stays_as_it_was(kind, dtype):
    bank = AdapterBank(dtype=dtype)
    bank.add_many([adapter(name, {"q": 4, "v": 4}, i) for i, name in enumerate(WEIGHTS)])
    before = {module: [t.clone() for t in stack.factors()] for module, stack in bank.stacks.items()}
    for density in (0.5, 1):
        merge(bank, WEIGHTS, combination_type=kind, density=density)
    for module, stack in bank.stacks.items():
        assert all(a.equal(b) for a, b in zip(stack.factors(), before[module], strict=True))


BAD = {
    "no density": ({}, r"density must be a number in \(0, 1\], got None for 'ties_svd'"),
    "density 0": ({"density": 0}, r"density must be a number in \(0, 1\], got 0 for"),
    "density 1.5": ({"density": 1.5}, r"density must be a number in \(0, 1\], got 1.5 for"),
    "density nan": ({"density": float("nan")}, r"density must be a number in \(0, 1\], got nan"),
    "density text": ({"density": "0.5"}, r"density must be a number in \(0, 1\], got '0.5'"),
    "density of svd": (
        {"density": 0.5, "combination_type": "svd"},
        r"density must be given for \('ties', .*\) and their forms only, got 0.5 for 'svd'",
    ),
    "sign": (
        {"density": 0.5, "majority_sign_method": "sum"},
        "majority_sign_method must be 'total' or 'frequency', got 'sum'",
    ),
    "no election": (
        {"majority_sign_method": "frequency", "combination_type": "svd"},
        "majority_sign_method must be given for rules that elect .* got 'frequency' for 'svd'",
    ),
    "seed": ({"density": 0.5, "seed": 0.5}, "seed must be an integer, got 0.5"),
    "mixed": (
        {"density": 0.5, "combination_type": "dare_ties"},
        "combination_type must be 'dare_ties_svd' or 'dare_ties_core' where ranks differ, got ",
    ),
    "rank": (
        {"density": 0.5, "combination_type": "ties", "rank": 3},
        r"rank must be given for 'svd', '\*_svd', '\*_core' and '\*_knots' only, got 3 for 'ties'",
    ),
    "large rank": ({"density": 0.5, "rank": 41}, "rank must be at most 40, .* got 41"),
    "large core": (
        {"density": 0.5, "rank": 18, "combination_type": "ties_core"},
        r"rank must be at most 17, .* \(at 'q'\), got 18",
    ),
    "taken": ({"density": 0.5, "name": "math"}, "name must be new to the bank, got 'math'"),
    "too sparse": ({"density": 1e-9}, "density must keep at least one value of each matrix"),
}


@pytest.mark.parametrize("change, text", BAD.values(), ids=BAD)
def test_rejects(change, text):
    bank = make_bank()
    with pytest.raises(ValueError, match=text) as caught:
        merge(bank, WEIGHTS, **{"combination_type": "ties_svd", **change})
    assert "\n" not in str(caught.value) and str(caught.value).startswith("merge: ")
    assert bank.names == list(WEIGHTS) and set(SIZES) == set(bank.modules) and RANKS


def test_progress_counts_modules():
    seen = []
    merge(
        make_bank(),
        WEIGHTS,
        combination_type="ties_core",
        density=0.5,
        progress=lambda *now: seen.append(now),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


class Largest(TorchDispatchMode):
    """The number of values of the largest matrix that any operation gives."""

    def __init__(self):
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for t in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(t, Tensor) and t.dim() > 1:
                self.values = max(self.values, t.shape[-2] * t.shape[-1])
        return found


@pytest.mark.parametrize("kind", ["cat", "svd", "linear", "ties", "ties_core", "ties_knots"])
def test_only_svd_forms_make_matrices_of_the_size_of_a_layer(kind):
    bank = AdapterBank()
    bank.add_many([adapter(f"{i}", {"q": 2}, i) for i in range(3)])
    stack = bank.stacks["q"]
    size = stack.in_features * stack.out_features
    assert 6 * (stack.in_features + stack.out_features) < size
    sizes = []
    for one in (kind, "ties_svd"):
        options = {"density": 0.5} if one.startswith("ties") else {}
        with Largest() as seen:
            merge(bank, dict.fromkeys(bank.names, 0.5), combination_type=one, **options)
        sizes.append(seen.values)
    assert sizes[0] < size <= sizes[1]
