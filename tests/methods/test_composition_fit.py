"""LearnedComposition.fit: what trains, what is kept, and a real few-shot task."""

import pytest
import torch
import torch.nn.functional as F
from support.models import Net, adapter, tokens
from torch import nn

from lora_fused import AdapterBank
from lora_fused.backends import ERRORS
from lora_fused.io import load_adapters
from lora_fused.methods import LearnedComposition
from lora_fused.nn import attach

ALL = ("embed", "up", "down")


class Problem:
    """Tokens whose labels a model with adapter b alone, and a hidden head, would give."""

    def __init__(self):
        self.model, bank = Net(), AdapterBank()
        bank.add_many([adapter(name, seed, 2, ALL) for seed, name in enumerate("abc")])
        self.handle = attach(self.model, bank)
        torch.manual_seed(1)
        self.head, hidden = nn.Linear(6, 3), nn.Linear(6, 3)
        x = [tokens(8, 5, seed=seed) for seed in range(6)]
        with torch.no_grad(), self.handle.mix("b"):
            self.batches = [(t, hidden(self.model(t)).mean(1).argmax(-1)) for t in x]
        self.composition = LearnedComposition(bank)

    def loss(self, batch):
        x, labels = batch
        return F.cross_entropy(self.head(self.model(x)).mean(1), labels)

    def fit(self, **options):
        options = {"train": self.head.parameters(), "epochs": 15, "progress": False} | options
        return self.composition.fit(self.handle, self.loss, self.batches, **options)


def test_weights_and_head_train_and_nothing_else():
    problem = Problem()
    frozen = {n: p.detach().clone() for n, p in problem.model.named_parameters()}
    factors = problem.handle.bank.stacks["up"].lora_a.clone()
    head = problem.head.weight.detach().clone()
    fit = problem.fit()
    assert len(fit.losses) == 15 and fit.best == 14 and fit.validation == []
    assert fit.losses[-1] < 0.5 * fit.losses[0]
    assert not torch.equal(problem.head.weight, head)
    for name, parameter in problem.model.named_parameters():
        assert torch.equal(parameter, frozen[name]) and parameter.requires_grad
        assert parameter.grad is None
    assert torch.equal(problem.handle.bank.stacks["up"].lora_a, factors)
    assert problem.composition.logits.grad is None


def test_the_fit_is_the_plain_loop():
    one, other = Problem(), Problem()
    one.fit(epochs=2, entropy=0.1)
    composition, model = other.composition, other.model.requires_grad_(False)
    optimizer = torch.optim.Adam([*composition.parameters(), *other.head.parameters()], lr=0.05)
    for x, labels in other.batches * 2:
        with other.handle.mix(composition.mixture()):
            loss = F.cross_entropy(other.head(model(x)).mean(1), labels)
        optimizer.zero_grad()
        (loss + 0.1 * composition.entropy()).backward()
        optimizer.step()
    assert torch.equal(one.composition.logits, composition.logits)
    assert torch.equal(one.head.weight, other.head.weight)


@pytest.mark.parametrize("options", [{"entropy": 0.5}, {"l1": 0.5}], ids=["entropy", "l1"])
def test_penalties_pull(options):
    values = []
    for used in ({}, options):
        problem = Problem()
        if "l1" in options:
            bank = problem.handle.bank
            problem.composition = LearnedComposition(bank, constraint="none")
        problem.fit(**used)
        measure = problem.composition.l1 if "l1" in options else problem.composition.entropy
        values.append(measure().item())
    assert values[1] < values[0] - 0.05


def test_early_stopping_keeps_the_best_epoch():
    problem, seen = Problem(), []
    wrong = [(x, (labels + 1) % 3) for x, labels in problem.batches]  # learning makes it worse

    def progress(done, total):
        seen.append((done, total, problem.composition.logits.detach().clone()))

    fit = problem.fit(validation=wrong, patience=2, progress=progress)
    assert len(fit.losses) == len(fit.validation) == len(seen) < 15
    assert fit.best == len(seen) - 3 and fit.validation[fit.best] == min(fit.validation)
    assert [entry[:2] for entry in seen] == [(i + 1, 15) for i in range(len(seen))]
    assert torch.equal(problem.composition.logits, seen[fit.best][2])
    assert not torch.equal(problem.composition.logits, seen[-1][2])


def test_a_validation_that_stays_the_same_is_no_better():
    problem = Problem()
    good = problem.loss
    problem.loss = lambda batch: torch.tensor(0.25) if batch == "constant" else good(batch)
    fit = problem.fit(validation=["constant"], patience=3)
    assert fit.best == 0 and fit.validation == [0.25] * 4
    assert problem.fit(epochs=5).best == 4, "without validation the last epoch counts"


def test_an_error_leaves_the_best_values_and_no_mixture():
    problem = Problem()
    start, head = problem.composition.logits.detach().clone(), problem.head.weight.detach().clone()
    good, calls = problem.loss, []

    def loss(batch):
        calls.append(batch)
        return good(batch) * (float("nan") if len(calls) == 4 else 1)

    problem.loss = loss
    with pytest.raises(ValueError, match="fit: loss must stay finite, got nan"):
        problem.fit()
    assert torch.equal(problem.composition.logits, start)
    assert torch.equal(problem.head.weight, head)
    assert all(p.requires_grad for p in problem.model.parameters())
    assert "idle" in repr(problem.handle)


def test_a_gradient_that_is_not_finite_is_refused_after_the_last_step_too():
    problem = Problem()
    start, good = problem.composition.logits.detach().clone(), problem.loss
    # Its value is that of the loss; the derivative of the root at 0 is infinite.
    problem.loss = lambda batch: good(batch) + (0 * problem.composition().sum()).sqrt()
    problem.batches = problem.batches[:1]
    with pytest.raises(ValueError, match="loss must have finite gradients, got NaN or infinity"):
        problem.fit(epochs=1)
    assert torch.equal(problem.composition.logits, start)


@pytest.mark.parametrize(
    "options, what",
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"patience": 3}, "patience must be given with validation only, got 3"),
        ({"validation": iter([1])}, r"validation must be iterable once per epoch"),
        ({"validation": []}, "batches and validation must hold at least one batch"),
        ({"l1": 0.1}, "constraint must be 'none'"),
        ({"train": [torch.ones(2)]}, "train must hold Parameters that require grad"),
    ],
    ids=["epochs", "patience", "one_shot", "empty", "l1", "train"],
)
def test_rejects(options, what):
    with pytest.raises(ValueError, match=what):
        Problem().fit(**options)


def test_rejects_a_loss_per_row_and_a_handle_of_another_bank():
    problem = Problem()
    problem.loss = lambda batch: problem.model(batch[0])
    with pytest.raises(ValueError, match=r"loss must return a scalar tensor, got \[8, 5, 6\]"):
        problem.fit()
    with pytest.raises(ValueError, match="handle must be that of a model attached to the comp"):
        Problem().composition.fit(problem.handle, problem.loss, problem.batches)


class Loop(nn.Module):
    """The same composition as a loop over adapters: what must not be saved."""

    def __init__(self, layer, stack, weights):
        super().__init__()
        self.layer, self.stack, self.weights = layer, stack, weights

    def forward(self, x):
        y = self.layer(x)
        for k, p in enumerate(self.weights()):
            rows = self.stack.rows(k)
            y = y + p * (x @ self.stack.lora_a[rows].T @ self.stack.lora_b[rows])
        return y


def saved_numbers(run) -> int:
    """How many numbers autograd keeps for what runs, each storage once."""
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        found = run()
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // 4 for t in held}
    del found
    return sum(sizes.values())


@pytest.mark.skipif(bool(ERRORS["native"]), reason=str(ERRORS["native"]))
def test_what_a_step_saves_does_not_grow_with_the_adapters():
    samples, length = 16, 32
    x, grown = torch.randn(samples, length, 8), []
    for build in ("mixture", "loop"):
        sizes = []
        for count in (2, 12):
            layer = nn.ModuleDict({"up": nn.Linear(8, 12)}).requires_grad_(False)
            bank = AdapterBank()
            bank.add_many([adapter(f"a{k}", k, 2, ["up"]) for k in range(count)])
            composition = LearnedComposition(bank)
            if build == "loop":
                loop = Loop(layer["up"], bank.stacks["up"], lambda c=composition: c()[0])
                sizes.append(saved_numbers(lambda run=loop: run(x)))
                continue
            handle = attach(layer, bank)
            with handle.mix(composition.mixture()):
                sizes.append(saved_numbers(lambda run=layer["up"]: run(x)))
        grown.append(sizes[1] - sizes[0])
    rank_wide = samples * length * 10 * 2  # of ten more adapters of rank 2
    factors = 10 * 2 * (8 + 12)  # the bank's own, which autograd merely refers to
    assert 0 <= grown[0] <= factors + 200 < rank_wide
    assert grown[1] > 10 * samples * length * 12  # the loop keeps every adapter's output


@pytest.mark.filterwarnings("ignore:attach. the model is")
def test_a_real_unseen_task(data_dir):
    """MiniLM with 6 adapters and 16 customer reviews, which none of them was trained on."""
    from lora_fused.cli import demo_tasks, demo_train

    upstream = ("mr", "pros_cons", "subj", "trec6", "clickbait", "tw_emotion")
    folders = [data_dir / "adapters_minilm" / name for name in upstream]
    if not all(folder.is_dir() for folder in folders):
        pytest.skip(f"no adapters in {folders[0].parent}")
    try:
        path = demo_tasks.model_path()
    except ImportError as error:
        pytest.skip(str(error))
    model, tokenizer = demo_train.load_model(str(path))
    bank = load_adapters(folders)
    handle = attach(model.requires_grad_(False), bank, missing="ignore")
    rows = [line.split("\t") for line in (data_dir / "text" / "cr.tsv").read_text().splitlines()]
    rows = [(text, int(label)) for split, label, text in rows if split == "train"][:16]
    labels = [label for _, label in rows]
    batch = demo_train.encode(tokenizer, [text for text, _ in rows], 32), torch.tensor(labels)
    with torch.no_grad():
        names = demo_train.encode(tokenizer, ["negative review", "positive review"], 8)
        targets = demo_train.embed(model, names)

    def loss(batch):
        return F.cross_entropy(demo_train.embed(model, batch[0]) @ targets.T / 0.05, batch[1])

    composition = LearnedComposition(bank)
    fit = composition.fit(handle, loss, [batch], epochs=6, learning_rate=0.3, progress=False)
    assert fit.losses[-1] < 0.8 * fit.losses[0], fit.losses
    with torch.no_grad(), handle.mix(composition.mixture()):
        learned = loss(batch)
    handle.detach()
    single = AdapterBank()
    single.add(composition.merged().adapter)
    with torch.no_grad(), attach(model, single, missing="ignore").mix("composition"):
        assert abs(loss(batch) - learned) < 1e-4
