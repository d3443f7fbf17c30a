"""Errors are one line, with exit codes 1 and 2; what importing the package imports."""

import re
import subprocess
import sys
import textwrap
import warnings

import pytest
import typer

import lora_fused
from lora_fused.cli.app import app


def fresh(code: str) -> subprocess.CompletedProcess:
    code = textwrap.dedent(code)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_importing_the_package_does_not_import_the_command_line():
    done = fresh(
        """
        import sys
        import lora_fused, lora_fused.io, lora_fused.nn
        print([m for m in ("typer", "rich", "lora_fused.cli") if m in sys.modules])
        """
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_without_typer_the_program_says_what_to_install():
    done = fresh(
        """
        import importlib.util, sys
        real = importlib.util.find_spec
        def without_typer(name, package=None):
            return None if name == "typer" else real(name, package)
        importlib.util.find_spec = without_typer
        sys.modules["typer"] = None
        from lora_fused.cli import main
        main()
        """
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip() == ("lora-fused: typer must be installed; run: pip install typer")


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["inspect"],
        ["inspect", "--nonsense"],
        ["demo", "--tasks", "nine"],
        ["demo", "--tasks", "1"],
        ["demo", "--model", "somewhere"],
        ["demo", "--text", "somewhere"],
        ["demo", "--any-base"],
        ["demo", "--saved-modules", "apply"],
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(run, arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("lora-fused: ")
    assert result.stdout == ""


def test_help_lists_the_commands(run):
    result = run("--help")
    assert result.exit_code == 0
    assert all(name in result.stdout for name in ("info", "inspect", "validate", "demo", "recycle"))


def commands(group, path=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


FRAGMENT = re.compile(r"(Of|Its|As|Over|For|With|At most|In place of)\b|[a-z]")
TEXTS = {
    (name, option.name): getattr(option, "help", None)
    for name, command in commands(typer.main.get_command(app))
    if not name.startswith("recycle")
    for option in command.params
    if option.name != "help"
}


@pytest.mark.parametrize("where", TEXTS, ids=" ".join)
def test_every_help_text_stands_alone(where):
    """No rests of sentences, of which a reader has to guess the beginning."""
    assert TEXTS[where] and not FRAGMENT.match(TEXTS[where]), TEXTS[where]


def test_merge_tells_the_rank_that_it_gives_by_default():
    assert "Default: the largest of the adapters" in TEXTS["merge", "rank"]


def test_help_promises_what_there_is(run):
    text = " ".join(run("--help").stdout.split())
    assert "Run and mix many LoRA adapters on one frozen model." in text
    assert "compress" not in text


def test_without_a_command_there_is_the_help_alone(run):
    result = run()
    assert result.exit_code == 2
    assert "Usage" in result.output and "lora-fused: " not in result.output


def test_version(run):
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"lora-fused {lora_fused.__version__}\n")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ValueError("bank: name must\n  be new, got 'a'"), 1, "bank: name must be new, got 'a'"),
        (FileNotFoundError("no such file"), 1, "no such file"),
        (KeyError("x"), 1, "internal error at test_main.py:"),
        (KeyboardInterrupt(), 130, None),
    ],
)
def test_any_error_in_a_command_is_one_line(run, monkeypatch, error, code, told):
    def fail():
        raise error

    monkeypatch.setattr("lora_fused.cli.info.collect", fail)
    result = run("info")
    assert result.exit_code == code
    assert result.stdout == ""
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    assert len(lines) == (told is not None)
    assert told is None or told in lines[0]


def test_a_warning_is_one_line(run, monkeypatch):
    def warn():
        warnings.warn("two\n lines", stacklevel=1)
        return {"backends": {}, "versions": {}, "threads": 1, "native": {}, "environment": {}}

    monkeypatch.setattr("lora_fused.cli.info.collect", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = warnings.showwarning
        result = run("info", "--json")
        assert warnings.showwarning is before
    assert result.stderr == "lora-fused: warning: two lines\n"
    assert result.exit_code == 0


def test_an_interrupted_process_shows_no_traceback():
    done = fresh(
        """
        import lora_fused.cli.app, lora_fused.cli.info, sys
        def interrupt():
            raise KeyboardInterrupt
        lora_fused.cli.info.collect = interrupt
        sys.argv = ["lora-fused", "info"]
        from lora_fused.cli import main
        main()
        """
    )
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_the_package_runs_as_a_module():
    command = [sys.executable, "-m", "lora_fused", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"lora-fused {lora_fused.__version__}")
