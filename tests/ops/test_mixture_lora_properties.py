"""What mixture_lora must satisfy whatever the ranks and routes: each exact side is in float64."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.mixture_lora import FORMS, IMPLS, dense, double, problem, require, run, truth

from lora_fused import testing

impls = pytest.mark.parametrize("impl", IMPLS)


@st.composite
def problems(draw, form=None) -> dict:
    """Ragged ranks, random routes with -1 and repeats, weights in eighths (exact when combined)."""
    ranks = tuple(draw(st.lists(st.integers(0, 20), min_size=1, max_size=6)))
    n, j = draw(st.integers(8, 24)), draw(st.integers(1, 4))
    form = draw(st.sampled_from(FORMS)) if form is None else form
    i, o, seed = draw(st.integers(1, 70)), draw(st.integers(16, 70)), draw(st.integers(0, 99))
    p = problem(n, j, ranks, i, o, form=form, seed=seed)
    table = st.lists(st.integers(-1, len(ranks) - 1), min_size=n * j, max_size=n * j)
    p["adapter_ids"] = torch.tensor(draw(table)).int().reshape(n, j)
    return {**p, "weights": eighths(n, j, seed), "list_ranks": ranks}


def eighths(n: int, j: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-16, 17, (n, j), generator=g) / 8


def split(drawn: dict) -> tuple[dict, tuple]:
    p = dict(drawn)
    return p, p.pop("list_ranks")


def check(p: dict, impl: str, exact: torch.Tensor) -> None:
    require(impl)
    testing.assert_within_budget(run(p, impl), run(p, "reference"), exact)


@impls
@given(problems())
def test_equals_the_dense_sum(impl, drawn):
    require(impl)
    p, _ = split(drawn)
    exact = dense(double(p), torch.float64)
    testing.assert_within_budget(run(p, impl), dense(p, torch.float32), exact)


@impls
@given(problems(), st.integers(-3, 3), st.integers(-3, 3))
def test_linear_in_the_weights(impl, drawn, a, b):
    p, _ = split(drawn)
    other = eighths(*p["weights"].shape, seed=100)
    exact = a * truth(p) + b * truth({**p, "weights": other})
    check({**p, "weights": a * p["weights"] + b * other}, impl, exact)


@impls
@given(problems())
def test_adds_up_over_the_adapters_of_a_row(impl, drawn):
    p, _ = split(drawn)
    columns = range(p["weights"].shape[1])
    parts = [{k: p[k][:, j : j + 1] for k in ("adapter_ids", "weights")} for j in columns]
    check(p, impl, sum(truth({**p, **part}) for part in parts))


@impls
@given(problems(), st.randoms(use_true_random=False))
def test_order_of_rows_and_of_adapters_within_a_row(impl, drawn, random):
    p, _ = split(drawn)
    n, j = p["weights"].shape
    rows, columns = random.sample(range(n), n), random.sample(range(j), j)
    shuffled = {k: p[k][rows][:, columns] for k in ("adapter_ids", "weights")}
    check({**p, **shuffled, "x": p["x"][rows]}, impl, truth(p)[rows])


@impls
@given(problems(form="packed"), st.randoms(use_true_random=False))
def test_names_of_adapters_do_not_matter(impl, drawn, random):
    p, ranks = split(drawn)
    order = random.sample(range(len(ranks)), len(ranks))  # new id -> old id
    new_id = torch.tensor([order.index(k) for k in range(len(ranks))] + [-1]).int()
    rows = [r for k in order for r in range(int(p["row_start"][k]), int(p["row_start"][k + 1]))]
    renamed = {
        "lora_a": p["lora_a"][rows],
        "lora_b": p["lora_b"][rows],
        "row_start": torch.tensor([0] + [ranks[k] for k in order]).cumsum(0).int(),
        "scale": p["scale"][order],
        "adapter_ids": new_id[p["adapter_ids"].long()],
    }
    check({**p, **renamed}, impl, truth(p))


@impls
@given(problems(form="packed"), st.data())
def test_an_adapter_split_in_two_is_the_same_adapter(impl, drawn, data):
    p, ranks = split(drawn)
    assume(max(ranks) >= 2)
    k = data.draw(st.sampled_from([k for k, rank in enumerate(ranks) if rank >= 2]))
    cut = int(p["row_start"][k]) + data.draw(st.integers(1, ranks[k] - 1))
    ids = p["adapter_ids"]
    moved = torch.where(ids > k, ids + 1, ids)  # the ids behind k move up by one
    halves = {
        "row_start": torch.cat(
            [p["row_start"][: k + 1], torch.tensor([cut]).int(), p["row_start"][k + 1 :]]
        ),
        "scale": torch.cat([p["scale"][: k + 1], p["scale"][k:]]),
        "adapter_ids": torch.cat([moved, torch.where(ids == k, k + 1, -1)], 1).int(),
        "weights": torch.cat([p["weights"]] * 2, 1),
    }
    check({**p, **halves}, impl, truth(p))


@impls
@given(problems(), st.data())
def test_scale_zero_is_no_adapter(impl, drawn, data):
    p, ranks = split(drawn)
    k = data.draw(st.integers(0, len(ranks) - 1))
    without = torch.where(p["adapter_ids"] == k, -1, p["adapter_ids"])
    scale = p["scale"].clone()
    scale[k] = 0.0
    check({**p, "scale": scale}, impl, truth({**p, "adapter_ids": without}))


@impls
@given(problems())
def test_scale_is_a_factor_of_the_weight(impl, drawn):
    p, _ = split(drawn)
    scale = torch.round(p["scale"] * 8) / 8  # exact products with weights in eighths
    used = torch.cat([scale, torch.zeros(1)])[p["adapter_ids"].long()]
    exact = truth({**p, "weights": p["weights"] * used, "scale": None})
    check({**p, "scale": scale}, impl, exact)


@impls
@given(problems(), st.integers(1, 4))
def test_repeated_mixtures_equal_row_mixture(impl, drawn, times):
    p, _ = split(drawn)
    n = p["x"].shape[0]
    at = torch.arange(n).flip(0).repeat_interleave(times).int()
    x = p["x"].repeat_interleave(times, 0)
    written_out = {k: p[k][at.long()] for k in ("adapter_ids", "weights")}
    check({**p, "x": x, "row_mixture": at}, impl, truth({**p, **written_out, "x": x}))
