"""Attention and its block sums, under Triton's interpreter."""

from pathlib import Path

import pytest
from interpreter import run_interpreted

pytest.importorskip("triton")


@pytest.mark.parametrize("name", ["", "_far"])
def test_under_the_interpreter(name):
    run_interpreted(name)


def test_every_file_is_run():
    here = Path(__file__).parent
    shared = "".join(path.read_text() for path in here.glob("test_interpreted_*.py"))
    names = [path.stem.removeprefix("interpreted") for path in here.glob("interpreted*.py")]
    assert len(names) == 8
    assert all(f'"{name}"' in shared for name in names)
