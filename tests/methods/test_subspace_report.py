"""The honesty report: planted subspaces are found, random adapters are not, pages stand alone."""

import base64
import json
import re
import struct
import sys
import zlib
from html.parser import HTMLParser

import pytest
import torch

from lora_fused import Adapter, AdapterBank, LoraFactors, load_adapters
from lora_fused.methods import SubspaceReport, Verdict, eigenlorax
from lora_fused.methods.controls import regauged, unrelated
from lora_fused.methods.eigenlorax import fit_subspace
from lora_fused.methods.products import norms
from lora_fused.methods.subspace_page import dendrogram
from lora_fused.methods.subspace_report import subspace_report

SIZES = {"q": (64, 48), "v": (48, 64)}


def make_bank(noise: float, *, count=8, common=5, rank=3, seed=0, mean=0.0, one_a=False):
    """Adapters in ``common`` directions of either side, and noise of its own for each."""
    generator, bank = torch.Generator().manual_seed(seed), AdapterBank()

    def draw(*size):
        return torch.randn(*size, generator=generator)

    shared = {m: [(draw(common, n), mean * draw(1, n)) for n in SIZES[m]] for m in SIZES}
    first = {m: draw(rank, SIZES[m][0]) for m in SIZES}
    for k in range(count):
        parts = {}
        for m, sides in shared.items():
            a, b = (
                draw(rank, common) @ s / common**0.5 + c + noise * draw(rank, s.shape[1])
                for s, c in sides
            )
            a = first[m] + 0.3 * a if one_a else a
            parts[m] = LoraFactors(a, b, 1.0 + k % 3)
        bank.add(Adapter(f"a{k}", parts))
    return bank


def reported(bank, rank=5, method="hosvd", **options):
    subspace = fit_subspace(bank, rank=rank, method=method)
    return subspace_report(subspace, bank, progress=False, **options)


@pytest.mark.parametrize("method", ["hosvd", "eigenlorax", "hooi", "jd_diag"])
def test_a_planted_subspace_is_shared(method):
    diagonal = method == "jd_diag"  # holds less of an update, and that of more directions
    report = reported(make_bank(0.05), 10 if diagonal else 5, method)
    assert report.verdict.label == ("partly shared" if diagonal else "shared")
    assert report.held_out.overall < (0.7 if diagonal else 0.3)
    assert min(e.overall for e in report.null_held_out) > 0.97 and not report.shared_a


LABELS = ("shared", "partly shared", "hardly shared", "not shared")


@pytest.mark.parametrize("method", ["hosvd", "eigenlorax"])
@pytest.mark.parametrize("seed", range(6))
def test_random_adapters_are_not_shared(method, seed):
    """The negative control; the in-sample error tempts to say otherwise."""
    report = reported(make_bank(1e3, seed=seed), method=method, seed=seed)
    assert report.verdict.label == "not shared", report.verdict.sentences
    assert abs(report.verdict.gain) < 0.05
    assert report.held_out.overall > 0.97 > 0.9 > report.fitted.overall
    assert "reconstructed no better than one that shares nothing" in str(report)


def test_what_lies_between_and_what_cannot_be_told():
    labels = [reported(make_bank(noise)).verdict.label for noise in (0.0, 0.3, 0.8, 5.0)]
    assert labels == list(LABELS)
    everything = reported(make_bank(1e3, count=30), rank=64)
    assert everything.verdict.label == "undecided" and len(everything.verdict.sentences) == 1


def test_the_null_keeps_spectra_and_shares_nothing():
    bank = make_bank(0.0)
    null = unrelated(bank, seed=1)
    for module, stack in bank.stacks.items():
        other = null.stacks[module]
        assert norms(other).tolist() == pytest.approx(norms(stack).tolist())
        for name in bank.names:
            old, new = (b.adapter(name).modules[module] for b in (bank, null))
            values = [
                torch.linalg.svdvals(p.lora_b.double().T @ p.lora_a.double()) for p in (old, new)
            ]
            assert values[1][:3].tolist() == pytest.approx(values[0][:3].tolist())
            assert old.scale == new.scale
        for rows, few in ((stack.lora_a, 5), (other.lora_a, 24)):
            assert torch.linalg.matrix_rank(rows.double(), rtol=1e-5) == few
    assert not null.stacks["q"].lora_a.equal(unrelated(bank, seed=2).stacks["q"].lora_a)
    assert null.stacks["q"].lora_a.equal(unrelated(bank, seed=1).stacks["q"].lora_a)


def test_regauged_adapters_are_the_same_updates():
    bank = make_bank(0.3)
    other = regauged(bank)
    for name in bank.names:
        old, new = (b.adapter(name).modules["q"] for b in (bank, other))
        products = [p.lora_b.double().T @ p.lora_a.double() for p in (old, new)]
        assert float((products[1] - products[0]).norm() / products[0].norm()) < 1e-6
        assert float((new.lora_a - old.lora_a).norm() / old.lora_a.norm()) > 0.3


def test_the_gauge_check_tells_methods_apart():
    bank = make_bank(0.3)
    for method, invariant in (("hosvd", True), ("hooi", True), ("eigenlorax", False)):
        report = reported(bank, method=method, null_draws=1)
        assert report.gauge.invariant is invariant, method
        assert (
            any("depends on how A and B share" in s for s in report.verdict.sentences) != invariant
        )


def test_a_shared_mean_is_seen():
    """With a large mean its direction alone holds much, and dropping it loses that."""
    report = reported(make_bank(0.3, mean=3.0), method="eigenlorax")
    assert report.mean.alone < 0.5 < 0.95 < report.mean.null_alone
    assert report.mean.dropped > 1.5 * report.fitted.overall
    assert reported(make_bank(0.3)).mean.dropped is None
    assert reported(make_bank(1e3)).mean.alone > 0.9


def test_one_random_a_is_named():
    report = reported(make_bank(1.0, one_a=True))
    assert [len(group["adapters"]) for group in report.shared_a] == [8]
    assert any("8 of 8 adapters share one random A" in s for s in report.verdict.sentences)
    seeded = reported(make_bank(0.0, one_a=True), rank=8, null_draws=1)
    assert seeded.verdict.label == "shared" and "Train some from other seeds" in str(seeded)
    assert 'class="verdict weak"' in seeded.to_html()
    assert 'class="verdict good"' in reported(make_bank(0.0), null_draws=1).to_html()


def test_only_what_both_have_is_compared():
    bank = make_bank(0.1)
    subspace = fit_subspace(bank.subset(bank.names[:6]), rank=5, method="hosvd")
    subspace.new_task("mine")
    report = subspace_report(subspace, bank, progress=False)
    assert report.skipped == ["a6", "a7", "mine"] and len(report.fitted.names) == 6


def test_modules_that_nobody_changes_have_no_error():
    bank = make_bank(0.1)
    bank.stacks["v"].lora_b.zero_()
    report = reported(bank, null_draws=1)
    assert [m["module"] for m in report.modules()] == ["q"]
    assert "No adapter changes v" in report.to_html() and report.verdict.label == "shared"


def test_progress_counts_every_fit():
    calls = []
    bank = make_bank(0.1, count=4)
    subspace = fit_subspace(bank, rank=3, method="hosvd")
    subspace_report(subspace, bank, null_draws=2, progress=lambda *at: calls.append(at))
    assert calls == [(done, 15) for done in range(1, 16)]


def test_a_sample_of_many_is_left_out(monkeypatch):
    """Ten fits a bank for a thousand adapters, each without ten of them, and a map of 200."""
    bank, sizes, calls = make_bank(0.05, count=1000), [], []
    subspace = fit_subspace(bank, rank=5, method="hosvd")
    fitted = eigenlorax._bases

    def counted(bank, *args):
        sizes.append(len(bank))
        return fitted(bank, *args)

    monkeypatch.setattr(eigenlorax, "_bases", counted)
    report = subspace.report(bank, null_draws=1, seed=4, progress=lambda *at: calls.append(at))
    assert sorted(sizes) == [990] * 20 + [1000] * 3 and calls[-1] == (22, 22)
    left = report.held_out.names
    assert len(left) == 100 == len(set(left)) and report.null_held_out[0].names == left
    assert report.similarity.shape == (200, 200) and set(left) < set(report.mapped)
    told = "100 of 1000 adapters were left out, 10 at a time; 200 of 1000 adapters are in the map"
    assert report.sampled == told and told in str(report) and told in report.to_html()
    found = report.to_dict()
    assert found["left_out"] == list(left) and found["left_out_at_once"] == 10
    assert [a["adapter"] for a in found["adapters"] if a["held_out"] is not None] == list(left)
    assert report.verdict.label == "shared" and len(json.dumps(found)) < 2**20
    assert isinstance(report, SubspaceReport) and isinstance(report.verdict, Verdict)


def test_few_adapters_are_all_left_out_one_by_one():
    bank = make_bank(0.3)
    subspace = fit_subspace(bank, rank=5, method="hosvd")
    whole = subspace.report(bank, null_draws=1)
    assert whole.held_out.names == whole.mapped == tuple(bank.names) and whole.sampled == ""
    some = subspace.report(bank, null_draws=1, sample=3, seed=1)
    given = subspace.report(bank, null_draws=1, names=["a6", "a2"])
    assert len(some.held_out.names) == 3 and given.held_out.names == ("a2", "a6")
    assert "3 of 8 adapters were left out" in str(some) and some.mapped == whole.mapped
    for part in (some, given):
        for name in part.held_out.names:
            assert part.held_out.adapters[name] == whole.held_out.adapters[name]
    again = subspace.report(bank, null_draws=1, sample=3, seed=1)
    assert again.held_out.names == some.held_out.names
    assert again.held_out.names != subspace.report(bank, null_draws=1, sample=3).held_out.names


def test_rejects():
    bank = make_bank(0.1)
    subspace = fit_subspace(bank, rank=3)
    for wrong in ({"sample": 1}, {"sample": 2.5}):
        with pytest.raises(ValueError, match="sample must be an integer of at least 2, got"):
            subspace.report(bank, **wrong)
    with pytest.raises(ValueError, match=r"names must be two or more .* got \['a9'\]"):
        subspace.report(bank, names=["a1", "a9"])
    with pytest.raises(ValueError, match=r"names must be two or more .* got \['a1'\]"):
        subspace.report(bank, names=["a1"])
    with pytest.raises(
        ValueError, match=r"^subspace_report: subspace must be a Subspace, got dict"
    ):
        subspace_report({}, bank)
    with pytest.raises(ValueError, match=r"bank must share at least two adapters .* got 1 of 8"):
        subspace_report(subspace, bank.subset(["a1"]))
    with pytest.raises(ValueError, match="null_draws must be an integer of at least 1, got 0"):
        subspace_report(subspace, bank, null_draws=0)
    wide = AdapterBank()
    for name in bank.names:
        part = LoraFactors(torch.ones(2, 7), torch.ones(2, 9), 1.0)
        wide.add(Adapter(name, {"q": part}))
    with pytest.raises(ValueError, match=r"sizes \(I, O\) = \(64, 48\) at 'q', got \(7, 9\)"):
        subspace_report(subspace, wide)


class Balance(HTMLParser):
    """Tags that are open; errors where one is closed that is not the last."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "path", "rect", "circle", "image"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_stands_alone(tmp_path):
    bank = make_bank(0.3)
    bank.rename("a0", "<b>&</b>")
    report = reported(bank, method="eigenlorax", null_draws=1)
    path = report.save_html(tmp_path / "report.html")
    html = path.read_text()
    parser = Balance()
    parser.feed(html)
    assert not parser.open and html.startswith("<!doctype html>")
    assert (
        "<b>" not in html and "&lt;b&gt;" in html and "nan" not in re.sub('base64,[^"]*', "", html)
    )
    assert not re.search(r"https?:|src=|url\(|@import|<script|<link", html)
    assert [a["href"][:5] for t, a in parser.seen if "href" in a] == ["data:"] * 2
    assert sum(tag == "svg" for tag, _ in parser.seen) == 1 + len(SIZES) + 1
    assert report.verdict.sentences[0] in html and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match=r"save_html: no such folder: .*absent"):
        report.save_html(tmp_path / "absent" / "report.html")


def test_the_map_shows_the_cosines():
    report = reported(make_bank(0.3), null_draws=1)
    data = re.findall(r"base64,([^\"]+)", report.to_html())[0]
    image = base64.b64decode(data)
    assert image[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", image[16:24]) == (8, 8)
    size = struct.unpack(">I", image[33:37])[0]
    pixels = zlib.decompress(image[41 : 41 + size])
    assert len(pixels) == 8 * (1 + 3 * 8)
    order, _, _ = dendrogram(report.similarity)
    cosines = report.similarity[order][:, order]
    for i in range(8):
        for j in range(8):
            red, _, blue = pixels[i * 25 + 1 + 3 * j :][:3]
            assert i == j or abs(cosines[i, j]) < 0.01 or (cosines[i, j] > 0) == (blue > red)


def test_the_tree_puts_like_beside_like(monkeypatch):
    cosines = torch.eye(6).double() + 0.01
    for i, j in ((0, 4), (1, 5), (2, 3)):
        cosines[i, j] = cosines[j, i] = 0.8
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "scipy.cluster.hierarchy", None)
        order, tree, reason = dendrogram(cosines)
        assert order == list(range(6)) and tree == [] and "pip install scipy" in reason
    pytest.importorskip("scipy", reason="scipy is not installed")
    order, tree, reason = dendrogram(cosines)
    assert {frozenset(order[i : i + 2]) for i in (0, 2, 4)} == {
        frozenset(pair) for pair in ((0, 4), (1, 5), (2, 3))
    }
    assert len(tree) == 5 and reason == ""
    assert all(0 <= p <= 6 and 0 <= h <= 1 + 1e-9 for line in tree for p, h in line)


def test_the_figures_are_json():
    report = reported(make_bank(0.3), null_draws=2)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["held_out"] == report.held_out.overall and len(found["null_held_out"]) == 2
    assert found["verdict"]["label"] == report.verdict.label
    assert [m["module"] for m in found["modules"]] == list(SIZES) and len(found["adapters"]) == 8
    for module in found["modules"]:
        assert 0 < module["null_kept"] < module["kept"] <= 1
        assert module["kept"] <= module["explained_a"] <= 1 + 1e-6
    assert len(found["scree"]["q"]["a"]) == len(found["scree"]["q"]["null_a"]) == 5
    assert sum(found["scree"]["q"]["a"]) > sum(found["scree"]["q"]["null_a"])


@pytest.fixture(scope="module")
def real_bank(data_dir) -> AdapterBank:
    """16 rank-8 adapters of all-MiniLM-L6-v2, every fifth of their modules that learned."""
    folder = data_dir / "adapters_minilm"
    if not (folder / "results.json").is_file():
        pytest.skip(f"no MiniLM adapters: {folder} has no results.json")
    names = list(json.loads((folder / "results.json").read_text()))[:16]
    full = load_adapters([folder / name for name in names])
    used = [m for m in full.modules if full.stacks[m].lora_b.any()][::5]
    bank = AdapterBank()
    for name in names:
        parts = full.adapter(name).modules
        bank.add(Adapter(name, {module: parts[module] for module in used}))
    return bank


@pytest.mark.parametrize(
    "rank, held_out, null", [(16, 0.974, 0.999), (32, 0.953, 0.998), (64, 0.919, 0.992)]
)
def test_real_adapters_share_hardly_anything(real_bank, rank, held_out, null):
    """Each P explains far more of the adapters in the fit than of any other."""
    report = reported(real_bank, rank, null_draws=1)
    assert report.held_out.overall == pytest.approx(held_out, abs=0.002)
    assert report.null_held_out[0].overall == pytest.approx(null, abs=0.002)
    assert report.fitted.overall < 0.62 and report.verdict.label == "hardly shared"
    assert [len(group["adapters"]) for group in report.shared_a] == [16]
    assert report.gauge.invariant
