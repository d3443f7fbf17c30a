"""merge against the dense sum in float64: products, reported errors, energies, refusals."""

import math

import pytest
import torch
from torch import Tensor

from lora_fused import Adapter, AdapterBank, LoraFactors, Mixture
from lora_fused.methods import exact_sums, merge
from lora_fused.testing import assert_within_budget

SIZES = {"q": (40, 56), "k": (40, 56), "v": (56, 40), "embed": (90, 40)}
WEIGHTS = {"math": 0.5, "code": -0.3, "chat": 1.25}
RANKS = {"math": {"q": 4, "k": 4, "v": 6}, "code": {"q": 8, "k": 8, "embed": 3}, "chat": {"q": 5}}
TYPES = pytest.mark.parametrize("combination_type", ("cat", "svd", "linear"))


def adapter(name: str, ranks: dict[str, int], seed: int, dtype=torch.float32) -> Adapter:
    """Random factors of O(1) products; scales as alpha patterns and rsLoRA give them."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for module, rank in ranks.items():
        a, b = (torch.randn(rank, n, generator=generator) for n in SIZES[module])
        scale = 16 / (math.sqrt(rank) if seed % 2 else rank) / (1 + len(parts))
        a, b = a.to(dtype) / 8, b.to(dtype) / 8
        parts[module] = LoraFactors(a, b, scale, module == "embed")
    return Adapter(name, parts)


def make_bank(ranks=RANKS, dtype=torch.float32) -> AdapterBank:
    bank = AdapterBank()
    bank.add_many([adapter(name, r, i, dtype) for i, (name, r) in enumerate(ranks.items())])
    return bank


def same_rank_bank(dtype=torch.float32) -> AdapterBank:
    return make_bank({n: dict.fromkeys(r, 4) for n, r in RANKS.items()}, dtype)


def product(part: LoraFactors, dtype=torch.float64) -> Tensor:
    return part.scale * (part.lora_b.to(dtype).T @ part.lora_a.to(dtype))


def dense(bank: AdapterBank, weights: dict, module: str, dtype=torch.float64) -> Tensor:
    parts = [(bank.adapter(n).modules.get(module), w) for n, w in weights.items()]
    return sum(w * product(part, dtype) for part, w in parts if part is not None)


def linear(bank: AdapterBank, weights: dict, module: str) -> Tensor:
    """PEFT's rule, in float64: sqrt(|w s|) on both factors, the sign on A."""
    parts = [(bank.adapter(n).modules.get(module), w) for n, w in weights.items()]
    factors = [(part, w * part.scale) for part, w in parts if part is not None]
    lora_a = sum(math.copysign(abs(f) ** 0.5, f) * p.lora_a.double() for p, f in factors)
    lora_b = sum(abs(f) ** 0.5 * p.lora_b.double() for p, f in factors)
    return lora_b.T @ lora_a


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def check_reported_errors(bank, weights, merged) -> None:
    """Each reported error is the dense one; the reference is the dense one taken in float32."""
    reported, rounded, truth, norms = [], [], [], []
    for module, part in merged.adapter.modules.items():
        exact = dense(bank, weights, module)
        truth.append((product(part) - exact).norm())
        gap = product(part, torch.float32) - dense(bank, weights, module, torch.float32)
        rounded.append(gap.norm() / exact.norm())
        norms.append(exact.norm())
        reported.append(merged.report.modules[module].error_to_exact)
    truth, norms = torch.stack(truth), torch.stack(norms)
    rounded = torch.stack([r.float() for r in rounded])
    assert_within_budget(torch.tensor(reported), rounded, truth / norms, "error_to_exact")
    overall = (truth.norm() / norms.norm())[None]
    found = torch.tensor([merged.report.error_to_exact])
    assert_within_budget(found, rounded.max()[None].expand(1), overall, "overall")


def test_cat_is_the_exact_sum():
    """Mixed ranks, rsLoRA, other scales in each module, a negative weight, modules that lack."""
    bank = make_bank()
    merged, flipped = merge(bank, WEIGHTS), merge(bank, {**WEIGHTS, "code": 0.3})
    ranks = {module: part.lora_a.shape[0] for module, part in merged.adapter.modules.items()}
    assert ranks == {"q": 17, "k": 12, "v": 6, "embed": 3}, "empty segments take no rows"
    assert tuple(merged.adapter.modules) == bank.modules
    for module, part in merged.adapter.modules.items():
        truth, reference = (dense(bank, WEIGHTS, module, d) for d in (torch.float64, torch.float32))
        assert_within_budget(product(part).float(), reference, truth, module)
        if module in RANKS["code"]:  # the negative control: the sign is felt
            other = product(flipped.adapter.modules[module])
            with pytest.raises(AssertionError):
                assert_within_budget(other.float(), reference, truth)
    assert merged.report.energy == 1 and merged.report.error_to_exact < 1e-6
    check_reported_errors(bank, WEIGHTS, merged)


def test_svd_is_the_best_of_its_rank():
    bank = make_bank()
    merged = merge(bank, WEIGHTS, combination_type="svd", rank=5)
    for module, part in merged.adapter.modules.items():
        report, exact = merged.report.modules[module], dense(bank, WEIGHTS, module)
        rank = min(5, torch.linalg.matrix_rank(exact).item())
        assert part.lora_a.shape[0] == report.rank == rank, module
        rounded = dense(bank, WEIGHTS, module, torch.float32)
        reference = truncated(rounded, rank)
        assert_within_budget(product(part).float(), reference, truncated(exact, rank), module)
        values = part.lora_a.norm(dim=1) * part.lora_b.norm(dim=1)
        truth, reference = (torch.linalg.svdvals(m)[:rank] for m in (exact, rounded))
        assert_within_budget(values, reference, truth, f"singular values of {module}")
        assert_within_budget(part.lora_a.norm(dim=1), reference.sqrt(), truth.sqrt(), "even split")
        share = truth.square().sum() / exact.square().sum()
        budget = torch.tensor([report.energy], dtype=torch.float64)
        assert_within_budget(budget, share.float().double()[None], share[None], "energy")
    check_reported_errors(bank, WEIGHTS, merged)


def test_energy_gives_the_smallest_rank_that_keeps_it():
    bank = make_bank()
    merged = merge(bank, WEIGHTS, combination_type="svd", energy=0.9)
    for module, part in merged.adapter.modules.items():
        energies = torch.linalg.svdvals(dense(bank, WEIGHTS, module)).square()
        shares = energies.cumsum(0) / energies.sum()
        assert part.lora_a.shape[0] == int((shares < 0.9).sum()) + 1, module
    assert len({part.rank for part in merged.report.modules.values()}) > 1, "ranks differ"
    assert 0.9 <= merged.report.energy < 1
    check_reported_errors(bank, WEIGHTS, merged)
    everything = merge(bank, WEIGHTS, combination_type="svd", energy=1.0)
    assert everything.report.error_to_exact < 1e-6 < merged.report.error_to_exact


def test_linear_is_the_sum_of_factors_and_says_how_far_off_it_is():
    bank = same_rank_bank()
    merged = merge(bank, WEIGHTS, combination_type="linear")
    for module, part in merged.adapter.modules.items():
        truth = linear(bank, WEIGHTS, module)
        assert_within_budget(product(part).float(), truth.float(), truth, module)
    assert merged.report.energy is None and merged.report.error_to_exact > 0.5
    assert merged.report.modules["v"].error_to_exact < 1e-6, "one adapter alone: exact"
    check_reported_errors(bank, WEIGHTS, merged)


@TYPES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes_are_kept_and_their_rounding_reported(combination_type, dtype):
    bank = same_rank_bank(dtype)
    merged = merge(bank, WEIGHTS, combination_type=combination_type)
    assert all(part.lora_a.dtype == dtype for part in merged.adapter.modules.values())
    check_reported_errors(bank, WEIGHTS, merged)
    wide = merge(bank, WEIGHTS, combination_type=combination_type, dtype=torch.float32)
    assert wide.adapter.modules["q"].lora_b.dtype == torch.float32
    module = "q" if combination_type == "cat" else "v"  # where rounding is all there is
    errors = [m.report.modules[module].error_to_exact for m in (wide, merged)]
    assert errors[0] < 1e-6 < 1e-4 < errors[1] < 1e-2
    narrow = merge(same_rank_bank(), WEIGHTS, combination_type=combination_type, dtype=dtype)
    check_reported_errors(same_rank_bank(), WEIGHTS, narrow)


def test_cat_keeps_equal_adapters_bit_for_bit():
    bank = AdapterBank()
    bank.add_many([adapter(f"{i}", {"q": 4}, 2 * i, torch.bfloat16) for i in range(3)])
    part = merge(bank, {"0": 0.1, "1": -0.1, "2": 0.1}).adapter.modules["q"]
    signs = torch.tensor([1.0, -1.0, 1.0]).repeat_interleave(4)[:, None]
    assert part.lora_a.equal(bank.stacks["q"].lora_a)
    assert part.lora_b.equal((bank.stacks["q"].lora_b * signs).bfloat16())


@TYPES
def test_batches_equal_modules_one_at_a_time_and_runs_repeat(combination_type, monkeypatch):
    names = [f"layers.{i}" for i in range(9)]
    bank = AdapterBank()
    for k, name in enumerate(WEIGHTS):
        generator = torch.Generator().manual_seed(k)
        factors = torch.randn(9, 2, 4, 32, generator=generator)
        bank.add(Adapter(name, {m: LoraFactors(*factors[i], 0.5) for i, m in enumerate(names)}))
    together, again = (merge(bank, WEIGHTS, combination_type=combination_type) for _ in range(2))
    monkeypatch.setattr(exact_sums, "BATCH_VALUES_CPU", 1)
    single = merge(bank, WEIGHTS, combination_type=combination_type)
    for module, part in together.adapter.modules.items():
        assert part.lora_a.equal(again.adapter.modules[module].lora_a)
        assert part.lora_b.equal(again.adapter.modules[module].lora_b)
        alone = product(single.adapter.modules[module])
        assert_within_budget(product(part).float(), alone.float(), alone, module)
    assert again.report == together.report


def test_dependent_rows_take_the_other_road():
    """Shared A's, rows of zeros and more rank rows than features, among sound modules."""
    bank = make_bank({n: {"q": 4, "k": 4, "v": 30} for n in WEIGHTS})
    shared, zero = bank.stacks["q"], bank.stacks["k"]
    shared.lora_a[4:8] = shared.lora_a[:4]
    shared.lora_a[8] = shared.lora_a[0] * (1 + 1e-6)
    zero.lora_b[:] = 0
    merged = merge(bank, WEIGHTS, combination_type="svd", rank=12)
    for module in ("q", "v"):
        exact, rounded = (dense(bank, WEIGHTS, module, d) for d in (torch.float64, torch.float32))
        best, reference = truncated(exact, 12), truncated(rounded, 12)
        assert_within_budget(product(merged.adapter.modules[module]).float(), reference, best)
    assert not product(merged.adapter.modules["k"]).any()
    assert merged.report.modules["k"] == (12, 0.0, 1.0, 0.0, 0.0)


@TYPES
def test_the_difference_of_nearly_equal_adapters(combination_type):
    """A sum 10,000 times smaller than its terms: nothing is lost on the way."""
    first = adapter("first", {"q": 4}, 0)
    part, noise = first.modules["q"], adapter("noise", {"q": 4}, 2).modules["q"]
    lora_a, lora_b = part.lora_a + 1e-4 * noise.lora_a, part.lora_b + 1e-4 * noise.lora_b
    bank = AdapterBank()
    bank.add_many([first, Adapter("second", {"q": LoraFactors(lora_a, lora_b, part.scale)})])
    rank = {"rank": 8} if combination_type == "svd" else {}
    weights = {"first": 1.0, "second": -1.0}
    merged = merge(bank, weights, combination_type=combination_type, **rank)
    check_reported_errors(bank, weights, merged)
    assert (merged.report.error_to_exact < 1e-6) == (combination_type != "linear")


def test_only_the_adapters_named_count_and_zero_leaves_one_out():
    bank = make_bank()
    merged = merge(bank, {"math": 2.0, "code": 0.0}, name="double")
    assert merged.adapter.name == "double" and "embed" not in merged.adapter.modules
    assert merged.adapter.modules["q"].lora_a.equal(bank.adapter("math").modules["q"].lora_a)
    assert merged.report.weights == {"math": 2.0, "code": 0.0}


def test_the_bank_takes_the_result_and_stays_as_it_was():
    bank = make_bank()
    before = bank.stacks["q"].lora_a.clone()
    merged = merge(bank, WEIGHTS, combination_type="svd", rank=17)
    assert bank.stacks["q"].lora_a.equal(before) and bank.names == list(WEIGHTS)
    bank.add(merged.adapter)
    assert bank.metadata["merged"]["merge"]["weights"] == WEIGHTS
    Mixture.of({"merged": 1.0}).resolve(bank)
    assert_within_budget(
        dense(bank, {"merged": 1.0}, "q").float(),
        dense(bank, WEIGHTS, "q", torch.float32),
        dense(bank, WEIGHTS, "q"),
    )


def test_adapters_in_training_are_merged_as_they_are_now():
    bank = make_bank()
    parameters = bank.trainable(["code"])
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(3)
    part = merge(bank, {"code": 1.0}).adapter.modules["q"]
    assert not part.lora_a.requires_grad
    assert part.lora_a.equal(make_bank().adapter("code").modules["q"].lora_a * 3)
    with torch.no_grad():
        parameters[0][0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"^merge: lora_a of adapter 'code' at 'q' must be finite"):
        merge(bank, WEIGHTS)


def test_the_report_prints_energy_and_error():
    report = merge(make_bank(), WEIGHTS, combination_type="svd", rank=5).report
    head, *worst = str(report).splitlines()
    start = "svd of 3 adapters, 4 modules, rank 3 to 5: energy kept 0."
    assert head.startswith(start) and ", error to the exact sum 0." in head
    assert worst[0].startswith("  k: rank 5, energy kept 0.") and len(worst) == 4
    report = merge(same_rank_bank(), WEIGHTS, combination_type="linear").report
    assert "energy" not in str(report) and "rank 4: error to the exact sum" in str(report)


BAD = {
    "unknown": ({"weights": {"maths": 1}}, r"be a loaded adapter \(close: 'math'\), got 'maths'"),
    "no names": ({"weights": {}}, "weights must name at least one adapter, got none"),
    "list": ({"weights": ["math"]}, "weights must map names of adapters to numbers"),
    "nan": ({"weights": {"math": math.nan}}, "weight of 'math' must be finite in float32, got nan"),
    "inf": (
        {"weights": {"math": -math.inf}},
        "weight of 'math' must be finite in float32, got -inf",
    ),
    "text": ({"weights": {"math": "1"}}, "weight of 'math' must be a number, got '1'"),
    "zeros": ({"weights": {"math": 0}}, "weights must hold a weight other than 0"),
    "huge": ({"weights": {"math": 1e60}}, "weight of 'math' must be finite in float32, got 1e"),
    "type": (
        {"combination_type": "tie"},
        r"must be one of \('cat', 'svd', 'linear', 'ties', .* 'magnitude_prune_knots'\), got 'tie'",
    ),
    "rank 0": ({"rank": 0}, "rank must be an integer of at least 1, got 0"),
    "rank 1.5": ({"rank": 1.5}, "rank must be an integer of at least 1, got 1.5"),
    "rank 18": ({"rank": 18}, r"rank must be at most 17, the largest .* \(at 'q'\), got 18"),
    "energy": ({"energy": 1.5}, r"energy must be a number in \(0, 1\], got 1.5"),
    "both": ({"energy": 0.5, "rank": 3}, "rank and energy must not both be given"),
    "cat": ({"combination_type": "cat", "rank": 3}, "rank must be given for 'svd', .* got 3 for"),
    "mixed": ({"combination_type": "linear"}, r"'svd' where ranks differ, got 'linear' at 'q', r"),
    "name": ({"name": "__base__"}, "name must be a non-empty string other than '__base__'"),
    "dtype": ({"dtype": torch.int8}, "dtype must be one of .* got torch.int8"),
    "saved": ({"saved_modules": "apply"}, "saved_modules must be 'error' or 'ignore', got 'apply'"),
}


@pytest.mark.parametrize("change, text", BAD.values(), ids=BAD)
def test_rejects(change, text):
    options = {"weights": WEIGHTS, "combination_type": "svd", **change}
    with pytest.raises(ValueError, match=text):
        merge(make_bank(), **options)
    with pytest.raises(ValueError, match="merge: bank must be an AdapterBank, got dict"):
        merge({}, WEIGHTS)


def test_values_beyond_the_dtype_are_refused():
    bank = make_bank()
    with pytest.raises(
        ValueError, match=r"weights and dtype must keep .* of q within torch.float16"
    ):
        merge(bank, {"math": 1e13}, combination_type="svd", dtype=torch.float16)
    with pytest.raises(
        ValueError, match=r"weights and dtype must keep .* of q within torch.float32"
    ):
        merge(bank, {"math": 1e-60})
