"""Programs of `eval/` as modules."""

import importlib.util
import sys
from pathlib import Path

EVAL = Path(__file__).parents[2] / "eval"


def load(name):
    """The program `eval/NAME.py`, made anew; its dataclasses look for it among the loaded modules."""
    spec = importlib.util.spec_from_file_location(name, EVAL / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
