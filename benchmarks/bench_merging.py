"""Merging 8 adapters of rank 16: lora_fused.methods.merge beside PEFT's add_weighted_adapter.

    python -m benchmarks.bench_merging --csv benchmarks/results/merging.csv

Two cases: one 4096 x 4096 module, and a bank of 28 modules of 2048 x 2048. In the rows N is the
number of modules, J = K the adapters, R the rank of each and of the result; max_error is the
largest difference of a singular value from float64's, relative to the largest (svd), or the error
of the product relative to the exact sum's (cat; linear: to PEFT's rule in float64). PEFT's svd
takes minutes: it is timed --slow-rounds times, all else --rounds times, in turns. One thread and
the CPU clock, so that a busy machine can be used.

Entrywise rules run on the 28 modules, density 0.5. PEFT needs minutes for them, too: it is timed on
--peft-modules of the modules, and the time is scaled. Their max_error is that of the product of one
module to a full SVD in float64 of what PEFT's rule gives, DARE with the same masks on all sides;
rows of a core space, another rule, have the difference to the dense one there, and say so.
"""

import argparse
import statistics
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import machine, table
from benchmarks.harness import CLOCKS, Case, Result
from lora_fused import Adapter, AdapterBank, LoraFactors
from lora_fused.methods import merge
from lora_fused.methods.entrywise import drawn

ADAPTERS, RANK, ALPHA = 8, 16, 32
WEIGHTS = {f"a{k}": (-1) ** k * 0.125 * (k + 1) for k in range(ADAPTERS)}  # exact in any dtype
SIZES = ((1, 4096), (28, 2048))
TYPES = ("svd", "cat", "linear")
RULES, SPACES, DENSITY, SEED = ("ties", "dare_ties"), ("core", "knots"), 0.5, 0
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

    def merge(self, combination_type: str, full: bool, **options) -> dict[str, LoraFactors]:
        """PEFT's merged factors; the adapter is taken out again by ``clear``."""
        self.model.add_weighted_adapter(
            list(WEIGHTS),
            list(WEIGHTS.values()),
            "merged",
            combination_type,
            svd_rank=RANK,
            svd_full_matrices=full,
            **options,
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


def entrywise(bank: AdapterBank, kind: str) -> dict[str, LoraFactors]:
    options = {"rank": RANK, "density": DENSITY, "seed": SEED}
    return merge(bank, WEIGHTS, combination_type=kind, **options).adapter.modules


@contextmanager
def same_masks(module: str, shape: tuple[int, int]):
    """PEFT's DARE with the masks that lora_fused draws."""
    masks = [drawn(f"{module}\0{name}\0update", SEED, shape, DENSITY) for name in WEIGHTS]

    def pruned(tensor: Tensor, density: float, rescale: bool) -> Tensor:
        return tensor * masks.pop(0) / density

    with mock.patch("peft.utils.merge_utils.random_pruning", pruned):
        yield


def agreement(rule: str, hidden: int) -> tuple[dict[str, float], float]:
    """Of one module: relative errors of the products of PEFT and of each of our forms.

    And how far our dense form is from PEFT's.
    """
    from peft.utils import merge_utils

    peft = PeftModel(1, hidden)
    (module,) = peft.bank.modules
    masks = (module, (hidden, hidden))
    with same_masks(*masks):
        theirs = product(peft.merge(f"{rule}_svd", True, density=DENSITY)[module])
    layer = peft.model.base_model.model.get_submodule(module)
    updates = [layer.get_delta_weight(name).detach() for name in WEIGHTS]
    with same_masks(*masks):
        dense = getattr(merge_utils, rule)(updates, torch.tensor(list(WEIGHTS.values())), DENSITY)
    u, s, vh = torch.linalg.svd(dense.double(), full_matrices=False)
    truth = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
    found = {FULL: theirs}
    for space in ("svd", *SPACES):
        found[space] = product(entrywise(peft.bank, f"{rule}_{space}")[module])
    errors = {name: float((part - truth).norm() / truth.norm()) for name, part in found.items()}
    return errors, float((found["svd"] - theirs).norm() / theirs.norm())


def race_rules(rule: str, modules: int, hidden: int, options) -> list[tuple[Case, list[Result]]]:
    """The dense form and those in core spaces, each beside PEFT's dense form."""
    now, few = CLOCKS["cpu"], min(options.peft_modules, modules)
    (errors, apart), bank = agreement(rule, hidden), PeftModel(modules, hidden).bank
    peft = PeftModel(few, hidden)

    def timed(run: Callable, share: float = 1.0) -> float:
        start = now()
        run()
        return (now() - start) * share

    theirs = Result(FULL, ours=False, max_error=errors[FULL])
    theirs.reason = f"timed on {few} of the modules, times {modules / few:g}"
    found = {space: Result(OURS, ours=True, max_error=errors[space]) for space in ("svd", *SPACES)}
    found["svd"].reason = f"{apart:.2g} from peft's product with the same masks"
    if not errors["svd"] <= 2 * (errors[FULL] + torch.finfo(torch.float32).eps):
        found["svd"].status, found["svd"].reason = "wrong", "further from float64 than PEFT"
    for i in range(-1, options.rounds):  # the first is a warm-up
        for space, result in found.items():
            took = timed(lambda kind=f"{rule}_{space}": entrywise(bank, kind))
            result.seconds += [took] if i >= 0 else []
        if 0 <= i < options.slow_rounds:
            peft.clear()
            run = lambda: peft.merge(f"{rule}_svd", True, density=DENSITY)  # noqa: E731
            theirs.seconds.append(timed(run, modules / few))
    cells = []
    for space, result in found.items():
        if space != "svd":
            result.reason = f"another rule: max_error is the difference to {rule}_svd"
        kind = f"{rule}_{space}"
        sizes = (modules, ADAPTERS, ADAPTERS, RANK, hidden, hidden)
        cells.append((Case("merge", kind, "modules", *sizes), [result, theirs]))
    return cells


def record(case: Case, raced: list[Result], rates: machine.Rates, results) -> None:
    """Print a case, and write its rows where they are wanted."""
    ours = raced[0].quantile(0.5)
    print(f"{case}")
    for result in raced:
        took = statistics.median(result.seconds)
        ratio = f"{took / ours:9.1f}x ours" if not result.ours else ""
        error = f"max error {result.max_error:.2g}"
        print(f"  {result.name:30s} {took * 1e3:12.2f} ms  {error} {ratio}", flush=True)
    # The least that is needed: two Gram matrices, and every factor read once.
    rows, numbers = ADAPTERS * RANK, 2 * case.N * ADAPTERS * RANK * case.I
    flops, traffic = 2.0 * numbers * rows, 4.0 * numbers
    facts = {"flops": flops, "traffic": traffic, "clock": "cpu"}
    facts["floor"] = rates.floor(flops, traffic, "float32")
    if results is not None:
        results.put(case, table.rows_of(case, raced, **facts))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_merging", description=__doc__)
    parser.add_argument("--csv", type=Path, help="where rows go; nothing is written without it")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--slow-rounds", type=int, default=1)
    parser.add_argument("--peft-modules", type=int, default=4)
    parser.add_argument("--only", choices=("exact", "entrywise"), help="one half of it")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = table.Table(options.csv) if options.csv else None
    rates = machine.Rates()
    print(f"{machine.cpu_model()}, torch {torch.__version__}, one thread, CPU clock")
    for modules, hidden in SIZES if options.only != "entrywise" else ():
        peft = PeftModel(modules, hidden)
        for kind in TYPES:
            case = Case("merge", kind, "modules", modules, ADAPTERS, ADAPTERS, RANK, hidden, hidden)
            raced = race(case, peft, options.rounds, options.slow_rounds)
            record(case, raced, rates, results)
    for rule in RULES if options.only != "exact" else ():
        for case, raced in race_rules(rule, *SIZES[-1], options):
            record(case, raced, rates, results)


if __name__ == "__main__":
    main()
