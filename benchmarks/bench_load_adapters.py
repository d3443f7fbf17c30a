"""Loading 64 adapters (230 MiB) against merely reading their files, interleaved in one process.

Run: pytest benchmarks/bench_load_adapters.py --benchmark-enable -s
"""

import statistics
import time

import pytest
import torch

from lora_fused import Adapter, LoraFactors
from lora_fused.io import load_adapters, write_adapter

COUNT, LAYERS, RANK, REPEATS = 64, 4, 16, 15
# The linear layers of a Llama-like block with hidden size 768: (name, I, O).
LINEARS = [
    *[(f"self_attn.{name}_proj", 768, 768) for name in "qkvo"],
    ("mlp.gate_proj", 768, 2048),
    ("mlp.up_proj", 768, 2048),
    ("mlp.down_proj", 2048, 768),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    generator = torch.Generator().manual_seed(0)
    for number in range(COUNT):
        modules = {}
        for layer in range(LAYERS):
            for name, size_in, size_out in LINEARS:
                a, b = (torch.randn(RANK, n, generator=generator) for n in (size_in, size_out))
                modules[f"model.layers.{layer}.{name}"] = LoraFactors(a, b, 2.0)
        write_adapter(Adapter(f"adapter{number:02}", modules), root / f"adapter{number:02}")
    return sorted(root.iterdir())


def read_files(folders):
    """Every byte, kept: buffers freed and used again would never leave the processor cache."""
    return [file.read_bytes() for folder in folders for file in folder.iterdir()]


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def test_read_files(benchmark, folders):
    benchmark.extra_info["mebibytes"] = sum(map(len, benchmark(read_files, folders))) / 2**20


def test_load_adapters(benchmark, folders):
    bank = benchmark(load_adapters, folders)
    assert len(bank) == COUNT


def test_ratio(folders):
    pairs = [
        (seconds(load_adapters, folders), seconds(read_files, folders)) for _ in range(REPEATS)
    ]
    load, read = (statistics.median(times) for times in zip(*pairs, strict=True))
    size = sum(map(len, read_files(folders))) / 2**20
    print(f"\n{COUNT} adapters, {size:.0f} MiB: load {load:.3f} s, read {read:.3f} s, ", end="")
    print(f"ratio {load / read:.2f} ({torch.get_num_threads()} threads)")
    assert load <= 3 * read
