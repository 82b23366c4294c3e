"""Statistics and selection of blocks, under Triton's interpreter."""

import pytest
from interpreter import run_interpreted

pytest.importorskip("triton")


@pytest.mark.parametrize("name", ["_select", "_stats"])
def test_under_the_interpreter(name):
    run_interpreted(name)
