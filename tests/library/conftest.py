"""Libraries of a tiny model's adapters."""

import importlib.util

import pytest
import torch
from support.models import Net, adapter

from lora_fused.library import AdapterLibrary
from lora_fused.methods import rpe

SIZE = 6


@pytest.fixture(autouse=True)
def engine(request):
    """Without the engine every test here skips, but for those marked as needing none."""
    if importlib.util.find_spec("lancedb") is None and "no_engine" not in request.node.name:
        pytest.skip("lancedb is not installed (pip install lancedb pyarrow)")


@pytest.fixture
def base():
    return Net()


@pytest.fixture
def empty(tmp_path, base):
    return AdapterLibrary.create(tmp_path / "library", base=base, size=SIZE)


@pytest.fixture
def make():
    """make(count, first=0, per_adapter=1): adapters ``a0000`` ... and their prototypes."""

    def made(count: int, first: int = 0, per_adapter: int = 1):
        numbers = range(first, first + count)
        adapters = [adapter(f"a{i:04}", seed=i, rank=1 + i % 3) for i in numbers]
        features = {}
        for i, one in zip(numbers, adapters, strict=True):
            generator = torch.Generator().manual_seed(i)
            centres = 3 * torch.randn(per_adapter, SIZE, generator=generator)
            spread = torch.randn(per_adapter * 20, SIZE, generator=generator)
            features[one.name] = centres.repeat(20, 1) + 0.3 * spread
        return adapters, rpe.make_prototypes(features, per_adapter=per_adapter)

    return made


@pytest.fixture
def library(empty, make):
    """Twelve adapters; the even ones tagged "even"."""
    adapters, prototypes = make(12)
    tags = {one.name: ["even"] if i % 2 == 0 else [] for i, one in enumerate(adapters)}
    empty.add_many(adapters, prototypes, tags=tags, batch=5, progress=False)
    return empty
