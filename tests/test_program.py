"""How programs and the command end on Ctrl-C and on SIGTERM, also while libraries are imported."""

from videosparse.program import leave_out, leaving_on_sigterm, run_program

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from videosparse import interrupts

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(path for folder in ("eval", "lora", "pipelines") for path in (ROOT / folder).glob("*.py"))


def hear_interrupts():
    """Shells start what they put into the background deaf to Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ended(*arguments, path=ROOT):
    """(exit code, stderr) of Python."""
    environment = {**os.environ, "PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120, check=False,
        preexec_fn=hear_interrupts,
    )  # fmt: skip
    return done.returncode, done.stderr


INTERRUPTED = (130, "Interrupted; nothing was written.\n")
HIDDEN = """import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except BaseException:
    pass
"""
"""A module that is interrupted while it is imported, and goes on, as some libraries do."""


@pytest.fixture
def interrupted(tmp_path):
    """A folder in which Diffusers is interrupted while it is imported, and the script of the command."""
    (tmp_path / "diffusers.py").write_text(HIDDEN)
    (tmp_path / "videosparse").write_text("from videosparse.__main__ import main\nmain()\n")
    return tmp_path


def test_ctrl_c_while_the_command_is_imported_is_one_line(interrupted):
    assert ended("-m", "videosparse", "doctor", path=interrupted) == INTERRUPTED
    assert ended(str(interrupted / "videosparse"), "doctor", path=interrupted) == INTERRUPTED


def test_ctrl_c_while_others_import_the_package_is_theirs(tmp_path):
    (tmp_path / "diffusers.py").write_text(HIDDEN.replace("pass", "raise"))
    (tmp_path / "eval").mkdir()
    for script in ("other.py", "eval/mine.py"):
        (tmp_path / script).write_text("import videosparse\n")
    for how in (["-c", "import videosparse"], ["-m", "other"], [str(tmp_path / "eval/mine.py")]):
        code, told = ended(*how, path=tmp_path)
        assert code != 130
        assert told.endswith("KeyboardInterrupt\n")


def test_ctrl_c_after_the_package_is_one_line(tmp_path):
    (tmp_path / "typer.py").write_text(HIDDEN)
    assert ended("-m", "videosparse", path=tmp_path) == INTERRUPTED


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.stem)
def test_ctrl_c_while_a_program_is_imported_is_one_line(program, tmp_path):
    """The signal comes while PyTorch, the first library that takes seconds, is imported."""
    (tmp_path / "torch.py").write_text(HIDDEN)
    assert ended(str(program), "--help", path=tmp_path) == INTERRUPTED


def test_ctrl_c_after_the_package_while_a_program_is_imported_is_one_line(tmp_path):
    (tmp_path / "accelerate.py").write_text(HIDDEN)
    assert ended(str(ROOT / "eval/compare_methods.py"), "--help", path=tmp_path) == INTERRUPTED


def test_ctrl_c_is_heard_once_a_program_has_begun(monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        monkeypatch.setattr(sys, "argv", [str(ROOT / "eval" / "report.py")])
        interrupts.end_at_once()
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        run_program(lambda: None)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        monkeypatch.setattr(sys, "orig_argv", [*sys.orig_argv, "--multiprocessing-fork"])
        interrupts.end_at_once()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
        (ValueError("num_frames must be\n4k+1"), 2, "Error: --frames must be 4k+1\n"),
        (SystemExit(7), 7, ""),
    ],
)
def test_how_programs_end(error, code, told, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as left:
        run_program(main, (ValueError,))
    assert (left.value.code, capsys.readouterr().err) == (code, told)


def test_other_errors_come_through():
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 // 0, (ValueError,))


def test_exit_codes():
    run_program(lambda: None)
    run_program(lambda: 0)
    with pytest.raises(SystemExit) as left:
        run_program(lambda: 1)
    assert left.value.code == 1


def test_sigterm_runs_the_clean_up_code():
    before, cleaned = signal.getsignal(signal.SIGTERM), []

    def main():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned.append(True)

    with pytest.raises(SystemExit) as left:
        run_program(main)
    assert (left.value.code, cleaned, signal.getsignal(signal.SIGTERM)) == (143, [True], before)
    with leaving_on_sigterm():
        assert signal.getsignal(signal.SIGTERM) != before


def test_every_program_ends_so():
    for program in PROGRAMS:
        assert "    run_program(main" in program.read_text().partition('if __name__ == "__main__":')[2], program.name


def test_a_remark_is_left_out_by_one_filter(caplog):
    log = logging.getLogger("a library")
    for remark in ("noise", "noise", "chatter"):
        leave_out(remark, log.name)
    for said in ("some noise", "chatter", "news"):
        log.warning(said)
    assert (caplog.messages, len(log.filters)) == (["news"], 2)
