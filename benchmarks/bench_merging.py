"""Merging 8 adapters of rank 16: lora_fused.methods.merge beside PEFT's add_weighted_adapter.

    python -m benchmarks.bench_merging --csv benchmarks/results/merging.csv

Two cases: one 4096 x 4096 module, and a bank of 28 modules of 2048 x 2048. In the rows N is the
number of modules, J = K the adapters, R the rank of each and of the result; max_error is the
largest difference of a singular value from float64's, relative to the largest (svd), or the error
of the product relative to the exact sum's (cat; linear: to PEFT's rule in float64). PEFT's svd
takes minutes: it is timed --slow-rounds times, all else --rounds times, in turns. One thread and
the CPU clock, so that a busy machine can be used.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import machine, table
from benchmarks.harness import CLOCKS, Case, Result
from lora_fused import Adapter, AdapterBank, LoraFactors
from lora_fused.methods import merge

ADAPTERS, RANK, ALPHA = 8, 16, 32
WEIGHTS = {f"a{k}": (-1) ** k * 0.125 * (k + 1) for k in range(ADAPTERS)}  # exact in any dtype
SIZES = ((1, 4096), (28, 2048))
TYPES = ("svd", "cat", "linear")
WORST_ERROR = 1e-5
OURS, FULL, THIN = "lora_fused", "peft", "peft svd_full_matrices=False"


class PeftModel:
    """PEFT's model of L modules with the same adapters as a bank."""

    def __init__(self, modules: int, hidden: int):
        from peft import LoraConfig, get_peft_model

        names = [f"m{i}" for i in range(modules)]
        base = nn.Module()
        for name in names:
            base.add_module(name, nn.utils.skip_init(nn.Linear, hidden, hidden, bias=False))
        config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=names)
        for k, name in enumerate(WEIGHTS):
            if k == 0:
                self.model = get_peft_model(base, config, adapter_name=name)
            else:
                self.model.add_adapter(name, config)
        generator = torch.Generator().manual_seed(0)
        self.bank = AdapterBank()
        for name in WEIGHTS:
            self.bank.add(Adapter(name, self._draw(name, hidden, generator)))

    def _draw(self, name: str, hidden: int, generator) -> dict[str, LoraFactors]:
        parts = {}
        for path, layer in self.model.base_model.model.named_children():
            a, b = torch.randn(2, RANK, hidden, generator=generator) * hidden**-0.5
            layer.lora_A[name].weight.data.copy_(a)
            layer.lora_B[name].weight.data.copy_(b.T)
            parts[path] = LoraFactors(a, b, layer.scaling[name])
        return parts

    def merge(self, combination_type: str, full: bool) -> dict[str, LoraFactors]:
        """PEFT's merged factors; the adapter is taken out again by ``clear``."""
        self.model.add_weighted_adapter(
            list(WEIGHTS),
            list(WEIGHTS.values()),
            "merged",
            combination_type,
            svd_rank=RANK,
            svd_full_matrices=full,
        )
        return {
            path: LoraFactors(
                layer.lora_A["merged"].weight.detach(),
                layer.lora_B["merged"].weight.detach().T,
                layer.scaling["merged"],
            )
            for path, layer in self.model.base_model.model.named_children()
        }

    def clear(self) -> None:
        if "merged" in self.model.peft_config:
            self.model.delete_adapter("merged")


def product(part: LoraFactors) -> Tensor:
    return part.scale * (part.lora_b.double().T @ part.lora_a.double())


def exact_sum(bank: AdapterBank, module: str) -> Tensor:
    return sum(w * product(bank.adapter(name).modules[module]) for name, w in WEIGHTS.items())


def linear_rule(bank: AdapterBank, module: str) -> Tensor:
    """The factors added, each times the root of its weight and scale: PEFT's linear."""
    parts = [(bank.adapter(name).modules[module], w) for name, w in WEIGHTS.items()]
    roots = [(part, abs(w * part.scale) ** 0.5, 1 if w > 0 else -1) for part, w in parts]
    lora_a = sum(sign * root * part.lora_a.double() for part, root, sign in roots)
    return sum(root * part.lora_b.double() for part, root, _ in roots).T @ lora_a


class Check:
    """max_error of merged factors against float64, on the first module (all are drawn alike)."""

    def __init__(self, bank: AdapterBank, combination_type: str):
        self.kind, self.module = combination_type, bank.modules[0]
        truth = linear_rule if combination_type == "linear" else exact_sum
        self.truth = truth(bank, self.module)
        self.values = torch.linalg.svdvals(self.truth)[:RANK] if combination_type == "svd" else None

    def __call__(self, parts: dict[str, LoraFactors]) -> float:
        if self.values is None:
            gap = product(parts[self.module]) - self.truth
            return float(gap.norm() / self.truth.norm())
        part = parts[self.module]  # orthogonal factors: the singular values are products of norms
        values = part.scale * part.lora_a.double().norm(dim=1) * part.lora_b.double().norm(dim=1)
        return float((values - self.values).abs().max() / self.values[0])


def race(case: Case, peft: PeftModel, rounds: int, slow_rounds: int) -> list[Result]:
    """Time everyone in turns; PEFT's svd takes part in the first rounds only."""
    now, kind = CLOCKS["cpu"], case.direction
    runs = {
        OURS: lambda: (
            merge(peft.bank, WEIGHTS, combination_type=kind, **_rank(kind)).adapter.modules
        ),
        FULL: lambda: peft.merge(kind, True),
    }
    if kind == "svd":
        runs[THIN] = lambda: peft.merge(kind, False)
    check = Check(peft.bank, kind)
    results = {name: Result(name, ours=name == OURS) for name in runs}
    for i in range(-1, rounds):  # the first is a warm-up, which the slow ones do without
        for name, run in runs.items():
            slow = kind == "svd" and name != OURS
            if slow and not 0 <= i < slow_rounds:
                continue
            peft.clear()
            start = now()
            parts = run()
            if i >= 0:
                results[name].seconds.append(now() - start)
            if i == 0:
                results[name].max_error = check(parts)
                if not results[name].max_error <= WORST_ERROR:
                    results[name].status = "wrong"
    return list(results.values())


def _rank(kind: str) -> dict[str, int]:
    return {"rank": RANK} if kind == "svd" else {}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_merging", description=__doc__)
    parser.add_argument("--csv", type=Path, help="where rows go; nothing is written without it")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--slow-rounds", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = table.Table(options.csv) if options.csv else None
    rates = machine.Rates()
    print(f"{machine.cpu_model()}, torch {torch.__version__}, one thread, CPU clock")
    for modules, hidden in SIZES:
        peft = PeftModel(modules, hidden)
        for kind in TYPES:
            case = Case("merge", kind, "modules", modules, ADAPTERS, ADAPTERS, RANK, hidden, hidden)
            start = time.perf_counter()
            raced = race(case, peft, options.rounds, options.slow_rounds)
            ours = raced[0].quantile(0.5)
            print(f"{case} ({time.perf_counter() - start:.0f} s)")
            for result in raced:
                took = statistics.median(result.seconds)
                ratio = f"{took / ours:9.1f}x ours" if not result.ours else ""
                error = f"max error {result.max_error:.2g}"
                print(f"  {result.name:30s} {took * 1e3:12.2f} ms  {error} {ratio}", flush=True)
            # The least that is needed: two Gram matrices, and every factor read once.
            rows, numbers = ADAPTERS * RANK, 2 * modules * ADAPTERS * RANK * hidden
            flops, traffic = 2.0 * numbers * rows, 4.0 * numbers
            facts = {"flops": flops, "traffic": traffic, "clock": "cpu"}
            facts["floor"] = rates.floor(flops, traffic, "float32")
            if results is not None:
                results.put(case, table.rows_of(case, raced, **facts))


if __name__ == "__main__":
    main()
