"""Fitting a shared basis to 100 adapters: fit_subspace beside lorashare.

    python -m benchmarks.bench_fit_subspace --csv benchmarks/results/fit_subspace.csv

100 adapters of rank 16 on two modules of 2048 x 2048, P = 32. The rows of each factor are a mean
that all adapters share, 32 common directions of falling size, and noise. In the rows of the table
N is the number of modules, J = P; max_error is the relative Frobenius error of all products over
the least that any basis of P directions on either side reaches (turns of exact eigenvectors in
float64, until they gain nothing). lorashare is timed on tensors in memory, files left out, where it
is installed; one thread, the CPU clock, in turns.
"""

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine, table
from benchmarks.harness import CLOCKS, Case, Result
from lora_fused import Adapter, AdapterBank, LoraFactors
from lora_fused.methods.eigenlorax import METHODS, fit_subspace

ADAPTERS, RANK, HIDDEN, MODULES, DIRECTIONS = 100, 16, 2048, 2, 32
MEAN, NOISE, SCALE = 0.3, 0.25, 2.0
WORST_ERROR = 1.02  # asked of the best method, times the least


def make_bank(seed: int = 0) -> AdapterBank:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    falling = torch.arange(1, DIRECTIONS + 1) ** -0.5
    parts: list[dict[str, LoraFactors]] = [{} for _ in range(ADAPTERS)]
    for module in range(MODULES):
        common = [(MEAN * draw(1, HIDDEN), draw(DIRECTIONS, HIDDEN)) for _ in "ab"]
        for part in parts:
            rows = [
                mean + (draw(RANK, DIRECTIONS) * falling) @ shared / 4 + NOISE * draw(RANK, HIDDEN)
                for mean, shared in common
            ]
            lora_a, lora_b = (t * HIDDEN**-0.5 for t in rows)
            part[f"m{module}"] = LoraFactors(lora_a, lora_b, SCALE)
    bank = AdapterBank()
    bank.add_many([Adapter(f"a{k}", part) for k, part in enumerate(parts)])
    return bank


def factors(bank: AdapterBank, module: str) -> tuple[Tensor, Tensor]:
    stack = bank.stacks[module]
    lora_a, lora_b = (t.double().unflatten(0, (ADAPTERS, RANK)) for t in stack.factors())
    return lora_a, lora_b * stack.scale.double()[:, None, None]


def least_error(bank: AdapterBank) -> float:
    """What full cores on the best two bases leave, by turns in float64."""
    lost = whole = 0.0
    for module in bank.modules:
        lora_a, lora_b = factors(bank, module)
        total = float(((lora_a @ lora_a.mT) * (lora_b @ lora_b.mT)).sum())
        basis_b, held = None, 0.0
        while True:
            seen_b = lora_b if basis_b is None else lora_b @ basis_b.mT
            basis_a, _ = _leading(lora_a, seen_b)
            basis_b, found = _leading(lora_b, lora_a @ basis_a.mT)
            if found - held <= 1e-9 * total:
                break
            held = found
        lost, whole = lost + total - found, whole + total
    return (lost / whole) ** 0.5


def _leading(rows: Tensor, other: Tensor) -> tuple[Tensor, float]:
    """Top right singular vectors of the stacked updates, and the energy that they hold."""
    power, turn = torch.linalg.eigh(other @ other.mT)
    seen = (power.clamp_min(0).sqrt()[..., None] * turn.mT @ rows).flatten(0, 1)
    energy, left = torch.linalg.eigh(seen @ seen.mT)
    energy, left = energy[-DIRECTIONS:], left[:, -DIRECTIONS:]
    return (left / energy.sqrt()).mT @ seen, float(energy.sum())


class Lorashare:
    """lorashare's components and loadings of the same adapters."""

    def __init__(self, bank: AdapterBank):
        from lorashare import compression

        self.package, self.bank = compression, bank
        self.adapters = {name: self._state(bank.adapter(name)) for name in bank.names}

    def _state(self, adapter: Adapter) -> dict[str, Tensor]:
        state = {}
        for module, part in adapter.modules.items():
            key = f"base_model.model.{module}.lora_"
            state[f"{key}A.weight"] = part.lora_a
            state[f"{key}B.weight"] = part.lora_b.mT.contiguous()
        return state

    def fit(self) -> tuple:
        combined = self.package.combine_adapter_weights(self.adapters)
        components = self.package.compute_shared_components(combined, DIRECTIONS)[0]
        project = self.package.compute_adapter_loadings
        return components, {name: project(components, s) for name, s in self.adapters.items()}

    def error(self, fitted: tuple) -> float:
        components, loadings = fitted
        lost = whole = 0.0
        for name, found in loadings.items():
            state = self.package.reconstruct_adapter_weights(components, found)
            for module, part in self.bank.adapter(name).modules.items():
                key = f"base_model.model.{module}.lora_"
                exact = part.lora_b.double().mT @ part.lora_a.double()
                gap = state[f"{key}B.weight"].double() @ state[f"{key}A.weight"].double() - exact
                lost, whole = lost + float(gap.square().sum()), whole + float(exact.square().sum())
        return (lost / whole) ** 0.5


def race(runs: dict[str, tuple[Callable, Callable]], least: float, rounds: int) -> list[Result]:
    """Time everyone in turns; the first round is a warm-up."""
    now, results = CLOCKS["cpu"], {name: Result(name, name in METHODS) for name in runs}
    for i in range(-1, rounds):
        for name, (run, error) in runs.items():
            start = now()
            fitted = run()
            if i >= 0:
                results[name].seconds.append(now() - start)
            else:
                results[name].max_error = error(fitted) / least
    if not results["hooi"].max_error <= WORST_ERROR:
        results["hooi"].status = "wrong"
    return list(results.values())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_fit_subspace", description=__doc__
    )
    parser.add_argument("--csv", type=Path, help="where rows go; nothing is written without it")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    bank = make_bank()
    runs = {
        method: (
            lambda method=method: fit_subspace(bank, rank=DIRECTIONS, method=method),
            lambda subspace: subspace.errors(bank).overall,
        )
        for method in METHODS
    }
    if importlib.util.find_spec("lorashare"):
        theirs = Lorashare(bank)
        runs["lorashare"] = (theirs.fit, theirs.error)
    else:
        print("lorashare is not installed: ours alone")
    case = Case(
        "fit_subspace", "fit", "shared mean", MODULES, ADAPTERS, DIRECTIONS, RANK, HIDDEN, HIDDEN
    )
    least = least_error(bank)
    print(f"{machine.cpu_model()}, torch {torch.__version__}, one thread, CPU clock")
    print(f"{case}: least error {least:.4f}")
    raced = race(runs, least, options.rounds)
    slowest = statistics.median(raced[-1].seconds)
    for result in raced:
        took = statistics.median(result.seconds)
        ratio = f"  {raced[-1].name} {slowest / took:.1f}x" if result is not raced[-1] else ""
        print(
            f"  {result.name:12s} {took * 1e3:9.1f} ms  error {result.max_error:.4f} x least{ratio}"
        )
    # The least that is needed: each factor read, and its products with P directions, once each.
    numbers = 2 * MODULES * ADAPTERS * RANK * HIDDEN
    facts = {"flops": 4.0 * numbers * DIRECTIONS, "traffic": 4.0 * numbers, "clock": "cpu"}
    rates = machine.Rates(CLOCKS["cpu"])
    facts["floor"] = rates.floor(facts["flops"], facts["traffic"], "float32")
    if options.csv:
        table.Table(options.csv).put(case, table.rows_of(case, raced, **facts))


if __name__ == "__main__":
    main()
