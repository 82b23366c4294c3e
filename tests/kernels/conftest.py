"""The kernel tests share their inputs, which are new in every run."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import quicken

    quicken()


@pytest.fixture(autouse=True)
def _fresh_inputs():
    print("inputs of torch.manual_seed:", torch.seed())  # shown when a test fails
