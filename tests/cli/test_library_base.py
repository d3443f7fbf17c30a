"""lora-fused library: where the base is found again, and what adapters may call it."""

import json
import shutil

import pytest

pytest.importorskip("lancedb", reason="lancedb is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from support.tiny_library import BASE, fault, said, save_base, save_manifest

from lora_fused.cli import base_model, library_add
from lora_fused.library import AdapterLibrary
from lora_fused.library.entries import Space


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path / "models" / "tiny")


@pytest.fixture
def manifest(tmp_path):
    return save_manifest(tmp_path)


def packaged(folder, monkeypatch, base):
    """An installed package ``tinybase`` that holds the base."""
    facts = folder / "site" / "tinybase-1.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: tinybase\nVersion: 1.0\n")
    shutil.copytree(base, folder / "site" / "tinybase" / "model")
    held = ["tinybase/model/config.json", "tinybase/model/model.safetensors"]
    (facts / "RECORD").write_text("".join(f"{name},,\n" for name in held))
    monkeypatch.syspath_prepend(str(folder / "site"))


@pytest.mark.parametrize("kind", ["relative", "absolute", "package"])
def test_no_later_command_needs_model(run, base, manifest, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(base.parent)
    if kind == "package":
        packaged(tmp_path, monkeypatch, base)
    model = {"relative": "tiny", "absolute": base, "package": "tinybase"}[kind]
    library = tmp_path / "L"
    create = ("library", "create", library, "--model", model, "--base-name", BASE)
    told = said(run(*create, "--json", "-q"))
    assert told["base"] == BASE
    assert told["base_place"] == ("tinybase" if kind == "package" else str(base))
    monkeypatch.chdir(tmp_path)
    assert run("library", "add", library, "--manifest", manifest, "-q").exit_code == 0
    (found,) = said(run("library", "search", library, "--text", "cat", "--json", "-q"))
    assert len(found["found"]) == 3
    assert run("retrieve", library, "--text", "cat", "-q").exit_code == 0
    assert "base place: " in run("library", "stats", library).stdout


def test_a_base_that_has_gone_is_asked_for(run, base, manifest, tmp_path):
    create = ("library", "create", tmp_path / "L", "--model", base, "--base-name", BASE, "-q")
    assert run(*create).exit_code == 0
    add = ("library", "add", tmp_path / "L", "--manifest", manifest, "-q")
    assert run(*add).exit_code == 0
    base.rename(tmp_path / "moved")
    search = ("library", "search", tmp_path / "L", "--text", "cat", "-q")
    fault(run(*search), "--model", f"({BASE}, no longer at {base})")
    done = run(*search, "--model", tmp_path / "none")
    fault(done, "--model", "installed package")


@pytest.mark.parametrize("command", ["search", "retrieve", "atlas"])
def test_an_empty_library_is_told_before_the_base_is_loaded(
    run, base, tmp_path, monkeypatch, command
):
    library = tmp_path / "L"
    assert run("library", "create", library, "--model", base, "-q").exit_code == 0
    monkeypatch.setattr(base_model, "load_base", lambda *_: pytest.fail("loaded"))
    asked = [library, "--text", "cat", *(["-o", tmp_path / "a.html"] * (command == "atlas"))]
    parts = [command] if command == "retrieve" else ["library", command]
    fault(run(*parts, *asked, "-q"), "URI must hold entries, got none")


def test_without_base_name_the_base_is_called_as_it_was_given(run, base, tmp_path, monkeypatch):
    packaged(tmp_path, monkeypatch, base)
    for model, name in ((base, str(base)), ("tinybase", "tinybase")):
        create = ("library", "create", tmp_path / name.replace("/", "_"), "--model", model)
        assert said(run(*create, "--json", "-q"))["base"] == name


def test_another_name_is_told_before_the_base_is_loaded(run, base, manifest, tmp_path, monkeypatch):
    library = tmp_path / "L"
    assert run("library", "create", library, "--model", base, "-q").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(base_model, "load_base", lambda *_: pytest.fail("loaded"))
        patch.setattr(library_add, "_BATCH", 1)
        add = ("library", "add", library, "--manifest", manifest, "-q")
        done = run(*add)
        fault(done, f"--base-name {BASE}, or pass --any-base", "'pets'", f"base {base} ")
        assert "any_base" not in done.stderr and "base_name" not in done.stderr
        config = manifest.parent / "adapters" / "cars" / "adapter_config.json"
        whole = config.read_text()
        config.write_text("{")
        fault(run(*add, "--any-base"), "cars", "be JSON")  # the last of them
    config.write_text(whole)
    assert run(*add, "--any-base").exit_code == 0


def test_a_library_of_before_opens(run, base, manifest, tmp_path, monkeypatch):
    """Its header has no base_place and is of version 1; its base is a path."""
    write = Space.to_json

    def old(space):
        header = json.loads(write(space))
        del header["base_place"]
        return json.dumps(header | {"format_version": 1, "base": str(base)})

    monkeypatch.setattr(Space, "to_json", old)
    library = tmp_path / "L"
    assert run("library", "create", library, "--model", base, "-q").exit_code == 0
    space = AdapterLibrary.open(library).space
    assert space.base_place is None and space.base == str(base)
    add = ("library", "add", library, "--manifest", manifest, "--any-base", "-q")
    assert said(run(*add, "--json"))["entries"] == 3


def test_a_library_of_later_is_refused():
    later = json.dumps({"format": "lora_fused.library", "format_version": 3})
    with pytest.raises(ValueError, match=r"version \(1, 2\) \(update lora_fused"):
        Space.from_json(later, "L")
