"""The atlas: where dots lie, what is said of them, and a page that takes any name."""

import datetime
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from lora_fused.library.atlas import make_atlas
from lora_fused.library.entries import Entry
from lora_fused.methods.rpe import Prototypes, retrieve, weigh

HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>&amp;\u2028\"'"
NOW = datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc)
NODE = shutil.which("node")


def entry(name: str, tags=(), rank: int = 4, metadata=None) -> Entry:
    return Entry(name, tuple(tags), metadata or {}, rank, 100, NOW, NOW, "0" * 64, 0, (12,))


def library(groups: int = 3, each: int = 6, size: int = 5, per_adapter: int = 1):
    """Entries of well separated groups, tagged by group; entries are in another order."""
    generator = torch.Generator().manual_seed(0)
    centres = 10 * torch.randn(groups, size, generator=generator)
    owners = torch.arange(groups * each).repeat_interleave(per_adapter)
    noise = torch.randn(len(owners), size, generator=generator)
    names = tuple(f"a{i}" for i in range(groups * each))
    prototypes = Prototypes(names, centres[owners % groups] + noise, owners)
    entries = [entry(name, [f"g{i % groups}", "all"]) for i, name in enumerate(names)]
    return entries[::-1], prototypes


def embedded_data(page: str) -> dict:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(found)


class Elements(HTMLParser):
    """The elements and attributes of a page, as a browser finds them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


def test_dots_lie_along_the_principal_directions():
    entries, prototypes = library(per_adapter=2)
    made = make_atlas(entries, prototypes)
    centred = prototypes.vectors.double() - prototypes.vectors.double().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    truth = u[:, :2] * s[:2]
    signs = (truth * made.points).sum(0).sign()
    assert torch.allclose(made.points.double(), truth * signs, atol=1e-4)
    share = (s.square() / s.square().sum())[:2].tolist()
    assert made.explained == pytest.approx(share, abs=1e-5)
    assert [e.name for e in made.entries] == list(prototypes.names)


def test_clusters_are_the_groups():
    entries, prototypes = library(groups=3, each=6)
    made = make_atlas(entries, prototypes, clusters=3)
    groups = {
        tuple(sorted(set((torch.arange(18)[made.labels == c] % 3).tolist()))) for c in range(3)
    }
    assert groups == {(0,), (1,), (2,)}
    assert [cluster.size for cluster in made.clusters] == [6, 6, 6]
    for cluster in made.clusters:
        assert cluster.tags[0] == ("all", 6) and len(cluster.tags) == 2
        assert cluster.tags[1][1] == 6, "all of a cluster are of one group"
    two = make_atlas(entries, prototypes, clusters=2)
    assert [cluster.size for cluster in two.clusters] == [12, 6], "the largest first"


def test_neighbours_are_the_nearest_other_adapters():
    entries, prototypes = library(per_adapter=2)
    made = make_atlas(entries, prototypes)
    away = torch.cdist(prototypes.vectors.double(), prototypes.vectors.double())
    for row, owner in enumerate(prototypes.owners.tolist()):
        to_adapter = away[row].view(-1, 2).amin(1)
        to_adapter[owner] = torch.inf
        truth = to_adapter.sort()
        assert made.neighbours[row].tolist() == truth.indices[:3].tolist()
        assert torch.allclose(made.distances[row], truth.values[:3], atol=1e-6)


def test_the_same_seed_gives_the_same_page():
    entries, prototypes = library()
    pages = [make_atlas(entries, prototypes, seed=seed).html() for seed in (3, 3)]
    assert pages[0] == pages[1]


def test_requests_are_drawn_with_their_weights():
    entries, prototypes = library()
    query = prototypes.vectors[0] + 0.4 * (prototypes.vectors[0] - prototypes.vectors[3])
    chosen = weigh(retrieve(query, prototypes, k=4), "linear")
    assert float(chosen.weights.min()) < 0, "so that a dashed line is called for"
    made = make_atlas(entries, prototypes, chosen=chosen)
    held = embedded_data(made.html())
    (request,) = held["requests"]
    assert [row for row, _ in request["weights"]] == chosen.found.rows[0].tolist()
    weights = [weight for _, weight in request["weights"]]
    assert weights == pytest.approx(chosen.weights[0].tolist(), rel=1e-3)
    assert (request["x"], request["y"]) == tuple(made.requests[0].tolist())
    # A request that is a prototype lies on its dot.
    same = make_atlas(
        entries, prototypes, chosen=weigh(retrieve(prototypes.vectors[7], prototypes))
    )
    assert torch.allclose(same.requests[0], same.points[7], atol=1e-5)


def test_hostile_names_are_text():
    entries, prototypes = library(groups=2, each=2)
    told = {"note": HOSTILE, HOSTILE: 1}
    hostile = [entry(HOSTILE, [HOSTILE], metadata=told), *(entry(e.name) for e in entries[:3])]
    prototypes = Prototypes(tuple(e.name for e in hostile), prototypes.vectors)
    chosen = weigh(retrieve(prototypes.vectors[0], prototypes), "uniform")
    page = make_atlas(hostile, prototypes, chosen=chosen).html()
    found, plain = Elements(page), Elements(make_atlas(*library(groups=2, each=2)).html())
    assert found.tags.count("script") == plain.tags.count("script") == 2
    assert "img" not in found.tags and not [a for a, _ in found.attributes if a.startswith("on")]
    held = embedded_data(page)["adapters"][0]
    assert held["name"] == HOSTILE and held["tags"] == [HOSTILE]
    # Negative control: put in as it is, it would have been an element.
    assert Elements(page.replace("\\u003c", "<").replace("\\u003e", ">")).tags.count("img") > 0


def test_nothing_is_fetched():
    page = make_atlas(*library()).html()
    found = Elements(page)
    assert not [a for a, _ in found.attributes if a in ("src", "href", "action")]
    assert "link" not in found.tags and not re.findall(r"https?:|url\(|import|fetch", page)


def test_ten_thousand_adapters_fit_a_page():
    generator = torch.Generator().manual_seed(0)
    names = tuple(f"adapter-{i:05}" for i in range(10_000))
    prototypes = Prototypes(names, torch.randn(10_000, 4, generator=generator))
    entries = [entry(name, ["some", "tags"]) for name in names]
    page = make_atlas(entries, prototypes, clusters=12).html()
    assert len(page) < 3e6 and len(embedded_data(page)["x"]) == 10_000
    assert len(set(embedded_data(page)["colours"])) == 12


@pytest.mark.parametrize("vectors", [
    torch.ones(1, 3), torch.ones(4, 3), torch.zeros(2, 1), torch.tensor([[0.0], [1.0], [5.0]]),
], ids=["one adapter", "copies", "zeros", "a line"])  # fmt: skip
def test_edges(vectors):
    names = tuple(f"a{i}" for i in range(len(vectors)))
    prototypes = Prototypes(names, vectors)
    made = make_atlas([entry(n) for n in names], prototypes)
    assert made.points.isfinite().all() and made.distances.isfinite().all()
    assert all(0 <= share <= 1 + 1e-6 for share in made.explained)
    assert sum(cluster.size for cluster in made.clusters) == len(vectors)
    assert all(row not in found for row, found in enumerate(made.neighbours.tolist()))
    embedded_data(made.html())


def test_rejects(tmp_path):
    entries, prototypes = library()
    with pytest.raises(ValueError, match="atlas: entries must be those of the prototypes"):
        make_atlas(entries[1:], prototypes)
    with pytest.raises(ValueError, match="atlas: clusters must"):
        make_atlas(entries, prototypes, clusters=0)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        make_atlas(entries, prototypes).save_html(tmp_path / "none" / "a.html")
    assert make_atlas(entries, prototypes).save_html(tmp_path / "a.html").stat().st_size > 1000


# A page's elements, as far as the script uses them; it prints what was drawn and told.
STUB = """
const fs = require("fs"), calls = {}, listeners = {};
const page = fs.readFileSync(process.argv[2], "utf8");
const held = page.match(/id="data">(.*?)<.script>/s)[1];
const pen = new Proxy({}, { get: (_, name) => (...a) => (calls[name] ||= []).push(a) });
const canvas = { getContext: () => pen, clientWidth: 800, clientHeight: 400,
  getBoundingClientRect: () => ({ left: 0, top: 0 }), setPointerCapture() {},
  addEventListener: (name, run) => listeners[name] = run };
const tip = { style: {}, hidden: true, offsetWidth: 10 }, box = { addEventListener() {} };
global.window = { addEventListener() {}, devicePixelRatio: 1 };
global.document = { getElementById: () => ({ textContent: held }),
  querySelector: s => s === ".tip" ? tip : s === ".find" ? box : canvas,
  querySelectorAll: () => [box] };
const script = page.match(/<script>(.*?)<.script>/s)[1];
eval(script);
const drawn = calls.arc.length, at = calls.arc[5], lines = calls.lineTo.length;
const dashes = calls.setLineDash.filter(a => a[0].length).length;
listeners.pointermove({ clientX: at[0], clientY: at[1] });
console.log(JSON.stringify({ drawn, lines, dashes, hidden: tip.hidden, told: tip.textContent,
  bad: calls.arc.flat().filter(v => !Number.isFinite(v)).length }));
"""


@pytest.mark.skipif(NODE is None, reason="node is not installed")
def test_the_script_draws_and_tells(tmp_path):
    entries, prototypes = library()
    query = prototypes.vectors[0] + 0.4 * (prototypes.vectors[0] - prototypes.vectors[3])
    chosen = weigh(retrieve(query, prototypes, k=4), "linear")
    entries = [entry(HOSTILE if e.name == "a5" else e.name, e.tags) for e in entries]
    names = tuple(HOSTILE if name == "a5" else name for name in prototypes.names)
    prototypes = Prototypes(names, prototypes.vectors, prototypes.owners)
    make_atlas(entries, prototypes, chosen=chosen).save_html(tmp_path / "a.html")
    (tmp_path / "stub.js").write_text(STUB)
    command = [NODE, tmp_path / "stub.js", tmp_path / "a.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["drawn"] == 18 and told["lines"] == 4 and told["bad"] == 0 and not told["hidden"]
    assert told["dashes"] == int((chosen.weights < 0).sum()) > 0
    lines = told["told"].splitlines()
    assert lines[0].startswith("</script>") and "rank: 4" in lines and "tags: g2, all" in lines
