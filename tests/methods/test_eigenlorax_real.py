"""Subspaces of real adapters: 16 of rank 8 on all-MiniLM-L6-v2, every fifth of their modules.

The figures are relative errors of the products over all adapters and modules, recomputed from dense
matrices in float64 when they were first measured. All 16 share one random A.
"""

import json

import pytest
import torch

from lora_fused import Adapter, AdapterBank, LoraFactors, load_adapters
from lora_fused.methods.eigenlorax import FitOptions, fit_subspace, leave_one_out

RANKS = (16, 32, 64)
PAPER = {"weighting": "factors"}
FIGURES = {
    "paper, mean inside": ({**PAPER, "center": False}, (0.653, 0.435, 0.243)),
    "paper, mean dropped": ({**PAPER, "keep_mean": False}, (0.663, 0.468, 0.311)),
    "paper, mean kept": (PAPER, (0.639, 0.429, 0.239)),
    "eigenlorax": ({}, (0.637, 0.429, 0.241)),
    "hosvd": ({"method": "hosvd"}, (0.609, 0.413, 0.235)),
    "hooi": ({"method": "hooi"}, (0.587, 0.408, 0.234)),
    "jd_diag": ({"method": "jd_diag"}, (0.604, 0.441, 0.262)),
}


@pytest.fixture(scope="module")
def bank(data_dir) -> AdapterBank:
    folder = data_dir / "adapters_minilm"
    if not (folder / "results.json").is_file():
        pytest.skip(f"no MiniLM adapters: {folder} has no results.json")
    names = list(json.loads((folder / "results.json").read_text()))[:16]
    full = load_adapters([folder / name for name in names])
    used = [m for m in full.modules if full.stacks[m].lora_b.any()][::5]
    found = AdapterBank()
    for name in full.names:
        parts = full.adapter(name).modules
        found.add(Adapter(name, {module: parts[module] for module in used}))
    assert len(found) == 16 and len(found.modules) == 8
    return found


@pytest.mark.parametrize("options, figures", FIGURES.values(), ids=FIGURES)
def test_errors_are_the_measured_ones(bank, options, figures):
    found = [fit_subspace(bank, rank=rank, **options).errors(bank).overall for rank in RANKS]
    assert [round(error, 3) for error in found] == list(figures)


def test_a_new_adapter_is_hardly_in_the_span(bank):
    """Whatever the explained variance says: 0.97 of it is lost at P = 16, 0.92 at P = 64."""
    left_out = [leave_one_out(bank, FitOptions("hosvd", rank=rank)).overall for rank in (16, 64)]
    assert [round(error, 2) for error in left_out] == [0.97, 0.92]


def test_the_gauge_changes_eigenlorax_alone(bank):
    generator, turned = torch.Generator().manual_seed(0), AdapterBank()
    for name in bank.names:
        parts = {}
        for module, part in bank.adapter(name).modules.items():
            turn = torch.randn(8, 8, generator=generator, dtype=torch.float64)
            lora_a, lora_b = turn @ part.lora_a.double(), part.lora_b.double()
            lora_b = torch.linalg.solve(turn.T, lora_b).float()
            parts[module] = LoraFactors(lora_a.float(), lora_b, part.scale)
        turned.add(Adapter(name, parts))

    def change(**options):
        found = [fit_subspace(b, rank=16, **options).errors(b).overall for b in (bank, turned)]
        return abs(found[1] / found[0] - 1)

    assert change(method="hosvd") < 1e-4 and change(method="hooi") < 1e-4
    assert change() > 0.1
