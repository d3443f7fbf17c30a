"""The typer application: its commands and the one way in which errors reach the user."""

import traceback
import warnings
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from lora_fused import __version__
from lora_fused.cli import (
    adapters,
    demo,
    info,
    library,
    merge,
    recycle,
    retrieve,
    similarity,
    subspace,
)

EXPECTED = (ValueError, RuntimeError, OSError, ImportError)
# What errors call an argument, and what it is called here.
OPTIONS = {
    "overwrite_ok=True": "--overwrite",
    "any_base=True": "--any-base",
    "allow_pickle=True": "--allow-pickle",
    "saved_modules='ignore' or 'apply'": "--saved-modules ignore or apply",
    "saved_modules='ignore'": "--saved-modules ignore",
    "(minimum=)": "(--minimum)",
}


class OneLineErrors(typer.core.TyperGroup):
    """Every error is one line on stderr: exit code 2 for wrong usage, 1 for the rest.

    A warning is one line there, too, without the place in the code.
    """

    def main(self, *args, standalone_mode=True, **options):
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _warn
                code = super().main(*args, standalone_mode=False, **options)
        except Exception as error:
            message, code = _describe(error)
            if message:
                typer.echo(f"lora-fused: {message}", err=True)
        raise SystemExit(code if isinstance(code, int) else 0)


def _warn(message, *place, **options) -> None:
    typer.echo(f"lora-fused: warning: {_one_line(str(message))}", err=True)


def _describe(error: Exception) -> tuple[str, int]:
    if isinstance(error, typer.Abort):
        return "interrupted", 130
    if hasattr(error, "format_message"):  # a usage error; its class moved between typer versions
        told = error.format_message()  # nothing where typer has shown the help itself
        return _one_line(f"{told} (see lora-fused --help)") if told else "", error.exit_code
    if isinstance(error, EXPECTED):
        told = str(error) or type(error).__name__
        for argument, option in OPTIONS.items():
            told = told.replace(argument, option)
        return _one_line(told), 1
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    return _one_line(f"internal error at {where}: {type(error).__name__}: {error}"), 1


def _one_line(text: str) -> str:
    return " ".join(text.split())


app = typer.Typer(
    cls=OneLineErrors,
    add_completion=False,
    no_args_is_help=True,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lora-fused {__version__}")
        raise typer.Exit


@app.callback()
def lora_fused(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Run and mix many LoRA adapters on one frozen model."""


app.command()(info.info)
app.command()(adapters.inspect)
app.command()(adapters.validate)
app.command()(merge.merge)
app.command()(similarity.similarity)
app.command()(demo.demo)
app.command()(retrieve.retrieve)
app.add_typer(subspace.app, name="subspace")
app.add_typer(library.app, name="library")
app.add_typer(recycle.app, name="recycle")
