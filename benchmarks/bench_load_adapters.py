"""Loading 64 adapters (230 MiB) against merely reading their files.

Run: pytest benchmarks/bench_load_adapters.py --benchmark-enable -s
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_fused import Adapter, LoraFactors
from lora_fused.io import load_adapters, write_adapter

COUNT, LAYERS, RANK, REPEATS = 64, 4, 16, 7
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
        folder = root / f"adapter{number:02}"
        write_adapter(Adapter(folder.name, modules), folder)
        file = folder / "adapter_model.safetensors"
        save_file(load_file(file), file)  # as PEFT writes it, without a checksum to verify
    return sorted(root.iterdir())


def read_files(folders):
    return [file.read_bytes() for folder in folders for file in folder.iterdir()]


def seconds(what, root):
    """Time of one call in a fresh process: a later call would find the allocator's pages warm."""
    command = [sys.executable, __file__, what, str(root)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_read_files(benchmark, folders):
    size = sum(map(len, benchmark(read_files, folders)))
    benchmark.extra_info["mebibytes"] = size / 2**20


def test_load_adapters(benchmark, folders):
    assert len(benchmark(load_adapters, folders)) == COUNT


def test_ratio(folders):
    root = folders[0].parent
    pairs = [(seconds("load", root), seconds("read", root)) for _ in range(REPEATS)]
    load, read = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(f"\n{COUNT} x 3.6 MiB: load {load:.3f} s, read {read:.3f} s, ratio {load / read:.2f}")
    assert load <= 3 * read


if __name__ == "__main__":
    torch.set_num_threads(1)
    work, paths = sys.argv[1], sorted(Path(sys.argv[2]).iterdir())
    load_adapters(paths[:1])  # what torch sets up once is no part of either
    start = time.perf_counter()
    kept = load_adapters(paths) if work == "load" else read_files(paths)
    print(time.perf_counter() - start)
