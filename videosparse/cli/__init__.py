"""The `videosparse` command: it parses and prints; the work is done by `videosparse.generation`.

Nothing heavy is imported here, so that --help and --version cost no more than they must.
"""

from __future__ import annotations

import signal
import sys
from typing import Annotated, NoReturn

import typer

from videosparse.cli.diagnosis import doctor
from videosparse.cli.generation import demo, generate
from videosparse.cli.planning import plan

app = typer.Typer(
    name="videosparse",
    help="Block-sparse attention for video diffusion transformers in Diffusers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (generate, plan, doctor, demo):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"videosparse {version('videosparse')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Block-sparse attention for video diffusion transformers in Diffusers."""


def main() -> None:
    """Entry point of the command."""
    signal.signal(signal.SIGTERM, _terminated)
    app()


def _terminated(number: int, frame: object) -> NoReturn:
    """Leave through the clean-up code, as Ctrl-C does."""
    sys.exit(128 + number)
