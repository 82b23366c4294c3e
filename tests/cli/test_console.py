"""What commands show while they work: lines in a log, bars on a terminal."""

import io

import folders
from rich.console import Console
from typer.testing import CliRunner

from videosparse.cli import app, console
from videosparse.cli.console import Lines, bars

SIZE = "--frames", "9", "--height", "64", "--width", "64", "--steps", "2", "--device", "cpu"


def test_a_log_gets_a_line_for_each_phase_and_tenth(capsys):
    lines = Lines()
    lines("load", 0, 1)
    lines("load", 1, 1)
    for step in range(1, 51):
        lines("2/8 denoise", step, 50)
    for part in range(4):
        lines("maps", part, 3)
    told = [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]
    tenths = [f"2/8 denoising {step}/50" for step in (1, *range(5, 51, 5))]
    assert told == ["loading", *tenths, *(f"finding maps {part}/3" for part in range(4))]


def test_lines_tell_the_time(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    lines = Lines()
    now[0] += 3725.9
    lines("decode", 0, 1)
    assert capsys.readouterr().err == "[1:02:05] decoding\n"


def test_a_command_tells_a_log_how_far_it_is(model_folder, tmp_path):
    where = "--model", str(model_folder), "-o", str(tmp_path / "a.mp4")
    result = CliRunner().invoke(app, ["generate", folders.PROMPT, *SIZE, *where])
    assert result.exit_code == 0, result.output
    told = [line.partition("] ")[2] for line in result.stderr.splitlines()]
    assert told == ["loading", "reading the prompt", "denoising 1/2", "denoising 2/2", "decoding"]


def test_a_terminal_gets_bars_with_the_time_that_is_left(monkeypatch):
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=80)
    monkeypatch.setattr("rich.console.Console", lambda **_: terminal)
    with bars() as progress:
        progress("denoise", 1, 4)
    for word in ("denoising", "1/4", "0:00:00", "-:--:--", "left"):
        assert word in shown.getvalue()
    assert "[0:00:00]" not in shown.getvalue()
