"""lorahub: batched candidates equal single ones, seeds repeat, and both ways of mixing."""

import sys

import pytest
import torch
from support.models import Net, adapter, tokens

from lora_fused import AdapterBank, Mixture
from lora_fused.io import read_adapter, write_adapter
from lora_fused.methods import lorahub, mix_factors
from lora_fused.nn import attach
from lora_fused.testing import assert_within_budget

pytest.importorskip("cma")

NAMES = ("a", "b", "c", "d")
TARGET = {"a": 0.5, "c": -0.75}


class Problem:
    """Examples whose targets a hidden mixture gives."""

    def __init__(self, ranks=(2, 3, 5, 2), dtype=torch.float32):
        self.model, self.bank = Net().to(dtype).eval(), AdapterBank(dtype=dtype)
        for seed, (name, rank) in enumerate(zip(NAMES, ranks, strict=True)):
            one = adapter(name, seed, rank)
            for part in one.modules.values():
                part.scale, part.lora_b = 1.5, part.lora_b * 0.5
            self.bank.add(one)
        self.handle = attach(self.model, self.bank)
        x = tokens(7, 4)
        with torch.no_grad(), self.handle.mix(TARGET):
            self.examples = {"x": x, "labels": [self.model(x)]}
        self.batches = []

    def losses(self, batch):
        self.batches.append(len(batch["x"]))
        gap = self.model(batch["x"]) - batch["labels"][0]
        return gap.square().mean((1, 2))

    def run(self, **options):
        options = {"seed": 0, "progress": False} | options
        return lorahub(self.handle, self.losses, self.examples, **options)


def test_candidates_in_one_batch_have_the_losses_of_each_alone():
    problem = Problem()
    found = problem.run(candidates=30)
    assert found.candidates.shape == (30, 4) and found.losses.shape == (30,)
    assert problem.batches == [7, *[8 * 7] * 3, 5 * 7]  # the start, then generations
    for weights, loss in zip(found.candidates, found.losses, strict=True):
        with torch.no_grad(), problem.handle.mix(Mixture.of(NAMES, weights)):
            alone = problem.losses(problem.examples).double().mean()
        assert abs(alone - loss) < 1e-5
    assert not found.candidates[0].any() and found.candidates.abs().max() <= 1.5
    assert found.losses.max() > found.losses.min() + 0.01


def test_finds_the_hidden_mixture_and_never_does_worse_than_the_base():
    problem = Problem()
    found = problem.run(candidates=400, l1=0.0)
    assert found.loss < 0.01 * found.losses[0]
    for name in NAMES:
        assert abs(found.weights[name] - TARGET.get(name, 0.0)) < 0.1
    with torch.no_grad(), problem.handle.mix(found.mixture()):
        assert abs(problem.losses(problem.examples).mean() - found.loss) < 1e-5
    assert problem.run(candidates=1).weights == dict.fromkeys(NAMES, 0.0)


def test_one_adapter_is_weighed_and_a_search_that_has_converged_ends():
    problem, seen = Problem(), []
    with torch.no_grad(), problem.handle.mix({"a": 0.5}):
        problem.examples["labels"] = [problem.model(problem.examples["x"])]

    def progress(*now):
        seen.append(now)

    found = problem.run(names=["a"], candidates=3000, l1=0.0, progress=progress)
    assert abs(found.weights["a"] - 0.5) < 1e-3
    assert len(found.losses) < 3000 and seen[0][1] == 3000
    assert seen[-1] == (len(found.losses), len(found.losses))


def test_the_l1_term_shrinks_weights():
    sizes = [sum(map(abs, Problem().run(candidates=200, l1=l1).weights.values())) for l1 in (0, 2)]
    assert sizes[1] < 0.5 * sizes[0]


def test_one_seed_and_batching_repeat_exactly_and_others_do_not():
    one, other = Problem().run(seed=3), Problem().run(seed=3)
    assert torch.equal(one.candidates, other.candidates) and torch.equal(one.losses, other.losses)
    assert one.weights == other.weights
    assert not torch.equal(one.candidates, Problem().run(seed=4).candidates)
    numpy = pytest.importorskip("numpy")
    numpy.random.seed(1)
    before = numpy.random.random()
    numpy.random.seed(1)
    Problem().run()
    assert numpy.random.random() == before  # the global stream is left alone


@pytest.mark.parametrize("mix", ["products", "factors"])
@pytest.mark.parametrize("max_rows, largest", [(20, 14), (3, 3), (500, 56)])
def test_chunks_fit_the_memory_asked_for(mix, max_rows, largest):
    problem = Problem(ranks=(2, 2, 2, 2))
    found = problem.run(candidates=9, max_rows=max_rows, mix=mix)
    whole = Problem(ranks=(2, 2, 2, 2)).run(candidates=9, max_rows=500, mix=mix)
    assert max(problem.batches) == largest
    assert torch.equal(found.candidates, whole.candidates)  # one generation: losses steer nothing
    assert (found.losses - whole.losses).abs().max() < 1e-5


def test_factors_are_mixed_as_the_paper_does():
    problem = Problem(ranks=(2, 2, 2, 2))
    bank, count, version = problem.bank, problem.bank.count, problem.bank.version
    found = problem.run(candidates=10, mix="factors")
    assert bank.names == [*NAMES] and bank.version > version and bank.count > count
    for weights, loss in zip(found.candidates.double(), found.losses, strict=True):
        net = Net().double()
        for layer in ("up", "down"):
            parts = [bank.adapter(name).modules[layer] for name in NAMES]
            a, b = (
                sum(w * getattr(p, side).double() for w, p in zip(weights, parts, strict=True))
                for side in ("lora_a", "lora_b")
            )
            net.get_submodule(layer).weight.data += 1.5 * b.T @ a
        gap = net(problem.examples["x"]) - problem.examples["labels"][0]
        assert abs(gap.square().mean() - loss) < 1e-5
    # The adapter that comes back is that mixture.
    best = mix_factors(bank, found.weights)
    for layer, part in found.adapter.modules.items():
        assert torch.equal(part.lora_a, best.modules[layer].lora_a) and part.scale == 1.5
    merged = AdapterBank()
    merged.add(found.adapter)
    problem.handle.detach()
    with torch.no_grad(), attach(problem.model, merged).mix("lorahub"):
        assert abs(problem.losses(problem.examples).mean() - found.loss) < 1e-5
    with pytest.raises(ValueError, match=r"mix must be 'products'; add found\.adapter"):
        found.mixture()


def test_mixed_factors_are_sums():
    bank = Problem(ranks=(2, 2, 2, 2)).bank
    bank.add(adapter("e", 5, 2, ["down"]))
    bank.stacks["down"].scale.fill_(1.5)
    weights = {"e": 2.0, "a": 0.5, "d": -1.25}  # "e" lacks the layer and adds 0 to it
    part = mix_factors(bank, weights).modules["up"]
    parts = [bank.adapter(name).modules["up"] for name in "ad"]
    for side in ("lora_a", "lora_b"):
        factors = [getattr(one, side) for one in parts]
        truth = 0.5 * factors[0].double() - 1.25 * factors[1].double()
        reference = 0.5 * factors[0] - 1.25 * factors[1]
        assert_within_budget(getattr(part, side), reference, truth)


@pytest.mark.parametrize("saved", [False, True])
def test_a_head_that_is_left_out_is_not_looked_for(saved, tmp_path):
    bank = Problem(ranks=(2, 2, 2, 2)).bank
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["up", "down"]}
    bank.metadata["a"]["config"] = {**config, "task_type": "SEQ_CLS", "modules_to_save": ["head"]}
    if saved:
        bank.saved["b"] = {"head.weight": torch.ones(3, 6)}
    write_adapter(mix_factors(bank, {"a": 0.5, "b": 0.5}), tmp_path / "mixed")
    written = read_adapter(tmp_path / "mixed")
    assert written.metadata["config"]["task_type"] == (None if saved else "SEQ_CLS")
    assert not written.saved and bank.metadata["a"]["config"]["task_type"] == "SEQ_CLS"


def test_an_error_leaves_the_bank_as_it_was():
    problem = Problem(ranks=(2, 2, 2, 2))
    rows = problem.bank.stacks["up"].lora_a.clone()

    def losses(batch):
        raise KeyError("mine")

    problem.losses = losses
    with pytest.raises(KeyError, match="mine"):
        problem.run(mix="factors")
    assert problem.bank.names == [*NAMES]
    assert torch.equal(problem.bank.stacks["up"].lora_a, rows) and "idle" in repr(problem.handle)


@pytest.mark.parametrize(
    "options, what",
    [
        ({"names": ["a", "x"]}, "name must be a loaded adapter"),
        ({"names": "a"}, "names must be a list of names"),
        ({"candidates": 0}, "candidates must be an integer of at least 1, got 0"),
        ({"population": 1}, "population must be an integer of at least 2, got 1"),
        ({"max_rows": 0}, "max_rows must be an integer of at least 1, got 0"),
        ({"mix": "cat"}, "mix must be one of .*, got 'cat'"),
        ({"mix": "factors"}, "mix must be 'products' where ranks or scales differ.*'up'"),
        ({"bound": 0}, "bound must be a positive number, got 0"),
        ({"l1": -0.1}, "l1 must be 0 or a positive number, got -0.1"),
        ({"l1": float("nan")}, "l1 must be 0 or a positive number, got nan"),
        ({"seed": None}, "seed must be an integer of at least 0, got None"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
    ],
    ids=str,
)
def test_rejects(options, what):
    with pytest.raises(ValueError, match=what):
        Problem().run(**options)


def test_rejects_models_examples_and_losses():
    problem = Problem()
    problem.model.train()
    with pytest.raises(ValueError, match="model must be in eval mode"):
        problem.run()
    problem.model.eval()
    for examples in ({"x": torch.ones(3), "y": torch.ones(2)}, {}, torch.tensor(1.0)):
        with pytest.raises(ValueError, match="examples must have tensors of one first axis"):
            lorahub(problem.handle, problem.losses, examples, seed=0)
    with pytest.raises(ValueError, match="examples must be a tensor, or a dict, list or tuple"):
        lorahub(problem.handle, problem.losses, {"x": "text"}, seed=0)
    for losses, what in (
        (lambda batch: torch.tensor(1.0), r"return one loss per row, \[7\], got \[\]"),
        (lambda batch: torch.full((len(batch["x"]),), float("nan")), "be finite"),
    ):
        with pytest.raises(ValueError, match=what):
            lorahub(problem.handle, losses, problem.examples, seed=0)


def test_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(RuntimeError, match=r"cma must be installed.*pip install cma numpy"):
        Problem().run()
