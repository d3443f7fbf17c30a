"""lora-fused library: every verb on a tiny base with tiny adapters, and its one-line errors."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("lancedb", reason="lancedb is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from support.tiny_library import (
    BASE,
    SUBJECTS,
    fault,
    said,
    save_adapter,
    save_base,
    save_manifest,
    texts,
)

from lora_fused.cli import library_add
from lora_fused.cli.base_model import base_folder, load_base, read_rows, read_texts
from lora_fused.cli.console import Reporter
from lora_fused.library import AdapterLibrary
from lora_fused.methods.rpe import make_prototypes


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base") / "model")


def features(opened, base, lines):
    """By another copy of the base than the command's."""
    loaded = load_base(str(base), Reporter(quiet=True))
    return opened.embed(loaded.model, lines, tokenizer=loaded.tokenizer, progress=False)


def row(**changes) -> str:
    """A line of a manifest."""
    return json.dumps({"adapter": "adapters/pets", "examples": "pets.txt"} | changes)


@pytest.fixture
def manifest(tmp_path):
    return save_manifest(tmp_path)


@pytest.fixture
def empty(run, base, tmp_path):
    uri = tmp_path / "library"
    assert run("library", "create", uri, "--model", base, "--base-name", BASE, "-q").exit_code == 0
    return uri


@pytest.fixture
def library(run, empty, base, manifest):
    done = run("library", "add", empty, "--manifest", manifest, "--model", base, "-q")
    assert done.exit_code == 0 and done.stderr == "", done.output
    return empty


def test_create_tells_what_entries_share(run, base, tmp_path):
    options = ("--layer", -2, "--pooling", "first", "--normalize", "--max-length", 8)
    told = said(run("library", "create", tmp_path / "L", "--model", base, *options, "--json", "-q"))
    space = AdapterLibrary.open(tmp_path / "L").space
    assert told["fingerprint"] == space.fingerprint and told["size"] == space.size == 16
    assert (space.layer, space.pooling, space.normalize, space.max_length) == (-2, "first", True, 8)
    again = run("library", "create", tmp_path / "L", "--model", base, "-q")
    fault(again, "library already")


def test_add_stores_the_means_of_the_examples(run, library, base):
    opened = AdapterLibrary.open(library)
    found = {s: features(opened, base, texts(s)) for s in sorted(SUBJECTS)}
    held, truth = opened.prototypes(), make_prototypes(found)
    assert held.names == truth.names and torch.equal(held.vectors, truth.vectors)
    assert held.counts.tolist() == [12, 12, 12]
    entry = opened.entry("food")
    assert entry.tags == ("thing",) and entry.metadata == {"n": 1} and entry.rank == 2


def test_list_and_stats_show_the_entries(run, library):
    listed = said(run("library", "list", library, "--json"))
    assert [row["name"] for row in listed] == ["cars", "food", "pets"]
    some = said(run("library", "list", library, "--tag", "thing", "--filter", "rank > 2", "--json"))
    assert [row["name"] for row in some] == ["cars"]
    shown = run("library", "list", library).stdout
    assert "3 entries" in shown and "living" in shown
    told = said(run("library", "stats", library, "--json"))
    assert told["entries"] == 3 and told["tags"] == {"living": 1, "thing": 2}
    assert "living" in run("library", "stats", library).stdout
    fault(run("library", "list", library, "--filter", "colour = 3"), "filter", "colour")


def test_search_finds_adapters_of_such_inputs(run, library, base, tmp_path):
    for subject in SUBJECTS:  # each its own: none is found whatever is asked
        words = [part for text in texts(subject, 3, seed=9) for part in ("--text", text)]
        asked = ("library", "search", library, *words, "--model", base)
        (answer,) = said(run(*asked, "--json", "-q"))
        assert answer["input"] == "mean of 3 inputs" and len(answer["found"]) == 3
        assert answer["found"][0]["name"] == subject
        distances = [row["distance"] for row in answer["found"]]
        assert distances == sorted(distances)
    answer = said(run(*asked, "--json", "-q", "--tag", "living"))
    assert [row["name"] for row in answer[0]["found"]] == ["pets"]
    rows = [{"question": text} for text in texts("food", 2)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ("--inputs", tmp_path / "q.jsonl", "--field", "question", "--per-input", "-k", 1)
    done = run("library", "search", library, *options, "--model", base)
    assert done.exit_code == 0 and "embedding 2 inputs" in done.stderr
    assert done.stdout.count("food") == 2


@pytest.mark.parametrize("verb", ["list", "search", "atlas", "retrieve"])
def test_a_filter_is_called_the_same_everywhere(run, library, base, tmp_path, verb):
    page = tmp_path / "page.html"
    asked = ("--text", "cat likes dog", "--model", base, "-q")
    command = {
        "list": ("library", "list", library),
        "search": ("library", "search", library, *asked),
        "atlas": ("library", "atlas", library, "-o", page, *asked),
        "retrieve": ("retrieve", library, *asked),
    }[verb]
    told = said(run(*command, "--filter", "rank > 1", "--json"))
    names = {
        "list": lambda: [row["name"] for row in told],
        "search": lambda: [row["name"] for row in told[0]["found"]],
        "atlas": lambda: [name for name in ("cars", "food", "pets") if name in page.read_text()],
        "retrieve": lambda: told["queries"][0]["adapters"],
    }[verb]()
    assert sorted(names) == ["cars", "food"]
    fault(run(*command, "--filter", "colour = 3"), "filter", "colour")
    fault(run(*command, "--where", "rank > 1"), "--where", code=2)
    shown = run(*command[: command.index(library)], "--help").stdout
    assert "--filter" in shown and "SQL" in shown


def test_distances_are_those_to_the_prototypes(run, library, base):
    asked = ("--text", "cat likes dog", "--model", base, "--json", "-q")
    (answer,) = said(run("library", "search", library, *asked))
    opened = AdapterLibrary.open(library)
    z = features(opened, base, ["cat likes dog"])
    truth = (opened.prototypes().vectors - z).norm(dim=1)
    for row in answer["found"]:
        assert row["distance"] == pytest.approx(float(truth[opened.names.index(row["name"])]))


@pytest.mark.parametrize("text", ["array[/b] x", "[red]x", ":cat: x", "x \\"])
def test_an_input_is_shown_as_it_is(run, library, base, text):
    asked = ("--text", text, "--model", base, "-q")
    for command in (("library", "search", library), ("retrieve", library)):
        done = run(*command, *asked)
        assert done.exit_code == 0 and text in done.stdout, done.output


def test_add_tells_what_noise_does(run, empty, base, manifest):
    options = ("--manifest", manifest, "--model", base, "--per-adapter", 2, "--minimum", 3)
    done = run("library", "add", empty, *options, "--noise", 0.01, "--tag", "noisy")
    assert done.exit_code == 0 and "noise of 0.01 per coordinate moved" in done.stdout
    assert "adding 3 adapters by 36 examples" in done.stderr
    told = said(run("library", "stats", empty, "--json"))
    assert told["prototypes"] > told["entries"] == told["tags"]["noisy"] == 3


def test_noise_on_one_adapter_has_no_neighbours(run, empty, base, tmp_path):
    save_adapter(tmp_path / "one", 5)
    (tmp_path / "one.txt").write_text("\n".join(texts("pets")))
    add = ("library", "add", empty, tmp_path / "one", "--examples", tmp_path / "one.txt")
    told = said(run(*add, "--model", base, "--noise", 0.01, "--json", "-q"))
    assert told["added"] == ["one"] and told["entries"] == 1
    noise = told["noise"]
    assert noise["spacing"] is None and noise["deviation"] == 0.01 and noise["moved"] > 0


def test_add_refuses_few_examples_and_adds_nothing(run, empty, base, tmp_path):
    save_adapter(tmp_path / "few", 5)
    (tmp_path / "few.txt").write_text("cat likes dog\n" * 9)
    add = ("library", "add", empty, tmp_path / "few", "--examples", tmp_path / "few.txt")
    fault(run(*add, "--model", base), "'few'", "at least 10", "(--minimum)")
    assert said(run("library", "list", empty, "--json")) == []
    assert run(*add, "--model", base, "--minimum", 9, "-q").exit_code == 0
    assert said(run("library", "list", empty, "--json"))[0]["counts"] == [9]


def test_add_passes_over_names_only_when_told(run, library, base, manifest):
    add = ("library", "add", library, "--manifest", manifest, "--model", base, "-q")
    fault(run(*add), "--skip-existing", "'pets'")
    told = said(run(*add, "--skip-existing", "--json"))
    assert told["added"] == [] and told["skipped"] == list(SUBJECTS) and told["entries"] == 3


@pytest.fixture
def calls(monkeypatch):
    """calls(owner, name) -> a list that grows with every call of that method."""

    def count(owner, name):
        made, held = [], getattr(owner, name)
        get = held.fget if isinstance(held, property) else held

        def counted(*args, **options):
            made.append(args[1:])
            return get(*args, **options)

        replaced = property(counted) if isinstance(held, property) else counted
        monkeypatch.setattr(owner, name, replaced)
        return made

    return count


def test_the_catalogue_is_not_asked_for_each_name(run, library, base, manifest, calls):
    names, entry = calls(AdapterLibrary, "names"), calls(AdapterLibrary, "entry")
    add = ("library", "add", library, "--manifest", manifest, "--model", base, "-q")
    assert run(*add, "--skip-existing").exit_code == 0 and len(names) == 1
    several = [part for text in texts("pets", 9) for part in ("--text", text)]
    found = said(run("library", "search", library, *several, "--per-input", *add[-3:], "--json"))
    assert sum(len(one["found"]) for one in found) == 27 and len(entry) == 3


def test_an_interrupted_add_keeps_what_was_added(run, empty, base, manifest, monkeypatch):
    calls = []

    embed = AdapterLibrary.embed

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return embed(*args, **options)

    monkeypatch.setattr(library_add, "_BATCH", 1)
    monkeypatch.setattr(AdapterLibrary, "embed", interrupted)
    add = ("library", "add", empty, "--manifest", manifest, "--model", base)
    done = run(*add)
    assert done.exit_code == 130 and "2 of 3 adapters were added, and stay" in done.stderr
    assert len(said(run("library", "list", empty, "--json"))) == 2
    assert said(run("library", "verify", empty, "--json", "-q"))["faults"] == []
    monkeypatch.setattr(AdapterLibrary, "embed", embed)
    assert said(run(*add, "--skip-existing", "--json", "-q"))["added"] == ["cars"]


def test_help_of_add_shows_one_and_many(run):
    shown = " ".join(run("library", "add", "--help").stdout.split())
    assert "add LIB adapters/pets --examples pets.txt" in shown
    assert "add LIB --manifest all.jsonl" in shown


def test_another_base_is_refused(run, empty, manifest, tmp_path):
    other = save_base(tmp_path / "other", seed=1)
    add = ("library", "add", empty, "--manifest", manifest, "--model", other, "-q")
    fault(run(*add), "base", "library's fingerprint")
    named = save_adapter(tmp_path / "named", 6, base="another/model")
    (tmp_path / "e.txt").write_text("\n".join(texts("pets")))
    add = ("library", "add", empty, named, "--examples", tmp_path / "e.txt", "-q")
    fault(run(*add), BASE, "another/model", "--any-base")


def test_remove_verify_compact_and_export(run, library, tmp_path):
    assert said(run("library", "remove", library, "food", "--json"))["entries"] == 2
    fault(run("library", "remove", library, "food"), "'food'")
    done = run("library", "verify", library)
    assert done.exit_code == 0 and "2 entries, 0 faults" in done.stdout
    told = said(run("library", "compact", library, "--keep-days", 0, "--index", "--json"))
    assert told["disk"] < told["disk_before"] and told["indexed"] is False
    out = tmp_path / "out"
    assert run("library", "export", library, "pets", "cars", "-o", out).exit_code == 0
    for file in ("adapter_config.json",):
        written = (out / "pets" / file).read_bytes()
        assert written == (tmp_path / "adapters" / "pets" / file).read_bytes()
    fault(run("library", "export", library, "pets", "-o", out), "exists", "--overwrite")
    two = ("library", "export", library, "cars", "pets", "pets", "-o", tmp_path / "two")
    fault(run(*two), "distinct names")
    assert not (tmp_path / "two").exists()


def test_verify_finds_damage(run, library):
    for path in (library / "weights").rglob("*"):
        if path.is_file() and path.stat().st_size > 1000:
            held = bytearray(path.read_bytes())
            held[len(held) // 2] ^= 1
            path.write_bytes(held)
    done = run("library", "verify", library, "--json", "-q")
    assert done.exit_code == 1 and json.loads(done.stdout)["faults"]


def test_atlas_writes_a_page(run, library, base, tmp_path):
    page = tmp_path / "atlas.html"
    options = ("-o", page, "--text", "cat likes dog", "--clusters", 2, "--weights", "linear")
    told = said(run("library", "atlas", library, *options, "--model", base, "--json", "-q"))
    assert told["adapters"] == 3 and len(told["clusters"]) == 2 and 0 < told["variance_shown"] <= 1
    written = page.read_text()
    assert "pets" in written and "What the request gets" in written
    assert run("library", "atlas", library, "-o", page).exit_code == 0  # no request, no model
    assert "What the request gets" not in page.read_text()
    fault(run("library", "atlas", library, "-o", tmp_path / "no" / "a.html"), "no such folder")


def test_where_nothing_can_be_written_nothing_is_read(run, library, tmp_path, monkeypatch):
    monkeypatch.setattr(AdapterLibrary, "embed", lambda *_, **__: pytest.fail("embedded"))
    (tmp_path / "file").touch()
    outs = [tmp_path / "file" / "x", Path("/proc/x")]  # the second: on Linux, not even by root
    for out in filter(lambda out: out.parent.exists(), outs):
        for command in (
            ("library", "export", library, "cars", "-o", out),
            ("library", "atlas", library, "--text", "cat", "-o", out),
            ("retrieve", library, "--text", "cat", "--apply", out),
        ):
            fault(run(*command, "-q"), str(out.parent))
    assert not list(tmp_path.glob("file?*"))


@pytest.mark.parametrize("line, words", [
    pytest.param("{", ("line 1", "be JSON"), id="no JSON"),
    pytest.param("[]", ("line 1", "object"), id="a list"),
    pytest.param('{"adaptor": "a"}', ("'adapter'", "'adaptor'"), id="unknown key"),
    pytest.param('{"adapter": "adapters/pets"}', ("'examples'", "null"), id="no examples"),
    pytest.param(row(examples="none.txt"), ("no such file", "none.txt"), id="no file"),
    pytest.param(row(tags="a"), ("tags of 'pets'", "list"), id="tags"),
    pytest.param(row(metadata=[1]), ("metadata of 'pets'", "dict"), id="metadata"),
    pytest.param(row(name="a/b"), ("name", "'a/b'"), id="name"),
    pytest.param(row(adapter="adapters/no"), ("no such file", "adapters/no"), id="no adapter"),
    pytest.param(row() + "\n" + row(), ("'pets' twice",), id="twice"),
    pytest.param("", ("one per line",), id="nothing"),
])  # fmt: skip
def test_add_names_what_is_wrong_in_a_manifest(run, empty, base, manifest, line, words):
    manifest.write_text(line)
    add = ("library", "add", empty, "--manifest", manifest, "--model", base, "-q")
    fault(run(*add), *words)
    assert said(run("library", "list", empty, "--json")) == []


def test_rejects(run, library, base, tmp_path):
    fault(run("library", "list", tmp_path / "none"), "holds no library")
    fault(run("library", "search", library, "-q"), "--inputs and --text", "neither")
    asked = ("library", "search", library, "--text", "cat", "-q")
    fault(run(*asked, "--model", tmp_path / "none"), "--model", "installed package")
    (tmp_path / "e.txt").write_text(" \n\n")
    fault(run(*asked[:3], "--inputs", tmp_path / "e.txt", "--model", base, "-q"), "hold inputs")
    (tmp_path / "e.jsonl").write_text('{"question": "cat"}')
    options = ("--inputs", tmp_path / "e.jsonl", "--model", base, "-q")
    fault(run(*asked[:3], *options), "--field", "'question'")
    fault(run("library", "add", library, "x"), "--examples and --manifest", "neither")


SEPARATED = ["one\u2028text", "a\x0cform", "next\x85line", "last\x1cone", "old\rmac"]


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["newline", "both"])
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "marked"])
def test_only_newlines_part_inputs(tmp_path, mark, end):
    """Lines that fell apart would count as examples that there are not."""
    (tmp_path / "a.txt").write_bytes((mark + end.join([*SEPARATED, "", " ", ""])).encode())
    assert read_texts(tmp_path / "a.txt") == SEPARATED
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in SEPARATED]
    (tmp_path / "a.jsonl").write_bytes((mark + end.join(rows) + end).encode())
    assert read_texts(tmp_path / "a.jsonl") == SEPARATED


def test_inputs_of_another_encoding_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "caf\u00e9"}'.encode("latin-1"))
    for read in (read_texts, read_rows):
        with pytest.raises(ValueError, match=r"a\.jsonl.* must be text in UTF-8"):
            read(path)


def test_a_base_in_a_package_is_found(base, tmp_path, monkeypatch):
    facts = tmp_path / "tinybase-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: tinybase\nVersion: 1.0\n")
    held = ["tinybase/model/config.json", "tinybase/model/model.safetensors", "other/config.json"]
    (facts / "RECORD").write_text("".join(f"{name},,\n" for name in held))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert base_folder("tinybase") == tmp_path / "tinybase" / "model"
    (facts / "RECORD").write_text("other/config.json,,\n")
    with pytest.raises(ValueError, match="tinybase with 0 of them"):
        base_folder("tinybase")


def test_adapters_are_checked_before_anything_is_embedded(run, empty, base, manifest, monkeypatch):
    monkeypatch.setattr(AdapterLibrary, "embed", lambda *_, **__: pytest.fail("embedded"))
    add = ("library", "add", empty, "--manifest", manifest, "--model", base, "-q")
    config = manifest.parent / "adapters" / "cars" / "adapter_config.json"
    config.write_text(config.read_text().replace(BASE, "another/model"))
    fault(run(*add), "'cars'", "another/model", "--any-base")
    (config.parent / "adapter_model.safetensors").write_bytes(b"damaged")
    fault(run(*add), "cars")
