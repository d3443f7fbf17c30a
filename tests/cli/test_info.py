"""lora-fused info."""

import json

import pytest
import torch

from lora_fused import __version__, backends


def test_json_gives_versions_threads_and_backends(run):
    result = run("info", "--json")
    facts = json.loads(result.stdout)
    assert result.exit_code == 0
    assert facts["versions"]["lora_fused"] == __version__
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["backends"]["mixture_lora"]["reference"] == "ok"
    assert set(facts["backends"]["mixture_lora"]) == set(backends.ERRORS)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_an_unusable_backend_shows_its_reason(run, monkeypatch, options):
    reason = "the native extension was not built; install [a] compiler"
    monkeypatch.setattr(backends, "NATIVE", None)
    monkeypatch.setitem(backends.ERRORS, "native", reason)
    result = run("info", *options)
    assert result.exit_code == 0
    assert reason in result.stdout


def test_the_native_isa_is_shown(run):
    if backends.NATIVE is None:
        pytest.skip(backends.NATIVE_ERROR)
    facts = json.loads(run("info", "--json").stdout)
    assert facts["native"]["isa in use"] == backends.NATIVE.isa()
    assert backends.NATIVE.isa() in facts["native"]["isa available"]


def test_environment_variables_of_the_project_are_shown_and_no_others(run, monkeypatch):
    monkeypatch.setenv("LORA_FUSED_DATA", "somewhere/[else]")
    monkeypatch.setenv("UNRELATED", "secret")
    assert json.loads(run("info", "--json").stdout)["environment"]["LORA_FUSED_DATA"]
    table = run("info").stdout
    assert "somewhere/[else]" in table
    assert "secret" not in table


def test_a_package_that_is_absent_is_named_so(run, monkeypatch):
    monkeypatch.setattr("lora_fused.cli.info.PACKAGES", ("no-such-package",))
    assert json.loads(run("info", "--json").stdout)["versions"]["no-such-package"] is None
    assert "not installed" in run("info").stdout
