"""The `videosparse` command: it parses and prints; the work is done by `videosparse.generation`.

Nothing heavy is imported here, so that --help and --version cost no more than they must.
"""

from __future__ import annotations

from videosparse.program import leaving_on_sigterm

import io
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from videosparse import interrupts
from videosparse.cli.calibration import calibrate
from videosparse.cli.diagnosis import doctor
from videosparse.cli.generation import demo, generate
from videosparse.cli.planning import plan
from videosparse.cli.presets import presets


class _OneLine(TyperGroup):
    """Tells of mistakes on the command line as of all others: one line on stderr, exit code 2."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command; `standalone_mode` ends the process with its exit code."""
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except typer.Abort:
            code = 130
        except Exception as error:
            # Typer and Click have moved this class between them; what it can do has stayed
            if not standalone_mode or not hasattr(error, "format_message"):
                raise
            code = _usage_error(error)
        if standalone_mode:
            sys.exit(code)
        return code


def _usage_error(error: Any) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "videosparse"
        message = _wrong_number(error) or " ".join(error.format_message().split()).rstrip(".")
        typer.echo(f"Error: {message}; see {command} -h.", err=True)
    return int(error.exit_code)


def _wrong_number(error: Any) -> str:
    """What is wrong with an option that takes a number, in our words; "" for any other mistake."""
    option, found = getattr(getattr(error, "param", None), "opts", None), getattr(error.__cause__, "errors", None)
    if not option or not callable(found):  # Typer's own message, which holds no value, is of pydantic's error
        return ""
    first = found()[0]
    kinds = {"int_": "a whole number", "float_": "a number"}
    expected = next((kind for start, kind in kinds.items() if first["type"].startswith(start)), None)
    return f"{option[0]} must be {expected} (got {first['input']!r})" if expected else ""


app = typer.Typer(
    name="videosparse",
    cls=_OneLine,
    help="Block-sparse attention for video diffusion transformers in Diffusers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (generate, presets, calibrate, plan, doctor, demo):
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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to fail
    interrupts.hear()
    with leaving_on_sigterm():
        app()
