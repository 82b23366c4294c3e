"""Runs a file where Triton interprets kernels on the CPU, in a process of its own.

The test_interpreted_*.py share the files among them, so that workers of pytest-xdist can.
"""

import os
import subprocess
import sys
from pathlib import Path


def run_interpreted(name):
    """Assert that the tests of interpreted`name`.py pass."""
    path = Path(__file__).with_name(f"interpreted{name}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(path)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
