"""Cosines and principal angles of updates, against dense matrices."""

import math

import pytest
import torch
from test_merging import adapter, make_bank, product
from test_merging_rules import regauged

from lora_fused import Adapter, AdapterBank, LoraFactors
from lora_fused.methods.similarity import compare, principal_angles


def spaces(part: LoraFactors) -> tuple:
    """Orthonormal bases [n, r] of the dense update's row and column space."""
    u, s, vh = torch.linalg.svd(product(part))
    rank = int((s > 1e-6 * s[0]).sum())
    return vh[:rank].T, u[:, :rank]


def dense_overlap(bank: AdapterBank, first: str, second: str, side: int) -> float:
    found = []
    for module in bank.modules:
        parts = [bank.adapter(name).modules.get(module) for name in (first, second)]
        if None not in parts:
            p, q = (spaces(part)[side] for part in parts)
            found.append(float((p.T @ q).square().sum() / min(p.shape[1], q.shape[1])))
    return sum(found) / len(found)


def test_matches_dense_matrices():
    """Mixed ranks, layers that lack; averages over the layers in common alone."""
    bank = make_bank()
    found = compare(bank)
    assert found.names == bank.names
    for j, first in enumerate(bank.names):
        for k, second in enumerate(bank.names):
            for side, matrix in enumerate((found.inputs, found.outputs)):
                truth = dense_overlap(bank, first, second, side)
                assert float(matrix[j, k]) == pytest.approx(truth, abs=1e-6), (first, second)
            dots = [
                [product(bank.adapter(n).modules[m]).flatten() for n in (first, second)]
                for m in bank.modules
                if all(m in bank.adapter(n).modules for n in (first, second))
            ]
            sizes = math.prod(
                math.hypot(*(float(product(p).norm()) for p in bank.adapter(n).modules.values()))
                for n in (first, second)
            )
            cosine = sum(float(a @ b) for a, b in dots) / sizes
            assert float(found.cosine[j, k]) == pytest.approx(cosine, abs=1e-6)


def test_no_change_of_gauge_shows():
    bank = make_bank()
    before, after = compare(bank), compare(regauged(bank))
    for measure in ("cosine", "inputs", "outputs"):
        one, other = getattr(before, measure), getattr(after, measure)
        assert (one - other).abs().max() < 1e-5, measure
    a, b = (bank_.stacks["q"].lora_a for bank_ in (bank, regauged(bank)))
    assert (a - b).norm() > 0.1 * a.norm(), "the negative control: the factors differ"


def test_random_spaces_are_as_alike_as_chance_says():
    bank = AdapterBank()
    bank.add_many([adapter(f"{i}", {"q": 4 + 2 * (i % 2), "v": 4}, i) for i in range(40)])
    found = compare(bank)
    for side in ("inputs", "outputs"):
        mean = getattr(found, side)[torch.ones(40, 40).triu(1).bool()].mean()
        assert float(mean) == pytest.approx(getattr(found, f"chance_{side}"), rel=0.03)
    shared = AdapterBank()
    for name in bank.names:  # the negative control: one A for all
        part = bank.adapter(name).modules["v"]
        a = bank.adapter("0").modules["v"].lora_a
        shared.add(Adapter(name, {"v": LoraFactors(a, part.lora_b, part.scale)}))
    assert compare(shared).inputs.min() > 1 - 1e-5


def test_principal_angles_of_known_spaces():
    """Small and large ones, of unequal ranks, as near as float32 factors allow."""
    angles = torch.tensor([0.0, 1e-6, 0.3, 1.4]).double()
    eye = torch.eye(40).double()
    first = eye[:4]
    second = angles.cos()[:, None] * eye[:4] + angles.sin()[:, None] * eye[10:14]
    second = torch.cat([second, eye[20:22]])
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(40, 40, generator=generator).double()).Q
    bank = AdapterBank(dtype=torch.float32)
    for name, rows in (("a", first), ("b", second)):
        b = torch.randn(len(rows), 56, generator=generator)
        mixed = torch.randn(len(rows), len(rows), generator=generator).double() @ rows
        bank.add(Adapter(name, {"q": LoraFactors((mixed @ turn).float(), b, 2.0)}))
    for pair in (("a", "b"), ("b", "a")):
        found = principal_angles(bank, *pair)["q"]["inputs"]
        assert found.shape == (4,) and (found - angles).abs().max() < 3e-6
        assert principal_angles(bank, *pair)["q"]["outputs"].min() > 0.3
    assert principal_angles(bank, "a", "a")["q"]["inputs"].max() < 1e-7


def test_updates_that_are_zero_or_share_no_layer():
    bank = make_bank({"math": {"q": 4}, "code": {"q": 4}, "chat": {"v": 4}})
    bank.stacks["q"].lora_b[:4] = 0
    found = compare(bank)
    assert found.inputs[0].isnan().all() and found.inputs[1, 2].isnan()
    assert float(found.inputs[1, 1]) == pytest.approx(1) and not found.cosine[0].any()
    assert principal_angles(bank, "math", "code") == {}
    assert len(found.pairs()) == 3


def test_dependent_rows_are_no_directions():
    bank = make_bank({"math": {"q": 4}, "code": {"q": 2}})
    stack = bank.stacks["q"]
    stack.lora_a[2:4] = stack.lora_a[:2]
    angles = principal_angles(bank, "math", "code")["q"]
    assert len(angles["inputs"]) == 2
    assert len(principal_angles(bank, "math", "math")["q"]["inputs"]) == 2


def test_the_page_stands_alone(tmp_path):
    path = compare(make_bank()).save_html(tmp_path / "page.html")
    text = path.read_text()
    assert text.startswith("<!doctype html>") and text.count("<svg") == 3
    assert "math, chat" in text or "math, code" in text
    assert "http" not in text.replace("http-equiv", "")


def test_two_are_needed():
    with pytest.raises(ValueError, match="similarity: bank must hold at least two adapters, got 1"):
        compare(make_bank({"math": {"q": 4}}))
    with pytest.raises(ValueError, match="similarity: bank must be an AdapterBank, got list"):
        compare([])


def test_pairs_come_in_order():
    pairs = compare(make_bank()).pairs()
    sizes = torch.tensor([abs(pair[2]) for pair in pairs]).double()
    assert sizes.equal(sizes.sort(descending=True).values)
    assert len(compare(make_bank()).pairs(1)) == 1
