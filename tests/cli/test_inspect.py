"""lora-fused inspect: figures against dense oracles, shared initialisations, path arguments."""

import json
import math

import pytest
import torch

from lora_fused import Adapter, LoraFactors
from lora_fused.cli.console import counted
from lora_fused.cli.facts import effective_rank, facts_of, singular_values
from lora_fused.io import read_adapter
from lora_fused.methods.initialisations import shared_initialisations
from lora_fused.testing import assert_within_budget


def dense(part: LoraFactors, dtype=torch.float64) -> torch.Tensor:
    return part.scale * part.lora_b.to(dtype).mT @ part.lora_a.to(dtype)


@pytest.mark.parametrize("rank", [1, 3, 8, 20])  # 20 exceeds both sizes
def test_singular_values_are_those_of_the_dense_update(rank):
    torch.manual_seed(rank)
    part = LoraFactors(torch.randn(rank, 12), torch.randn(rank, 9), -1.5)
    truth = torch.linalg.svdvals(dense(part))
    actual = torch.zeros_like(truth)
    found = singular_values(part)[: len(truth)]
    actual[: len(found)] = found
    assert_within_budget(actual.float(), truth.float(), truth)


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([2.0, 0.0, 0.0])) == 1.0
    assert effective_rank(torch.zeros(3)) == 0.0
    share = torch.tensor([0.75, 0.25])
    entropy = -sum(p * math.log(p) for p in share.tolist())
    assert effective_rank(4 * share) == pytest.approx(math.exp(entropy))


def test_facts_agree_with_the_dense_updates(make_adapter):
    adapter = read_adapter(make_adapter("one", seed=3))
    norms = sorted(float(dense(part).norm()) for part in adapter.modules.values())
    facts = facts_of(adapter, "one")
    assert (facts.norm_range[0], facts.norm_range[2]) == pytest.approx(tuple(norms))
    assert facts.ranks == [2] and facts.alpha == [4.0] and facts.scale == [2.0]
    assert facts.kinds == {"dense": 1, "query": 1}
    assert facts.parameters == 2 * (8 + 12) + 2 * (12 + 6)
    assert facts.faults == []


def adapters_from(inits: list[int], drift: float) -> list[Adapter]:
    """Adapters whose A is one of several random matrices plus a drift of its own."""
    made = []
    for k, init in enumerate(inits):
        start = torch.randn(8, 256, generator=torch.Generator().manual_seed(1000 + init))
        own = torch.randn(8, 256, generator=torch.Generator().manual_seed(k))
        part = LoraFactors(start + drift * own, torch.ones(8, 4), 1.0)
        made.append(Adapter(str(k), {"layer": part}))
    return made


def test_adapters_of_one_random_a_are_grouped():
    groups = shared_initialisations(adapters_from([0, 1, 0, 2, 1, 0], drift=1.0))
    assert [group["adapters"] for group in groups] == [["0", "2", "5"], ["1", "4"]]
    # start + own drift of the same size: a cosine of 1/2.
    assert groups[0]["median_cosine"] == pytest.approx(0.5, abs=0.05)


def test_independent_adapters_are_not_grouped():
    assert shared_initialisations(adapters_from(list(range(40)), drift=0.1)) == []
    # Nor are those that share nothing to compare.
    a, b = adapters_from([0, 0], drift=0.0)
    b.modules = {"other": b.modules["layer"]}
    assert shared_initialisations([a, b]) == []


def test_json_holds_adapters_groups_and_unreadable_paths(run, make_adapter, tmp_path):
    folders = [make_adapter("a", 1, init=5), make_adapter("b", 2, init=5), make_adapter("c", 3)]
    result = run("inspect", *folders, tmp_path / "absent", "--json", "-q")
    told = json.loads(result.stdout)
    assert result.exit_code == 1
    assert [one["name"] for one in told["adapters"]] == ["a", "b", "c"]
    assert told["adapters"][0]["base_model"] == "tiny/base"
    assert told["unreadable"] == [
        {"path": str(tmp_path / "absent"), "reason": "no such file or directory"}
    ]


def test_the_table_shows_what_can_be_read_and_why_the_rest_cannot(run, make_adapter):
    good, bad = make_adapter("good", 1), make_adapter("bad", 2, nan=True)
    result = run("inspect", good, bad)
    assert result.exit_code == 1
    assert "base model tiny/base" in result.stdout
    line = next(line for line in result.stdout.splitlines() if line.startswith(str(bad)))
    assert "lora_B" in line and "finite" in line
    assert "reading 2 adapters" in result.stderr
    assert run("inspect", good, "--quiet").stderr == ""


def test_one_is_not_several(run, make_adapter):
    done = run("inspect", make_adapter("good", 1))
    assert "reading 1 adapter ..." in done.stderr and "1 adapter, base model" in done.stdout
    assert counted(2, "adapter") == "2 adapters" and counted(0, "entry") == "0 entries"


def test_an_adapter_without_effect_is_pointed_out(run, make_adapter):
    result = run("inspect", make_adapter("idle", inert=True))
    assert result.exit_code == 0
    assert "no effect" in result.stdout


def test_directories_patterns_and_lists_are_expanded_once(run, make_adapter, tmp_path):
    for name in ("deep/x/a", "deep/y/a", "b"):
        make_adapter(name)
    listing = tmp_path / "list.txt"
    listing.write_text("# a comment\n\ndeep/x/a\nb\n")
    paths = (f"@{listing}", tmp_path / "deep", f"{tmp_path}/?")
    told = json.loads(run("inspect", *paths, "--json", "-q").stdout)
    found = [one["path"].removeprefix(f"{tmp_path}/") for one in told["adapters"]]
    assert found == ["deep/x/a", "b", "deep/y/a"]
    # Two folders called "a" go by their paths.
    assert told["adapters"][0]["name"].endswith("deep/x/a")


@pytest.mark.parametrize(
    ("argument", "reason"),
    [
        ("no/*/match", "the pattern matches nothing"),
        ("@absent.txt", "the list cannot be read"),
        ("empty", "no adapter in this directory"),
    ],
)
def test_a_path_that_stands_for_nothing_gives_a_reason(
    run, tmp_path, monkeypatch, argument, reason
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    result = run("inspect", argument, "-q")
    assert result.exit_code == 1
    assert reason in result.stdout
    assert len(result.stdout.splitlines()) == 1


def test_minilm_adapters_share_one_random_a(run, data_dir):
    told = json.loads(run("inspect", data_dir / "adapters_minilm", "--json", "-q").stdout)
    assert len(told["adapters"]) == 22 and told["unreadable"] == []
    (group,) = told["shared_a"]
    assert len(group["adapters"]) == 22
    assert group["median_cosine"] > 0.5
