"""Arrow routing over 64 adapters: lora_fused.methods.ArrowRouter beside PEFT's Arrow.

    python -m benchmarks.bench_arrow --csv benchmarks/results/arrow.csv

512 tokens, each with its 3 adapters of 64, in one layer of 2048 x 2048. "update" is choosing and
running adapters, what PEFT's ArrowLoraLinearLayer does; "layer" adds the frozen layer's own
product, the same for both and most of what is left for ours. The adapters have one direction well
ahead, so that PEFT's power iteration finds the same prototypes. max_error is the largest error
against float64; one thread, the CPU clock, in turns.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import machine, table
from benchmarks.harness import Case, Competitor, Problem, race
from lora_fused import Adapter, AdapterBank, LoraFactors, attach
from lora_fused.methods import ArrowRouter
from lora_fused.ops import mixture_lora

TOKENS, ADAPTERS, CHOSEN, HIDDEN, ALPHA, TEMPERATURE = 512, 64, 3, 2048, 32, 1.0
RANKS, PARTS = (8, 16), ("update", "layer")  # 8 is PEFT's default
LEAD = 3.0  # of the first rank component, in either factor


class Inputs:
    """The adapters in a bank and as PEFT holds them, tokens, and the frozen layer."""

    def __init__(self, rank: int):
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator) * size[-1] ** -0.5

        self.x = draw(TOKENS, HIDDEN) * HIDDEN**0.5
        self.model = nn.ModuleDict({"m": nn.Linear(HIDDEN, HIDDEN, bias=False)})
        self.model["m"].weight = nn.Parameter(draw(HIDDEN, HIDDEN))
        self.scale, self.adapters = ALPHA / rank, []
        self.bank = AdapterBank()
        for k in range(ADAPTERS):
            lora_a, lora_b = draw(rank, HIDDEN), draw(rank, HIDDEN)
            lora_a[0] *= LEAD
            lora_b[0] *= LEAD
            self.adapters.append((lora_a, lora_b))
            part = LoraFactors(lora_a, lora_b, self.scale)
            self.bank.add(Adapter(f"task_{k}", {"m": part}))

    def router(self, dtype: torch.dtype = torch.float32) -> ArrowRouter:
        bank = self.bank
        if dtype != torch.float32:
            bank = bank.subset(bank.names).to(dtype=dtype)
        return ArrowRouter(bank, top_k=CHOSEN, temperature=TEMPERATURE)

    def reference(self, part: str, dtype: torch.dtype) -> tuple[Tensor]:
        """Plain torch in a dtype: route, gather, multiply."""
        x, stack = self.x.to(dtype), self.bank.stacks["m"]
        lora_a, lora_b = (t.to(dtype) for t in stack.factors())
        args = (lora_a, lora_b, stack.row_start, *self.router(dtype)("m", x))
        update = mixture_lora(x, *args, scale=stack.scale, impl="reference")
        base = F.linear(x, self.model["m"].weight.to(dtype)) if part == "layer" else 0.0
        return (update + base,)


def ours(inputs: Inputs, part: str):
    router, stack = inputs.router(), inputs.bank.stacks["m"]
    if part == "layer":
        handle = attach(inputs.model, inputs.bank)
        handle.route(router).__enter__()
        return lambda: (inputs.model["m"](inputs.x),)
    args = (stack.lora_a, stack.lora_b, stack.row_start)

    def run():
        route = router("m", inputs.x)
        return (mixture_lora(inputs.x, *args, *route, scale=stack.scale),)

    return run


def peft(inputs: Inputs, part: str):
    from peft import ArrowConfig
    from peft.tuners.lora.arrow import ArrowLoraLinearLayer

    config = ArrowConfig(top_k=CHOSEN, router_temperature=TEMPERATURE, rng_seed=0)
    names = inputs.bank.names
    config.task_adapter_names, config.gks_adapter_names = names, []
    layer = ArrowLoraLinearLayer(HIDDEN, config)
    lora_a, lora_b = nn.ModuleDict(), nn.ModuleDict()
    for name, (a, b) in zip(names, inputs.adapters, strict=True):
        for table_, values in ((lora_a, a), (lora_b, b.T.contiguous())):
            table_[name] = nn.utils.skip_init(nn.Linear, *values.shape[::-1], bias=False)
            table_[name].weight = nn.Parameter(values)
    layer.build_prototypes(lora_a, lora_b)
    scaling, nothing = dict.fromkeys(names, inputs.scale), nn.Identity()
    weight = inputs.model["m"].weight

    def run():
        update = layer(inputs.x, lora_a, lora_b, nothing, scaling)
        return (F.linear(inputs.x, weight) + update if part == "layer" else update,)

    return run


def problem(inputs: Inputs, part: str) -> Problem:
    return Problem(
        [
            Competitor("lora_fused", lambda: ours(inputs, part), ours=True),
            Competitor("peft", lambda: peft(inputs, part)),
        ],
        truth=lambda: inputs.reference(part, torch.float64),
        rounded=lambda: inputs.reference(part, torch.float32),
    )


def work(part: str, rank: int) -> tuple[float, float]:
    """FLOPs and bytes that are needed: scores, the chosen adapters, every array once."""
    flops = 2.0 * TOKENS * HIDDEN * (ADAPTERS + 2 * CHOSEN * rank)
    numbers = HIDDEN * (ADAPTERS * (1 + 2 * rank) + 2 * TOKENS)
    if part == "layer":
        flops, numbers = flops + 2.0 * TOKENS * HIDDEN**2, numbers + HIDDEN**2
    return flops, 4.0 * numbers


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_arrow", description=__doc__)
    parser.add_argument("--csv", type=Path, help="where rows go; nothing is written without it")
    parser.add_argument("--budget", type=float, default=8.0, help="seconds of timing per case")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = table.Table(options.csv) if options.csv else None
    rates = machine.Rates()
    print(f"{machine.cpu_model()}, torch {torch.__version__}, one thread, CPU clock")
    for rank in RANKS:
        for part in PARTS:
            sizes = (TOKENS, ADAPTERS, CHOSEN, rank, HIDDEN, HIDDEN)
            case = Case("arrow", part, "drawn", *sizes)
            raced = race(problem(Inputs(rank), part), options.budget, "cpu")
            print(case)
            fastest = raced[0].quantile(0.5)
            for result in raced:
                took, told = result.quantile(0.5), f"{result.status} {result.reason}"
                ratio = f"{took / fastest:.1f}x ours"
                line = f"  {result.name:12s} {took * 1e3:9.2f} ms, max error {result.max_error:.2g}"
                print(f"{line}, {ratio}, {len(result.seconds)} rounds, {told}", flush=True)
            flops, traffic = work(part, rank)
            facts = {"flops": flops, "traffic": traffic, "clock": "cpu"}
            facts["floor"] = rates.floor(flops, traffic, "float32")
            if results is not None:
                results.put(case, table.rows_of(case, raced, **facts))


if __name__ == "__main__":
    main()
