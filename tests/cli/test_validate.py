"""lora-fused validate: exit codes and one line per fault."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lora_fused import load_adapters


def test_sound_adapters_give_ok_lines_and_exit_code_0(run, make_adapter):
    folders = [make_adapter("a", 1), make_adapter("b", 2)]
    result = run("validate", *folders)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [f"{folder}: ok" for folder in folders]


def test_every_fault_has_its_line_and_the_exit_code_is_1(run, make_adapter, tmp_path):
    sound, idle = make_adapter("sound", 1), make_adapter("idle", inert=True)
    result = run("validate", tmp_path / "absent", sound, make_adapter("nan", nan=True), idle)
    assert result.exit_code == 1
    absent, ok, nan, inert = result.stdout.splitlines()
    assert absent == f"{tmp_path / 'absent'}: no such file or directory"
    assert ok == f"{sound}: ok"
    assert "layer.0.query.lora_B.weight" in nan and "finite" in nan
    assert "no effect" in inert


def test_quiet_prints_faults_only(run, make_adapter):
    sound, idle = make_adapter("sound", 1), make_adapter("idle", inert=True)
    result = run("validate", sound, "--quiet")
    assert (result.exit_code, result.stdout) == (0, "")
    result = run("validate", sound, idle, "-q")
    assert result.exit_code == 1
    (line,) = result.stdout.splitlines()
    assert line.startswith(f"{idle}: ")


def test_json_holds_every_path_with_its_faults(run, make_adapter, tmp_path):
    sound, idle = make_adapter("sound", 1), make_adapter("idle", inert=True)
    result = run("validate", sound, idle, tmp_path / "absent", "--json")
    assert result.exit_code == 1
    first, second, third = json.loads(result.stdout)["adapters"]
    assert first == {"path": str(sound), "faults": []}
    assert second["path"] == str(idle) and "no effect" in second["faults"][0]
    assert third["faults"] == ["no such file or directory"]
    result = run("validate", sound, idle, "--json", "-q")
    assert [one["path"] for one in json.loads(result.stdout)["adapters"]] == [str(idle)]
    assert run("validate", sound, "--json").exit_code == 0


@pytest.fixture
def strewn(make_adapter, tmp_path):
    """Two adapters beside what is none: a file, a folder, tensors of another kind."""
    folders = [make_adapter("in/a", 1), make_adapter("in/b", 2)]
    (tmp_path / "in" / "results.json").write_text("{}")
    (tmp_path / "in" / "plots").mkdir()
    save_file({"weight": torch.ones(2)}, tmp_path / "in" / "head.safetensors")
    return folders


@pytest.mark.parametrize("command", ["validate", "inspect", "merge", "similarity"])
def test_what_a_pattern_matches_besides_adapters_is_passed_over(run, strewn, tmp_path, command):
    options = ["--dry-run"] if command == "merge" else []
    done = run(command, f"{tmp_path}/in/*", *options)
    assert done.exit_code == 0, done.output
    (line,) = (line for line in done.stderr.splitlines() if "passed over" in line)
    assert "3 matches without an adapter: " in line and "results.json" in line
    assert len(load_adapters(f"{tmp_path}/in/*")) == 2  # the same rule


def test_only_a_pattern_passes_over(run, strewn, tmp_path):
    stray = tmp_path / "in" / "results.json"
    (tmp_path / "in" / "b" / "adapter_model.safetensors").unlink()
    done = run("validate", f"{tmp_path}/in/*", "--json")
    told = json.loads(done.stdout)
    assert done.exit_code == 1 and told["adapters"][1]["faults"]  # a damaged adapter is one
    assert str(stray) in told["passed_over"] and len(told["passed_over"]) == 3
    for named in (stray, f"{tmp_path}/in/*.json", f"{tmp_path}/in/*.txt"):
        done = run("validate", named)
        assert done.exit_code == 1 and len(done.stdout.splitlines()) == 1, done.stdout


def damage_json(folder):
    (folder / "adapter_config.json").write_text("{ not json")


def damage_weights(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def remove_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


def ask_for_dora(folder):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))


def put_a_pointer(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "adapter_model.safetensors").write_text(pointer)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (damage_json, "adapter_config.json"),
        (damage_weights, "adapter_model.safetensors"),
        (remove_weights, "adapter_model"),
        (ask_for_dora, "use_dora"),
        (put_a_pointer, "Git LFS"),
    ],
)
def test_damage_is_told_in_one_line_that_names_it(run, make_adapter, damage, word):
    folder = make_adapter("damaged")
    damage(folder)
    result = run("validate", folder)
    assert result.exit_code == 1
    (line,) = result.stdout.splitlines()
    assert line.startswith(str(folder)) and word in line
    assert result.stderr == ""


def test_public_adapters_all_get_an_answer(run, data_dir):
    result = run("validate", data_dir / "adapters", "--allow-pickle")
    assert result.exit_code == 1
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert len(lines) == 42
    assert sum(line.endswith(": ok") for line in lines) == 40
