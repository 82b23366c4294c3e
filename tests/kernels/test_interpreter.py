"""Runs interpreted*.py where Triton interprets kernels on the CPU, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


NAMES = ["", "_backward", "_int8", "_norm", "_order", "_select", "_specialized", "_stats"]


@pytest.mark.parametrize("name", [f"interpreted{name}.py" for name in NAMES])
def test_kernels_under_the_interpreter(name):
    path = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(path)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
