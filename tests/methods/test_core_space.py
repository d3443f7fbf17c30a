"""Core Space and KnOTS against the papers' own formulas on dense matrices."""

import pytest
import torch
from test_merging import WEIGHTS, make_bank, product, truncated
from torch import Tensor

from lora_fused.methods import merge
from lora_fused.methods.entrywise import Entrywise
from lora_fused.testing import assert_within_budget

DENSITY, RANK = 0.6, 5


def by_rule(rule: str, tensors: list[Tensor], weights: list[float]) -> Tensor:
    def rows(k: int, span: slice) -> Tensor:
        return tensors[k][span].clone()

    keys = [""] * len(tensors)
    return Entrywise(rule, DENSITY).combine(rows, tensors[0].shape, weights, keys)


def directions(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((s > 1e-10 * s[0]).sum())
    return u[:, :rank], s[:rank], vh[:rank]


def core_space(parts, weights, rule: str) -> Tensor:
    """arXiv:2509.17786: M_k = U^T (s B_k A_k) V; U, V of all B side by side, all A stacked."""
    u, _, _ = directions(torch.cat([p.lora_b.double().mT for p in parts], 1))
    _, _, vh = directions(torch.cat([p.lora_a.double() for p in parts]))
    cores = [u.mT @ product(p) @ vh.mT for p in parts]
    return u @ by_rule(rule, cores, weights) @ vh


def knots(parts, weights, rule: str) -> Tensor:
    """arXiv:2410.19735: [D_1 ... D_K] = U S [V_1^T ... V_K^T], the rule on V_k^T."""
    u, s, vh = directions(torch.cat([product(p) for p in parts], 1))
    merged = by_rule(rule, list(vh.chunk(len(parts), 1)), weights)
    return u * s @ merged


@pytest.mark.parametrize("rule", ["ties", "magnitude_prune"])
@pytest.mark.parametrize("space, formula", [("core", core_space), ("knots", knots)])
def test_is_the_papers_formula(space, formula, rule):
    bank = make_bank()
    options = {"combination_type": f"{rule}_{space}", "rank": RANK, "density": DENSITY}
    merged = merge(bank, WEIGHTS, **options)
    other = merge(bank, WEIGHTS, **{**options, "combination_type": f"{rule}_svd"})
    for module, part in merged.adapter.modules.items():
        held = [name for name in WEIGHTS if module in bank.adapter(name).modules]
        parts = [bank.adapter(name).modules[module] for name in held]
        whole = formula(parts, [WEIGHTS[name] for name in held], rule)
        best = truncated(whole, RANK)
        rounded = truncated(whole.float(), RANK)
        assert_within_budget(product(part).float(), rounded, best, module)
        assert merged.report.modules[module].rule_norm == pytest.approx(float(whole.norm()))
        with pytest.raises(AssertionError):  # the negative control: not the dense rule's result
            found = product(other.adapter.modules[module]).float()
            assert_within_budget(found, rounded, best, module)
