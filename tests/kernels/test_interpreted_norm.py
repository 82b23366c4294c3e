"""Norm and rotation, and what token orders do to them, under Triton's interpreter."""

import pytest
from interpreter import run_interpreted

pytest.importorskip("triton")


@pytest.mark.parametrize("name", ["_norm", "_order"])
def test_under_the_interpreter(name):
    run_interpreted(name)
